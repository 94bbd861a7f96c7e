"""The best candidate by the job's goal, among those that keep its limits, and the Pareto front.  Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, TypeVar

from clusters.units import format_s
from orchestrator.errors import JobError, NothingFits
from orchestrator.job.spec import JobSpec
from orchestrator.planning.candidates import Candidate
from orchestrator.planning.price import price_of
from strategies.contract import Method
from strategies.cost.phases import Phases
from strategies.quality import QualityPrior

T = TypeVar("T")

# Beyond two weeks a stated goal.max_hours must allow the plan: nobody plans that by mistake.  Published fine-tunings of
# one machine take minutes to days; in two weeks a machine is restarted (updates, heat, power), the loss says in hours
# whether a run is worth it, and a rented card does the same work in a day.
LONG_S = 14 * 86400.0
_MUCH_WAITING = 0.05  # of a step: worth a word
_ABOUT_AS_FAST = 1.15  # times the fastest: a model's error in time is larger than this


def choose_candidate(spec: JobSpec, fitting: Sequence[Candidate], phases: Callable[[Candidate], Phases]) -> Candidate:
    """The best by the goal.  Raises NothingFits naming the limit that no candidate keeps.

    Limits hold for the whole job, whose phases are given.  The fastest trains and evaluates in the least time: a
    machine that trains a little and evaluates slowly would make the job longer.  Start and saving are guesses, which
    decide nothing.
    """
    kept = _within_limits(spec, fitting, phases)

    def compute_s(candidate: Candidate) -> float:
        found = phases(candidate)
        return found.training_s + found.evaluation_s

    if spec.goal.max_hours is None:
        kept = [candidate for candidate in kept if phases(candidate).total_s <= LONG_S] or kept
    cost = _cost_key(spec, kept, phases)
    keys = {
        "time": lambda c: (compute_s(c), c.peak_bytes),
        "memory": lambda c: (c.memory_fraction, compute_s(c)),
        "cost": lambda c: (*cost(c), compute_s(c)),
        "quality": lambda c: (-(c.quality or 0.0), compute_s(c)),
    }
    best = min(kept, key=keys[spec.goal.prefer])
    if spec.goal.prefer != "time":
        return best
    # Of candidates about as fast: the best expected quality; then the plain one, whose shares may be uneven and whose
    # steps may be repeated, before one that is divided.
    about = [candidate for candidate in kept if compute_s(candidate) <= _ABOUT_AS_FAST * compute_s(best)]
    return min(about, key=lambda c: (-(c.quality or 0.0), c.zero_stage, compute_s(c), c.peak_bytes))


def why_not_beside(spec: JobSpec, chosen: Candidate, other: Candidate, phases: Callable[[Candidate], Phases]) -> str:
    """What stands against a candidate on more machines than the chosen one: longer steps, else what the goal says."""
    goal, waits = spec.goal, other.sync_s > _MUCH_WAITING * other.step_s
    waiting = f", {format_s(other.sync_s)} of it waiting for the network" if waits else ""
    steps = f"a step would take {format_s(other.step_s)} with it{waiting}, {format_s(chosen.step_s)} without"
    if other.step_s >= chosen.step_s:
        return steps
    own_s, other_s = phases(chosen).total_s, phases(other).total_s
    own, theirs = (price_of(spec, one, phases(one).total_s) for one in (chosen, other))
    wholes = f"the whole job would take {format_s(other_s)} with it, {format_s(own_s)} without"
    if goal.max_hours is not None and other_s > 3600 * goal.max_hours:
        return f"{steps}, but {wholes}: goal.max_hours is {goal.max_hours:g}"
    is_compared = goal.max_cost is not None or (goal.prefer == "cost" and own.is_whole)
    if is_compared and not theirs.is_whole:
        return f"{steps}, but what the job would cost with it is not known: {theirs.unknown}"
    prices = f"the job would cost {theirs.total or 0:.2f} {own.currency} with it, {own.total or 0:.2f} without"
    if goal.max_cost is not None and (theirs.total or 0) > goal.max_cost:
        return f"{steps}, but {prices}: goal.max_cost is {goal.max_cost:g}"
    if goal.prefer == "cost" and theirs.total != own.total:
        return f"{steps}, but {prices}"
    if goal.prefer == "memory":
        filled, fuller = chosen.memory_fraction, other.memory_fraction
        return f"{steps}, but {fuller:.0%} of the fullest device's memory would be used with it, {filled:.0%} without"
    return f"{steps}, but {wholes}" if other_s > own_s else f"{steps}; {wholes}: about as long"


def too_long(spec: JobSpec, candidate: Candidate, phases: Phases) -> str | None:
    """Why a plan needs a stated goal.max_hours; None where it takes less than two weeks, or one is stated."""
    if spec.goal.max_hours is not None or phases.total_s <= LONG_S:
        return None
    devices = ", ".join(dict.fromkeys(part.slot.device.name for part in candidate.placed))
    hours = math.ceil(1.05 * phases.total_s / 3600)
    return (
        f"{candidate.method.name} on {devices} would take {format_s(phases.total_s)}, the best that fits: more than"
        f" {format_s(LONG_S)} are planned only where the job allows them (goal.max_hours: {hours})"
    )


def prior_of(spec: JobSpec, num_parameters: float, method: Method) -> QualityPrior | None:
    """A method's prior where it is one for this job: measured on a model of the same size and the same kind of task."""
    if spec.build_objective().is_by_document:  # published runs copied answers
        return None
    prior = method.quality_prior()
    return prior if prior and prior.applies(num_parameters, str(spec.data.train)) else None


