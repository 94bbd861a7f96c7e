"""A merged model as GGUF, by llama.cpp's own script in a process of its own: nothing of it is imported or installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from clusters.safe.reading import printable
from orchestrator.errors import JobError, RunFailed

SCRIPT = "convert_hf_to_gguf.py"
FILE = "model.gguf"


def find(given: Path | None) -> Path:
    """The script that was given, or the one on PATH.  Raises JobError."""
    found = given or (Path(there) if (there := shutil.which(SCRIPT)) else None)
    if found is None:
        raise JobError(
            f"a model as GGUF needs llama.cpp's {SCRIPT}, which is not on PATH: clone llama.cpp, install what it asks"
            " for in an environment of its own (its gguf package would take the place of ours), and give --converter"
            " FILE"
        )
    if not found.is_file():
        raise JobError(f"--converter {printable(str(found))}: is no file")
    return found


def convert(script: Path, model: Path, file: Path) -> None:
    """Write the model of a folder as one GGUF file, in the types it is stored in.  Raises RunFailed."""
    own = [str(script)] if os.access(script, os.X_OK) else [sys.executable, str(script)]  # its own environment, if any
    command = [*own, str(model), "--outfile", str(file), "--outtype", "auto"]
    hidden = ("PYTHONPATH", "PYTHONHOME")
    environment = {key: value for key, value in os.environ.items() if key not in hidden}
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", env=environment)
    if done.returncode or not file.is_file():
        last = (done.stderr or done.stdout).strip().splitlines()[-1:] or ["it said nothing"]
        raise RunFailed(f"{script.name} ended with {done.returncode}: {printable(last[0][:400])}")
