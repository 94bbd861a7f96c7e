"""Pipelines: candidates whose devices have layers of their own and pass micro-batches on.  Pure.

Stages share micro-batches and optimizer; each has its own precision, kernel, checkpointing and way to hold its weights.
`strategies/cost/stages.py` says what a stage costs by its layers, `strategies/cost/pipeline.py` finds cut and order,
`strategies/cost/replicas.py` which devices make pipelines of their own.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from clusters.units import format_s
from orchestrator.job.spec import JobSpec
from orchestrator.planning.candidates import (
    Candidate,
    Division,
    Pipeline,
    Placed,
    Slot,
    in_stages,
    limit_per_node,
    stage_link,
)
from orchestrator.planning.enumeration import Enumeration
from orchestrator.planning.groups import linked_groups
from orchestrator.planning.memory_fit import device_shortage, host_usable_bytes, needed_bytes, node_shortage
from orchestrator.planning.refusals import allows_pipelines
from orchestrator.planning.settings import MICRO_BATCH_TOKENS, Assignment, Rejections, worthwhile_dtypes
from strategies.compatibility import conflict
from strategies.contract import Method, StrategyPlan
from strategies.cost.kept_layers import best_kept, best_kept_replicas
from strategies.cost.micro_batches import num_micro_batches, tokens_per_micro_batch
from strategies.cost.pipeline import (
    AHEADS,
    LEAST_BYTES_PER_S,
    MOST_DEVICES,
    WORTH_A_DEVICE,
    Arrangement,
    Boundary,
    Role,
    Search,
    orders_of,
    simulate,
)
from strategies.cost.replicas import Groups, Replicas, ReplicaSearch, divisions_of
from strategies.cost.stages import Place, StageCosts, pass_of
from strategies.cost.time import product_rate
from strategies.pipeline.wire_size import message_bytes
from strategies.workload import BYTES_PER_ELEMENT, Dtype, StagePart, Techniques, Wire

CLEARLY = 1.1  # times as fast as the best undivided way, or a pipeline is not worth its parts
_MOST_PLACES = 24  # devices whose stages are estimated, the fastest
_MOST_MICRO_BATCHES = 128
_TRIES = 5  # cuts that are estimated as they are, each after the last one did not fit
_NO_SHARE = 1e-3  # of a step's samples: so near, shares are equal


@dataclass(frozen=True)
class Layout:
    """What all stages have in common."""

    packing: bool
    rows: int
    optim: str
    is_fp16: bool  # one loss scale for all stages; else each computes in bfloat16 or float32


def with_pipelines(spec: JobSpec, enumeration: Enumeration) -> list[Candidate]:
    """The candidates that fit, and each method's pipeline where the job wants one or it clearly wins."""
    fitting = enumeration.fitting
    if not allows_pipelines(spec) or len(enumeration.slots) < 2 or enumeration.workload.shape.num_layers < 2:
        return fitting
    fastest_s = min((candidate.step_s for candidate in fitting), default=math.inf)
    limit_s = math.inf if spec.strategy.mode == "pipeline" else fastest_s / CLEARLY
    found = (PipelineSearch(spec, enumeration, method).best(limit_s) for method in enumeration.methods)
    return [*fitting, *itertools.chain.from_iterable(found)]


def why_no_stage(spec: JobSpec, enumeration: Enumeration, chosen: Candidate) -> dict[str, str]:
    """Node -> why it has no stage of the chosen pipeline; none where the choice is no pipeline."""
    if not chosen.pipelines:
        return {}
    first = chosen.placed[0].plan.techniques
    layout = Layout(first.packing, first.per_device_train_batch_size, first.optim, first.dtype == "float16")
    stages = StageSearch(PipelineSearch(spec, enumeration, chosen.method), layout)
    slowest_s = max(one.total_s for pipeline in chosen.pipelines for one in pipeline.simulation.passes)
    taking_part = {node.name for node in chosen.nodes}
    found: dict[str, str] = {}
    for place, slot in enumerate(stages.slots):
        if slot.node.name not in taking_part and slot.node.name not in found:
            found[slot.node.name] = _reason_excluded(stages, place, slowest_s)
    return found


def _reason_excluded(stages: StageSearch, place: int, slowest_s: float) -> str:
    ways, name = stages.costs.ways(place, Role(False, False, 2)), stages.slots[place].node.name
    if not ways:
        return f"a stage on {name} has no room for a single layer"
    layer_s = min(way.total_s(1) for way in ways)
    if layer_s > slowest_s:
        return (
            f"a stage on {name} would take {format_s(layer_s)} a micro-batch for one layer, where the others take"
            f" {format_s(slowest_s)} for all of theirs"
        )
    if isinstance(stages.search.spec.strategy.pipeline.stages, int):
        return f"with a stage on {name} a step is no shorter, of as many stages as the job states"
    return f"a stage on {name} would not make a step {1 - WORTH_A_DEVICE:.0%} shorter"


