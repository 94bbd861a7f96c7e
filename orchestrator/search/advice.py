"""What is predicted of every point before anything is tried: which cannot run, which cannot win, where to start.

Pure: no torch, no ray.  A point is planned twice: as the real job on all machines, which is what counts, and as a trial
on one machine, which is what will be measured.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

from clusters.capability import ClusterCapability, DeviceCapability, NodeCapability
from clusters.safe.reading import first_line
from orchestrator.errors import JobError, NothingFits
from orchestrator.job.job_file import spec_with
from orchestrator.job.space import Point, Space, key_of
from orchestrator.job.spec import JobSpec
from orchestrator.lifecycle.prepare import Sizes
from orchestrator.lifecycle.together.side_by_side import best_division
from orchestrator.planning import planner, workload
from orchestrator.planning.candidates import Slot
from orchestrator.planning.goal import by_goal, pareto
from orchestrator.planning.plan import Plan
from strategies.shape import ModelShape

# A point is dropped where another gives the same result this much faster and in no more memory: predicted steps are
# off by 13 % on average (LOG.md), and two of them are compared.
_CLEARLY = 1.35
# Keys that lay the same computation out in another way: the result is the same to rounding.
LAYOUT = frozenset(
    {
        "model.attn_implementation",
        "data.packing",
        "train.gradient_checkpointing",
        "train.per_device_train_batch_size",
        "train.gradient_accumulation_steps",
        "train.loss_type",
        "train.torch_compile",
        "train.use_liger_kernel",
        "strategy.offload",
        "strategy.mode",
    }
)


@dataclass(frozen=True)
class Advice:
    """A point and its plan for the real job."""

    point: Point
    plan: Plan

    @cached_property
    def numbers(self) -> str:
        """What decides the result: points that share it train the same weights (to rounding), whatever else they do."""
        t = self.plan.techniques
        beside = {key: value for key, value in self.point.items() if key not in LAYOUT}
        return json.dumps([self.plan.method, t.dtype, t.optim, t.max_length, beside], sort_keys=True)

    @cached_property
    def same(self) -> str:
        """Points that share it are one: they differ in a micro-batch size that the data never fills."""
        t = replace(self.plan.techniques, per_device_train_batch_size=0)
        return json.dumps([self.numbers, asdict(t), *self.costs], sort_keys=True)

    @cached_property
    def costs(self) -> tuple[float, float, float]:
        """Seconds, bytes, lacking quality (a prior): less is better in each."""
        return self.plan.total_s, self.plan.memory.total_bytes, -self.score

    @property
    def score(self) -> float:
        """The score that orders the methods, whatever the model."""
        prior = self.plan.build_method().quality_prior()
        return prior.score if prior else 0.0


@dataclass
class Forecast:
    """The predictions of every combination of a space's choices, in the order to try them."""

    worth: list[Advice] = field(default_factory=list)  # in the order to try them
    dominated: list[Advice] = field(default_factory=list)
    impossible: Counter[str] = field(default_factory=Counter)  # reason -> combinations
    num_front: int = 0  # of `worth`, the first: nothing is predicted to beat them in time, memory and quality

    @cached_property
    def by_key(self) -> dict[str, Advice]:
        return {key_of(advice.point): advice for advice in self.worth}


