"""Trials -> the combination to use: every one scaled to the real job, the goal kept, quality not given away.  Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from orchestrator.errors import JobError, NothingFits
from orchestrator.job.space import Point
from orchestrator.job.spec import JobSpec
from orchestrator.planning.goal import by_goal, pareto
from orchestrator.planning.plan import Plan
from orchestrator.runs.search_folder import Trial


@dataclass(frozen=True)
class Outcome:
    """A trial, and what the real job would cost with its combination: the plan, corrected by what was measured."""

    trial: Trial
    plan: Plan
    total_s: float  # of the training
    whole_s: float  # of the whole job, which the limits of the goal are for
    peak_bytes: float
    cost: float | None  # in cost.currency; None where the machines have no price
    lack: float  # of quality: the held-out loss, or 1 - score; less is better

    @property
    def costs(self) -> tuple[float, float, float]:
        return self.total_s, self.peak_bytes, self.lack

    @property
    def whole(self) -> bool:
        """Whether it trained to its end: only then its quality can be compared."""
        return self.trial.status == "finished"


def outcome_of(trial: Trial, plan: Plan, metric: str) -> Outcome | None:
    """The trial scaled to the real job; None for one that measured nothing.

    One that shared passes says nothing of how long a job takes by itself: its time is the plan's.
    """
    if trial.step_s is None or trial.eval_loss is None:
        return None
    slower = trial.step_s / trial.predicted_step_s if trial.predicted_step_s else 1.0
    heavier = (trial.tensors_bytes or 0.0) / (trial.predicted_tensors_bytes or 1.0)
    memory, price = plan.memory, plan.price.total
    total_s = plan.total_s * slower
    whole_s = plan.whole_s - plan.total_s + total_s
    return Outcome(
        trial=trial,
        plan=plan,
        total_s=total_s,
        whole_s=whole_s,
        peak_bytes=memory.framework_bytes + memory.tensors_bytes * heavier,
        cost=None if price is None else price * whole_s / plan.whole_s,
        lack=1.0 - trial.quality[metric] if metric in trial.quality else trial.eval_loss,
    )


def outcomes(trials: Sequence[Trial], real: Callable[[Point], Plan], metric: str) -> list[Outcome]:
    """Every trial that measured something, in the order they ended."""
    found = []
    for trial in trials:
        if not trial.measured:
            continue
        try:
            outcome = outcome_of(trial, real(trial.point), metric)
        except (JobError, NothingFits):  # tried by a sampler that knows no plan: not for these machines
            continue
        if outcome:
            found.append(outcome)
    return found


def front(found: Sequence[Outcome]) -> list[Outcome]:
    """Those that trained to their end and that no other one beats in time, memory and quality at once."""
    return pareto([outcome for outcome in found if outcome.whole], lambda outcome: outcome.costs)


def recommend(spec: JobSpec, found: Sequence[Outcome]) -> tuple[Outcome | None, str]:
    """What to use, and why: the most wanted by the goal among those that keep its limits and whose quality is within
    `search.quality_tolerance` of the best."""
    whole = [outcome for outcome in found if outcome.whole]
    if not whole:
        return None, "no trial was trained to its end; raise search.budget"
    keeping = [outcome for outcome in whole if _keeps(spec, outcome)]
    if not keeping:
        return None, "every combination that was tried breaks goal.max_hours or goal.max_cost as measured; raise them"
    best = min(outcome.lack for outcome in keeping)
    tolerance, prefer = spec.search.quality_tolerance, spec.goal.prefer
    as_good = [outcome for outcome in keeping if outcome.lack <= best + tolerance * abs(best)]
    chosen = min(as_good, key=lambda outcome: by_goal(prefer, *outcome.costs, outcome.cost))
    left = len(keeping) - len(as_good)
    why = f"best by goal.prefer: {prefer} of {len(as_good)} whose quality is within {tolerance:.0%} of the best"
    return chosen, why + (f"; {left} were worse by more" if left else "")


def _keeps(spec: JobSpec, outcome: Outcome) -> bool:
    goal = spec.goal
    in_time = goal.max_hours is None or outcome.whole_s <= 3600 * goal.max_hours
    return in_time and (goal.max_cost is None or outcome.cost is None or outcome.cost <= goal.max_cost)
