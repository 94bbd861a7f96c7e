"""The row of a run in a table, kept while no file it rests on changes.

A damaged run has none: what is wrong with it is looked for each time.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path

from orchestrator.errors import JobError
from orchestrator.job.hub import name_in_cache
from orchestrator.runs import record
from orchestrator.runs.condition import damage
from orchestrator.runs.run_folder import RunFolder
from orchestrator.runs.summary.event_summary import EventSummary
from orchestrator.runs.summary.summary_file import Identities, draft, keep_row, kept_row, look_at, summary_of
from strategies.export import EXPORT_FOLDERS


@dataclass(frozen=True)
class RunFacts:
    """What a table shows of a run, whatever process looks at it and from wherever."""

    state: str  # the last that was written down
    step: int = 0
    num_steps: int | None = None
    loss: float | None = None
    tokens_per_s: float | None = None  # of the last step; of a run with a result, over all of its training
    seconds: float | None = None  # of the last step
    loss_scale: float | None = None
    started: float | None = None  # seconds since the epoch
    error: str | None = None
    exported: str | None = None  # the folder's name
    model: str | None = None  # its name on the hub, or its folder's
    method: str | None = None
    loss_before: float | None = None  # held-out, as far as it was measured
    loss_after: float | None = None
    scores: dict[str, float] = field(default_factory=dict)


def facts_of(run: RunFolder, summary: EventSummary) -> RunFacts:
    """Raises JobError."""
    last, result, exported = summary.last_step, run.result(), run.exported()
    plan = run.plan() if (run.path / "plan.json").exists() else None
    return RunFacts(
        state=summary.state_by_events,
        step=last.step if last else 0,
        num_steps=plan.num_steps if plan else None,
        loss=last.loss if last else None,
        tokens_per_s=result.tokens_per_s if result else last.tokens_per_s if last else None,
        seconds=last.seconds if last else None,
        loss_scale=last.loss_scale if last else None,
        started=summary.started,
        error=summary.error,
        exported=exported.name if exported else None,
        model=model_name_of(run),
        method=plan.method["type"] if plan else None,
        loss_before=summary.loss_before,
        loss_after=summary.loss_after,
        scores=result.after.scores if result and result.after else {},
    )


def model_name_of(run: RunFolder) -> str | None:
    """The name that others know a run's model by.  Raises JobError."""
    if not (run.path / "data.json").exists():
        return None
    folder = Path(run.data().model)
    named = name_in_cache(folder)
    return named[0] if named else folder.name


def facts_of_whole_run(run: RunFolder) -> RunFacts:
    """Of a run that no process holds.  Raises JobError with everything that can be seen to be wrong with it."""
    if (kept := _kept(run)) is not None:
        return kept
    with draft(run.path) as new:
        seen = _look_at_files(run)
        if wrong := damage(run, lambda: summary_of(run).state_by_events):
            raise JobError(wrong)
        found = facts_of(run, summary_of(run))
        keep_row(run.path, seen, asdict(found), new)
    return found


def _kept(run: RunFolder) -> RunFacts | None:
    row = kept_row(run.path)
    if (
        row is None
        or row.keys() != _TYPES.keys()
        or any(type(row[name]) not in kinds for name, kinds in _TYPES.items())
    ):
        return None
    return RunFacts(**row)


def _look_at_files(run: RunFolder) -> Identities:
    """How everything is that `damage` and `facts_of` read, before they read it."""
    seen: Identities = {}
    for name in _FILES:
        look_at(run.path, name, seen)
    with contextlib.suppress(JobError):  # a damaged record is named by `damage`
        for name in found.files if (found := record.read(run.path)) else ():
            look_at(run.path, name, seen)
    for name in EXPORT_FOLDERS:
        look_at(run.path, name, seen)
        for folder, _, files in os.walk(run.path / name):
            for file in files:
                look_at(run.path, os.path.relpath(f"{folder}/{file}", run.path), seen)
    return seen


_FILES = (record.NAME, "job.yaml", "origin.json", "capability.json", "plan.json", "data.json", "result.json")
_FILES += ("events.jsonl",)
_NUMBERS = ("loss", "tokens_per_s", "seconds", "loss_scale", "started", "loss_before", "loss_after")
_NUMBER_OR_NONE, _TEXT_OR_NONE = (int, float, type(None)), (str, type(None))
_TYPES: dict[str, tuple[type, ...]] = {
    "state": (str,),
    "step": (int,),
    "num_steps": (int, type(None)),
    "scores": (dict,),
    **dict.fromkeys(_NUMBERS, _NUMBER_OR_NONE),
    **dict.fromkeys(("error", "exported", "model", "method"), _TEXT_OR_NONE),
}
