"""Every way to run a workload on given machines, with its price: what the planner chooses from.  Pure.

A *slot* is one device that would train.  A candidate fixes what all slots share (method, sharding, which slots take
part) and for each slot what is its own (precision, kernel, micro-batch, checkpointing, loss, offload); shares follow
speed, and a step lasts as long as its slowest part plus the network.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

from clusters.capability import ClusterCapability, DeviceCapability, NodeCapability
from clusters.units import GIB, format_bytes
from strategies.compatibility import conflict
from strategies.contract import BYTES_PER_ELEMENT, Dtype, LossType, Method, Offload, StrategyPlan, Techniques, Workload
from strategies.cost.network import Network
from strategies.cost.time import product_rate

_ASSUMED_NETWORK_BYTES_PER_S = 118e6  # one gigabit, as most homes and offices have
_ASSUMED_ROUND_TRIP_S = 0.4e-3
_INSIDE_BYTES_PER_S = 8e9  # between GPUs of one machine, over PCIe
_INSIDE_ROUND_TRIP_S = 20e-6
_MICRO_BATCH_TOKENS = {"cpu": 2048, "cuda": 32768, "rocm": 32768}  # beyond it nothing is gained: the device is full
_HOST_RESERVE_BYTES = 2 * GIB  # of a node's memory: its system and the processes themselves
_OVER = 1 / 0.92  # half-way to the high estimate may eat the safety margin, no more
_EQUAL = 1.01  # times this close are equal

LOCAL_STEPS = 32  # of the fastest worker between two sums, where nothing else is said

Prefer = Literal["time", "memory"]


@dataclass(frozen=True)
class Slot:
    """One device of one node, and how much of the node's memory and cores it may use."""

    node: NodeCapability
    device: DeviceCapability
    memory_bytes: float  # usable, the safety margin taken off
    threads: int

    @property
    def kind(self) -> tuple[str, float]:
        """Slots of one node that are equal in this are equal; a display takes memory from one of two like cards."""
        return self.device.name, self.memory_bytes


@dataclass(frozen=True)
class Switches:
    """The values each switch may take; a job that states one leaves a single value."""

    dtypes: Sequence[Dtype]
    attentions: Sequence[str]
    packings: Sequence[bool]
    checkpointings: Sequence[bool]
    losses: Sequence[LossType]
    offloads: Sequence[Offload]
    optims: Sequence[str]
    rows: int | None  # None = open
    accumulation: int | None
    zero_stages: Sequence[int]
    torch_compile: bool
    max_length: int
    deepspeed: bool = False  # the job speaks of DeepSpeed: stage 1 is its, too


@dataclass(frozen=True)
class Division:
    """How a group divides what each of its devices would otherwise keep whole."""

    stage: int = 0  # of ZeRO
    num_devices: int = 1
    state_share: float | None = None  # by memory: this device's part of the optimizer's state


@dataclass(frozen=True)
class Placed:
    """One slot's part of a candidate."""

    slot: Slot
    plan: StrategyPlan
    share: float  # of each step's samples


@dataclass(frozen=True)
class Candidate:
    """One way to run the job, and what it would cost."""

    method: Method
    placed: tuple[Placed, ...]
    sync_s: float
    num_steps: int
    tokens_per_step: float
    network: Network | None = None  # None: one worker
    assumed_network: bool = False

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
        ways["local steps"] = self.network.all_reduce_s(self.sent_bytes) / LOCAL_STEPS
        return ways

    @property
    def quality(self) -> float | None:
        prior = self.method.quality_prior()
        return prior.score if prior else None

    @property
    def costs(self) -> tuple[float, float, float]:
        """Seconds, bytes, lacking quality (a prior): less is better in each."""
        return self.total_s, self.peak_bytes, -(self.quality or 0.0)

    @property
    def zero_stage(self) -> int:
        return self.placed[0].plan.techniques.zero_stage

    @property
    def is_guess(self) -> bool:
        return self.assumed_network or any(part.plan.time.is_guess for part in self.placed)

    @property
    def nodes(self) -> tuple[NodeCapability, ...]:
        return tuple({part.slot.node.name: part.slot.node for part in self.placed}.values())


