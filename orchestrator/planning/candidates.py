"""A candidate: one way to run a workload on given devices, with its price.  Pure.

A *slot* is one device that would train.  A candidate fixes what all slots share (method, sharding, which slots take
part) and for each slot its own settings (precision, kernel, micro-batch, checkpointing, loss, offload).  Shares follow
speed, and a step lasts as long as its slowest part plus the network.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from clusters.capability import ClusterCapability, DeviceCapability, NodeCapability
from clusters.hardware.gpu_links import slowest_inside
from strategies.contract import Method, StrategyPlan
from strategies.cost.network import Network
from strategies.cost.pipeline import Boundary, PlannedPasses, Simulation
from strategies.cost.replicas import Replicas
from strategies.workload import Dtype, Kept, LocalMerge, LossType, Offload, Techniques, Wire, Workload

_ASSUMED_NETWORK_BYTES_PER_S = 118e6  # one gigabit, as most homes and offices have
_ASSUMED_ROUND_TRIP_S = 0.4e-3
_GLOO_BYTES_PER_S = 1.5e9  # one connection on the loopback of two shared cores: what a pair of stages gets at most
_GLOO_ROUND_TRIP_S = 0.1e-3

LOCAL_STEPS = 32  # of the fastest worker between two sums, where the job does not state them


@dataclass(frozen=True)
class Slot:
    """One device of one node, and how much of the node's memory and cores it may use."""

    node: NodeCapability
    device: DeviceCapability
    memory_bytes: float  # usable, the safety margin taken off
    threads: int

    @property
    def kind(self) -> Hashable:
        """Slots of one node that are equal in this are equal; a display takes memory from one of two like cards, and
        one may be slower than the other.
        """
        return self.device.name, self.memory_bytes, tuple(sorted(self.device.calibration.items()))

    @property
    def label(self) -> str:
        return f"{self.node.name} ({self.device.name})"

    def as_part_of_cpu(self, workers: int) -> Slot:
        """With what one of so many workers has of a CPU: its threads, and their part of products and bandwidth."""
        if self.device.kind != "cpu" or (self.threads, workers) == (self.node.num_cores, 1):
            return self
        device = self.device.shared(self.node.num_cores, self.threads, workers)
        return replace(self, node=replace(self.node, num_cores=self.threads), device=device)


@dataclass(frozen=True)
class Switches:
    """The values each switch may take, by default where a job leaves it open; a stated one is a single value."""

    max_length: int
    dtypes: Sequence[Dtype] = ("bfloat16", "float16", "float32")
    attentions: Sequence[str] = ("document", "flash_attention_2", "sdpa", "eager")
    packings: Sequence[bool] = (True, False)
    checkpointings: Sequence[bool] = (False, True)
    losses: Sequence[LossType] = ("nll", "chunked_nll")
    offloads: Sequence[Offload] = ("none", "activations", "optimizer", "parameters", "weights")
    optims: Sequence[str] = ("adamw_torch_fused", "adamw_bnb_8bit")
    rows: int | None = None  # None = open
    accumulation: int | None = None
    zero_stages: Sequence[int] = (0, 1, 2, 3)
    torch_compile: bool = False
    liger_kernel: bool = False
    share_prefixes: bool | None = None  # None = open: where the rows have enough in common
    cache_frozen_activations: Kept | None = None  # None = open: where steps become shorter
    local_merge: LocalMerge = "factors"
    deepspeed: bool = False  # the job configures DeepSpeed: stage 1 is DeepSpeed's too

    def used_by(self, found: Sequence[Techniques]) -> Switches:
        """The values of each device's own switches that some of these have; but all losses: logits grow with a step."""
        return replace(
            self,
            dtypes=[dtype for dtype in self.dtypes if any(dtype == one.dtype for one in found)],
            attentions=[name for name in self.attentions if any(name == one.attn_implementation for one in found)],
            packings=[packing for packing in self.packings if any(packing == one.packing for one in found)],
            checkpointings=[on for on in self.checkpointings if any(on == one.gradient_checkpointing for one in found)],
            offloads=[offload for offload in self.offloads if any(offload == one.offload for one in found)],
        )


@dataclass(frozen=True)
class Division:
    """How a group of devices divides what each would otherwise keep whole."""

    stage: int = 0  # of ZeRO
    num_devices: int = 1
    state_share: float | None = None  # by memory: this device's part of the optimizer's state


@dataclass(frozen=True)
class Placed:
    """One slot's part of a candidate."""

    slot: Slot
    plan: StrategyPlan
    share: float  # of each step's samples
    replica: int | None = None  # the pipeline of which it is a stage; None = it has all layers


