"""The events of a file, line by line, in bounded memory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from io import BufferedReader
from typing import Any

from orchestrator.runs.events import Event, StepReport, parse_line

_CHUNK_BYTES = 2**20
_STEP = b'{"event": "step", '  # as every step is written
_scan = json.JSONDecoder().raw_decode  # what json.loads calls, without finding out the encoding
_shapes: set[tuple[Any, ...]] = set()  # names and types of steps that `read_event` found well-formed
_MOST_SHAPES = 1000


def read_lines(stream: BufferedReader) -> Iterator[tuple[bytes, list[tuple[Event | None, str]]]]:
    """Whole lines, a piece of the file at a time: its bytes, and the event of each line or what is wrong with it.

    What follows the last line break is being written, and not read.
    """
    parts: list[bytes] = []  # of a line that is not whole yet
    while chunk := stream.read(_CHUNK_BYTES):
        complete, found, rest = chunk.rpartition(b"\n")
        if found:
            whole = b"".join([*parts, complete])
            yield whole + found, [read_line(line) for line in whole.split(b"\n")]
            parts = []
        parts.append(rest)


def read_line(line: bytes) -> tuple[Event | None, str]:
    """The event of a line, or None and what is wrong with it."""
    if line.startswith(_STEP) and (step := _read_known_step(line)):
        return step, ""
    event, fault = parse_line(line)
    if type(event) is StepReport and not event.extra and len(_shapes) < _MOST_SHAPES:
        _shapes.add(_shape(json.loads(line)))
    return event, fault


def _read_known_step(line: bytes) -> StepReport | None:
    """A step whose names and types were all found well-formed in an earlier line: checked once, not a million times."""
    try:
        text = line.decode()
        values, end = _scan(text, 0)
    except (ValueError, RecursionError, StopIteration):
        return None
    if end != len(text) or _shape(values) not in _shapes:
        return None
    del values["event"]
    values["extra"] = {}
    made = object.__new__(StepReport)  # as Event.from_json does, without a copy
    object.__setattr__(made, "__dict__", values)
    return made


def _shape(values: dict[str, Any]) -> tuple[Any, ...]:
    """Names, types, and the types inside of lists and objects: all that decides whether a step is well-formed."""
    types = (*map(type, values.values()),)
    if list not in types and dict not in types:
        return (*values, *types)
    inside = (
        frozenset(map(type, one.values() if type(one) is dict else one)) if type(one) in (list, dict) else None
        for one in values.values()
    )
    return (*values, *types, *inside)
