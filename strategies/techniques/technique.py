"""What a technique states, and how a verdict follows from the cost model.

A technique states how it is switched on and where it cannot be.  Its effect is never written down: it is the ratio of
two estimates, with and without, on the device's own figures.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from clusters.capability import DeviceCapability, NodeCapability
from strategies.contract import Method, StrategyPlan
from strategies.shape import ModelShape
from strategies.techniques.libraries import absent_libraries, with_installed
from strategies.workload import Techniques, Workload

Level = Literal["effective", "works", "little gain", "harmful", "not installed", "impossible"]
Refusal = Callable[[DeviceCapability, ModelShape], str | None]  # why it cannot be used there; None where it can


@dataclass(frozen=True)
class Choice:
    """One way to train one workload: what a technique changes."""

    workload: Workload
    method: Method
    techniques: Techniques

    def estimate(self, device: DeviceCapability, node: NodeCapability) -> StrategyPlan:
        return self.method.estimate(self.workload, device, node, self.techniques)

    def with_(self, **changes: Any) -> Choice:
        """The same with other switches."""
        return replace(self, techniques=replace(self.techniques, **changes))


@dataclass(frozen=True)
class Technique:
    """One technique of the catalogue."""

    name: str
    about: str
    switch: str  # the line of a job file that turns it on
    on: Callable[[Choice], Choice]
    off: Callable[[Choice], Choice]
    impossible: Refusal = lambda device, shape: None
    quality: str = "the same result"  # what it does to the tuned model
    needs_devices: int = 1
    saves_first: Literal["memory", "time"] = "time"  # its usual purpose


@dataclass(frozen=True)
class Verdict:
    """A technique's effect on a device: ratios are with over without, None where it cannot be used."""

    technique: str
    level: Level
    reason: str
    memory_ratio: float | None = None
    time_ratio: float | None = None


def judge(
    technique: Technique, choice: Choice, device: DeviceCapability, node: NodeCapability, num_devices: int = 1
) -> Verdict:
    """The verdict on one device for one workload, from the estimates with and without.

    Memory counts for what it is worth: a saving on a device that has room to spare buys nothing, and is harmful when it
    costs time.  What only lacks a library has the ratios that it would have with it.
    """
    reason = technique.impossible(device, choice.workload.shape)
    if reason is None and num_devices < technique.needs_devices:
        reason = f"it divides work among devices; this cluster has {num_devices}"
    if reason is not None:
        equipped = with_installed(device, absent_libraries(device))
        found = judge(technique, choice, equipped, node, num_devices) if equipped != device else None
        if found is None or found.level == "impossible":
            return Verdict(technique.name, "impossible", reason)
        return replace(found, level="not installed", reason=f"{reason}; with it: {found.reason}")
    without = technique.off(choice).estimate(device, node)
    with_it = technique.on(choice).estimate(device, node)
    memory = with_it.memory.total_bytes / without.memory.total_bytes
    seconds = with_it.time.step_s / without.time.step_s
    need = without.memory.total_bytes / device.memory_bytes if device.memory_bytes else 0.0
    level = _level(memory, seconds, need)
    text = f"memory x{memory:.2f}, time x{seconds:.2f}; without it {need:.0%} of the memory is used"
    if need > 1 and with_it.memory.total_bytes <= (device.memory_bytes or 0):
        text += ": it makes this fit"
    return Verdict(technique.name, level, text, memory, seconds)


def _level(memory: float, seconds: float, need: float) -> Level:
    scarce = need > 0.6
    if seconds <= 0.9 and (memory <= 1.1 or need * memory < 0.9):
        return "effective"
    if scarce and memory <= 0.85 and seconds <= 3:
        return "effective"
    if seconds >= 1.1:
        return "works" if memory <= 0.7 and need > 0.5 else "harmful"
    if need * memory > 1 >= need:
        return "harmful"
    if memory <= 0.9 or seconds <= 0.97:
        return "works"
    return "little gain" if seconds <= 1.05 and memory <= 1.05 else "harmful"
