"""What a folder was begun with: recorded.json holds the text of every file that decides a run, under one digest.

A file beside it that says something else was edited, one that cannot be read was damaged: both are known by name, and
what was recorded can be put back.  The record is written first and remembers the text before, so a crash between the
two writes is neither.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from clusters.safe.masking import holds_secret
from clusters.safe.reading import (
    BadInput,
    load_json,
    load_yaml,
    open_regular,
    printable,
    read_bytes,
    read_json,
    read_text,
    record,
)
from clusters.safe.writing import write_whole
from orchestrator.errors import JobError
from orchestrator.runs.digests import FileDigest

NAME = "recorded.json"
VERSION = 1
_MAX_BYTES = 64 * 2**20
MOST_NAMED = 3
_HEAD = re.compile(
    rb'\{\n "version": %d,\n "sha256": "[0-9a-f]{64}",\n "kind": "(run|search)",\n' % VERSION
)  # as written
_HEAD_BYTES = 256
Fault = Literal["gone", "damaged", "edited"]


class OtherVersion(JobError):
    """A file that another version of this program wrote."""


@dataclass(frozen=True)
class Recorded:
    """What was written down when a run or a search began, and since."""

    kind: str  # run or search
    files: dict[str, str] = field(default_factory=dict)  # name -> text
    before: dict[str, str] = field(default_factory=dict)  # name -> SHA-256 of the text before the last change
    model: dict[str, FileDigest] = field(default_factory=dict)  # file of the model's folder -> what it was
    version: int = VERSION

    def with_files(self, texts: Mapping[str, str]) -> Recorded:
        """The same with some files at other texts."""
        before = {name: _sha256(self.files[name]) for name in texts if name in self.files}
        return replace(self, files={**self.files, **texts}, before={**self.before, **before})

    def without(self, name: str) -> Recorded:
        """The same without a file."""
        files, before = dict(self.files), dict(self.before)
        files.pop(name, None)
        before.pop(name, None)
        return replace(self, files=files, before=before)


@dataclass(frozen=True)
class Difference:
    """A file that is not as it was recorded."""

    name: str
    fault: Fault
    text: str  # what is wrong with it


def read(folder: Path) -> Recorded | None:
    """The record of a folder, None where it has none.  Raises JobError for a damaged one, OtherVersion."""
    file = folder / NAME
    if not os.path.lexists(file):
        return None
    try:
        values = read_json(file, _MAX_BYTES)
        if isinstance(values, dict) and values.get("version") not in (None, VERSION):
            raise OtherVersion(f"{file}: has version {values['version']}, this program writes {VERSION}")
        found = record(Recorded, values, str(file))
    except BadInput as error:
        raise JobError(_damaged(str(error))) from None
    if values.get("sha256") != _digest(found):
        raise JobError(_damaged(f"{file}: its bytes are not those that were written"))
    return found


def read_kind(folder: Path) -> str | None:
    """Whether a record is a run's or a search's, None for a damaged one or another version's."""
    with contextlib.suppress(OSError, BadInput), open_regular(folder / NAME) as stream:
        if found := _HEAD.match(stream.read(_HEAD_BYTES)):
            return found[1].decode()
    with contextlib.suppress(JobError):  # not written as `write` does
        whole = read(folder)
        return whole.kind if whole else None
    return None


def write(folder: Path, found: Recorded) -> None:
    """Write the record, whole and on the disk.  Raises OSError."""
    text = json.dumps({"version": found.version, "sha256": _digest(found), **asdict(found)}, indent=1)
    write_whole(folder / NAME, text, 0o600 if any(map(holds_secret, found.files.values())) else 0o666)


def difference(
    folder: Path, name: str, found: Recorded, changed: Callable[[str, str], list[str]] | None = None
) -> Difference | None:
    """How a file differs from its record, None where it says the same.

    `changed` names what two texts differ in, where their plain values do not decide; it may raise JobError.
    """
    recorded, file = found.files[name], folder / name
    try:
        content = read_bytes(file)
    except BadInput as error:
        return Difference(name, "damaged" if os.path.lexists(file) else "gone", str(error))
    if content == recorded.encode() or hashlib.sha256(content).hexdigest() == found.before.get(name):
        return None  # the second: a crash came between the record and the file
    try:
        parse = load_json if name.endswith(".json") else load_yaml
        old, new = parse(recorded), parse(read_text(file), str(file))
    except BadInput as error:
        return Difference(name, "damaged", str(error))
    if type(new) is not type(old):
        return Difference(name, "damaged", f"{file}: holds a {type(new).__name__}, not a {type(old).__name__}")
    try:
        names = changed(recorded, content.decode("utf-8-sig")) if changed else changed_values(old, new)
    except JobError as error:
        return Difference(name, "edited", str(error))
    return Difference(name, "edited", f"{file}: {few(names)}") if names else None


def changed_values(old: Any, new: Any, at: str = "") -> list[str]:
    """What two plain values differ in, as `key.key is NEW, was OLD`."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*old, *(key for key in new if key not in old)]
        parts = [(f"{at}.{key}" if at else str(key), old.get(key), new.get(key)) for key in keys]
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        parts = [(f"{at}.{place}", *pair) for place, pair in enumerate(zip(old, new, strict=True))]
    else:
        return [] if old == new and type(old) is type(new) else [f"{at or 'it'} is {_shown(new)}, was {_shown(old)}"]
    return [line for key, before, after in parts for line in changed_values(before, after, key)]


def few(names: Iterable[str], count: int | None = None) -> str:
    """The first of some differences, and how many more there are, of `count` in all."""
    listed = list(names)
    more = (len(listed) if count is None else count) - MOST_NAMED
    return "; ".join(listed[:MOST_NAMED]) + (f"; and {more} more" if more > 0 else "")


def _shown(value: Any) -> str:
    text = printable(json.dumps(value, ensure_ascii=False))
    return text if len(text) <= 60 else f"{text[:57]}..."


def _damaged(text: str) -> str:
    return f"{text}. It holds what the run began with: delete it to continue without that check, or submit a new run"


def _digest(found: Recorded) -> str:
    return _sha256(json.dumps(asdict(found), sort_keys=True))


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
