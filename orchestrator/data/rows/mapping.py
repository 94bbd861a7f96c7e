"""A row's columns under our names: as a job states them, or by names that differ in their spelling alone."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any

from orchestrator.data.rows import columns
from orchestrator.data.rows.row import BadRow, Row

TURN_NAMES = ("role", "content", "train", "tool_calls", "reasoning_content")
_OPTIONAL = ("input", "system", "tools", "history")  # of which a row may have none
_ALPACA = {"prompt": "instruction", "completion": "output"}
_IN_TEXT = re.compile(r"\{([^{}]+)\}")
_ABSENT = object()


@dataclass(frozen=True)
class ColumnMap:
    """What a job states about the columns of a source: our name -> theirs, their roles -> ours, what is not read."""

    stated: Mapping[str, str] = field(default_factory=dict)
    roles: Mapping[str, str] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    wanted: str = "auto"  # the format that the job states

    @cached_property
    def row_format(self) -> str:
        """The format that the job states or the columns make; auto where they do not decide it."""
        stated = self.stated
        if self.wanted != "auto":
            return self.wanted
        if "messages" in stated:
            return "messages"
        if "prompt" in stated or "completion" in stated:
            return "alpaca" if "input" in stated else "prompt_completion"
        if "label" in stated:
            return "classification"
        return "text" if "text" in stated else "auto"

    def apply(self, row: Row) -> Row:
        """The row under our names, with what was taken for what; broken where a stated column is not there."""
        if row.broken or self._is_empty:
            return row
        try:
            values, notes = self._renamed(row.values)
        except BadRow as fault:
            return replace(row, broken=fault)
        ignored = tuple(name for name in self.ignored if not columns.missing(row.values.get(name)))
        return Row(values, row.file, row.line, None, (*row.notes, *notes), ignored, self.row_format)

    @cached_property
    def _note(self) -> list[str]:
        listed = ", ".join(f"{theirs!r} as {name}" for name, theirs in self.stated.items())
        return [f"columns are read as stated: {listed}"] if listed else []

    @cached_property
    def _is_empty(self) -> bool:
        return not (self.stated or self.roles or self.ignored) and self.wanted == "auto"

    def _renamed(self, values: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
        ours = {name: theirs for name, theirs in self.stated.items() if name not in TURN_NAMES}
        names = _ALPACA if self.row_format == "alpaca" else {}
        taken, used, notes = {}, set(self.ignored), []
        for name, theirs in ours.items():
            found, parts = _take(values, name, theirs)
            if found is _ABSENT:
                notes.append(f"column {theirs!r}, which data.columns.{name} names, is not there")
                continue
            taken[names.get(name, name)] = found
            used |= parts
        rest = {
            f"{name} (another column)" if name in taken else name: value
            for name, value in values.items()
            if name not in used
        }
        notes[:0] = self._note
        made = {**taken, **rest}
        key = columns.first(columns.TURN_KEYS, made)
        if key and (self.roles or any(name in self.stated for name in TURN_NAMES)):
            made[key] = self._turns(made[key])
        return made, notes

    def _turns(self, turns: Any) -> Any:
        if isinstance(turns, str):
            try:
                turns = json.loads(turns)
            except (ValueError, RecursionError):
                return turns  # its reader says what is wrong
        return [self._turn(turn) if isinstance(turn, dict) else turn for turn in turns] if _is_list(turns) else turns

    def _turn(self, turn: dict[str, Any]) -> dict[str, Any]:
        theirs = {self.stated[name]: name for name in TURN_NAMES if name in self.stated}
        renamed = {theirs.get(key, key if key not in theirs.values() else f"{key} (another key)"): value
                   for key, value in turn.items()}  # fmt: skip
        for key in columns.ROLE_KEYS:
            role = renamed.get(key)
            if isinstance(role, str) and role in self.roles:
                renamed[key] = self.roles[role]
        return renamed


def columns_in(theirs: str) -> list[str]:
    """The columns that stand in the text of a stated one."""
    return _IN_TEXT.findall(theirs)


def _is_list(value: Any) -> bool:
    return isinstance(value, list)


def _take(values: Mapping[str, Any], name: str, theirs: str) -> tuple[Any, set[str]]:
    """What a stated column holds and the columns that it is made of.  Raises BadRow for one that is not there."""
    if theirs in values:
        return values[theirs], {theirs}
    if parts := columns_in(theirs):
        for part in parts:
            if _at(values, part) is _ABSENT:
                raise _not_there(values, name, part)
        text = _IN_TEXT.sub(lambda match: _text(_at(values, match[1]), match[1]), theirs)
        return text, {part.partition(".")[0] if part not in values else part for part in parts}
    found = _at(values, theirs)
    if found is _ABSENT and name not in _OPTIONAL:
        raise _not_there(values, name, theirs)
    return found, {theirs.partition(".")[0]}


def _at(values: Mapping[str, Any], path: str) -> Any:
    """The value of a column, or of `column.key.0` within one."""
    if path in values:
        return values[path]
    found: Any = values
    for step in path.split("."):
        if isinstance(found, Mapping) and step in found:
            found = found[step]
        elif isinstance(found, list) and step.isdecimal() and int(step) < len(found):
            found = found[int(step)]
        else:
            return _ABSENT
    return found


def _text(value: Any, name: str) -> str:
    if columns.missing(value):
        return ""
    if not isinstance(value, str | int | float):
        raise BadRow(f"column {name!r} is a {type(value).__name__}, not text, and stands in a text of data.columns")
    return str(value)


def _not_there(values: Mapping[str, Any], name: str, theirs: str) -> BadRow:
    has = ", ".join(repr(str(one)) for one in list(values)[:20]) or "nothing"
    return BadRow(
        f"has no column {theirs!r}, which data.columns.{name} names; it has: {has}",
        f"has no column {theirs!r}, which data.columns.{name} names",
    )


@lru_cache(maxsize=1024)
def plain_names(names: tuple[str, ...]) -> dict[str, str]:
    """Their name -> the plain one, of names that differ from known ones by capitals, spaces or hyphens alone.

    >>> plain_names(("Question ", "Answer", "id"))
    {'Question ': 'question', 'Answer': 'answer'}
    """
    plain = {name: re.sub(r"[\s_-]+", "_", name.strip()).strip("_").lower() for name in names}
    known = {name: to for name, to in plain.items() if to != name and to in columns.RECOGNISED}
    return {name: to for name, to in known.items() if list(plain.values()).count(to) == 1}