@dataclass
class Planning:
    """Plans points of one job, for real and as trials."""

    spec: JobSpec
    config: dict[str, Any]  # of the model
    shape: ModelShape
    capability: ClusterCapability
    whole: Sizes  # of the job's data
    sample: Sizes  # of the rows that trials train on
    global_batch_size: int
    compares_times: bool = False  # of trials: then each has its machine for itself
    points: Sequence[Point] = ()  # that may be tried, or many of them
    num_trials: int = 1  # that are left
    _works: dict[Any, Any] = field(default_factory=dict)
    _workers: dict[str, tuple[int, float]] = field(default_factory=dict)  # by node
    _real: dict[str, Plan] = field(default_factory=dict)  # each trial is judged again after every other one

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(len(self.whole.lengths) / self.global_batch_size)

    def real(self, point: Mapping[str, Any]) -> Plan:
        """The job with this point on all machines.  Raises JobError and NothingFits."""
        key = key_of(point)
        if key not in self._real:
            self._real[key] = self._plan(self._spec(point), self.capability, self.whole)
        return self._real[key]

    def trial(self, point: Mapping[str, Any], node: NodeCapability, num_workers: int | None = None) -> Plan:
        """A trial of this point on one device of a node.  Raises JobError and NothingFits.

        `num_workers`: that have a part of its CPU each; by default as many as it takes.
        """
        alone = {
            "train.max_steps": self.spec.search.trial_steps,
            "train.gradient_accumulation_steps": "auto",  # stated, it may be of several workers
            "strategy.mode": "single",
            "cluster.num_workers": 1,
            "eval.eval_steps": None,
            "eval.early_stopping_patience": None,
            "checkpoint.load_best_model_at_end": "auto",
        }
        part = node if node.gpus else node.part_of_cpu(num_workers or self.workers_on(node)[0])
        cluster = replace(self.capability, nodes=(replace(part, num_slots=1),))
        return self._plan(spec_with(self._spec(point), alone), cluster, self.sample)

    def workers_on(self, node: NodeCapability) -> tuple[int, float]:
        """How many trials at a time the CPU of a node without GPUs takes, and the predicted gain over one.

        Of this machine as many as do most steps in all, where the job leaves it open and times are not compared.
        """
        if node.name not in self._workers:
            spec = self.spec
            stated = [slot for slot in planner.slots_of(spec, self.capability) if slot.node.name == node.name]
            is_open = spec.cluster.address == "local" and spec.cluster.num_workers == spec.train.threads == "auto"
            if node.gpus or not is_open or self.compares_times:
                self._workers[node.name] = max(1, len(stated)), 1.0
            else:
                most = min(node.num_cores, self.num_trials)
                self._workers[node.name] = best_division(lambda count: self._trial_step_s(node, count), most)
        return self._workers[node.name]

    def _trial_step_s(self, node: NodeCapability, num_workers: int) -> float | None:
        """Predicted of the job as it is; None where a point that fits the whole machine does not fit a part."""
        for point in self.points if num_workers > 1 else ():
            if self._step_s(point, node, num_workers) is None and self._step_s(point, node, 1) is not None:
                return None
        return self._step_s({}, node, num_workers)

    def _step_s(self, point: Mapping[str, Any], node: NodeCapability, num_workers: int) -> float | None:
        try:
            return self.trial(point, node, num_workers).step_s
        except (JobError, NothingFits):
            return None

    def slots(self, nodes: Sequence[NodeCapability]) -> list[Slot]:
        """Where trials run at a time."""
        names = {node.name for node in nodes}
        found = [slot for slot in planner.slots_of(self.spec, self.capability) if slot.node.name in names]
        if len(found) == 1 and found[0].device.kind == "cpu":
            count = self.workers_on(next(node for node in nodes if node.name == found[0].node.name))[0]
            found = count * [replace(found[0], threads=max(1, found[0].threads // count))]
        return found

    def _spec(self, point: Mapping[str, Any]) -> JobSpec:
        return spec_with(self.spec, {**point, "train.global_batch_size": self.global_batch_size})

    def _plan(self, spec: JobSpec, cluster: ClusterCapability, sizes: Sizes) -> Plan:
        max_length, _ = planner.resolve_max_length(spec, self.config)
        train, slots = spec.train, len(planner.slots_of(spec, cluster))
        parts = train.per_device_train_batch_size, train.gradient_accumulation_steps, slots
        key = (id(sizes), max_length, train.max_steps, train.max_grad_norm > 0, spec.strategy.mode, parts)
        if key not in self._works:
            cut = sizes.cut(max_length)
            self._works[key] = workload.describe(
                spec, self.shape, list(cut.lengths), cut.num_supervised, slots, cut.tree_ratio
            )[0]
        return planner.make_plan(spec, self._works[key], cluster, max_length, sizes.held_out, {})


def by_kind(node: NodeCapability) -> list[NodeCapability]:
    """The node with one kind of its GPUs after the other: a trial runs on whichever Ray gives."""
    names = dict.fromkeys(gpu.name for gpu in node.gpus)
    if len(names) < 2:
        return [node]
    return [
        replace(node, devices=tuple(one for one in node.devices if one.kind == "cpu" or one.name == name))
        for name in names
    ]


def plan_for(plans: Sequence[Plan], shown: Sequence[DeviceCapability]) -> Plan:
    """The plan of a trial in a process that is shown these GPUs; the first where none of them was planned with."""
    names = {gpu.name for gpu in shown}
    return next((plan for plan in plans if plan.nodes[0].device in names), plans[0])


def advise(planning: Planning, space: Space) -> Forecast:
    """Plan every combination of the space's choices.  Raises NothingFits, with the constraints, where none can run."""
    advised = Forecast()
    possible: dict[str, Advice] = {}
    for point in space.points():
        try:
            advice = Advice(point, planning.real(point))
        except (JobError, NothingFits) as error:
            advised.impossible[first_line(error)] += 1
            continue
        if not _follows_point(point, advice.plan):
            continue  # it resolves to another point's plan, which is listed by itself
        possible.setdefault(advice.same, advice)
    if not possible:
        reasons = [f"{count} of {len(space)}: {reason}" for reason, count in advised.impossible.most_common(5)]
        raise NothingFits("no combination of search.space can run here\n" + "\n".join(reasons))
    alike: dict[str, list[Advice]] = {}
    for advice in possible.values():
        alike.setdefault(advice.numbers, []).append(advice)
    survivors = []
    for group in alike.values():
        for advice in group:
            (advised.dominated if _is_beaten(advice, group) else survivors).append(advice)
    advised.worth, advised.num_front = _in_order(survivors, planning.spec.goal.prefer)
    return advised


def advice_json(space: Space, advised: Forecast) -> dict[str, Any]:
    """advice.json: every point with its prediction."""

    def one(advice: Any) -> dict[str, Any]:
        return {
            "point": advice.point,
            "total_s": advice.plan.total_s,
            "peak_bytes": advice.plan.memory.total_bytes,
            "quality_prior": advice.plan.quality_prior["score"] if advice.plan.quality_prior else None,
        }

    return {
        "combinations": len(space),
        "impossible": dict(advised.impossible),
        "num_front": advised.num_front,
        "worth": [one(advice) for advice in advised.worth],
        "dominated": [one(advice) for advice in advised.dominated],
    }


def _follows_point(point: Point, plan: Plan) -> bool:
    """Whether the plan is the point: some keys are wishes that a plan may not follow."""
    attention = point.get("model.attn_implementation")
    return attention is None or attention == plan.techniques.attn_implementation


def _is_beaten(advice: Advice, alike: Sequence[Advice]) -> bool:
    """Whether another point that trains the same weights is clearly faster and takes no more memory."""
    seconds, peak, _ = advice.costs
    return any(other.costs[0] * _CLEARLY < seconds and other.costs[1] <= peak for other in alike)


def _in_order(survivors: list[Advice], prefer: str) -> tuple[list[Advice], int]:
    """The Pareto front first, the most wanted of it first; then the others; and how many are on the front."""
    front = pareto(survivors, lambda advice: advice.costs)
    on_front = {id(advice) for advice in front}
    rest = [advice for advice in survivors if id(advice) not in on_front]

    def wanted(advice: Advice) -> tuple[float, float]:
        return by_goal(prefer, *advice.costs, advice.plan.price.total)

    return [*sorted(front, key=wanted), *sorted(rest, key=wanted)], len(front)