@dataclass
class Tried:
    """What came of looking at every combination: those that fit, and why the others do not."""

    fitting: list[Candidate] = field(default_factory=list)
    other_groups: list[Candidate] = field(default_factory=list)  # would fit, but with more or fewer workers than asked
    rejected: dict[str, str] = field(default_factory=dict)  # combination -> reason, one combination for each reason
    least: dict[str, tuple[StrategyPlan, str]] = field(default_factory=dict)  # slot's name -> the leanest that does
    # not fit there, and why
    _looked: dict[Any, list[StrategyPlan]] = field(default_factory=dict)
    _chosen: dict[Any, StrategyPlan | None] = field(default_factory=dict)
    _twins: dict[str, str] = field(default_factory=dict)
    _kinds: dict[str, NodeCapability] = field(default_factory=dict)

    def twin_of(self, slot: Slot) -> str:
        """The name of the first node that is like this slot's but for its name: what fits the one fits the other."""
        if slot.node.name not in self._twins:
            unnamed = tuple(replace(device, uuid=None, pci_bus_id=None) for device in slot.node.devices)
            plain = replace(slot.node, name="", devices=unnamed)
            self._kinds.setdefault(slot.node.name, plain)
            self._twins[slot.node.name] = next(name for name, other in self._kinds.items() if other == plain)
        return self._twins[slot.node.name]

    def reject(self, label: str, reason: str) -> None:
        if reason not in self.rejected.values():
            self.rejected[label] = reason


def at_once(slots: Iterable[Slot]) -> list[Slot]:
    """In this order as many of each node as it gives to training."""
    taken: list[Slot] = []
    for slot in slots:
        limit = slot.node.num_slots
        if limit is None or sum(other.node.name == slot.node.name for other in taken) < limit:
            taken.append(slot)
    return taken


def enumerate_candidates(
    workload: Workload, slots: Sequence[Slot], cluster: ClusterCapability, methods: Iterable[Method], switches: Switches
) -> Tried:
    """All candidates that fit.  Offloading is looked at only where nothing fits without it, whatever the method."""
    tried = Tried()
    plain: list[Offload] = [offload for offload in switches.offloads if offload == "none"]
    moved: list[Offload] = [offload for offload in switches.offloads if offload != "none"]
    for offloads in (plain, moved):
        if offloads and not tried.fitting:
            tried._looked.clear()
            tried._chosen.clear()
            _collect(workload, slots, cluster, methods, replace(switches, offloads=offloads), tried)
    return tried


def _collect(
    workload: Workload,
    slots: Sequence[Slot],
    cluster: ClusterCapability,
    methods: Iterable[Method],
    switches: Switches,
    tried: Tried,
) -> None:
    for method, stage, optim in itertools.product(methods, switches.zero_stages, switches.optims):
        if stage and len(slots) < 2:
            continue
        one = replace(switches, optims=(optim,))  # all workers make the same update
        for prefer in ("time", "memory"):
            for candidate in _groups(workload, slots, cluster, method, stage, one, prefer, tried):
                if candidate not in tried.fitting:
                    tried.fitting.append(candidate)


