"""SHA-256 of model files and of what is handed back.

A model's files are large and seldom change: what was computed is kept in the user's cache under the file's size,
times and inode, and a file that has none of them changed is not read again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from clusters.safe.reading import BadInput, open_regular, read_json, record
from clusters.safe.writing import write_whole
from clusters.units import format_bytes

_MODEL_SUFFIXES = (".json", ".safetensors", ".bin", ".model", ".jinja", ".py", ".tiktoken")
_MODEL_TEXTS = ("merges.txt", "vocab.txt")
_MOST_KEPT = 4096  # entries of the cache
_READERS = 4
_SAID_BYTES = 2**31
CARD = "README.md"  # of what is handed back: written later, from what is known


@dataclass(frozen=True)
class FileDigest:
    """A file as it was."""

    bytes: int
    sha256: str


def of_file(file: Path) -> FileDigest:
    """Raises BadInput where it is no regular file or cannot be read."""
    with open_regular(file) as stream:
        try:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
            return FileDigest(os.fstat(stream.fileno()).st_size, digest)
        except OSError as error:
            raise BadInput(f"{file}: cannot be read: {error.strerror}") from None


def of_folder(folder: Path) -> dict[str, FileDigest]:
    """Every file of a folder that was handed back, its card excepted, by its name from there."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file() and file.name != CARD]
    return {file.relative_to(folder).as_posix(): of_file(file) for file in files}


def of_model(
    folder: Path, cache: Path | None = None, say: Callable[[str], None] = lambda text: None
) -> dict[str, FileDigest]:
    """The files of a model's folder that decide what it computes.  Raises BadInput.

    `cache` is a file that remembers digests of files that have not changed; reading large ones is said.
    """
    try:
        listed = [file for file in sorted(folder.iterdir()) if _counts(file) and file.is_file()]
    except OSError as error:
        raise BadInput(f"{folder}: cannot be read: {error.strerror}") from None
    if any(file.suffix == ".safetensors" for file in listed):  # the same weights once more
        listed = [file for file in listed if file.suffix != ".bin"]
    kept = _KnownDigests(cache)
    if (unknown := sum(file.stat().st_size for file in listed if not kept.knows(file))) > _SAID_BYTES:
        say(f"reading {format_bytes(unknown)} of model files once, to recognise them later ...")
    with ThreadPoolExecutor(_READERS) as pool:
        found = dict(zip([file.name for file in listed], pool.map(kept.digest, listed), strict=True))
    kept.save()
    return found


def changed(recorded: Mapping[str, FileDigest], now: Mapping[str, FileDigest]) -> list[str]:
    """Names of files that have changed, are gone, or came, each with a word."""
    gone = [f"{name} is gone" for name in recorded if name not in now]
    other = [f"{name} has changed" for name in recorded if name in now and now[name] != recorded[name]]
    return [*other, *gone, *(f"{name} is new" for name in now if name not in recorded)]


def _counts(file: Path) -> bool:
    return not file.name.startswith(".") and (file.suffix in _MODEL_SUFFIXES or file.name in _MODEL_TEXTS)


@dataclass(frozen=True)
class _DigestEntry:
    state: list[int]
    bytes: int
    sha256: str


class _KnownDigests:
    """Digests by path, each true while the file's size, times and inode are those it was computed at."""

    def __init__(self, cache: Path | None) -> None:
        self._file = cache
        self._known: dict[str, _DigestEntry] = {}
        self._is_new = False
        with contextlib.suppress(BadInput):  # none yet, or a damaged one: computed again
            values = read_json(cache) if cache else {}
            self._known = {name: record(_DigestEntry, entry, str(cache)) for name, entry in values.items()}

    def knows(self, file: Path) -> bool:
        entry = self._known.get(str(file.resolve()))
        return entry is not None and entry.state == _state(file)

    def digest(self, file: Path) -> FileDigest:
        path, state = str(file.resolve()), _state(file)
        entry = self._known.get(path)
        if entry is None or entry.state != state:
            found = of_file(file)
            if _state(file) != state:
                return found  # it is being written; the next look decides
            entry = self._known[path] = _DigestEntry(state, found.bytes, found.sha256)
            self._is_new = True
        return FileDigest(entry.bytes, entry.sha256)

    def save(self) -> None:
        if not self._file or not self._is_new:
            return
        newest = dict(list(self._known.items())[-_MOST_KEPT:])
        with contextlib.suppress(OSError):  # a cache that cannot be written is none
            self._file.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self._file, json.dumps({name: asdict(entry) for name, entry in newest.items()}))


def _state(file: Path) -> list[int]:
    """What changes with every write: size, time of the last write and of the last change of anything, inode."""
    found = file.stat()
    if not stat.S_ISREG(found.st_mode):
        raise BadInput(f"{file}: is not a regular file")
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]
