"""A row of a data file, and the error for a broken one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Message = dict[str, Any]


class BadRow(ValueError):
    """A row that cannot be used.  `reason` says field, fault and way out, without the row's place.

    `kind` is the same for all rows with this fault: the reason without what differs from row to row (the number of a
    turn, a value), to be counted.
    """

    def __init__(self, reason: str, kind: str | None = None) -> None:
        self.reason, self.kind = reason, kind or reason
        super().__init__(reason)


@dataclass(frozen=True)
class Row:
    """One row and where it stands; `broken` says why it cannot be read."""

    values: dict[str, Any]
    file: str
    line: int  # line of a text file where the row begins, else number of the row; from 1
    broken: BadRow | None = None
    notes: tuple[str, ...] = ()  # how its file or its columns were read, to be counted and named
    ignored: tuple[str, ...] = ()  # columns that hold something and that the job does not read
    row_format: str = "auto"  # where its source states one

    @property
    def where(self) -> str:
        return f"{self.file}:{self.line}"