def _groups(
    workload: Workload,
    slots: Sequence[Slot],
    cluster: ClusterCapability,
    method: Method,
    stage: int,
    switches: Switches,
    prefer: Prefer,
    tried: Tried,
) -> Iterator[Candidate]:
    """Each device alone, then the fastest two, three ... together."""
    fits: list[Candidate] = []
    if not stage:
        alone = [_place(workload, [slot], cluster, method, 0, switches, prefer, tried) for slot in slots]
        fits = sorted((found for found in alone if found), key=lambda found: found.step_s)
        seen = set()
        for found in fits:
            slot = found.placed[0].slot
            if (slot.node.name, slot.kind) not in seen:  # two like cards alone are one way
                seen.add((slot.node.name, slot.kind))
                yield found
        order = [found.placed[0].slot for found in fits]
    else:
        order = sorted((s for s in slots if s.device.kind != "cpu"), key=lambda s: -s.memory_bytes)
        order += sorted((s for s in slots if s.device.kind == "cpu"), key=lambda s: -s.memory_bytes)
    order = at_once(order)
    for count in range(2, len(order) + 1):
        together = _place(workload, order[:count], cluster, method, stage, switches, prefer, tried)
        if together:
            yield together
    if fits and len(order) > 2:  # one behind a slow link must not keep out those after it
        best = fits[0]
        for slot in order[1:]:
            wider = [part.slot for part in best.placed] + [slot]
            together = _place(workload, wider, cluster, method, stage, switches, prefer, tried)
            if together and together.step_s < best.step_s:
                best = together
        if len(best.placed) > 1:
            yield best


def _place(
    workload: Workload,
    slots: Sequence[Slot],
    cluster: ClusterCapability,
    method: Method,
    stage: int,
    switches: Switches,
    prefer: Prefer,
    tried: Tried,
) -> Candidate | None:
    """The best settings of each slot, shares in proportion to speed; None where one of them does not fit."""
    count = len(slots)
    divisions = [Division(stage, count)] * count
    by_deepspeed = count > 1 and (stage > 1 or (stage == 1 and switches.deepspeed))
    if by_deepspeed and len({slot.device.name for slot in slots}) > 1:
        label = f"{method.name} + ZeRO-{stage} x {count} on {slots[-1].node.name} ({slots[-1].device.name})"
        tried.reject(label, "DeepSpeed divides into equal parts: it needs devices of one kind (zero1 works by memory)")
        return None
    if stage == 1 and not by_deepspeed:
        parts = _state_shares(workload, slots, method, switches, tried)
        if parts is None:
            return None
        divisions = [Division(stage, count, part) for part in parts]
    shares = [1.0 / count] * count
    best: list[StrategyPlan] = []
    for _ in range(1 if count == 1 or by_deepspeed else 3):  # a share decides the micro-batch, which decides the speed
        best, alike = [], {}
        for slot, share, division in zip(slots, shares, divisions, strict=True):
            key = (slot.node.name, slot.kind, share, division)
            if key not in alike:  # cards of one node are often of one kind
                one = replace(workload, share=share)
                alike[key] = _best_on(one, slot, method, division, switches, prefer, tried)
            found = alike[key]
            if found is None:
                return None
            best.append(found)
        if not by_deepspeed:
            speeds = [share / plan.time.step_s for share, plan in zip(shares, best, strict=True)]
            shares = [speed / sum(speeds) for speed in speeds]
    network, assumed = _network(slots, cluster)
    wait_s = _wait_s(network, best) if network else 0.0
    placed = tuple(Placed(slot, plan, share) for slot, plan, share in zip(slots, best, shares, strict=True))
    if crowded := _crowded_host(placed, workload.shape.num_parameters, method):
        last = f"{slots[-1].node.name} ({slots[-1].device.name})"
        tried.reject(f"{count} x {_label(method, best[-1].techniques, last)}", crowded)
        tried.least.setdefault(last, (best[-1], crowded))
        return None
    return Candidate(method, placed, wait_s, workload.num_steps, workload.tokens_per_step, network, assumed)