@dataclass
class PipelineSearch:
    """The fastest pipelines of one method over the devices of an enumeration."""

    spec: JobSpec
    enumeration: Enumeration
    method: Method

    def best(self, limit_s: float) -> list[Candidate]:
        """The fastest whose step takes less than the limit, by the first optimizer with which one fits.

        Several pipelines, each with all layers, have to save as much as a further device.
        """
        for optim, is_fp16 in itertools.product(self.enumeration.switches.optims, self._precisions()):
            searches = [StageSearch(self, layout) for layout in self._layouts(optim, is_fp16)]
            searches = [one for one in searches if len(one.slots) > 1]
            if not searches or not min(searches, key=lambda one: one.layout.rows).costs.may_fit():
                continue
            found = list[Candidate]()
            for count in self.num_replicas:
                if better := _fastest(searches, count, limit_s):
                    found.append(better)
                    limit_s = WORTH_A_DEVICE * better.step_s
            if found:
                return found
        return []

    def _precisions(self) -> list[bool]:
        """Whether stages compute in float16: where the job says so, or a GPU has no units for bfloat16."""
        dtypes = self.enumeration.switches.dtypes
        lacking = any(slot.device.has_bf16_units is False for slot in self.slots if slot.device.kind != "cpu")
        others = any(dtype != "float16" for dtype in dtypes)
        return [False] * others + [True] * ("float16" in dtypes and (lacking or not others))

    def _layouts(self, optim: str, is_fp16: bool) -> list[Layout]:
        """By rows of a micro-batch: several micro-batches a step, and not too many."""
        found: list[Layout] = []
        for packing in self.enumeration.switches.packings:
            layouts = [Layout(packing, rows, optim, is_fp16) for rows in self._row_counts(packing)]
            numbers = {one: num_micro_batches(self.enumeration.workload, self.plain(one)) for one in layouts}
            found += [one for one in layouts if 2 <= numbers[one] <= _MOST_MICRO_BATCHES] or layouts[:1]
        return found

    def _row_counts(self, packing: bool) -> list[int]:
        switches, workload = self.enumeration.switches, self.enumeration.workload
        if switches.rows is not None:
            return [switches.rows]
        if switches.accumulation is not None:
            rows = workload.global_batch_size / switches.accumulation
            return [max(1, math.ceil(rows * (workload.mean_length / switches.max_length if packing else 1)))]
        largest = max(MICRO_BATCH_TOKENS[slot.device.kind] for slot in self.slots) // switches.max_length
        return [2**power for power in range(max(1, largest).bit_length())]

    def plain(self, layout: Layout) -> Techniques:
        """Settings with a layout's micro-batches."""
        return Techniques("float32", "sdpa", layout.packing, False, layout.rows, self.enumeration.switches.max_length)

    @cached_property
    def slots(self) -> list[Slot]:
        """The devices that a stage may lie on, the fastest first."""

        def rate(slot: Slot) -> float:
            return max(product_rate(slot.device, slot.node, dtype)[0] for dtype in BYTES_PER_ELEMENT)

        return sorted(self.enumeration.slots, key=rate, reverse=True)[:_MOST_PLACES]

    @property
    def num_replicas(self) -> Sequence[int]:
        """As the job states them, or all that devices allow: of several pipelines one at least has two."""
        stated = self.spec.strategy.pipeline.replicas
        return (stated,) if isinstance(stated, int) else range(1, min(MOST_DEVICES, len(self.slots)))

    @property
    def num_stages(self) -> Sequence[int]:
        """Of each pipeline as the job states them, or all there may be: beside others a device may hold all layers."""
        stated = self.spec.strategy.pipeline.stages
        return (stated,) if isinstance(stated, int) else range(1, MOST_DEVICES + 1)

    @property
    def aheads(self) -> Sequence[int]:
        stated = self.spec.strategy.pipeline.ahead
        return (stated,) if isinstance(stated, int) else AHEADS

    def link(self, one: Slot, other: Slot) -> tuple[float, float, bool]:
        return stage_link(one, other, self.enumeration.cluster)

    def settings(self, slot: Slot, layout: Layout) -> tuple[Techniques, ...]:
        """What a stage on a slot may be trained with, the plainest first; in the fastest format that can be."""
        switches = self.enumeration.switches
        dtypes: list[Dtype] = ["float16"]
        if not layout.is_fp16:
            dtypes = worthwhile_dtypes([dtype for dtype in switches.dtypes if dtype != "float16"], slot)
        for dtype in dtypes:
            if found := tuple(self._settings(slot, layout, dtype)):
                return found
        return ()

    def _settings(self, slot: Slot, layout: Layout, dtype: Dtype) -> Iterator[Techniques]:
        switches, work = self.enumeration.switches, self.enumeration.workload
        part, shares = Assignment(work, slot, self.method, Division(), switches), bool(switches.share_prefixes)
        for offload in switches.offloads:
            if offload not in ("none", "weights") or (offload == "weights" and slot.device.kind == "cpu"):
                continue
            kernels = part.best_kernels(dtype, layout.packing, offload, layout.optim, Rejections())
            for base, recomputes, loss in itertools.product(kernels, switches.checkpointings, switches.losses):
                one = replace(base, gradient_checkpointing=recomputes, loss_type=loss, share_prefixes=shares)
                one = replace(one, per_device_train_batch_size=layout.rows)
                if not conflict(self.method, replace(one, stage=StagePart(0, 2, 0, 1)), slot.device, work.shape):
                    yield one


