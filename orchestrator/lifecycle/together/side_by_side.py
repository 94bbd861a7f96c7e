"""Several workers on one CPU, each with a part of its cores: how many, and which runs each of them takes.

A pass starts some thousand operations, which takes as long with one core as with all; loading, evaluating and handing
back is mostly Python.  So two workers with half of the cores each do more in all, where there is work for both.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from functools import cache

from orchestrator.errors import JobError, NothingFits
from orchestrator.lifecycle.hooks import BankHooks
from orchestrator.lifecycle.run import HeldRun, keep_plan, leaves_workers_open, node_of, with_part_of_cpu

_WORTH = 1.1  # of one worker's speed: what workers take from each other's caches is in no formula
_MOST = 4  # more than two were not measured


def best_division(step_s: Callable[[int], float | None], most: int) -> tuple[int, float]:
    """How many workers, up to `most`, do most steps in all, and how many times those of one.

    `step_s`: predicted seconds of a step of each of so many; None where it does not fit.
    """
    alone, best, gain = step_s(1), 1, 1.0
    count = 2
    while alone and count <= min(most, _MOST):
        each = step_s(count)
        if each is None:
            break
        if (rate := count * alone / each) >= _WORTH * gain:
            best, gain = count, rate
        count *= 2
    return best, gain


@dataclass(frozen=True)
class SideBySide:
    """Runs divided among workers, and planned for them."""

    workers: tuple[tuple[HeldRun, ...], ...]  # the runs of each
    gain: float = 1.0  # predicted: steps of all workers together, for each that one would do
    num_cores: int = 0  # of their machine

    @property
    def text(self) -> str:
        """What happens, in one sentence."""
        plan = self.workers[0][0].plan
        assert plan
        return (
            f"{sum(map(len, self.workers))} runs of one base model train in {len(self.workers)} workers side by side,"
            f" with {plan.threads_per_worker} of {self.num_cores} cores each: predicted {self.gain:.2f} x the steps of"
            " one worker (cluster.num_workers: 1 keeps them in one)"
        )


def divide(runs: Sequence[HeldRun], bank: BankHooks, same: Callable[[HeldRun], Hashable]) -> SideBySide:
    """The runs among as many workers as do most steps in all; in one where more win nothing.

    `same`: what must be equal of runs that share a base; planned for a part of the CPU they may differ in it.
    """

    @cache
    def planned(num_workers: int) -> list[HeldRun]:
        return [replace(held, plan=with_part_of_cpu(held, num_workers, bank)) for held in runs]

    def seconds(num_workers: int) -> float | None:
        try:
            found = planned(num_workers)
        except (JobError, NothingFits):
            return None
        if num_workers > 1 and len({same(held) for held in [*found, runs[0]]}) > 1:
            return None  # with a part of the memory they would be computed in other ways
        return sum(held.plan.step_s * held.plan.num_steps for held in found if held.plan)

    count, gain, num_cores = 1, 1.0, 0
    if all(held.plan and leaves_workers_open(held.job, held.plan) for held in runs):
        num_cores = node_of(runs[0]).num_cores
        count, gain = best_division(seconds, min(len(runs), num_cores))
    kept = planned(count)
    for before, held in zip(runs, kept, strict=True):
        keep_plan(before, held, count)
    parts: list[list[HeldRun]] = [[] for _ in range(count)]
    for held in sorted(kept, key=_total_s, reverse=True):
        min(parts, key=lambda part: sum(map(_total_s, part))).append(held)
    return SideBySide(tuple(tuple(sorted(part, key=kept.index)) for part in parts), gain, num_cores)


def _total_s(held: HeldRun) -> float:
    assert held.plan
    return held.plan.whole_s