def _crowded_host(placed: Sequence[Placed], num_parameters: float, method: Method) -> str | None:
    """Which node's memory its workers overflow together; None where all fit.

    Each worker's part of the host counts, and the whole model where DeepSpeed divides it: every worker then loads it
    there before the first byte is on a device.  Without DeepSpeed weights go straight to the device.
    """
    needs: dict[str, float] = {}
    for part in placed:
        if part.slot.device.kind != "cpu":
            techniques = part.plan.techniques
            bytes_loaded = num_parameters * BYTES_PER_ELEMENT[method.load_dtype(techniques)]
            loading = bytes_loaded if techniques.uses_engine else 0.0
            name = part.slot.node.name
            needs[name] = needs.get(name, 0.0) + max(part.plan.memory.host_bytes, loading)
    for node in {part.slot.node.name: part.slot.node for part in placed}.values():
        room, need = _host_room(node), needs.get(node.name, 0.0)
        if need > room and node.memory_bytes is None:
            return f"loading needs {format_bytes(need)} of {node.name}'s own memory, whose size is unknown"
        if need > room:
            workers = sum(part.slot.node.name == node.name for part in placed)
            return (
                f"the {workers} workers on {node.name} need {format_bytes(need)} of the node's own memory together, has"
                f" {format_bytes(room)} usable"
            )
    return None


def _state_shares(
    workload: Workload, slots: Sequence[Slot], method: Method, switches: Switches, tried: Tried
) -> list[float] | None:
    """The optimizer's state by what memory is free beside everything else; None where there is no room at all."""
    free = []
    for slot in slots:
        share = replace(workload, share=1.0 / len(slots))
        leanest = _best_on(share, slot, method, Division(1, len(slots), 0.0), switches, "memory", tried)
        if leanest is None:
            return None
        free.append(max(0.0, slot.memory_bytes - _cautious(leanest)))
    return [room / sum(free) for room in free] if sum(free) else None


def _best_on(
    workload: Workload,
    slot: Slot,
    method: Method,
    division: Division,
    switches: Switches,
    prefer: Prefer,
    tried: Tried,
) -> StrategyPlan | None:
    """The fastest (or leanest) settings that fit one slot; of equals the plainest, which are listed first."""
    share, optim = round(workload.share, 3), switches.optims[0]
    twin, where = tried.twin_of(slot), f"{slot.node.name} ({slot.device.name})"
    key = (twin, slot.kind, method.name, division, share, optim)
    if key not in tried._looked:
        tried._looked[key] = _all_on(workload, slot, method, division, switches, tried)
    elif (least := tried.least.get(f"{twin} ({slot.device.name})")) is not None:
        tried.least.setdefault(where, least)
    if (key, prefer) not in tried._chosen:
        tried._chosen[key, prefer] = _preferred(tried._looked[key], prefer)
    return tried._chosen[key, prefer]


def _preferred(fitting: Sequence[StrategyPlan], prefer: Prefer) -> StrategyPlan | None:
    if not fitting:
        return None
    if prefer == "memory":
        return min(fitting, key=lambda plan: (plan.memory.total_bytes, plan.time.step_s))
    fastest = min(plan.time.step_s for plan in fitting)
    return next(plan for plan in fitting if plan.time.step_s <= _EQUAL * fastest)


def _all_on(
    workload: Workload,
    slot: Slot,
    method: Method,
    division: Division,
    switches: Switches,
    tried: Tried,
) -> list[StrategyPlan]:
    """Every setting that fits one slot."""
    where = f"{slot.node.name} ({slot.device.name})"
    host_room = _host_room(slot.node)
    fitting: list[StrategyPlan] = []
    nearest: tuple[StrategyPlan, str] | None = None
    for techniques in _settings(workload, slot, method, division, switches, tried):
        plan = method.estimate(workload, slot.device, slot.node, techniques)
        needs = plan.memory.total_bytes
        why = _why_too_much(plan, slot, host_room)
        if why is None:
            fitting.append(plan)
            continue
        if where not in tried.least or needs < tried.least[where][0].memory.total_bytes:
            tried.least[where] = (plan, why)
        if plan.memory.host_bytes > host_room:
            tried.reject(_label(method, techniques, where), why)
        elif nearest is None or needs < nearest[0].memory.total_bytes:
            nearest = (plan, why)
    if not fitting and nearest is not None:
        tried.reject(_label(method, nearest[0].techniques, where), nearest[1])
    return fitting