@dataclass(frozen=True)
class Pipeline:
    """How some devices of a candidate pass micro-batches on: a stage each, in their order."""

    simulation: Simulation
    boundaries: tuple[Boundary, ...]
    wire: Wire

    @property
    def planned(self) -> PlannedPasses:
        one = self.simulation
        return PlannedPasses(one.passes, self.boundaries, one.num_micro_batches, one.ahead)


@dataclass(frozen=True)
class Candidate:
    """One way to run the job, and what it would cost."""

    method: Method
    placed: tuple[Placed, ...]
    sync_s: float  # of stages: what the slowest waits for the others and for the links
    num_steps: int
    tokens_per_step: float
    network: Network | None = None  # over which gradients are added up; None: one worker, or one pipeline
    assumed_network: bool = False
    pipelines: tuple[Pipeline, ...] = ()

    @property
    def replicas(self) -> list[list[Placed]]:
        """The copies of the model: a device each, or the stages of one."""
        if not self.pipelines:
            return [[part] for part in self.placed]
        return [[part for part in self.placed if part.replica == one] for one in range(len(self.pipelines))]

    @cached_property
    def whole_plan(self) -> StrategyPlan:
        """The first device's; of stages with what all of its pipeline train, save and compute."""
        plans = [part.plan for part in self.replicas[0]]
        return replace(
            plans[0],
            num_trainable_parameters=sum(plan.num_trainable_parameters for plan in plans),
            flops_per_token=sum(plan.flops_per_token for plan in plans),
            checkpoint_bytes=sum(plan.checkpoint_bytes for plan in plans),
        )

    @cached_property
    def step_s(self) -> float:
        return max(part.plan.time.step_s for part in self.placed) + self.sync_s

    @property
    def total_s(self) -> float:
        return self.step_s * self.num_steps

    @property
    def tokens_per_s(self) -> float:
        return self.tokens_per_step / self.step_s

    @cached_property
    def memory_fraction(self) -> float:
        """Of the fullest device's memory."""
        return max(part.plan.memory.total_bytes / part.slot.memory_bytes for part in self.placed)

    @cached_property
    def peak_bytes(self) -> float:
        return max(part.plan.memory.total_bytes for part in self.placed)

    @property
    def sent_bytes(self) -> float:
        """Gradients that a worker adds up with the others once a step."""
        return max(part.plan.gradient_bytes for part in self.placed)

    @property
    def sync_options(self) -> dict[str, float]:
        """Seconds a step would wait, by the way the workers keep together."""
        if self.network is None:
            return {}
        micro_s = min(part.plan.time.step_s / part.plan.num_micro_batches for part in self.placed)
        ways = {}
        for dtype, factor in (("float32", 1.0), ("bfloat16", 0.5)):
            sent = factor * self.sent_bytes
            ways[f"all-reduce {dtype}"] = self.network.exposed_s(sent, micro_s, self.network.bucket_bytes(sent))
        if not self.pipelines:
            ways["local steps"] = self.network.all_reduce_s(self.sent_bytes) / LOCAL_STEPS
        return ways

    @property
    def quality(self) -> float | None:
        """The score that orders the methods, whatever the model: what is shown is `goal.prior_of`."""
        prior = self.method.quality_prior()
        return prior.score if prior else None

    @property
    def zero_stage(self) -> int:
        return self.placed[0].plan.techniques.zero_stage

    @property
    def dtype(self) -> Dtype:
        """The precision of the first device."""
        return self.placed[0].plan.techniques.dtype

    @property
    def device_names(self) -> list[str]:
        return [part.slot.device.name for part in self.placed]

    @property
    def is_guess(self) -> bool:
        return self.assumed_network or any(part.plan.time.is_guess for part in self.placed)

    @property
    def nodes(self) -> tuple[NodeCapability, ...]:
        return tuple({part.slot.node.name: part.slot.node for part in self.placed}.values())


def limit_per_node(slots: Iterable[Slot]) -> list[Slot]:
    """In this order, as many slots of each node as the node gives to training."""
    taken: list[Slot] = []
    counts: dict[str, int] = {}
    for slot in slots:
        limit, count = slot.node.num_slots, counts.get(slot.node.name, 0)
        if limit is None or count < limit:
            counts[slot.node.name] = count + 1
            taken.append(slot)
    return taken


def network_between(slots: Sequence[Slot], cluster: ClusterCapability) -> tuple[Network | None, bool]:
    """The slowest link of the ring, None for one worker, and whether a typical link stood in for an unknown one."""
    if len(slots) < 2:
        return None, False
    names = list(dict.fromkeys(slot.node.name for slot in slots))
    if len(names) == 1:
        inside = slowest_inside(slots[0].node, [slot.device for slot in slots])
        return Network(len(slots), inside.bytes_per_s, inside.round_trip_s), inside.is_assumed
    bytes_per_s, round_trip_s, is_assumed = slowest_link(names, cluster)
    return Network(len(slots), bytes_per_s, round_trip_s), is_assumed


