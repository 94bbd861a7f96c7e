"""Seconds that a run spent in each phase, from the times of its events.

The time between two events belongs to the phase that the later one ends; notes and groups end none.  Time in which no
process ran (between a failure and the next start) counts for nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

from orchestrator.runs.events import (
    CheckpointReport,
    Evaluation,
    Event,
    FinalEvaluation,
    HandBack,
    ModelReady,
    PreflightReport,
    QualityReport,
    StateChange,
    StepReport,
)
from strategies.cost.phases import Phases

_ENDS: dict[type[Event], str] = {
    ModelReady: "start",
    PreflightReport: "preflight",
    StepReport: "training",
    Evaluation: "evaluation",
    CheckpointReport: "saving",
    FinalEvaluation: "saving",
    HandBack: "saving",
    QualityReport: "evaluation",
}


def measured_phases(events: Sequence[Event]) -> Phases:
    """Over all sittings of a run; what was measured before it began, its data, is not among them."""
    spent = dict.fromkeys(Phases().parts, 0.0)
    since: float | None = None
    evaluates = False  # the last evaluation runs, whose end comes with the check of what was handed back
    for event in events:
        if isinstance(event, StateChange):
            since = event.time if event.state in ("running", "replanning") else None
            continue
        phase = _ENDS.get(type(event))
        if phase is None or since is None:
            continue
        if evaluates and isinstance(event, HandBack):
            phase = "evaluation"
        spent[phase] += max(0.0, event.time - since)
        since, evaluates = event.time, isinstance(event, FinalEvaluation)
    return Phases(**{f"{phase}_s": seconds for phase, seconds in spent.items()}, guesses=())
