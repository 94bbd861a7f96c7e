"""Whether plans fit into the memory of their devices and of the nodes around them.  Pure."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from clusters.capability import Kind, NodeCapability
from clusters.units import GIB, format_bytes
from orchestrator.planning.candidates import Placed, Slot
from strategies.contract import MemoryEstimate, Method, StrategyPlan
from strategies.workload import BYTES_PER_ELEMENT

_HOST_RESERVE_BYTES = 2 * GIB  # of a node's memory: its system and one worker's process
_PROCESS_BYTES = 0.7 * GIB  # of each further worker: its libraries, as strategies/cost/reserved.py has them of a CPU's
_LEFT = 0.95  # what the default safety margin leaves; half-way to the high estimate may use it up, no more


@dataclass(frozen=True)
class MemoryShortage:
    """Why a plan does not fit, and how many times the usable memory it needs."""

    reason: str
    times: float


def device_shortage(plan: StrategyPlan, slot: Slot) -> MemoryShortage | None:
    """Which memory a plan does not fit into, of several the one it exceeds most; None where it fits."""
    needs, host = plan.memory.total_bytes, plan.memory.host_bytes
    usable, host_usable = slot.memory_bytes, host_usable_bytes(slot.node)
    if plan.disk_bytes > (disk_usable := disk_usable_bytes(slot.node)):
        need, has = _compare(plan.disk_bytes, disk_usable)
        times = plan.disk_bytes / disk_usable if disk_usable else math.inf
        return MemoryShortage(f"needs {need} of the node's disk, {has}: half of what is free", times)
    host_times = host / host_usable if host_usable else math.inf if host else 0.0
    times = needed_bytes(plan.memory, slot.device.kind) / usable if usable > 0 else math.inf
    if max(host_times, times) <= 1:
        return None
    if host_times > times and slot.node.memory_bytes is None:
        return MemoryShortage(f"needs {format_bytes(host)} of the node's own memory, whose size is unknown", host_times)
    if host_times > times:
        need, has = _compare(host, host_usable)
        return MemoryShortage(f"needs {need}, {has} of the node's own memory", host_times)
    if needs > usable:
        need, has = _compare(needs, usable)
        return MemoryShortage(f"needs {need}, {has}", times)
    return MemoryShortage(
        f"may need {format_bytes(plan.memory.high_bytes)} at worst, has {format_bytes(usable)} usable", times
    )


def _compare(needs: float, usable: float) -> tuple[str, str]:
    """What is needed and what is there, as the difference where rounded figures would be equal."""
    need, has = format_bytes(needs), format_bytes(usable)
    return need, f"has {has} usable" if need != has else f"{format_bytes(needs - usable)} more than is usable"


def node_shortage(placed: Sequence[Placed], num_parameters: float, method: Method) -> MemoryShortage | None:
    """Which node's memory is too small for all its workers together; None where all fit.

    A GPU's worker counts with its part of the host, a CPU's with all it holds, and each beside the first with a
    process of its own; a node without room for one process takes none.
    """
    parts: defaultdict[str, list[Placed]] = defaultdict(list)
    for part in placed:
        parts[part.slot.node.name].append(part)
    for name, here in parts.items():
        node = here[0].slot.node
        if all(part.slot.device.kind == "cpu" for part in here):
            continue  # they share the CPU's memory, which their slots divide
        if node.memory_bytes is not None and node.memory_bytes < _HOST_RESERVE_BYTES:
            has, least = format_bytes(node.memory_bytes), format_bytes(_HOST_RESERVE_BYTES)
            why = f"{name} has {has} of memory of its own, and its system and a worker's process take {least}"
            return MemoryShortage(why, _HOST_RESERVE_BYTES / node.memory_bytes if node.memory_bytes > 0 else math.inf)
        needs = sum(_host_bytes(part, num_parameters, method) for part in here)
        usable = max(0.0, host_usable_bytes(node) - _PROCESS_BYTES * (len(here) - 1))
        if needs <= usable:
            continue
        if node.memory_bytes is None:
            why = f"loading needs {format_bytes(needs)} of {name}'s own memory, whose size is unknown"
            return MemoryShortage(why, math.inf)
        need, has = _compare(needs, usable)
        who = f"the {len(here)} workers on {name} need" if len(here) > 1 else f"the worker on {name} needs"
        why = f"{who} {need} of the node's own memory{' together' if len(here) > 1 else ''}, {has}"
        return MemoryShortage(why, needs / usable if usable else math.inf)
    return None


def _host_bytes(part: Placed, num_parameters: float, method: Method) -> float:
    """What one worker takes of its node's memory at most.

    Where DeepSpeed divides, every worker loads the whole model there before the first byte is on a device; without it
    weights go straight to the device.
    """
    techniques, memory = part.plan.techniques, part.plan.memory
    if part.slot.device.kind == "cpu":
        return memory.total_bytes
    loaded = num_parameters * BYTES_PER_ELEMENT[method.load_dtype(techniques)]
    return max(memory.host_bytes, loaded if techniques.uses_engine else 0.0)


def host_usable_bytes(node: NodeCapability) -> float:
    """What a node's own memory leaves to training; unknown memory is none."""
    return max(0.0, (node.memory_bytes or 0) - _HOST_RESERVE_BYTES)


def disk_usable_bytes(node: NodeCapability) -> float:
    """What a node's disk leaves to what is kept while it trains, each of its workers: half of what is free.

    Where that is unknown all of it: the worker looks again before it writes.
    """
    free = math.inf if node.disk_free_bytes is None else node.disk_free_bytes
    return free / 2 / (node.num_slots or 1)


def needed_bytes(memory: MemoryEstimate, kind: Kind) -> float:
    """What a device must have, its safety margin taken off, for a plan to be accepted there.

    On a GPU the expected bytes: with the default margin of 5 % the published peaks of ../shared/tables are accepted on
    a card too small for them in 3 % of the cases and refused on a large enough one in 7 % (tests/benchmarks/
    memory_errors.py).  A CPU's memory is also its system's, and running out of it ends more than the worker: there
    half-way to the high estimate must fit beside it, which may use up the margin.
    """
    if kind != "cpu":
        return memory.total_bytes
    return max(memory.total_bytes, _LEFT * (memory.total_bytes + memory.high_bytes) / 2)