def _host_room(node: NodeCapability) -> float:
    """What a node's own memory leaves to training; unknown memory is none."""
    return max(0.0, (node.memory_bytes or 0) - _HOST_RESERVE_BYTES)


def _why_too_much(plan: StrategyPlan, slot: Slot, host_room: float) -> str | None:
    """Which memory a plan does not fit into; None where it fits."""
    needs, host, room = plan.memory.total_bytes, plan.memory.host_bytes, slot.memory_bytes
    if host > host_room and slot.node.memory_bytes is None:
        return f"needs {format_bytes(host)} of the node's own memory, whose size is unknown"
    if host > host_room:
        return f"needs {format_bytes(host)}, has {format_bytes(host_room)} usable of the node's own memory"
    if needs > room:
        return f"needs {format_bytes(needs)}, has {format_bytes(room)} usable"
    if _cautious(plan) > _OVER * room:
        return f"may need {format_bytes(plan.memory.high_bytes)} at worst, has {format_bytes(room)} usable"
    return None


def _cautious(plan: StrategyPlan) -> float:
    """Half-way between the expected and the high estimate."""
    return (plan.memory.total_bytes + plan.memory.high_bytes) / 2


def _settings(
    workload: Workload,
    slot: Slot,
    method: Method,
    division: Division,
    switches: Switches,
    tried: Tried,
) -> Iterator[Techniques]:
    """Settings worth an estimate: of kernels that compute the same only the best the device has."""
    where, num_devices = f"{slot.node.name} ({slot.device.name})", division.num_devices
    dtypes = _worthwhile(switches.dtypes, slot)
    for packing, offload, optim in itertools.product(switches.packings, switches.offloads, switches.optims):
        for dtype in dtypes:
            allowed: Techniques | None = None
            refused: list[tuple[str, str]] = []
            for attention in _kernels(switches.attentions, slot.device, packing):
                techniques = Techniques(
                    dtype=dtype,
                    attn_implementation=attention,
                    packing=packing,
                    gradient_checkpointing=switches.checkpointings[0],
                    per_device_train_batch_size=1,
                    max_length=switches.max_length,
                    optim=optim,
                    loss_type=switches.losses[0],
                    torch_compile=switches.torch_compile,
                    offload=offload,
                    zero_stage=division.stage,
                    num_shards=num_devices if division.stage else 1,
                    state_share=division.state_share,
                )
                reason = conflict(method, techniques, slot.device, workload.shape, num_devices)
                if reason is None:
                    allowed = techniques
                    break
                refused.append((_label(method, techniques, where), reason))
            if allowed is None:  # what stands against the plainest kernel is what must be mended
                tried.reject(*refused[-1])
                continue
            for label, reason in refused:
                tried.reject(label, reason)
            rows = _row_counts(workload, slot, switches, packing)
            for checkpointing, loss, count in itertools.product(switches.checkpointings, switches.losses, rows):
                full = replace(
                    allowed,
                    gradient_checkpointing=checkpointing,
                    loss_type=loss,
                    per_device_train_batch_size=count,
                )
                reason = conflict(method, full, slot.device, workload.shape, num_devices)
                if reason is None:
                    yield full
                else:
                    tried.reject(_label(method, full, where), reason)


def _kernels(asked: Sequence[str], device: DeviceCapability, packing: bool) -> list[str]:
    """Attention kernels, best first: on a GPU the flash-attn library before one call a document."""
    allowed = [kernel for kernel in asked if packing or kernel != "document"]
    if device.kind != "cpu" and len(allowed) > 1:
        allowed.sort(key=lambda kernel: kernel != "flash_attention_2")
    return allowed


