"""Seconds that a run spent in each phase, from the times of its events.

The time between two events belongs to the phase that the later one ends; notes and groups end none.  Time in which no
process ran (between a failure and the next start) counts for nothing.
"""

from __future__ import annotations

from typing import Any, Self

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


class PhaseClock:
    """Adds up the phases event by event, over all sittings of a run."""

    def __init__(self) -> None:
        self._spent = dict.fromkeys(Phases().parts, 0.0)
        self._since: float | None = None
        self._evaluates = False  # the last evaluation runs, whose end comes with the check of what was handed back

    def add(self, event: Event) -> None:
        if isinstance(event, StateChange):
            self._since = event.time if event.state in ("running", "replanning") else None
            return
        kind = type(event)
        phase = _ENDS.get(kind)
        if phase is None or self._since is None:
            return
        if self._evaluates and kind is HandBack:
            phase = "evaluation"
        self._spent[phase] += max(0.0, event.time - self._since)
        self._since, self._evaluates = event.time, kind is FinalEvaluation

    @property
    def phases(self) -> Phases:
        """What was measured before the run began, its data, is not among them."""
        return Phases(**{f"{phase}_s": seconds for phase, seconds in self._spent.items()}, guesses=())

    def to_json(self) -> list[Any]:
        return [self._spent, self._since, self._evaluates]

    @classmethod
    def from_json(cls, values: list[Any]) -> Self:
        made = cls()
        spent, made._since, made._evaluates = values
        made._spent = {phase: spent[phase] for phase in made._spent}
        return made
