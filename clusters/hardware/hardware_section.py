"""One mapping of a hardware file, read value by value with every mistake noted."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterator, Sequence
from typing import Any

from clusters.safe.reading import printable

_MOST = 1e12  # of anything, in any unit of the file
_LONGEST_TEXT = 100


class HardwareSection:
    """One mapping of the file: hands out its values and notes each mistake with where it is.

    A value that is wrong comes out as None, so that the next mistake is found as well.
    """

    def __init__(self, where: str, values: Any, known: Sequence[str], mistakes: list[str]) -> None:
        self.where, self.mistakes = where, mistakes
        self.values: dict[Any, Any] = values if isinstance(values, dict) else {}
        if not isinstance(values, dict):
            self.wrong("", f"{shown(values)} is not a mapping with {', '.join(known)}")
        for key in self.values:
            if key not in known:
                near = difflib.get_close_matches(str(key), known, n=1)
                hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
                self.wrong(key, f"there is no such key; {hint}")

    def path(self, key: Any) -> str:
        return ".".join(part for part in (self.where, str(key)) if part)

    def wrong(self, key: Any, what: str) -> None:
        self.mistakes.append(f"{self.path(key)}: {what}")

    def has(self, key: str) -> bool:
        return self.values.get(key) is not None

    def need(self, *keys: str) -> None:
        for key in keys:
            if not self.has(key):
                self.wrong(key, "is missing")

    def number(self, key: str, above: float = 0, at_most: float = _MOST, at_least: float = 0) -> float | None:
        value = self.values.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
            self.wrong(key, f"{shown(value)} is not a number")
        elif value <= above:
            self.wrong(key, f"{shown(value)} is not above {above:g}")
        elif value < at_least:
            self.wrong(key, f"{shown(value)} is below {at_least:g}, less than any machine has")
        elif value > at_most:
            self.wrong(key, f"{shown(value)} is above {at_most:g}, more than any machine has")
        else:
            return float(value)
        return None

    def whole(self, key: str, at_most: int) -> int | None:
        value = self.number(key, at_most=at_most)
        if value is not None and not value.is_integer():
            self.wrong(key, f"{value:g} is not a whole number")
        return None if value is None else int(value)

    def text(self, key: str) -> str | None:
        value = self.values.get(key)
        if isinstance(value, str) and value.strip():
            if len(value) > _LONGEST_TEXT:
                self.wrong(key, f"has {len(value)} characters, more than {_LONGEST_TEXT}")
            return value.strip()[:_LONGEST_TEXT]
        if value is not None:
            self.wrong(key, f"{shown(value)} is not a text")
        return None

    def items(self, key: str) -> list[tuple[str, Any]]:
        """The entries of a list, each with where it is."""
        value = self.values.get(key)
        if value is not None and not isinstance(value, list):
            self.wrong(key, f"{shown(value)} is not a list")
        return [(f"{self.path(key)}[{i}]", item) for i, item in enumerate(value)] if isinstance(value, list) else []

    def texts(self, key: str) -> tuple[str, ...]:
        found = []
        for where, item in self.items(key):
            if isinstance(item, str) and item.strip():
                found.append(item.strip())
            else:
                self.mistakes.append(f"{where}: {shown(item)} is not a text")
        return tuple(found)

    def section(self, key: str, known: Sequence[str]) -> HardwareSection:
        """The mapping at `key`, empty where the file has none."""
        return HardwareSection(self.path(key), self.values[key] if self.has(key) else {}, known, self.mistakes)

    def sections(self, key: str, known: Sequence[str]) -> Iterator[HardwareSection]:
        """The mappings of a list; where they have a name, a plain text stands for one with nothing else."""
        for where, item in self.items(key):
            values = {"name": item} if isinstance(item, str) and "name" in known else item
            section = HardwareSection(where, values, known, self.mistakes)
            if isinstance(values, dict):
                yield section


def shown(value: Any) -> str:
    return printable(reprlib.repr(value))
