"""Every way to run a workload on given devices: what the planner chooses from.  Pure.

Equal slots of equal nodes are one kind, which is estimated once.  `groups.py` says which slots are worth being placed
together; placed, each gets its best settings and the share with which all finish a step together.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

from clusters.capability import ClusterCapability, NodeCapability
from orchestrator.planning.candidates import Candidate, Division, Placed, Slot, Switches, step_s_of, waiting_s
from orchestrator.planning.groups import Curve, Groups, Links, Pace, balance, share_out
from orchestrator.planning.memory_fit import needed_bytes, node_shortage
from orchestrator.planning.settings import (
    Assignment,
    FittingPlans,
    Miss,
    Prefer,
    Rejections,
    describe_combination,
    preferred_plan,
)
from strategies.contract import Method, StrategyPlan
from strategies.cost.network import Network
from strategies.workload import Offload, Techniques, Workload

_ROUNDS = 6  # a share decides the micro-batch, which decides the speed, which decides the share
_SETTLED = 0.002  # of a step: where other shares gain less, they are final
_LEVEL = 4  # all settings are estimated for shares of 1, 1/4, 1/16 ...; between them only the best of those
_ABOUT = 1.1  # times the fastest at a level: settings that may be the best of another share
_SMALL_STATE = 0.05  # of a device's memory
_WAITS = 0.02  # of a step for the network: settings are chosen by what they wait, too
_MOST_SETTINGS = 2  # of a level that are estimated for another share


@dataclass(frozen=True)
class Common:
    """What all slots of a candidate have in common."""

    method: Method
    stage: int  # of ZeRO
    switches: Switches  # with one optimizer: all workers make the same update
    prefer: Prefer
    network: Network | None = None  # where known: settings that wait less for it are preferred

    @property
    def equal_parts(self) -> bool:
        """Whether DeepSpeed divides a group: into equal parts, whatever the devices."""
        return self.stage > 1 or (self.stage == 1 and self.switches.deepspeed)


@dataclass
class Enumeration:
    """Every way to run a workload on some slots: `run` finds those that fit, and why the others do not."""

    workload: Workload
    slots: Sequence[Slot]
    cluster: ClusterCapability
    methods: Sequence[Method]
    switches: Switches
    num_workers: int | None = None  # as the job states them: groups of that size are looked at too
    looks_lean: bool = True  # beside what is fastest, what needs least memory
    kinds: Kinds | None = None  # of these slots, and the links between them: found where they are not given
    links: Links | None = None
    fitting: list[Candidate] = field(default_factory=list, init=False)
    other_groups: list[Candidate] = field(default_factory=list, init=False)  # with more or fewer workers than stated
    rejections: Rejections = field(default_factory=Rejections, init=False)
    _plans: dict[Any, FittingPlans] = field(default_factory=dict, init=False)
    _best: dict[Any, StrategyPlan | None] = field(default_factory=dict, init=False)
    _paces: dict[Any, Pace | None] = field(default_factory=dict, init=False)
    _seen: set[Any] = field(default_factory=set, init=False)

    def __post_init__(self) -> None:
        self._kinds = self.kinds = self.kinds or Kinds(self.slots)
        self._links = self.links = self.links or Links(self.cluster, self.slots)

    def run(self) -> Self:
        """Look at all combinations; at offloading only where nothing fits without it, whatever the method.

        What fits on CPUs alone beside GPUs that hold nothing is not enough: there offloading is looked at too, and at
        last what saves a little of a small state.
        """
        plain: list[Offload] = [offload for offload in self.switches.offloads if offload == "none"]
        moved: list[Offload] = [offload for offload in self.switches.offloads if offload != "none"]
        for offloads, last_resort in ((plain, False), (moved, False), (plain, True)):
            if offloads and not self._uses_its_gpus():
                for known in (self._plans, self._best, self._paces):
                    known.clear()
                self._collect(replace(self.switches, offloads=offloads), last_resort)
        for slot, method in itertools.product(self.slots, self.methods):
            self.rejections.share(self._kinds.first(slot).label, slot.label, method.name)
        return self

    def _uses_its_gpus(self) -> bool:
        """Whether something fits, on a GPU where there is one."""
        wanted = {slot.device.kind for slot in self.slots} - {"cpu"} or {"cpu"}
        return any(part.slot.device.kind in wanted for candidate in self.fitting for part in candidate.placed)

    def slots_like(self, slot: Slot) -> list[Slot]:
        """All slots of a kind."""
        return [other for other in self.slots if self._kinds.first(other) is self._kinds.first(slot)]

    def _collect(self, switches: Switches, last_resort: bool) -> None:
        for method, stage, optim in itertools.product(self.methods, switches.zero_stages, switches.optims):
            if stage and len(self.slots) < 2:
                continue
            common = Common(method, stage, replace(switches, optims=(optim,)), "time")
            if self._is_pointless(common, switches, last_resort):
                continue
            groups = list(self._groups(common))
            firsts = [group for group, *_ in groups]
            lean = [firsts[0], min(firsts, key=len), max(firsts, key=len)] if firsts else []
            alone = [[slot] for slot in self._kinds.firsts] if not stage else []
            placed = [self._place(group, common) for group in alone]
            placed += [self._place_first(found, common) for found in groups]
            for candidate in placed:
                self._add(candidate)
            best = min((found for found in placed if found), key=lambda found: found.step_s, default=None)
            if best and best.sync_s > _WAITS * best.step_s:
                self._add(self._place([part.slot for part in best.placed], replace(common, network=best.network)))
            for group in (*alone, *lean) if self.looks_lean else ():
                self._add(self._place(group, replace(common, prefer="memory")))

    def _is_pointless(self, common: Common, switches: Switches, last_resort: bool) -> bool:
        """Whether a division or an optimizer saves only state, of which there is so little that nothing would change.

        Nothing changes on a device where the state is small beside its memory, or where nothing fits without it.
        As the last resort little counts, where something fits without the state and not with it.
        """
        plain = replace(common, stage=0, switches=replace(switches, optims=switches.optims[:1]))
        saves_state = common.stage == 1 or (common.stage == 0 and common.switches.optims[0] != switches.optims[0])
        if not saves_state or 0 not in switches.zero_stages:
            return last_resort
        for slot in self._kinds.firsts:
            found = self._plans_at(1.0, slot, plain, Division(0, 1))
            plan = found.leanest
            if plan is None:
                continue
            state, needs = plan.memory.optimizer_bytes, plan.memory.total_bytes
            is_large, decides = state > _SMALL_STATE * slot.memory_bytes, needs - state < slot.memory_bytes
            if decides and not is_large and not found.plans if last_resort else is_large and (found.plans or decides):
                return False
        return True

    def _add(self, candidate: Candidate | None) -> None:
        if candidate is None:
            return
        key = (
            candidate.method.name,
            candidate.zero_stage,
            candidate.total_s,
            candidate.peak_bytes,
            tuple(id(part.slot) for part in candidate.placed),
        )
        if key not in self._seen:
            self._seen.add(key)
            self.fitting.append(candidate)

    def _groups(self, common: Common) -> Iterator[list[list[Slot]]]:
        """Groups worth placing, each before those to place instead; where DeepSpeed divides, of devices of one kind."""
        if len(self.slots) < 2:
            return

        def pace(slot: Slot, size: int) -> Pace | None:
            return self._pace(slot, size, common)

        groups = Groups(self._links, pace, self.workload.global_batch_size, common.equal_parts, self.num_workers)
        if not common.equal_parts:
            yield from groups.best(self.slots)
            return
        by_name: dict[str, list[Slot]] = {}
        for slot in self.slots:
            by_name.setdefault(slot.device.name, []).append(slot)
        if len(by_name) > 1:
            label = f"{common.method.name} + ZeRO-{common.stage} x {len(self.slots)} on {self.slots[-1].label}"
            why = "DeepSpeed divides into equal parts: it needs devices of one kind (zero1 works by memory)"
            self.rejections.add(label, why)
        for slots in by_name.values():
            yield from groups.best(slots)

    def _pace(self, slot: Slot, size: int, common: Common) -> Pace | None:
        """What a slot takes by its share in groups of about this size; None where nothing fits."""
        first = self._kinds.first(slot)
        share, division = 1 / _LEVEL ** _level(1 / size), Division(common.stage, size)
        if common.equal_parts:
            share = 1 / size
        elif common.stage:
            division = _rounded(replace(division, state_share=1 / size))
        else:
            division = _rounded(division)
        key = (id(first), common.method.name, common.switches.optims[0], share, division)
        if key not in self._paces:
            found = self._plans_at(share, first, common, division)
            if not found.plans and division.state_share is not None:  # others may keep all of the state
                division = replace(division, state_share=0.0)
                found = self._plans_at(share, first, common, division)
            if not found.plans and found.may_fit_whole and not common.equal_parts:
                share /= _LEVEL
                found = self._plans_at(share, first, common, division)
            plan = preferred_plan(found.plans, "time")
            self._paces[key] = self._pace_around(plan, share, first, common) if plan else None
        return self._paces[key]

    def _pace_around(self, plan: StrategyPlan, share: float, slot: Slot, common: Common) -> Pace:
        """The pace of a plan for a share, and for the least that takes part: a sample of each step."""
        least, techniques = 1 / self.workload.global_batch_size, plan.techniques
        if common.equal_parts or least >= share:
            return Pace.of(plan, share)
        division = Division(techniques.zero_stage, techniques.num_shards, techniques.state_share)
        single = self._assignment(least, slot, common, division).fastest_like([techniques], self.rejections)
        return Pace.through(plan, share, single[0], least) if single else Pace.of(plan, share)

    def _place_first(self, groups: Sequence[Sequence[Slot]], common: Common) -> Candidate | None:
        """The first of some groups that fits."""
        return next((found for group in groups if (found := self._place(group, common))), None)

    def _place(self, slots: Sequence[Slot], common: Common) -> Candidate | None:
        """The best settings of each slot, shares in proportion to speed; None where one of them does not fit."""
        kinds = self._kinds.count(slots)
        divisions = self._divisions(kinds, len(slots), common)
        tries = list(self._balanced(kinds, divisions, common)) if divisions else []
        if not tries:
            return None
        network, assumed = self._links.network(slots)
        balanced = min(tries, key=lambda parts: step_s_of([plan for plan, _ in parts], network))
        parts = {id(kind): part for (kind, _), part in zip(kinds, balanced, strict=True)}
        placed = tuple(Placed(slot, *parts[id(self._kinds.first(slot))]) for slot in slots)
        plans = [plan for plan, _ in balanced]
        if shortage := node_shortage(placed, self.workload.shape.num_parameters, common.method):
            combination = describe_combination(common.method, placed[-1].plan.techniques, slots[-1])
            self.rejections.add(f"{len(slots)} x {combination}", shortage.reason)
            for part in placed:
                self.rejections.offer(part.slot.label, Miss(part.plan, shortage))
            return None
        wait_s = waiting_s(network, plans) if network else 0.0
        work = self.workload
        return Candidate(common.method, placed, wait_s, work.num_steps, work.tokens_per_step, network, assumed)

    def _divisions(self, kinds: Sequence[tuple[Slot, int]], count: int, common: Common) -> list[Division] | None:
        """How each kind's part of a group is divided; None where this group cannot be."""
        if common.stage != 1 or common.equal_parts:
            return [Division(common.stage, count)] * len(kinds)
        parts = self._state_shares(kinds, count, common)
        return None if parts is None else [Division(1, count, part) for part in parts]

    def _state_shares(self, kinds: Sequence[tuple[Slot, int]], count: int, common: Common) -> list[float] | None:
        """The optimizer's state by what memory is free beside everything else; None where there is none at all."""
        free = []
        for slot, _ in kinds:
            division = Division(1, count, 0.0)
            smallest = self._best_plan(1.0 / count, slot, replace(common, prefer="memory"), division)
            if smallest is None:
                return None
            free.append(max(0.0, slot.memory_bytes - needed_bytes(smallest.memory, slot.device.kind)))
        whole = sum(number * each for (_, number), each in zip(kinds, free, strict=True))
        return [each / whole for each in free] if whole else None

    def _balanced(
        self, kinds: Sequence[tuple[Slot, int]], divisions: Sequence[Division], common: Common
    ) -> Iterator[list[tuple[StrategyPlan, float]]]:
        """The plans and shares of each kind's slots with which all finish a step together, and those on the way there.

        Equal shares come first, since a little more can be too much for a slot's fastest settings; where those do not
        fit, shares by pace.
        """
        counts = [number for _, number in kinds]
        size = sum(counts)
        shares, least = [1.0 / size] * len(kinds), min(1.0 / size, 1.0 / self.workload.global_batch_size)
        paces = [self._pace(slot, size, common) for slot, _ in kinds]
        curves, fastest_s = list[Curve](), math.inf
        for number in range(_ROUNDS):
            plans = [
                self._best_plan(share, slot, common, division)
                for (slot, _), share, division in zip(kinds, shares, divisions, strict=True)
            ]
            found = [plan for plan in plans if plan]
            known = [pace for pace in paces if pace]
            if len(found) < len(plans):
                if number or common.equal_parts or len(known) < len(kinds):
                    return
                _, shares = balance(known, counts)
                continue
            yield list(zip(found, shares, strict=True))
            if len(kinds) == 1 or common.equal_parts:
                return
            if not curves:
                starts = [pace or Pace.of(plan, shares[0]) for pace, plan in zip(paces, found, strict=True)]
                curves = [Curve([(0.0, pace.fixed_s)]) for pace in starts]
            for curve, plan, share in zip(curves, found, shares, strict=True):
                curve.add(share, plan.time.step_s)
            fastest_s = min(fastest_s, max(plan.time.step_s for plan in found))
            finish_s, shares = share_out(curves, counts, least)
            if finish_s >= (1 - _SETTLED) * fastest_s:
                return

    def _best_plan(self, share: float, slot: Slot, common: Common, division: Division) -> StrategyPlan | None:
        """The preferred plan of those that fit a slot, with the settings that are best for a share about as large."""
        if not common.stage:
            division = _rounded(division)  # nothing is divided: how many take part changes nothing
        key = (id(slot), common.method.name, division, share, common.switches.optims[0], common.prefer, common.network)
        if key in self._best:
            return self._best[key]
        around, usual = (share, division) if common.equal_parts else (1 / _LEVEL ** _level(share), _rounded(division))
        found = self._plans_at(around, slot, common, usual)
        known = found.plans
        if known and (share, division) != (around, usual):
            part = self._assignment(share, slot, common, division)
            settings = _worthwhile_settings(known, share / around, common.prefer)
            if found.may_fit_whole and share < around:
                fewer = self._plans_at(around / _LEVEL, slot, common, usual).plans
                settings += _worthwhile_settings(fewer, share * _LEVEL / around, common.prefer)
            if common.prefer == "memory":
                plans = part.find_leanest(settings, self.rejections)
            else:
                plans = part.fastest_like(settings, self.rejections, common.network)
        else:
            plans = known
        plans = plans or self._plans_at(share, slot, common, division).plans
        self._best[key] = preferred_plan(plans, common.prefer, common.network)
        return self._best[key]

    def _plans_at(self, share: float, slot: Slot, common: Common, division: Division) -> FittingPlans:
        """The plans for all settings that fit."""
        key = (id(slot), common.method.name, division, share, common.switches.optims[0])
        if key not in self._plans:
            part = self._assignment(share, slot, common, division)
            self._plans[key] = part.fitting_plans(self.rejections)
        return self._plans[key]

    def _assignment(self, share: float, slot: Slot, common: Common, division: Division) -> Assignment:
        return Assignment(replace(self.workload, share=share), slot, common.method, division, common.switches)


