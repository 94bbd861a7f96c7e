"""What happened to the rows, counted: what is supervised, cut, dropped or broken, and what is reported of it.  Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from orchestrator.data.rendering.supervision import LostTurns
from orchestrator.data.rows.formats import Example
from orchestrator.data.rows.likeness import MOST_COMPARED
from orchestrator.data.rows.preferences import Labelled, Preference
from orchestrator.data.rows.row import BadRow, Row
from orchestrator.errors import JobError

_MAX_CUT, _MAX_DROPPED = 0.01, 0.001  # of tokens, of rows: more is reported
_MAX_KINDS = 1000  # reasons that never repeat must not fill the memory
_MAX_LOST = 0.2  # of tokens or rows: more needs data.truncate


@dataclass
class Statistics:
    """What happened to the rows."""

    rows: int = 0
    samples: int = 0
    tokens: int = 0  # in samples: what the model reads
    supervised_tokens: int = 0
    longest: int = 0
    truncated: int = 0  # rows of which a part was cut, or that were split
    dropped: int = 0  # rows of which nothing is left: too long, or without a supervised token
    rejected: int = 0  # broken rows
    formats: dict[str, int] = field(default_factory=dict)
    cut_tokens: int = 0  # of rows that were kept
    dropped_tokens: int = 0  # of rows that were not
    lost_turns: int = 0
    unended: int = 0  # answers whose end is not supervised
    bos_doubled: int = 0  # rows whose second beginning-of-text token was taken out
    per_turn: int = 0  # conversations trained as one sample a turn
    repeated: int = 0  # samples equal to another one
    held_out: int = 0  # samples equal to a held-out one
    ignored: dict[str, int] = field(default_factory=dict)  # column that is not used -> rows that have it
    readings: dict[str, int] = field(default_factory=dict)  # how what is unusual was read -> rows
    leaked: int = 0  # samples that say what a held-out one says, capitals, punctuation and spaces aside
    near: int = 0  # samples nearly equal to an earlier one; counted by `validate` and `inspect` alone
    near_held_out: int = 0  # samples nearly equal to a held-out one; likewise
    parts: list[int] = field(default_factory=list)  # samples of each source, in their order


class BrokenRows:
    """Broken rows, counted by the kind of their fault; the first ones stand for the rest."""

    def __init__(self) -> None:
        self.count = 0
        self._kinds: dict[str, _Kind] = {}

    def add(self, row: Row, reason: BadRow) -> None:
        """Count a row."""
        self.count += 1
        if kind := self._kinds.get(reason.kind):
            kind.count += 1
            if kind.count <= 4:
                kind.places.append(f"line {row.line}" if row.file == kind.file else row.where)
        elif len(self._kinds) < _MAX_KINDS:
            self._kinds[reason.kind] = _Kind(f"{row.where}: {reason.reason}", row.file)

    def lines(self, most: int = 10) -> list[str]:
        """A line for each kind: its first row, and how many more there are and where."""
        kinds = list(self._kinds.values())[:most]
        rest = self.count - sum(kind.count for kind in kinds)
        return [kind.line() for kind in kinds] + ([f"... and {rest} more broken rows"] if rest else [])


@dataclass
class _Kind:
    """One kind of fault: what is reported of its first row, and where the next ones are."""

    first: str
    file: str
    count: int = 1
    places: list[str] = field(default_factory=list)

    def line(self) -> str:
        more = self.count - 1
        if not more:
            return self.first
        places = ", ".join(self.places) + (", ..." if more > len(self.places) else "")
        return f"{self.first} (and {more} more such row{'s' if more > 1 else ''}: {places})"


class RowCounts:
    """What happened to the rows so far; the format of each file is that of its first row that has one."""

    def __init__(self) -> None:
        self.statistics, self.broken = Statistics(), BrokenRows()
        self.formats: dict[str, str] = {}

    def read(self, row_format: str, example: Example | Preference | Labelled) -> None:
        """Count a row that has a format."""
        statistics = self.statistics
        for names, seen in (
            ((row_format,), statistics.formats),
            (example.ignored, statistics.ignored),
            (example.readings, statistics.readings),
        ):
            for name in names:
                seen[name] = seen.get(name, 0) + 1

    def reject(self, row: Row, reason: BadRow) -> None:
        """Count a broken row."""
        self.statistics.rejected += 1
        self.statistics.lost_turns += reason.num_turns if isinstance(reason, LostTurns) else 0
        self.broken.add(row, reason)

    def mistake(self, key: str, strict: bool, needs_samples: bool = True) -> JobError | None:
        """Why these rows cannot be trained on: broken ones where `strict`, or no sample left where some are needed."""
        statistics, lines = self.statistics, self.broken.lines()
        if lines and strict:
            return JobError([*lines, "Fix these rows, or set data.strict: false to skip and count them"])
        if statistics.samples or not needs_samples:
            return None
        left = (
            f"{key}: no sample is left of {statistics.rows} rows ({statistics.rejected} rejected, {statistics.dropped}"
            " dropped as too long or without a supervised token); raise data.max_length or look with `inspect`"
        )
        return JobError([*lines, left])


def check_line(statistics: Mapping[str, Any]) -> str:
    """What is supervised of the rendered rows, in one line."""
    count = {name: value for name, value in statistics.items() if isinstance(value, int)}
    of = max(1, count.get("samples", 0))
    counted = (
        ("cut_tokens", "tokens cut"),
        ("dropped", "rows dropped"),
        ("rejected", "rows rejected"),
        ("lost_turns", "turns lost by the template"),
        ("unended", "answers without an end"),
        ("bos_doubled", "BOS doubled"),
    )
    per_turn = count.get("per_turn", 0)
    return (
        f"supervision: {count.get('supervised_tokens', 0):,} of {count.get('tokens', 0):,} tokens; "
        + ", ".join(f"{count.get(name, 0):,} {what}" for name, what in counted)
        + f"; {count.get('repeated', 0) / of:.1%} of the samples equal another, {count.get('held_out', 0) / of:.1%} a"
        " held-out one" + (f"; {per_turn:,} conversations as one sample a turn" if per_turn else "")
    )


def loss_notice(statistics: Mapping[str, Any], key: str) -> str | None:
    """A notice where more than 1 % of the tokens or 0.1 % of the rows are lost to data.max_length, else None."""
    tokens, rows = _lost_shares(statistics)
    cut = statistics["cut_tokens"] / max(1, _all_tokens(statistics))
    if cut <= _MAX_CUT and rows <= _MAX_DROPPED:
        return None
    return (
        f"{key}: {tokens:.1%} of the tokens are lost: {statistics['cut_tokens']:,} cut from"
        f" {statistics['truncated']:,} rows, {statistics['dropped_tokens']:,} in {statistics['dropped']:,} of"
        f" {statistics['rows']:,} rows dropped. Raise data.max_length to keep them"
    )


def loss_refusal(statistics: Mapping[str, Any], key: str) -> str | None:
    """Why such a loss needs `data.truncate: true`; None below 20 % of tokens and rows."""
    if max(_lost_shares(statistics)) <= _MAX_LOST:
        return None
    way = "shorten or split the rows, or set data.truncate: true to train on what is left"
    return f"{loss_notice(statistics, key)}, {way}"


def _all_tokens(statistics: Mapping[str, Any]) -> int:
    return statistics["tokens"] + statistics["cut_tokens"] + statistics["dropped_tokens"]


def _lost_shares(statistics: Mapping[str, Any]) -> tuple[float, float]:
    """Shares of all tokens and of all rows that are not trained on."""
    lost = statistics["cut_tokens"] + statistics["dropped_tokens"]
    return lost / max(1, _all_tokens(statistics)), statistics["dropped"] / max(1, statistics["rows"])


def likeness_notices(statistics: Mapping[str, Any], key: str) -> list[str]:
    """Notices of samples that are held out too or nearly equal another one."""
    notices, of = [], max(1, statistics["samples"])
    held, near_held = statistics["leaked"], statistics["near_held_out"]
    if held or near_held:
        near = f", {near_held:,} nearly" if near_held > held else ""
        notices.append(
            f"{key}: {held:,} samples ({held / of:.1%}) say what a held-out one says, capitals, punctuation and spaces"
            f" aside{near}: the held-out loss is too good by them. Remove them from one side"
        )
    if (near := statistics["near"]) > 0.01 * min(of, MOST_COMPARED):
        of_first = f" (of the first {MOST_COMPARED:,})" if of > MOST_COMPARED else ""
        notices.append(f"{key}: {near:,} samples{of_first} nearly equal an earlier one")
    return notices


def reading_notices(statistics: Mapping[str, Any], key: str) -> list[str]:
    """Notices of unused columns and of unusual ways in which rows were read, each with its number of rows."""
    ignored = [f"{name} ({count:,} row{'s' if count > 1 else ''})" for name, count in statistics["ignored"].items()]
    notices = [f"{key}: not used: {', '.join(ignored)}"] if ignored else []
    return notices + [f"{key}: {reading} ({count:,} rows)" for reading, count in statistics["readings"].items()]
