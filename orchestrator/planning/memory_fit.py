"""Whether plans fit into the memory of their devices and of the nodes around them.  Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from clusters.capability import NodeCapability
from clusters.units import GIB, format_bytes
from orchestrator.planning.candidates import Placed, Slot
from strategies.contract import BYTES_PER_ELEMENT, Method, StrategyPlan

_HOST_RESERVE_BYTES = 2 * GIB  # of a node's memory: its system and the processes themselves
_OVER = 1 / 0.92  # half-way to the high estimate may use up the safety margin, no more


def device_shortage(plan: StrategyPlan, slot: Slot) -> str | None:
    """Which memory a plan does not fit into; None where it fits."""
    needs, host = plan.memory.total_bytes, plan.memory.host_bytes
    usable, host_usable = slot.memory_bytes, host_usable_bytes(slot.node)
    if host > host_usable and slot.node.memory_bytes is None:
        return f"needs {format_bytes(host)} of the node's own memory, whose size is unknown"
    if host > host_usable:
        return f"needs {format_bytes(host)}, has {format_bytes(host_usable)} usable of the node's own memory"
    if needs > usable:
        return f"needs {format_bytes(needs)}, has {format_bytes(usable)} usable"
    if cautious_bytes(plan) > _OVER * usable:
        return f"may need {format_bytes(plan.memory.high_bytes)} at worst, has {format_bytes(usable)} usable"
    return None


def node_shortage(placed: Sequence[Placed], num_parameters: float, method: Method) -> str | None:
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
            return f"loading needs {format_bytes(need)} of {node.name}'s own memory, whose size is unknown"
        if need > usable:
            workers = sum(part.slot.node.name == node.name for part in placed)
            return (
                f"the {workers} workers on {node.name} need {format_bytes(need)} of the node's own memory together, has"
                f" {format_bytes(usable)} usable"
            )
    return None


def host_usable_bytes(node: NodeCapability) -> float:
    """What a node's own memory leaves to training; unknown memory is none."""
    return max(0.0, (node.memory_bytes or 0) - _HOST_RESERVE_BYTES)


def cautious_bytes(plan: StrategyPlan) -> float:
    """Half-way between the expected and the high estimate."""
    return (plan.memory.total_bytes + plan.memory.high_bytes) / 2
