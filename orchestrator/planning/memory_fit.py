"""Whether plans fit into the memory of their devices and of the nodes around them.  Pure."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from clusters.capability import NodeCapability
from clusters.units import GIB, format_bytes
from orchestrator.planning.candidates import Placed, Slot
from strategies.contract import BYTES_PER_ELEMENT, Method, StrategyPlan

_HOST_RESERVE_BYTES = 2 * GIB  # of a node's memory: its system and the processes themselves
_OVER = 1 / 0.92  # half-way to the high estimate may use up the safety margin, no more


@dataclass(frozen=True)
class MemoryShortage:
    """Why a plan does not fit, and how many times the usable memory it needs."""

    reason: str
    times: float


def device_shortage(plan: StrategyPlan, slot: Slot) -> MemoryShortage | None:
    """Which memory a plan does not fit into, of several the one it exceeds most; None where it fits."""
    needs, host = plan.memory.total_bytes, plan.memory.host_bytes
    usable, host_usable = slot.memory_bytes, host_usable_bytes(slot.node)
    host_times = host / host_usable if host_usable else math.inf if host else 0.0
    times = max(needs, cautious_bytes(plan) / _OVER) / usable if usable else math.inf
    if max(host_times, times) <= 1:
        return None
    if host_times > times and slot.node.memory_bytes is None:
        return MemoryShortage(f"needs {format_bytes(host)} of the node's own memory, whose size is unknown", host_times)
    if host_times > times:
        return MemoryShortage(f"{_needs_has(host, host_usable)} of the node's own memory", host_times)
    if needs > usable:
        return MemoryShortage(_needs_has(needs, usable), times)
    return MemoryShortage(
        f"may need {format_bytes(plan.memory.high_bytes)} at worst, has {format_bytes(usable)} usable", times
    )


def _needs_has(needs: float, usable: float) -> str:
    """What is needed against what is there, with the difference where rounded figures would be equal."""
    need, has = format_bytes(needs), format_bytes(usable)
    if need == has:
        return f"needs {need}, {format_bytes(needs - usable)} more than is usable"
    return f"needs {need}, has {has} usable"


def node_shortage(placed: Sequence[Placed], num_parameters: float, method: Method) -> MemoryShortage | None:
    """Which node's memory is too small for all its workers together; None where all fit.

    Each worker's part of the host counts, and the whole model where DeepSpeed divides it: every worker then loads it
    there before the first byte is on a device.  Without DeepSpeed weights go straight to the device.
    """
    needs: defaultdict[str, float] = defaultdict(float)
    for part in placed:
        if part.slot.device.kind != "cpu":
            techniques = part.plan.techniques
            bytes_loaded = num_parameters * BYTES_PER_ELEMENT[method.load_dtype(techniques)]
            loading = bytes_loaded if techniques.uses_engine else 0.0
            needs[part.slot.node.name] += max(part.plan.memory.host_bytes, loading)
    for node in {part.slot.node.name: part.slot.node for part in placed}.values():
        usable, need = host_usable_bytes(node), needs[node.name]
        if need > usable and node.memory_bytes is None:
            why = f"loading needs {format_bytes(need)} of {node.name}'s own memory, whose size is unknown"
            return MemoryShortage(why, math.inf)
        if need > usable:
            workers = sum(part.slot.node.name == node.name for part in placed)
            why = (
                f"the {workers} workers on {node.name} need {format_bytes(need)} of the node's own memory together, has"
                f" {format_bytes(usable)} usable"
            )
            return MemoryShortage(why, need / usable if usable else math.inf)
    return None


def host_usable_bytes(node: NodeCapability) -> float:
    """What a node's own memory leaves to training; unknown memory is none."""
    return max(0.0, (node.memory_bytes or 0) - _HOST_RESERVE_BYTES)


def cautious_bytes(plan: StrategyPlan) -> float:
    """Half-way between the expected and the high estimate."""
    return (plan.memory.total_bytes + plan.memory.high_bytes) / 2
