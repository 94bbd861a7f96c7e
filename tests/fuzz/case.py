"""One input: files, a command line, and how they are laid out in an empty folder."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Special = Literal["fifo", "loop", "zero", "folder", "socket", "unreadable", "gone"]


@dataclass(frozen=True)
class Case:
    """A command line over files; a file is text, bytes, or something that is no regular file."""

    arguments: tuple[str, ...]
    files: Mapping[str, str | bytes] = field(default_factory=dict)
    specials: Mapping[str, Special] = field(default_factory=dict)
    writes: bool = False  # whether the verb may leave files behind when it refuses (a repaired bank, a cache)


def lay_out(case: Case, folder: Path) -> None:
    """Write the files of a case; those it does not mention stay as they are."""
    for name, content in case.files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        _remove(file)
        file.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    for name, kind in case.specials.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        _remove(file)
        _make(file, kind)


def _make(file: Path, kind: Special) -> None:
    if kind == "fifo":
        os.mkfifo(file)
    elif kind == "loop":
        file.symlink_to(file.name)
    elif kind == "zero":
        file.symlink_to("/dev/zero")
    elif kind == "folder":
        file.mkdir()
    elif kind == "socket":
        file.symlink_to("/dev/null")
    elif kind == "unreadable":  # root reads everything: a file of another kind stands in for it
        file.write_bytes(b"\xff\xfe\x00")
        file.chmod(0)


def _remove(file: Path) -> None:
    if file.is_symlink() or file.is_file():
        file.unlink()
    elif file.is_dir():
        for child in file.iterdir():
            _remove(child)
        file.rmdir()
