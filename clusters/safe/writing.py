"""Write a file or a folder whole or not at all; bring both to disk."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_whole(file: Path, text: str, mode: int = 0o666) -> None:
    """Write a file so that it is there whole or not at all, also after a power cut.  Raises OSError.

    Its mode is `mode` less the umask, so that others can read what lies in a shared folder; 0o600 for secrets.
    """
    temporary = file.with_name(f".{file.name[:100]}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        with open(temporary, "w", encoding="utf-8", opener=lambda path, flags: os.open(path, flags, mode)) as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def new_folder(place: Path, replaces: bool = False) -> Iterator[Path]:
    """An empty folder beside `place` that takes its name when the block ends; where the block fails, nothing stays.

    With `replaces` what lies there is removed once the new one is complete.  Raises OSError, FileExistsError without.
    """
    if not replaces and os.path.lexists(place):
        raise FileExistsError(f"{place} exists already; choose a new folder")
    temporary, old = (place.with_name(f"{place.name}.tmp-{uuid.uuid4().hex[:8]}") for _ in range(2))
    try:
        temporary.mkdir(parents=True)
        yield temporary
        if replaces and place.exists():
            place.rename(old)
        try:
            temporary.rename(place)
        except OSError:
            if old.exists():
                old.rename(place)
            raise
        sync(place.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def sync(path: Path) -> None:
    """Bring a file, or a folder's list of names, to disk: a rename must not be there before what it names."""
    if os.name == "nt" and path.is_dir():  # Windows opens no folder
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