def by_goal(prefer: str, seconds: float, peak_bytes: float, lack: float, cost: float | None) -> tuple[float, float]:
    """What the goal wants least of, and what decides between equals; time where the cost is unknown."""
    if prefer == "memory":
        return peak_bytes, seconds
    if prefer == "quality":
        return lack, seconds
    return (seconds if prefer == "time" or cost is None else cost), peak_bytes


def _within_limits(
    spec: JobSpec, fitting: Sequence[Candidate], phases: Callable[[Candidate], Phases]
) -> list[Candidate]:
    goal, kept = spec.goal, list(fitting)
    limits = (
        ("goal.max_hours", goal.max_hours, lambda c: phases(c).total_s / 3600, "takes {:.2g} h", True),
        ("goal.max_cost", goal.max_cost, lambda c: _whole_price(spec, c, phases(c).total_s), "costs {:.2f}", True),
        ("goal.min_quality", goal.min_quality, lambda c: c.quality, "promises {:.3f}", False),
    )
    for key, limit, measure, phrase, at_most in limits:
        if limit is None:
            continue
        measured = [(measure(candidate), candidate) for candidate in kept]
        known = [(value, candidate) for value, candidate in measured if value is not None]
        if not known:
            raise JobError(_no_whole_price(spec, kept, f"{key} is {limit:g}"))
        passing = [candidate for value, candidate in known if (value <= limit if at_most else value >= limit)]
        if not passing:
            value, best = (min if at_most else max)(known, key=lambda pair: pair[0])
            why = f"{key} is {limit:g}, and the best that fits {phrase.format(value)}"
            raise NothingFits(
                f"{why} as a whole job ({phases(best).text}). {_how_to_shorten(phases(best))}"
                if at_most
                else f"{why} (a prior from published runs). Lower it, or use a larger model and measure"
            )
        kept = passing
    return kept


def _how_to_shorten(phases: Phases) -> str:
    """What to change about a job that is too long or too dear: evaluation first where that takes longest."""
    train = "lower train.num_train_epochs or data.max_length, choose a smaller model, or add a device"
    if phases.evaluation_s <= phases.training_s:
        return f"Raise the limit, {train}"
    return f"Raise the limit, lower eval.max_rows or eval.max_new_tokens, set eval.before to false, {train}"


def _whole_price(spec: JobSpec, candidate: Candidate, total_s: float) -> float | None:
    """None where a machine's price or draw is unknown: what is known is a lower bound, which keeps no limit."""
    price = price_of(spec, candidate, total_s)
    return price.total if price.is_whole else None


def _cost_key(
    spec: JobSpec, candidates: Sequence[Candidate], phases: Callable[[Candidate], Phases]
) -> Callable[[Candidate], tuple[bool, float]]:
    """What the goal cost wants least of: whole prices before others.

    Without any, the part that is known of all machines; without such a part, time.
    """
    part = _known_part(spec, candidates) if spec.goal.prefer == "cost" else None

    def key(candidate: Candidate) -> tuple[bool, float]:
        seconds = phases(candidate).total_s
        price = price_of(spec, candidate, seconds)
        whole = price.total if price.is_whole else None
        cost = {"whole": whole, "machines": price.machines, "electricity": price.electricity}[part] if part else None
        return cost is None, seconds if cost is None else cost

    return key


def _known_part(spec: JobSpec, candidates: Sequence[Candidate]) -> Literal["whole", "machines", "electricity"] | None:
    """What prices can be compared by; None where they cannot."""
    prices = [price_of(spec, candidate, 1.0) for candidate in candidates]
    if any(price.is_whole for price in prices):
        return "whole"
    if not any(price.lacks_price for price in prices):
        return "machines"
    return None if any(price.lacks_draw for price in prices) else "electricity"


def what_decides(spec: JobSpec, fitting: Sequence[Candidate]) -> str | None:
    """By what the cheapest was chosen where no price is whole; None where one is, or the goal is another."""
    if spec.goal.prefer != "cost" or (part := _known_part(spec, fitting)) == "whole":
        return None
    deciding = {"machines": "the machines' price", "electricity": "electricity"}.get(part or "", "time")
    return f"{_no_whole_price(spec, fitting, 'goal.prefer is cost')}. Until then {deciding} decides"


def _no_whole_price(spec: JobSpec, candidates: Sequence[Candidate], wish: str) -> str:
    """That no candidate's price is whole, what is unknown of the one that lacks least, and where to state it."""
    prices = [price_of(spec, candidate, 1.0) for candidate in candidates]
    nearest = min(prices, key=lambda price: len(price.without_price) + len(price.without_draw))
    keys = ["per_hour, or purchase"] * bool(nearest.without_price) + ["load_w"] * bool(nearest.without_draw)
    return (
        f"{wish}, and of no way that fits the whole cost is known (unknown: {nearest.unknown}). State it in the"
        f" hardware file, or as cost.nodes.NAME ({' and '.join(keys)})"
    )


def pareto(items: Sequence[T], costs: Callable[[T], tuple[float, ...]]) -> list[T]:
    """The items that no other one beats in every cost at once, in their order; of equal costs all stay.

    Less is better in each cost.
    """
    known = [costs(item) for item in items]
    different = set(known)

    def is_beaten(mine: tuple[float, ...]) -> bool:
        return any(theirs != mine and all(a <= b for a, b in zip(theirs, mine, strict=True)) for theirs in different)

    return [item for item, mine in zip(items, known, strict=True) if not is_beaten(mine)]
