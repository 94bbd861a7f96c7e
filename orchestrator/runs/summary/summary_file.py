"""A run's `.summary`: what its events come to, and the row of a table, each beside what it was read from.

It is derived and may be deleted at any time: whoever reads the run makes it again, and where nothing can be written the
same is computed without it.  A line a part: `CRC-32 {json}`; the first is the table's row, read alone by `list`, the
second the events' summary.  Two readers at once each write a whole file and the later one stays.

What is kept of the events counts where their file is the same to the kernel (inode, size, times of change), or where
the bytes that were read are still its first ones, by their CRC-32: then only what was appended is read.  So a line that
is damaged later is found.  A file that changed within two seconds of being looked at is never taken for the same,
since a clock that ticks coarsely may give two changes one time.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any
from uuid import uuid4

from clusters.safe.reading import READ_ONLY, BadInput, kind_of, open_regular
from orchestrator import __version__
from orchestrator.errors import JobError
from orchestrator.runs.run_folder import RunFolder
from orchestrator.runs.summary.event_summary import EventSummary
from orchestrator.runs.summary.lines import read_lines

NAME = ".summary"
_FORMAT = f"2 of {__version__}"  # another version may see other faults
_COARSE_NS = 2 * 10**9  # the coarsest clock of a file system: FAT's
_WORTH_KEEPING_BYTES = 2**20  # less is read again as fast
_CHUNK_BYTES = 2**20
_HEAD_BYTES = 8192  # that hold the row of nearly every run
_MOST_BYTES = 64 * 2**20  # of a line; no summary comes near it
Identity = list[int]  # of a file: inode, size, times of its last changes in nanoseconds
Identities = dict[str, Identity | None]  # by name in the run's folder; None where nothing is


@dataclass
class _Events:
    """How far events.jsonl was read."""

    identity: Identity | None = None  # None where it had just changed
    num_bytes: int = 0
    crc32: int = 0
    summary: EventSummary | None = None


def summary_of(run: RunFolder) -> EventSummary:
    """What a run's events come to, of what was appended since they were last read.  Raises JobError."""
    return summary_and_end(run)[0]


def summary_and_end(run: RunFolder) -> tuple[EventSummary, int]:
    """The same, and the byte offset after what it is of."""
    file = run.path / "events.jsonl"
    try:
        if kind_of(file) is None:
            return EventSummary(), 0
        with open_regular(file) as stream:
            return _brought_up_to_date(run.path, stream)
    except (OSError, BadInput) as error:
        raise JobError(f"{file}: cannot be read: {getattr(error, 'strerror', None) or error}") from None


def _brought_up_to_date(folder: Path, stream: BufferedReader) -> tuple[EventSummary, int]:
    found, now = _kept_events(folder), identity_of(os.fstat(stream.fileno()))
    if found.summary and found.identity == now:
        return found.summary, found.num_bytes
    with draft(folder) as new:
        if found.summary is None or not _begins_with(stream, found):
            found = _Events(summary=EventSummary())
        assert found.summary
        stream.seek(found.num_bytes)
        before = found.num_bytes
        for content, lines in read_lines(stream):
            found.num_bytes += len(content)
            found.crc32 = zlib.crc32(content, found.crc32)
            found.summary.add(lines)
        found.identity = now if new.is_settled(now) else None
        if found.identity or found.num_bytes - before >= _WORTH_KEEPING_BYTES:
            new.keep(_row_line(folder), _line(_events_to_json(found)))
    return found.summary, found.num_bytes


def _begins_with(stream: BufferedReader, found: _Events) -> bool:
    """Whether the bytes that were read are still the first ones."""
    left, crc32 = found.num_bytes, 0
    while left and (chunk := stream.read(min(left, _CHUNK_BYTES))):
        crc32, left = zlib.crc32(chunk, crc32), left - len(chunk)
    return left == 0 and crc32 == found.crc32


def _kept_events(folder: Path) -> _Events:
    """What is kept of the events; nothing where that is damaged or of another version."""
    with contextlib.suppress(OSError, BadInput, ValueError, TypeError, LookupError, RecursionError, AttributeError):
        with open_regular(folder / NAME) as stream:
            stream.readline(_MOST_BYTES)
            values = _parsed(stream.readline(_MOST_BYTES))
        if values["format"] == _FORMAT:
            summary = EventSummary.from_json(values["summary"])
            return _Events(values["identity"], int(values["num_bytes"]), int(values["crc32"]), summary)
    return _Events()


