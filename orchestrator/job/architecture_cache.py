"""What the library reported about a model, kept in the user's cache: to ask it again takes ten seconds.

An entry is named by all that the answer follows from: config.json, the tensors of the files, the library's version and
the code that asks.  One that cannot be read is asked for anew.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clusters.safe import cache
from clusters.safe.reading import BadInput, read_bytes
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
    return cache.cache_folder("architectures", f"{digest.hexdigest()}.json")


def recall(entry: Path) -> Findings | None:
    """The answer that was kept; None where there is none."""
    return cache.recall(Findings, entry, _MAX_BYTES)


def keep(entry: Path, answer: Findings) -> None:
    """Keep an answer for the next process."""
    cache.keep(entry, answer, _KEPT)
