"""Verdicts: what was looked at, what came of it, and the numbers behind it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

Verdict = Literal["ok", "failed", "measured", "not run"]  # measured: a number for which there is no right or wrong
VERSION = 1


@dataclass(frozen=True)
class Check:
    """One line of the table.

    `figures` are in the units of their names; `predicted_step_s` beside `measured_step_s` and `predicted_bytes` beside
    `measured_bytes` are what tests/benchmarks/predictions.py reads.
    """

    name: str
    verdict: Verdict
    text: str
    figures: Mapping[str, float] = field(default_factory=dict)
    part: str = ""


def judged(name: str, is_right: bool, text: str, **figures: float) -> Check:
    """A check with a right and a wrong outcome."""
    return Check(name, "ok" if is_right else "failed", text, figures)


def not_run(name: str, reason: str) -> Check:
    return Check(name, "not run", reason)


def raised(name: str, error: BaseException) -> Check:
    """A check that ended with an error."""
    lines = str(error).strip().splitlines()
    return Check(name, "failed", f"{type(error).__name__}: {lines[0][:160] if lines else 'no message'}")


def table(checks: Sequence[Check]) -> str:
    """A line a check, and a last one that counts."""
    rows = [(check.part, check.name, check.verdict, check.text) for check in checks]
    widths = [max((len(row[column]) for row in rows), default=0) for column in range(3)]
    lines = [
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]) for row in rows
    ]
    counts = {verdict: sum(check.verdict == verdict for check in checks) for verdict in ("ok", "failed", "not run")}
    return "\n".join([*lines, ", ".join(f"{count} {verdict}" for verdict, count in counts.items())])


def write(file: Path, about: Mapping[str, Any], checks: Sequence[Check]) -> None:
    """What was found, for predictions.py and for a report of a fault; `about` says on what card and with what."""
    held = {"version": VERSION, **about, "checks": [asdict(check) for check in checks]}
    file.write_text(json.dumps(held, indent=1), encoding="utf-8")


def read(file: Path) -> tuple[dict[str, Any], list[Check]]:
    """The inverse of `write`.  Raises ValueError for another version."""
    held = json.loads(file.read_text(encoding="utf-8"))
    if held.get("version") != VERSION:
        raise ValueError(f"{file}: has version {held.get('version')}, this program reads {VERSION}")
    return held, [Check(**check) for check in held["checks"]]
