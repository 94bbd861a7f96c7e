"""What the library reported about a model, kept in the user's cache: to ask it again takes ten seconds.

An entry is named by all that the answer follows from: config.json, the tensors of the files, the library's version and
the code that asks.  One that cannot be read is asked for anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from clusters.safe.cache import cache_folder
from clusters.safe.reading import BadInput, read_bytes, read_json, record
from orchestrator.errors import JobError
from orchestrator.job.paths import write_text_file
from strategies.model import architecture
from strategies.model.architecture import Architecture, LoadReport

_LIBRARIES = ("transformers", "torch")
_KEPT = 64  # entries; the oldest go
_MAX_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Findings:
    """The parts of a model, and what loading its files would report."""

    built: Architecture
    report: LoadReport


def entry_of(folder: Path, stored: Mapping[str, Any]) -> Path | None:
    """Where the answer for a model folder with these tensors (name -> shape, type) lies or belongs.

    None where the library is not installed or config.json cannot be read.
    """
    try:
        parts = [read_bytes(folder / "config.json"), Path(architecture.__file__).read_bytes()]
        parts += [f"{name} {importlib.metadata.version(name)}".encode() for name in _LIBRARIES]
    except (BadInput, OSError, importlib.metadata.PackageNotFoundError):
        return None
    parts.append(json.dumps(sorted(stored.items())).encode())
    digest = hashlib.sha256()
    for part in parts:
        digest.update(hashlib.sha256(part).digest())
    return cache_folder("architectures", f"{digest.hexdigest()}.json")


def recall(entry: Path) -> Findings | None:
    """The answer that was kept; None where there is none or it is damaged."""
    try:
        return record(Findings, read_json(entry, _MAX_BYTES), str(entry)) if entry.is_file() else None
    except (BadInput, OSError):
        return None


def keep(entry: Path, answer: Findings) -> None:
    """Keep an answer for the next process; a cache that cannot be written is none."""
    with contextlib.suppress(JobError, OSError):
        entry.parent.mkdir(parents=True, exist_ok=True)
        write_text_file(entry, json.dumps(asdict(answer)), "the cache")
        for old in sorted(entry.parent.glob("*.json"), key=lambda path: path.stat().st_mtime)[:-_KEPT]:
            old.unlink()
