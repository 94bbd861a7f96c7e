"""Unpacking a tar that another person or program made: nothing is written outside the folder, nothing without bounds.

`tarfile` follows what an archive says.  Here every entry is checked before it is written: regular files and folders
alone, relative names without `..`, each once, and no more files and bytes than were allowed.
"""

from __future__ import annotations

import gzip
import os
import shutil
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from clusters.safe.reading import BadInput, printable

_MAX_DEPTH = 32
_MAX_NAME_BYTES = 255
_MAX_HEADER_BYTES = 2**16  # of an entry's long name or extra fields, which tarfile reads whole


class _ZipEntry(tarfile.TarInfo):
    """An entry whose extra fields are of a size that can be read."""

    def _proc_member(self, archive: tarfile.TarFile) -> Any:
        if self.size < 0:
            raise BadInput("an entry has a negative size")
        is_file = self.isreg() and not self.issparse()
        if not is_file and not self.isdir() and self.size > _MAX_HEADER_BYTES:
            raise BadInput("an entry has a name or extra fields of more than 64 KiB")
        return super()._proc_member(archive)  # type: ignore[misc]


class _Bounded:
    """A stream that gives no more bytes than were allowed."""

    def __init__(self, stream: Any, max_bytes: int) -> None:
        self._stream, self._left = stream, max_bytes

    def read(self, size: int) -> bytes:
        content = self._stream.read(size)
        self._left -= len(content)
        if self._left < 0:
            raise BadInput("it unpacks to more bytes than such an archive has")
        return bytes(content)


@dataclass(frozen=True)
class Bounds:
    """What an archive may hold."""

    max_bytes: int
    max_files: int
    is_gzip: bool = False  # else it must be a plain tar


def names_in(stream: BinaryIO, bounds: Bounds) -> list[str]:
    """The files of an archive, checked as `unpack` does, with nothing written.  Raises BadInput."""
    with _reading(stream, bounds) as entries:
        return [str(place) for _, entry, place in entries if not entry.isdir()]


def unpack(stream: BinaryIO, folder: Path, bounds: Bounds) -> None:
    """Write an archive's files into `folder`, which must not exist.

    Raises BadInput for an archive that is none or that may not be unpacked; `folder` is then gone again.
    """
    folder.mkdir()
    try:
        with _reading(stream, bounds) as entries:
            for archive, entry, place in entries:
                if entry.isdir():
                    (folder / place).mkdir(parents=True, exist_ok=True)
                else:
                    _write(archive, entry, folder / place)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


@contextmanager
def _reading(stream: BinaryIO, bounds: Bounds) -> Iterator[Iterator[tuple[tarfile.TarFile, tarfile.TarInfo, Path]]]:
    """The entries, checked one by one; what goes wrong inside as BadInput."""
    headers = (bounds.max_files + 20) * 2 * tarfile.BLOCKSIZE
    source: Any = gzip.GzipFile(fileobj=stream) if bounds.is_gzip else stream
    bounded: Any = _Bounded(source, bounds.max_bytes + headers)
    try:
        with tarfile.open(fileobj=bounded, mode="r|", tarinfo=_ZipEntry) as archive:
            yield _checked(archive, bounds)
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile, ValueError) as error:
        raise BadInput(str(error)) from None


def _checked(archive: tarfile.TarFile, bounds: Bounds) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo, Path]]:
    left = bounds.max_bytes
    for number, entry in enumerate(archive, start=1):
        place = _place(entry)
        left -= entry.size
        if number > bounds.max_files or left < 0:
            raise BadInput(f"it holds more than {bounds.max_files} entries or {bounds.max_bytes} bytes")
        yield archive, entry, Path(place)


def _place(entry: tarfile.TarInfo) -> PurePosixPath:
    """Where an entry may be written.  Raises BadInput."""
    name, place = printable(entry.name[:200]), PurePosixPath(entry.name)
    if not (entry.isdir() or (entry.isreg() and not entry.issparse())):
        raise BadInput(f"{name} is a link, a device or a sparse file; only files and folders are unpacked")
    if place.is_absolute() or ".." in place.parts or not place.parts or "\0" in entry.name or "\\" in entry.name:
        raise BadInput(f"{name} is not a path below the archive's folder")
    if len(place.parts) > _MAX_DEPTH or any(len(os.fsencode(part)) > _MAX_NAME_BYTES for part in place.parts):
        raise BadInput(f"{name} is too long or too deep")
    return place


def _write(archive: tarfile.TarFile, entry: tarfile.TarInfo, path: Path) -> None:
    content = archive.extractfile(entry)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("xb") as out:  # an entry that comes twice is a mistake or an attack
            if content is not None:
                shutil.copyfileobj(content, out)
    except (FileExistsError, NotADirectoryError, IsADirectoryError):
        raise BadInput(f"{printable(entry.name[:200])} comes twice") from None
    if path.stat().st_size != entry.size:
        raise BadInput(f"{printable(entry.name[:200])} is cut")