class Kinds:
    """Which slots are equal but for their names: what is estimated for the first of them holds for all."""

    def __init__(self, slots: Sequence[Slot]) -> None:
        self._first: dict[tuple[str, Any], Slot] = {}  # by node and kind
        nodes: dict[str, str] = {}
        found: dict[Any, Slot] = {}
        for slot in slots:
            name = slot.node.name
            if name not in nodes:
                nodes[name] = repr(_without_name(slot.node))
            self._first.setdefault((name, slot.kind), found.setdefault((nodes[name], slot.kind, slot.threads), slot))
        self.firsts = list(found.values())

    def first(self, slot: Slot) -> Slot:
        return self._first[slot.node.name, slot.kind]

    def count(self, slots: Iterable[Slot]) -> list[tuple[Slot, int]]:
        """The first slot of each kind, and how many of that kind there are."""
        counts: dict[int, tuple[Slot, int]] = {}
        for slot in slots:
            first = self.first(slot)
            counts[id(first)] = first, counts.get(id(first), (first, 0))[1] + 1
        return list(counts.values())


def _without_name(node: NodeCapability) -> NodeCapability:
    devices = tuple(replace(device, uuid=None, pci_bus_id=None) for device in node.devices)
    return replace(node, name="", hardware_hash=None, devices=devices)


