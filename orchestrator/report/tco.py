"""What a job costs to own and to run, and what it would cost on other machines.  Pure; all prices are the user's.

A machine that is owned is written off over its hours of work and takes electricity; a rented one takes its rate.  What
has no price stays unknown, and `missing` names the key to set.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from clusters.capability import ClusterCapability
from clusters.safe.reading import first_line
from orchestrator.errors import JobError, NothingFits
from orchestrator.job.spec import JobSpec
from orchestrator.planning.plan import Plan


@dataclass(frozen=True)
class Cost:
    """One way to run the job, in `currency`; None is unknown."""

    what: str
    seconds: float | None  # of training; None where the job does not fit
    energy_wh: float | None = None
    energy_source: str = "declared"  # declared | RAPL | NVML | RAPL + NVML
    machines: float | None = None
    electricity: float | None = None
    per_million_tokens: float | None = None
    per_year: float | None = None  # with cost.retrainings_per_year
    purchase: float | None = None  # what it takes to begin, where it is to be bought
    note: str = ""
    missing: tuple[str, ...] = field(default=())  # keys that would complete it

    @property
    def per_run(self) -> float | None:
        """The sum of what is known; None where nothing is."""
        known = [part for part in (self.machines, self.electricity) if part is not None]
        return sum(known) if known else None


def of_plan(spec: JobSpec, what: str, plan: Plan, num_tokens: float, scale: float = 1.0) -> Cost:
    """The cost of a planned run; `scale` is measured over planned time, all phases."""
    price = plan.price

    def scaled(value: float | None) -> float | None:
        return None if value is None else scale * value

    keys = {"cost.nodes": price.lacks_price, "cost.power_w": price.lacks_draw}
    cost = Cost(
        what=what,
        seconds=scale * plan.whole_s,
        energy_wh=scaled(price.energy_wh),
        machines=scaled(price.machines),
        electricity=scaled(price.electricity),
        missing=tuple(key for key, is_lacking in keys.items() if is_lacking),
    )
    return completed(spec, cost, num_tokens)


def completed(spec: JobSpec, cost: Cost, num_tokens: float) -> Cost:
    """With what follows from the cost of a run."""
    each = cost.per_run
    if each is None:
        return cost
    return replace(cost, per_million_tokens=1e6 * each / num_tokens, per_year=each * spec.cost.retrainings_per_year)


def measured(spec: JobSpec, cost: Cost, wh: float, source: str, num_tokens: float, owned: bool) -> Cost:
    """With energy that was counted in place of declared watts; a rented machine's is in its rate."""
    electricity = wh / 1000 * spec.cost.electricity_per_kwh if owned else cost.electricity
    return completed(spec, replace(cost, energy_wh=wh, energy_source=source, electricity=electricity), num_tokens)


def alternatives(
    spec: JobSpec, declared: ClusterCapability, plan_on: Callable[[ClusterCapability], Plan], num_tokens: float
) -> list[Cost]:
    """Each declared machine alone; one that cannot run the job has the reason in its note."""
    found = []
    for node in declared.nodes:
        device = node.gpus[0].name if node.gpus else "CPU"
        count = f"{len(node.gpus)} x " if len(node.gpus) > 1 else ""
        what = f"{node.name} ({count}{device})"
        try:
            plan = plan_on(ClusterCapability((node,)))
        except (NothingFits, JobError) as error:
            found.append(Cost(what, None, note=first_line(error)))
            continue
        kind = "rent" if node.price_per_hour is not None else "buy" if node.purchase_price is not None else ""
        cost = of_plan(spec, f"{kind} {what}".strip(), plan, num_tokens)
        lacking = {"price": plan.price.lacks_price, "power_w": plan.price.lacks_draw}
        missing = tuple(f"{key} of {node.name} in its file" for key, is_lacking in lacking.items() if is_lacking)
        guess = "rough: one of its figures is unknown" if plan.is_guess else ""
        found.append(replace(cost, purchase=node.purchase_price, note=guess, missing=missing))
    return found


def cheapest(costs: Sequence[Cost]) -> Cost | None:
    """The one with the lowest cost of a run among those whose cost is whole."""
    known = [cost for cost in costs if cost.per_run is not None and not cost.missing and cost.seconds is not None]
    return min(known, key=lambda cost: cost.per_run or 0.0) if known else None
