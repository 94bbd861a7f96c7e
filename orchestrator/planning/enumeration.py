"""Every way to run a workload on given devices: what the planner chooses from.  Pure."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

from clusters.capability import ClusterCapability, NodeCapability
from orchestrator.planning.candidates import (
    Candidate,
    Division,
    Placed,
    Slot,
    Switches,
    limit_per_node,
    network_between,
    waiting_s,
)
from orchestrator.planning.memory_fit import needed_bytes, node_shortage
from orchestrator.planning.settings import Assignment, Miss, Prefer, Rejections, describe_combination, preferred_plan
from strategies.contract import Method, Offload, StrategyPlan, Workload

_ROUNDS = 3  # a share decides the micro-batch, which decides the speed, which decides the share


@dataclass(frozen=True)
class Common:
    """What all slots of a candidate have in common."""

    method: Method
    stage: int  # of ZeRO
    switches: Switches  # with one optimizer: all workers make the same update
    prefer: Prefer

    def divides_equally(self, num_devices: int) -> bool:
        """Whether DeepSpeed divides: into equal parts, whatever the devices."""
        return num_devices > 1 and (self.stage > 1 or (self.stage == 1 and self.switches.deepspeed))


@dataclass
class Enumeration:
    """Every way to run a workload on some slots: `run` finds those that fit, and why the others do not."""

    workload: Workload
    slots: Sequence[Slot]
    cluster: ClusterCapability
    methods: Sequence[Method]
    switches: Switches
    fitting: list[Candidate] = field(default_factory=list, init=False)
    other_groups: list[Candidate] = field(default_factory=list, init=False)  # with more or fewer workers than stated
    rejections: Rejections = field(default_factory=Rejections, init=False)
    _plans: dict[Any, list[StrategyPlan]] = field(default_factory=dict, init=False)
    _preferred: dict[Any, StrategyPlan | None] = field(default_factory=dict, init=False)
    _twins: dict[str, str] = field(default_factory=dict, init=False)
    _unnamed: dict[str, NodeCapability] = field(default_factory=dict, init=False)

    def run(self) -> Self:
        """Look at all combinations; at offloading only where nothing fits without it, whatever the method."""
        plain: list[Offload] = [offload for offload in self.switches.offloads if offload == "none"]
        moved: list[Offload] = [offload for offload in self.switches.offloads if offload != "none"]
        for offloads in (plain, moved):
            if offloads and not self.fitting:
                self._plans.clear()
                self._preferred.clear()
                self._collect(replace(self.switches, offloads=offloads))
        for slot, method in itertools.product(self.slots, self.methods):
            self.rejections.share(f"{self._twin_of(slot.node)} ({slot.device.name})", slot.label, method.name)
        return self

    def _collect(self, switches: Switches) -> None:
        for method, stage, optim in itertools.product(self.methods, switches.zero_stages, switches.optims):
            if stage and len(self.slots) < 2:
                continue
            for prefer in ("time", "memory"):
                for candidate in self._groups(Common(method, stage, replace(switches, optims=(optim,)), prefer)):
                    if candidate not in self.fitting:
                        self.fitting.append(candidate)

    def _groups(self, common: Common) -> Iterator[Candidate]:
        """Each device alone, then the fastest two, three ... together."""
        alone = self._each_alone(common)
        seen = set()
        for candidate in alone:
            slot = candidate.placed[0].slot
            if (slot.node.name, slot.kind) not in seen:  # two like cards alone are one way
                seen.add((slot.node.name, slot.kind))
                yield candidate
        order = limit_per_node(_largest_first(self.slots) if common.stage else [c.placed[0].slot for c in alone])
        for count in range(2, len(order) + 1):
            if together := self._place(order[:count], common):
                yield together
        if alone and len(order) > 2:
            best = self._grow(alone[0], order[1:], common)
            if len(best.placed) > 1:
                yield best

    def _each_alone(self, common: Common) -> list[Candidate]:
        """One candidate for each slot that it fits, the fastest first; none of what must be divided."""
        if common.stage:
            return []
        found = [self._place([slot], common) for slot in self.slots]
        return sorted((candidate for candidate in found if candidate), key=lambda candidate: candidate.step_s)

    def _grow(self, best: Candidate, others: Sequence[Slot], common: Common) -> Candidate:
        """Add each slot that makes a step faster: one behind a slow link must not keep out those after it."""
        for slot in others:
            wider = self._place([*(part.slot for part in best.placed), slot], common)
            if wider and wider.step_s < best.step_s:
                best = wider
        return best

    def _place(self, slots: Sequence[Slot], common: Common) -> Candidate | None:
        """The best settings of each slot, shares in proportion to speed; None where one of them does not fit."""
        divisions = self._divisions(slots, common)
        balanced = self._balance(slots, divisions, common) if divisions else None
        if balanced is None:
            return None
        plans, shares = balanced
        placed = tuple(Placed(*part) for part in zip(slots, plans, shares, strict=True))
        if shortage := node_shortage(placed, self.workload.shape.num_parameters, common.method):
            combination = describe_combination(common.method, plans[-1].techniques, slots[-1])
            self.rejections.add(f"{len(slots)} x {combination}", shortage.reason)
            for slot, plan in zip(slots, plans, strict=True):
                self.rejections.offer(slot.label, Miss(plan, shortage))
            return None
        network, assumed = network_between(slots, self.cluster)
        wait_s = waiting_s(network, plans) if network else 0.0
        work = self.workload
        return Candidate(common.method, placed, wait_s, work.num_steps, work.tokens_per_step, network, assumed)

    def _divisions(self, slots: Sequence[Slot], common: Common) -> list[Division] | None:
        """How each slot's part of a group is divided; None where this group cannot be."""
        count, stage = len(slots), common.stage
        if common.divides_equally(count):
            if len({slot.device.name for slot in slots}) > 1:
                self.rejections.add(
                    f"{common.method.name} + ZeRO-{stage} x {count} on {slots[-1].label}",
                    "DeepSpeed divides into equal parts: it needs devices of one kind (zero1 works by memory)",
                )
                return None
            return [Division(stage, count)] * count
        if stage != 1:
            return [Division(stage, count)] * count
        parts = self._state_shares(slots, common)
        return None if parts is None else [Division(stage, count, part) for part in parts]

    def _state_shares(self, slots: Sequence[Slot], common: Common) -> list[float] | None:
        """The optimizer's state by what memory is free beside everything else; None where there is none at all."""
        free = []
        for slot in slots:
            division = Division(1, len(slots), 0.0)
            smallest = self._best_plan(1.0 / len(slots), slot, replace(common, prefer="memory"), division)
            if smallest is None:
                return None
            free.append(max(0.0, slot.memory_bytes - needed_bytes(smallest.memory, slot.device.kind)))
        return [each / sum(free) for each in free] if sum(free) else None

    def _balance(
        self, slots: Sequence[Slot], divisions: Sequence[Division], common: Common
    ) -> tuple[list[StrategyPlan], list[float]] | None:
        """The plan and the share of each slot, so that all finish a step together; None where one does not fit."""
        count = len(slots)
        shares, plans = [1.0 / count] * count, list[StrategyPlan]()
        equally = common.divides_equally(count)
        for _ in range(1 if count == 1 or equally else _ROUNDS):
            plans, alike = [], dict[Any, StrategyPlan | None]()
            for slot, share, division in zip(slots, shares, divisions, strict=True):
                key = (slot.node.name, slot.kind, share, division)
                if key not in alike:  # cards of one node are often of one kind
                    alike[key] = self._best_plan(share, slot, common, division)
                if (plan := alike[key]) is None:
                    return None
                plans.append(plan)
            if not equally:
                speeds = [share / plan.time.step_s for share, plan in zip(shares, plans, strict=True)]
                shares = [speed / sum(speeds) for speed in speeds]
        return plans, shares

    def _best_plan(self, share: float, slot: Slot, common: Common, division: Division) -> StrategyPlan | None:
        """The preferred plan of those that fit one slot; looked up where an equal slot had one."""
        method, switches, twin = common.method, common.switches, self._twin_of(slot.node)
        key = (twin, slot.kind, method.name, division, round(share, 3), switches.optims[0])
        if key not in self._plans:
            part = Assignment(replace(self.workload, share=share), slot, method, division, switches)
            self._plans[key] = part.fitting_plans(self.rejections)
        if (key, common.prefer) not in self._preferred:
            self._preferred[key, common.prefer] = preferred_plan(self._plans[key], common.prefer)
        return self._preferred[key, common.prefer]

    def _twin_of(self, node: NodeCapability) -> str:
        """The name of the first node that equals this one but for its name: what fits the one fits the other."""
        if node.name not in self._twins:
            devices = tuple(replace(device, uuid=None, pci_bus_id=None) for device in node.devices)
            unnamed = replace(node, name="", devices=devices)
            self._unnamed.setdefault(node.name, unnamed)
            self._twins[node.name] = next(name for name, other in self._unnamed.items() if other == unnamed)
        return self._twins[node.name]


def _largest_first(slots: Sequence[Slot]) -> list[Slot]:
    """GPUs before CPUs, each by memory."""
    return sorted(slots, key=lambda slot: (slot.device.kind == "cpu", -slot.memory_bytes))