def _worthwhile(dtypes: Sequence[Dtype], slot: Slot) -> list[Dtype]:
    """Of the 16-bit formats the faster one, bfloat16 of equals: it needs no loss scaling; and fp32 beside it."""
    half: list[Dtype] = [dtype for dtype in dtypes if dtype != "float32"]
    if len(half) > 1:
        rate = {dtype: product_rate(slot.device, slot.node, dtype)[0] for dtype in half}
        if slot.device.kind != "cpu" and slot.device.has_bf16_units is False:
            rate["bfloat16"] = 0.0
        half = [max(half, key=lambda dtype: (rate[dtype], dtype == "bfloat16"))]
    return [*half, "float32"] if "float32" in dtypes else half


def _row_counts(workload: Workload, slot: Slot, switches: Switches, packing: bool) -> list[int]:
    """Micro-batch sizes worth a look: the whole share, and its halvings."""
    if switches.rows is not None:
        return [switches.rows]
    share = math.ceil(workload.global_batch_size * workload.share)
    if switches.accumulation is not None:
        share = math.ceil(share / switches.accumulation)
    if packing:  # rows of max_length tokens, each holding several samples
        share = math.ceil(share * workload.mean_length / switches.max_length)
    share = max(1, min(share, _MICRO_BATCH_TOKENS[slot.device.kind] // switches.max_length))
    return sorted({max(1, share >> halvings) for halvings in range(share.bit_length())}, reverse=True)


def _label(method: Method, techniques: Techniques, where: str) -> str:
    """A combination in words, without its micro-batch."""
    parts = [method.name, techniques.dtype, techniques.attn_implementation]
    if techniques.gradient_checkpointing:
        parts.append("checkpointing")
    if techniques.optim.startswith("adamw_bnb"):
        parts.append("8-bit optimizer")
    if techniques.offload != "none":
        parts.append(f"{techniques.offload} offload")
    if techniques.zero_stage:
        parts.append(f"ZeRO-{techniques.zero_stage} x {techniques.num_shards}")
    return f"{' + '.join(parts)} on {where}"


def _network(slots: Sequence[Slot], cluster: ClusterCapability) -> tuple[Network | None, bool]:
    """The slowest link of the ring, and whether a typical one stood in for an unknown."""
    if len(slots) < 2:
        return None, False
    names = list(dict.fromkeys(slot.node.name for slot in slots))
    if len(names) == 1:
        return Network(len(slots), _INSIDE_BYTES_PER_S, _INSIDE_ROUND_TRIP_S), False
    links = [cluster.link(first, second) for first, second in itertools.combinations(names, 2)]
    rates = [link.bytes_per_s if link else None for link in links]
    slowest = min(rate or _ASSUMED_NETWORK_BYTES_PER_S for rate in rates)
    trips = max((link.round_trip_s if link else None) or _ASSUMED_ROUND_TRIP_S for link in links)
    return Network(len(slots), slowest, trips), any(rate is None for rate in rates)


def _wait_s(network: Network, plans: Sequence[StrategyPlan]) -> float:
    """Seconds a step waits: for gradients that the backward pass does not hide, for weights that ZeRO moves."""
    gradient = max(plan.gradient_bytes for plan in plans)
    gathered = max(plan.gathered_bytes for plan in plans)
    num_micro = max(plan.num_micro_batches for plan in plans)
    techniques = plans[0].techniques
    if not techniques.uses_engine:
        micro_batch_s = min(plan.time.step_s / plan.num_micro_batches for plan in plans)
        waits = network.exposed_s(gradient, micro_batch_s, network.bucket_bytes(gradient))
        if techniques.zero_stage == 1:  # who updated a piece sends it to the others
            waits += network.gather_s(gradient)
        return waits
    # DeepSpeed reduces every micro-batch's gradients from stage 2 on, and nothing of ours hides it.
    reduced = network.step_s + network.gather_s(gradient) * (num_micro if techniques.zero_stage >= 2 else 1)
    if techniques.zero_stage >= 3:
        return reduced + num_micro * network.gather_s((2 + techniques.gradient_checkpointing) * gathered)
    return reduced + network.gather_s(gradient)
