"""How fast a run trains by the clock, and what is left of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from clusters.units import format_s
from orchestrator.planning.plan import Plan

if TYPE_CHECKING:
    from orchestrator.runs.summary.event_summary import EventSummary

_ENOUGH_STEPS = 3  # after the first, which is often the slowest


class Pace:
    """Seconds of a step of one sitting, evaluations and checkpoints between steps included."""

    def __init__(self) -> None:
        self._first: tuple[int, float] | None = None  # step, time
        self._last: tuple[int, float] | None = None

    def add(self, step: int, time: float) -> None:
        self._first = self._first or (step, time)
        self._last = (step, time)

    @property
    def step_s(self) -> float | None:
        """None while fewer than three steps follow the first one."""
        if not self._first or not self._last or self._last[0] - self._first[0] < _ENOUGH_STEPS:
            return None
        return max(0.0, self._last[1] - self._first[1]) / (self._last[0] - self._first[0])

    def to_json(self) -> list[Any]:
        return [self._first, self._last]

    @classmethod
    def from_json(cls, values: list[Any]) -> Self:
        made = cls()
        made._first, made._last = (one and (int(one[0]), one[1]) for one in values)
        return made


@dataclass(frozen=True)
class TimeLeft:
    """Seconds until a run has handed back its result."""

    seconds: float
    is_measured: bool  # by steps of this sitting; else by the plan

    @property
    def text(self) -> str:
        return format_s(self.seconds) if self.is_measured else f"about {format_s(self.seconds)}"


def time_left(summary: EventSummary, plan: Plan) -> TimeLeft:
    """Of a run that is at work: the steps that are left at the pace that was measured, and the end after them.

    The last evaluation takes what the first one took.  What was not measured is the plan's.
    """
    done = summary.last_step.step if summary.last_step else 0
    left, step_s = max(0, plan.num_steps - done), summary.pace.step_s
    spent, planned = summary.phases, plan.phases
    evaluation_s = max(0.0, planned.evaluation_s - spent.evaluation_s) if summary.before_s is None else summary.before_s
    if summary.loss_after is not None or (summary.doing == "saving" and not left):
        evaluation_s = 0.0
    ending_s = evaluation_s + max(0.0, planned.saving_s - spent.saving_s)
    if not done:
        ending_s += max(0.0, planned.start_s - spent.start_s) + max(0.0, planned.preflight_s - spent.preflight_s)
        ending_s += 0.0 if summary.before_s is None else max(0.0, planned.evaluation_s - 2 * summary.before_s)
    return TimeLeft(left * (plan.step_s if step_s is None else step_s) + ending_s, left > 0 and step_s is not None)
