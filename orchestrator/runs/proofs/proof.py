"""One comparison of two ways to the same answer: how far apart they were, how far they may be; the table of a run."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from clusters.safe.reading import BadInput, record
from orchestrator.errors import JobError
from orchestrator.runs.events import Event
from orchestrator.runs.run_folder import RunFolder

FILE = "verify.json"
TITLES = {  # of each check, in the order of the table; trackers have its number by the same name
    "documents": "documents in one row = apart",  # `submit`, of the attention that was taken, before the first step
    "packing": "packed = separate",
    "accumulation": "accumulated = one batch",
    "uneven": "uneven = one machine",
    "resume": "resumed = uninterrupted",
    "saved": "loaded = saved",
    "handed_back": "handed back = trained",  # `submit`, of what it wrote
    "merged": "merged = adapter",
}
# Of a loss and of a gradient's norm, relative: another order of sums, in fp32 or with factors rounded to 16 bits.
ROUNDING = {"float32": 1e-4, "float16": 5e-3, "bfloat16": 2e-2}
PASSED, DIFFERS, NOT_RUN = "passed", "differs", "not run"


@dataclass(frozen=True)
class Proof(Event, kind="proof"):
    """What came of one comparison."""

    check: str  # one of TITLES
    compared: str  # the two ways, on what
    outcome: str  # passed | differs | not run
    difference: float | None = None
    tolerance: float | None = None
    why: str | None = None  # the tolerance is what it is
    reason: str | None = None  # it was not run, or what a difference means

    @property
    def title(self) -> str:
        return TITLES.get(self.check, self.check)


def judged(check: str, compared: str, difference: float, tolerance: float, why: str) -> Proof:
    """A comparison that was made.  What is no number differs."""
    holds = math.isfinite(difference) and difference <= tolerance
    measured = difference if math.isfinite(difference) else None
    reason = None if measured is not None else "what was compared is not a finite number"
    return Proof(check, compared, PASSED if holds else DIFFERS, measured, tolerance, why, reason)


def not_run(check: str, reason: str) -> Proof:
    return Proof(check, "", NOT_RUN, reason=reason)


def proofs_of(run: RunFolder) -> list[Proof]:
    """The table of a run: of each check the newest comparison; one that was not run only where none was."""
    newest: dict[str, Proof] = {}
    for one in run.events_of(Proof):
        if one.outcome != NOT_RUN or newest.get(one.check, one).outcome == NOT_RUN:
            newest[one.check] = one
    places = {check: place for place, check in enumerate(TITLES)}
    return sorted(newest.values(), key=lambda one: places.get(one.check, len(places)))


def write_table(run: RunFolder) -> None:
    """Write verify.json; nothing where a run holds no proof."""
    if proofs := proofs_of(run):
        run.write(FILE, json.dumps({"checks": to_rows(proofs)}, indent=1))


def read_table(run: RunFolder) -> list[Proof]:
    """The proofs of verify.json; none where there is no such file.  Raises JobError for a damaged one."""
    values = run.read_json(FILE) or {}
    try:
        return [_proof(one) for one in values.get("checks", ())]
    except (BadInput, AttributeError, TypeError) as error:
        raise JobError(f"{run.path / FILE}: {error}; `orchestrator verify {run.run_id}` writes it again") from None


def to_rows(proofs: Sequence[Proof]) -> list[dict[str, Any]]:
    """As verify.json and --json have them."""
    return [{"title": one.title, **_values(one)} for one in proofs]


def _values(one: Proof) -> dict[str, Any]:
    return {key: value for key, value in asdict(one).items() if key not in ("time", "extra")}


def _proof(values: dict[str, Any]) -> Proof:
    return record(Proof, {key: value for key, value in values.items() if key != "title"}, FILE)