def _level(share: float) -> int:
    """The nearest power of `_LEVEL` that divides the samples into such shares."""
    return max(0, round(math.log(1 / share, _LEVEL)))


def _rounded(division: Division) -> Division:
    """A division that stands for many: of state that is divided by memory as much or a little more."""
    part = division.state_share
    if part:
        part = 2.0 ** math.ceil(math.log2(part))
    return Division(division.stage, min(2, division.num_devices), part)


def _worthwhile_settings(plans: Sequence[StrategyPlan], factor: float, prefer: Prefer) -> list[Techniques]:
    """Settings that may be the best where the share is `factor` times that of these plans."""
    if prefer == "memory":
        ranked = sorted(plans, key=lambda plan: plan.memory.total_bytes)
    else:
        seconds = {id(plan): Pace.of(plan, 1.0).step_s(factor) for plan in plans}
        ranked = sorted(plans, key=lambda plan: seconds[id(plan)])
        ranked = [plan for plan in ranked if seconds[id(plan)] <= _ABOUT * seconds[id(ranked[0])]]
    kept = dict.fromkeys(map(_settings_of, ranked))
    kept = dict.fromkeys(itertools.islice(kept, _MOST_SETTINGS))
    first = {_settings_of(plan): plan.techniques for plan in reversed(plans)}
    return [first[each] for each in dict.fromkeys(map(_settings_of, plans)) if each in kept]  # the plainest first


def _settings_of(plan: StrategyPlan) -> tuple[Any, ...]:
    """What is open of a slot's settings, but for its micro-batch."""
    t = plan.techniques
    return t.dtype, t.attn_implementation, t.packing, t.gradient_checkpointing, t.loss_type, t.offload
