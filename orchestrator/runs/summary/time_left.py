"""How long a run still takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from clusters.units import format_s
from orchestrator.runs.summary.event_summary import EventSummary

if TYPE_CHECKING:  # a list of runs reads no plan
    from orchestrator.planning.plan import Plan


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