def _fastest(searches: Sequence[StageSearch], num_replicas: int, limit_s: float) -> Candidate | None:
    """The fastest of so many pipelines: layouts in the order of their bounds, until one brings nothing."""
    found: Candidate | None = None
    for search in sorted(searches, key=lambda one: one.filled_s(num_replicas)):
        if better := search.best(num_replicas, limit_s):
            found, limit_s = better, better.step_s
        elif limit_s < math.inf:  # else it does not fit, and one of fewer rows may
            break
    return found


@dataclass
class StageSearch:
    """The fastest pipelines with one layout of micro-batches."""

    search: PipelineSearch
    layout: Layout
    _boundaries: dict[tuple[int, int], Boundary | None] = field(default_factory=dict, init=False)

    @cached_property
    def slots(self) -> list[Slot]:
        return [slot for slot in self.search.slots if self.search.settings(slot, self.layout)]

    @cached_property
    def costs(self) -> StageCosts:
        def needed(plan: StrategyPlan, place: Place) -> float:
            return needed_bytes(plan.memory, place.device.kind)

        def place(slot: Slot) -> Place:
            settings = self.search.settings(slot, self.layout)
            kind = id(self.search.enumeration.slots_like(slot)[0])
            return Place(slot.device, slot.node, slot.memory_bytes, host_usable_bytes(slot.node), settings, kind)

        return StageCosts(self.search.method, self.search.enumeration.workload, list(map(place, self.slots)), needed)

    @cached_property
    def bound_s(self) -> float:
        """No step with this layout is shorter."""
        seconds = [self.costs.layer_s(number) for number in range(len(self.slots))]
        speeds = sorted((1 / max(one, 1e-12) for one in seconds), reverse=True)[:MOST_DEVICES]
        return self.num_micro_batches * self.costs.num_layers / sum(speeds)

    def filled_s(self, num_replicas: int) -> float:
        """The bound, and the time in which two stages of each pipeline fill and drain."""
        return self.bound_s * (1 + num_replicas / self.num_micro_batches)

    @cached_property
    def num_micro_batches(self) -> int:
        return num_micro_batches(self.search.enumeration.workload, self.search.plain(self.layout))

    def best(self, num_replicas: int, limit_s: float) -> Candidate | None:
        """The fastest of so many pipelines whose step takes less than the limit, estimated as it is."""
        if self.bound_s >= limit_s:
            return None
        for _ in range(_TRIES):
            found = self._best_arranged(num_replicas, limit_s)
            if found is None:
                return None
            candidate, too_small = self._best_shared(found)
            if not too_small:
                return candidate if candidate.step_s < limit_s else None
            for place in too_small:
                self.costs.tighten(place)
        return None

    def _best_arranged(self, num_replicas: int, limit_s: float) -> Replicas | None:
        held = [slot.node.held_layers for slot in self.slots]
        if num_replicas == 1:
            found = best_kept(self.arrangements, self._orders(), held, limit_s)
            return found and Replicas((found,), (self.num_micro_batches,))
        return best_kept_replicas(ReplicaSearch(self.arrangements), self._divisions(num_replicas), held, limit_s)

    @property
    def arrangements(self) -> Search:
        return Search(
            self.costs.num_layers,
            self.num_micro_batches,
            self.costs.ways,
            self._boundary,
            self.search.aheads,
            [self._alike(slot) for slot in self.slots],
        )

    def _alike(self, slot: Slot) -> Any:
        """Slots equal in this may stand for each other: of one kind, with the same links."""
        enumeration = self.search.enumeration
        alone = sum(other.node.name == slot.node.name for other in self.slots) == 1
        name = None if alone and enumeration.cluster.has_like_links else slot.node.name
        return id(enumeration.slots_like(slot)[0]), name

    def _orders(self) -> Iterator[tuple[int, ...]]:
        counts = [count for count in self.search.num_stages if count > 1]
        orders = itertools.chain.from_iterable(orders_of(group, counts) for group in self._groups())
        return (order for order in orders if self._may_train(order))

    def _divisions(self, num_replicas: int) -> Iterator[Groups]:
        for group in self._groups():
            for groups in divisions_of(group, num_replicas, self.search.num_stages):
                if self._may_train([place for one in groups for place in one]):
                    yield groups

    def _may_train(self, places: Sequence[int]) -> bool:
        """Whether they are as many as the job states, and nodes give so many of their devices."""
        stated = self.search.spec.cluster.num_workers
        if isinstance(stated, int) and len(places) != stated:
            return False
        return len(limit_per_node([self.slots[place] for place in places])) == len(places)

    def _groups(self) -> list[list[int]]:
        def rate(one: int, other: int) -> float:
            return self.search.link(self.slots[one], self.slots[other])[0]

        return linked_groups(len(self.slots), MOST_DEVICES, rate)

    def _boundary(self, one: int, other: int) -> Boundary | None:
        pair = min(one, other), max(one, other)
        if pair not in self._boundaries:
            self._boundaries[pair] = self._boundary_of(one, other, self._wire(pair))
        return self._boundaries[pair]

    def _boundary_of(self, one: int, other: int, wire: Wire, share: float = 1.0) -> Boundary | None:
        rate, trip_s, _ = self.search.link(self.slots[one], self.slots[other])
        if rate < LEAST_BYTES_PER_S:
            return None
        workload = replace(self.search.enumeration.workload, share=share)
        tokens = tokens_per_micro_batch(workload, self.search.plain(self.layout))
        return Boundary(message_bytes(tokens, workload.shape.hidden_size, wire), rate, trip_s / 2)

    def _wire(self, places: Sequence[int]) -> Wire:
        """As the job states it, or the form in which all of these places compute hidden states."""
        stated = self.search.spec.strategy.pipeline.wire
        if stated != "auto":
            return stated
        method = self.search.method
        forms = {method.load_dtype(self.costs.places[place].settings[0]) for place in places}
        return "bfloat16" if forms == {"bfloat16"} else "float32"

    def _best_shared(self, found: Replicas) -> tuple[Candidate, list[int]]:
        """The candidate with whole micro-batches for each pipeline, or that with shares by speed where it is faster."""
        best = self._candidate(found, found.shares)
        speeds = [one / run.simulation.step_s for one, run in zip(found.shares, best[0].pipelines, strict=True)]
        by_speed = [speed / sum(speeds) for speed in speeds]
        if max(abs(one - other) for one, other in zip(by_speed, found.shares, strict=True)) < _NO_SHARE:
            return best
        return min(best, self._candidate(found, by_speed), key=lambda it: (len(it[1]) > 0, it[0].step_s))

    def _candidate(self, found: Replicas, shares: Sequence[float]) -> tuple[Candidate, list[int]]:
        """The candidate that some pipelines are, estimated as it is, and the places on which it does not fit."""
        work, placed, pipelines, too_small = self.costs.workload, list[Placed](), list[Pipeline](), list[int]()
        for run, share in sorted(zip(found.pipelines, shares, strict=True), key=lambda one: -one[1]):
            wire = self._wire(run.devices)
            boundaries = [self._boundary_of(*pair, wire, share) for pair in itertools.pairwise(run.devices)]
            plans = [self.costs.plan(*one, share) for one in zip(run.devices, self._techniques(run, wire), strict=True)]
            for place, plan in zip(run.devices, plans, strict=True):
                placed.append(Placed(self.slots[place], plan, share, len(pipelines)))
                too_small += [place] if device_shortage(plan, self.slots[place]) else []
            known, count = tuple(one for one in boundaries if one), plans[0].num_micro_batches
            pipelines.append(Pipeline(simulate(list(map(pass_of, plans)), known, count, run.ahead), known, wire))
        if not too_small and node_shortage(placed, work.shape.num_parameters, self.search.method):
            too_small = [place for run in found.pipelines for place in run.devices]
        cluster = self.search.enumeration.cluster
        return in_stages(self.search.method, work, cluster, placed, pipelines, found), too_small

    def _techniques(self, found: Arrangement, wire: Wire) -> list[Techniques]:
        """Each stage's settings; the loss is the last one's, which computes it."""
        ways, count = [way.name for way in found.partition.ways], len(found.devices)
        edges = [0, *itertools.accumulate(found.partition.layers)]
        return [
            replace(
                way,
                loss_type=ways[-1].loss_type,
                stage=StagePart(index, count, edges[index], edges[index + 1], found.ahead, wire),
            )
            for index, way in enumerate(ways)
        ]
