"""A Python whose CPU build of torch takes fake cuda tensors of two cards: a wrong device or dtype raises, nothing runs.

Two small libraries make it so (stubs/), built once with the system's C++ compiler against torch's own headers and
preloaded.  A module that runs there prints one JSON object a line.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

_STUBS = Path(__file__).parent / "stubs"
_ROOT = Path(__file__).resolve().parents[2]
_TIMEOUT_S = 600


def compiler() -> str | None:
    """The system's C++ compiler; None where there is none."""
    return next((found for name in ("c++", "g++", "clang++") if (found := shutil.which(name))), None)


def libraries(cache: Path) -> list[Path]:
    """The built stubs, in the order in which they must be preloaded.  Raises CalledProcessError with g++'s words."""
    import torch

    home = Path(torch.__file__).parent
    built = []
    for name in ("accelerator", "guard"):
        source = _STUBS / f"{name}.cpp"
        digest = hashlib.sha256(source.read_bytes() + torch.__version__.encode() + str(home).encode()).hexdigest()[:12]
        library = cache / f"{name}-{digest}.so"
        if not library.exists():
            _compile(source, library, home)
        built.append(library)
    return built


def _compile(source: Path, library: Path, home: Path) -> None:
    includes = [f"-I{home / 'include'}", f"-I{home / 'include/torch/csrc/api/include'}"]
    links = [f"-L{home / 'lib'}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{home / 'lib'}"]
    temporary = library.with_suffix(f".{os.getpid()}.tmp")
    command = [str(compiler()), "-shared", "-fPIC", "-std=c++20", "-O0", "-w", *includes, "-o", str(temporary)]
    subprocess.run([*command, str(source), *links], check=True)
    temporary.rename(library)


def run(module: str, cache: Path, *arguments: str) -> list[dict]:
    """What `python -m module` prints there, a JSON object a line."""
    preload = " ".join(str(library) for library in libraries(cache))
    environment = {**os.environ, "LD_PRELOAD": preload, "OMP_NUM_THREADS": "1"}
    shown = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-W", "ignore", "-m", module, *arguments],
        env=environment, cwd=_ROOT, stdout=subprocess.PIPE, text=True, check=True, timeout=_TIMEOUT_S,
    )  # fmt: skip
    return [json.loads(line) for line in shown.stdout.splitlines() if line.startswith("{")]
