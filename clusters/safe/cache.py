"""The user's cache folder: what is kept there can be made again."""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from clusters.safe.reading import BadInput, read_json, record
from clusters.safe.writing import write_whole

T = TypeVar("T")


def cache_folder(*parts: str) -> Path:
    """`$XDG_CACHE_HOME` or `~/.cache`, then our folder and `parts`.  Raises RuntimeError where there is no home folder.

    The XDG base directory specification ignores a relative `$XDG_CACHE_HOME`.
    """
    stated = Path(os.environ.get("XDG_CACHE_HOME", ""))
    base = stated if stated.is_absolute() else Path.home() / ".cache"
    return base.joinpath("finetune-orchestrator", *parts)


def recall(kind: type[T], entry: Path, max_bytes: int) -> T | None:
    """The dataclass that was kept as JSON; None where there is none or it is damaged."""
    try:
        return record(kind, read_json(entry, max_bytes), str(entry)) if entry.is_file() else None
    except (BadInput, OSError):
        return None


def keep(entry: Path, answer: Any, most: int) -> None:
    """Keep a dataclass for the next process, the newest `most` of a folder; a cache that cannot be written is none."""
    with contextlib.suppress(OSError):
        entry.parent.mkdir(parents=True, exist_ok=True)
        write_whole(entry, json.dumps(asdict(answer)))
        for old in sorted(entry.parent.glob("*.json"), key=lambda path: path.stat().st_mtime)[:-most]:
            old.unlink()