def _events_to_json(found: _Events) -> dict[str, Any]:
    assert found.summary
    return {
        "format": _FORMAT,
        "identity": found.identity,
        "num_bytes": found.num_bytes,
        "crc32": found.crc32,
        "summary": found.summary.to_json(),
    }


# --- the row


def kept_row(folder: Path) -> dict[str, Any] | None:
    """The row that was kept, while every file that it rests on is as it was."""
    try:
        descriptor = os.open(folder / NAME, READ_ONLY)
    except OSError:
        return None
    try:
        head = os.read(descriptor, _HEAD_BYTES)
        while b"\n" not in head and len(head) < _MOST_BYTES and (more := os.read(descriptor, _MOST_BYTES)):
            head += more
        values = _parsed(head.partition(b"\n")[0])
        same = values["format"] == _FORMAT and all(
            identity == _identity_at(f"{folder}/{name}") for name, identity in values["files"].items()
        )
        return values["row"] if same else None
    except (OSError, ValueError, TypeError, LookupError, RecursionError, AttributeError):
        return None
    finally:
        os.close(descriptor)


def keep_row(folder: Path, seen: Identities, row: dict[str, Any], new: Draft) -> None:
    """Keep a row beside the files that it rests on, as they were before it was made, unless one had changed just then.

    `new` was begun before the first of them was looked at.
    """
    if all(identity is None or new.is_settled(identity) for identity in seen.values()):
        new.keep(_line({"format": _FORMAT, "files": seen, "row": row}), _line_after_row(folder))


def look_at(folder: Path, name: str, seen: Identities) -> None:
    """Remember how a file of the folder is, or that it is not there."""
    seen.setdefault(name, _identity_at(f"{folder}/{name}"))


def _identity_at(path: str) -> Identity | None:
    """None where nothing is; of a folder only that it is one, since its files count by themselves."""
    try:
        found = os.stat(path)  # noqa: PTH116 - a Path for each of 150,000 names would take as long as the question
    except (FileNotFoundError, NotADirectoryError):
        return None
    return [-1, -1, -1, -1] if stat.S_ISDIR(found.st_mode) else identity_of(found)


def identity_of(found: os.stat_result) -> Identity:
    return [found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns]


# --- the file


class Draft:
    """A new `.summary` that takes its place if it is kept; `is_settled` asks the file system's own clock."""

    def __init__(self, file: Path | None, now_ns: int) -> None:
        self._file, self._now_ns = file, now_ns

    def is_settled(self, identity: Identity) -> bool:
        """Whether a file changed long enough before this draft was begun to be known by its times."""
        return self._file is not None and max(identity[2:]) + _COARSE_NS < self._now_ns

    def keep(self, *lines: bytes) -> None:
        """Nothing happens where the folder cannot be written or the disk is full."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.write_bytes(b"".join(lines))
                self._file.replace(self._file.with_name(NAME))


@contextlib.contextmanager
def draft(folder: Path) -> Iterator[Draft]:
    """Begin a new `.summary`; one that is not kept is gone after the block."""
    file = folder / f"{NAME}.{uuid4().hex[:12]}.tmp"
    try:
        file.touch(exist_ok=False)
        new = Draft(file, file.stat().st_mtime_ns)
    except OSError:
        new, file = Draft(None, 0), None
    try:
        yield new
    finally:
        if file is not None:
            with contextlib.suppress(OSError):
                file.unlink(missing_ok=True)


def _line(values: dict[str, Any]) -> bytes:
    content = json.dumps(values).encode()
    return b"%08x %b\n" % (zlib.crc32(content), content)


def _parsed(line: bytes) -> dict[str, Any]:
    """The values of a line.  Raises ValueError."""
    digest, _, content = line.rstrip(b"\n").partition(b" ")
    if int(digest, 16) != zlib.crc32(content):
        raise ValueError("is not as it was written")
    return json.loads(content)


def _row_line(folder: Path) -> bytes:
    """The first line as it is; whether it still holds is asked when it is read."""
    with contextlib.suppress(OSError, BadInput), open_regular(folder / NAME) as stream:
        return stream.readline(_MOST_BYTES).rstrip(b"\n") + b"\n"
    return b"\n"


def _line_after_row(folder: Path) -> bytes:
    with contextlib.suppress(OSError, BadInput), open_regular(folder / NAME) as stream:
        stream.readline(_MOST_BYTES)
        return stream.readline(_MOST_BYTES)
    return b""
