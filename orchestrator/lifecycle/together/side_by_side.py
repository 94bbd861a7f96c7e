"""Several workers on one CPU, each with a part of its cores: how many, and which runs each of them takes.

A pass starts some thousand operations, which takes as long with one core as with all; loading, evaluating and handing
back is mostly Python.  So two workers with half of the cores each do more in all, where there is work for both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from clusters.capability import ClusterCapability, NodeCapability
from orchestrator.errors import JobError, NothingFits
from orchestrator.job.job_file import Job
from orchestrator.lifecycle.hooks import BankHooks
from orchestrator.lifecycle.recovery import replan
from orchestrator.lifecycle.run import HeldRun
from orchestrator.planning.plan import Plan

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


def may_divide(job: Job, plan: Plan) -> bool:
    """Whether a job leaves it to the planner how many workers its CPU has, with how many threads."""
    is_open = job.spec.cluster.num_workers == job.spec.train.threads == "auto"
    return is_open and plan.nodes[0].torch_device == "cpu" and plan.num_workers == 1


def node_of(held: HeldRun) -> NodeCapability:
    """The machine that a run was planned for."""
    assert held.plan
    name = held.plan.nodes[0].node
    return next(node for node in held.run.capability().nodes if node.name == name)


def as_one_of(held: HeldRun, num_workers: int, bank: BankHooks) -> HeldRun:
    """A run planned for one of so many workers, nothing written.  Raises JobError and NothingFits."""
    node, plan = node_of(held).part_of_cpu(num_workers), held.plan
    assert plan
    if plan.nodes[0].threads == node.num_cores:
        return held
    return replace(held, plan=replan(held.run, held.job, bank, plan, ClusterCapability((node,))))


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


def divided(runs: Sequence[HeldRun], bank: BankHooks) -> SideBySide:
    """The runs among as many workers as do most steps in all; in one where more win nothing."""
    if not all(held.plan and may_divide(held.job, held.plan) for held in runs):
        return SideBySide((tuple(runs),))

    def step_s(num_workers: int) -> float | None:
        try:
            plan = as_one_of(runs[0], num_workers, bank).plan
        except (JobError, NothingFits):
            return None
        return plan.step_s if plan else None

    num_cores = node_of(runs[0]).num_cores
    try:
        count, gain = best_division(step_s, min(len(runs), num_cores))
        planned = [as_one_of(held, count, bank) for held in runs]
    except (JobError, NothingFits):  # one that is larger than the first does not fit a part of the memory
        count, gain, planned = 1, 1.0, [as_one_of(held, 1, bank) for held in runs]
    for held in planned:
        assert held.plan
        held.run.keep("plan.json", held.plan.to_json())
    parts: list[list[HeldRun]] = [[] for _ in range(count)]
    for held in sorted(planned, key=_total_s, reverse=True):
        min(parts, key=lambda part: sum(map(_total_s, part))).append(held)
    return SideBySide(tuple(map(tuple, parts)), gain, num_cores)


def _total_s(held: HeldRun) -> float:
    assert held.plan
    return held.plan.whole_s
