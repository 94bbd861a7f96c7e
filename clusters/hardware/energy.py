"""Energy a machine really took, where its hardware counts it: RAPL for CPUs and their memory, NVML for NVIDIA GPUs.

RAPL: /sys/class/powercap of Linux, microjoules since boot that wrap around; often readable by root only, and absent in
virtual machines.  NVML: `nvmlDeviceGetTotalEnergyConsumption`, millijoules, Volta or newer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

POWERCAP = Path("/sys/class/powercap")
_J_PER_WH = 3600.0


@dataclass(frozen=True)
class Energy:
    """Watt-hours, and which counters said so."""

    wh: float
    source: str  # "RAPL", "NVML" or both


class Meter:
    """Counts from when it is made.  `read` may be asked often: a counter that wraps must not do so twice unseen."""

    def __init__(self, gpus: tuple[str, ...] = (), powercap: Path | None = POWERCAP) -> None:
        """`gpus` are UUIDs: NVML counts otherwise than CUDA.  Without `powercap` the CPU is somebody else's."""
        cards = list(_cards(gpus))
        self._counters = [*(_packages(powercap) if powercap else ()), *cards] if len(cards) == len(gpus) else []
        self._last = [counter.read() for counter in self._counters]
        self._joules = 0.0

    def read(self) -> Energy | None:
        """Energy since the start; None where nothing counts it, a GPU is not counted, or a counter has failed since."""
        try:
            values = [counter.read() for counter in self._counters]
        except Exception:  # files taken away, a driver that fell: unknown from here on, and no reason to end a training
            self._counters, values = [], []
        if not self._counters:
            return None
        for place, (counter, now) in enumerate(zip(self._counters, values, strict=True)):
            spent = now - self._last[place]
            self._joules += spent if spent >= 0 else spent + counter.wraps_at
            self._last[place] = now
        names = dict.fromkeys(counter.name for counter in self._counters)
        return Energy(self._joules / _J_PER_WH, " + ".join(names))


@dataclass(frozen=True)
class _Counter:
    name: str
    read: Callable[[], float]  # joules
    wraps_at: float = 0.0


def _packages(powercap: Path) -> Iterator[_Counter]:
    """One for each CPU package; its parts (cores, memory controller) are counted in it, DRAM is not on some."""
    for zone in sorted(powercap.glob("intel-rapl:*")):
        try:
            name = (zone / "name").read_text().strip()
            if not (name.startswith("package") or (name == "dram" and zone.name.count(":") == 2)):
                continue
            _joules(zone / "energy_uj")  # may be there and not for us
            limit = _joules(zone / "max_energy_range_uj")
        except (OSError, ValueError):
            continue
        yield _Counter("RAPL", lambda zone=zone: _joules(zone / "energy_uj"), limit)


def _joules(file: Path) -> float:
    return int(file.read_text()) / 1e6


def _cards(gpus: tuple[str, ...]) -> Iterator[_Counter]:
    if not gpus:
        return
    try:
        import pynvml  # pyright: ignore[reportMissingImports]

        pynvml.nvmlInit()
    except Exception:  # not installed, or no driver: the figure is unknown
        return
    for uuid in gpus:
        try:
            handle: Any = pynvml.nvmlDeviceGetHandleByUUID(uuid)
            pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
        except Exception:  # an older card
            continue
        yield _Counter("NVML", lambda handle=handle: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3)