def slowest_link(names: Sequence[str], cluster: ClusterCapability) -> tuple[float, float, bool]:
    """The lowest rate and the longest round trip among nodes, and whether a typical rate stood in for an unknown."""
    if cluster.has_like_links:
        names = names[:2]
    links = [cluster.link(first, second) for first, second in itertools.combinations(names, 2)]
    rates = [link.bytes_per_s if link else None for link in links]
    slowest = min(rate or _ASSUMED_NETWORK_BYTES_PER_S for rate in rates)
    trips = max((link.round_trip_s if link else None) or _ASSUMED_ROUND_TRIP_S for link in links)
    return slowest, trips, any(rate is None for rate in rates)


def stage_link(one: Slot, other: Slot, cluster: ClusterCapability) -> tuple[float, float, bool]:
    """Bytes a second, round trip, and whether a typical link stood in: gloo carries messages of GPUs as well."""
    if one.node.name == other.node.name:
        inside = slowest_inside(one.node, [one.device, other.device])
        return min(inside.bytes_per_s, _GLOO_BYTES_PER_S), _GLOO_ROUND_TRIP_S, inside.is_assumed
    rate, trip_s, is_assumed = slowest_link((one.node.name, other.node.name), cluster)
    return min(rate, _GLOO_BYTES_PER_S), trip_s, is_assumed


def step_s_of(plans: Sequence[StrategyPlan], network: Network | None) -> float:
    """Seconds of a step in which each slot, or one of each kind, runs one of these plans."""
    return max(plan.time.step_s for plan in plans) + (waiting_s(network, plans) if network else 0.0)


def in_stages(
    method: Method,
    work: Workload,
    cluster: ClusterCapability,
    placed: Sequence[Placed],
    pipelines: Sequence[Pipeline],
    found: Replicas,
) -> Candidate:
    """The candidate of pipelines beside each other, or of one, with the stages of each in their order.

    A step ends with the slowest pipeline's last pass, the sums that were found, the update and everybody's numbers.
    """
    update_s = max(part.plan.time.update_s for part in placed)
    boundaries = [one for pipeline in pipelines for one in pipeline.boundaries]
    trips = [2 * one.latency_s for one in boundaries] + ([found.network.round_trip_s] if found.network else [])
    numbers = Network(len(placed), min(one.bytes_per_s for one in boundaries), max(trips))
    step_s = max(one.simulation.step_s for one in pipelines) + found.sum_s + update_s + numbers.step_s
    return Candidate(
        method,
        tuple(placed),
        step_s - max(part.plan.time.step_s for part in placed),
        work.num_steps,
        work.tokens_per_step,
        found.network,
        any(stage_link(one.slot, other.slot, cluster)[2] for one, other in itertools.pairwise(placed)),
        pipelines=tuple(pipelines),
    )


def waiting_s(network: Network, plans: Sequence[StrategyPlan]) -> float:
    """Seconds a step waits: for gradients that the backward pass does not hide, and for weights that ZeRO moves."""
    gradient = max(plan.gradient_bytes for plan in plans)
    gathered = max(plan.gathered_bytes for plan in plans)
    num_micro = max(plan.num_micro_batches for plan in plans)
    techniques = plans[0].techniques
    if rank := plans[0].averaged_rank:
        return network.averaged_products_s(gradient, rank)
    if not techniques.uses_engine:
        micro_batch_s = min(plan.time.step_s / plan.num_micro_batches for plan in plans)
        waits = network.exposed_s(gradient, micro_batch_s, network.bucket_bytes(gradient))
        if techniques.zero_stage == 1:  # each sends the weights that it updated to the others
            waits += network.gather_s(gradient)
        return waits
    # DeepSpeed reduces every micro-batch's gradients from stage 2 on, and no backward pass hides it: whole buckets
    # until stage 2 (use_multi_rank_bucket_allreduce), and then the weights come back.
    if techniques.zero_stage < 3:
        reduced = network.all_reduce_s(gradient) * (num_micro if techniques.zero_stage >= 2 else 1)
        return network.step_s + reduced + network.gather_s(gradient)
    moved = (2 + techniques.gradient_checkpointing) * gathered + gradient
    computing = min((plan.time.compute_s + plan.time.memory_s) / plan.num_micro_batches for plan in plans)
    return network.step_s + num_micro * network.gather_wait_s(moved, computing)
