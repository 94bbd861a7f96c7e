"""Let threads that wait for each other spin while the cores are theirs, and sleep while other programs want them.

A training step on a CPU is hundreds of short parallel regions.  GNU's OpenMP, which torch's CPU build uses, lets a
thread that waits spin first and sleep then.  Waking one costs 50 to 100 microseconds, more than most regions take, so
spinning wins where nothing else runs (1.5x of SmolLM2-135M's steps on two cores with AMX).  Where another program has
taken a core, every region spins until the scheduler gives it back (0.3x at 30,000 spins), so sleeping at once wins.

Which of both is decided while a process computes.  libgomp spins as often as GOMP_SPINCOUNT says, but where it has more
threads than the process has CPUs it does as OMP_WAIT_POLICY says, and passive is not to spin at all:
https://gcc.gnu.org/onlinedocs/libgomp/GOMP_005fSPINCOUNT.html.  So while others want the cores a team of sleeping
threads is kept beside those that compute.  No sum changes by that, as it would with another number of threads.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

# About a millisecond on a Xeon, more than lies between most regions; less where the processor's pause is shorter.
_SPINS = {"GOMP_SPINCOUNT": "20000", "OMP_WAIT_POLICY": "passive"}
# Read when OpenMP is loaded, so before torch is imported.  Where the user has set one of them, theirs stand.
_VARIABLES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
_PERIOD_S = 2.0  # between looks at the cores
_WANTED = 0.3  # cores that others have to use beyond those that are free before threads sleep
_STAT = Path("/proc/stat")  # https://man7.org/linux/man-pages/man5/proc_stat.5.html


def environment() -> dict[str, str]:
    """What a process that computes on a CPU starts with; what the user has set stays."""
    theirs = {name: os.environ[name] for name in _VARIABLES if name in os.environ}
    return theirs or (_SPINS if sys.platform == "linux" else {})  # other systems' builds have another OpenMP


def use_threads(count: int) -> None:
    """Compute with so many threads from now on, which spin or sleep as the load of the machine says."""
    import torch

    torch.set_num_threads(count)
    if watch := _watch():
        watch.num_threads = count


def report_change() -> str | None:
    """What has changed in how threads wait since this was last asked, for a person to read; None = nothing."""
    return watch.take_change() if (watch := _watch()) else None


@functools.cache
def _watch() -> Watch | None:
    """This process's watch over its cores; None where libgomp would not listen, or the user decides."""
    set_by_us = all(os.environ.get(name) == value for name, value in _SPINS.items())
    openmp = _libgomp() if set_by_us and _STAT.exists() else None
    if openmp is None:
        return None
    try:
        watch = Watch(openmp)
    except (OSError, ValueError):  # a kernel that does not say what its CPUs do
        return None
    threading.Thread(target=watch.run, name="thread-waits", daemon=True).start()
    return watch


def _libgomp() -> ctypes.CDLL | None:
    """The libgomp that torch computes with in this process: its own, or the only one; None where that is not known."""
    import torch

    with Path("/proc/self/maps").open() as lines:
        loaded = {line.split(maxsplit=5)[-1].strip() for line in lines if "libgomp" in line}
    brought = {path for path in loaded if Path(path).is_relative_to(Path(torch.__file__).parent)}
    found = brought or loaded
    try:
        return ctypes.CDLL(found.pop()) if len(found) == 1 else None
    except OSError:
        return None


@dataclass
class Watch:
    """Looks at the machine's cores every two seconds and decides how threads wait."""

    openmp: ctypes.CDLL
    num_threads: int = 1  # that compute
    others: float = 0.0  # cores that other programs used in the last period
    is_crowded: bool = False  # whether threads sleep at once
    _reported: bool = False  # the state that was last handed out
    _idle: IdleTeam | None = None
    _load: OtherLoad = field(default_factory=lambda: OtherLoad(sorted(os.sched_getaffinity(0))))

    def run(self) -> None:
        """Look until the process ends, or until the kernel does not say what its CPUs do."""
        with contextlib.suppress(OSError, ValueError):
            while True:
                time.sleep(_PERIOD_S)
                self.look()

    def look(self) -> None:
        """Decide by what others have used since the last look."""
        self.others = self._load.cores()
        cores = len(self._load.cpus)
        self.is_crowded = wants_sleep(self.num_threads, self.others, cores)
        if self.is_crowded and self._idle is None:
            self._idle = IdleTeam(self.openmp, max(2, cores - self.num_threads + 2))
        elif not self.is_crowded and self._idle is not None:
            self._idle.end()
            self._idle = None

    def take_change(self) -> str | None:
        """As `report_change`."""
        if self.is_crowded == self._reported:
            return None
        self._reported = self.is_crowded
        if self.is_crowded:
            others, cores = f"{self.others:.1f}", len(self._load.cpus)
            return f"other programs use {others} of {cores} cores: threads that wait sleep at once, as is faster then"
        return "the cores are free again: threads that wait spin before they sleep"


def wants_sleep(num_threads: int, others: float, num_cores: int) -> bool:
    """Whether threads that wait should sleep at once: others use cores that those which compute would need."""
    return num_threads > 1 and others > num_cores - num_threads + _WANTED


class OtherLoad:
    """What other programs, and the host of a virtual machine, use of some CPUs."""

    def __init__(self, cpus: list[int]) -> None:
        self.cpus = cpus
        self._before = self._read()

    def cores(self) -> float:
        """That they used since the last call, on average."""
        before, self._before = self._before, self._read()
        passed, busy, own = (now - then for now, then in zip(self._before, before, strict=True))
        return max(0.0, busy - own) / passed if passed > 0 else 0.0

    def _read(self) -> tuple[float, float, float]:
        """Seconds of the clock, of the CPUs' work, of this process's."""
        return time.monotonic(), busy_s(_STAT.read_text(), self.cpus), time.process_time()


def busy_s(stat: str, cpus: list[int]) -> float:
    """Seconds that some CPUs have worked since the machine started, by the text of /proc/stat."""
    rows = {name: values for name, *values in map(str.split, stat.splitlines()) if name.startswith("cpu")}
    ticks = 0
    for cpu in cpus:
        user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, rows.get(f"cpu{cpu}", ["0"] * 8)[:8])
        ticks += user + nice + system + irq + softirq + steal
    return ticks / os.sysconf("SC_CLK_TCK")


class IdleTeam:
    """A team of OpenMP threads that does nothing, until its end: libgomp then has more threads than CPUs."""

    def __init__(self, openmp: ctypes.CDLL, size: int) -> None:
        self._over, begun = threading.Event(), threading.Event()

        def keep() -> None:
            nothing = ctypes.cast(ctypes.CDLL(None).free, ctypes.c_void_p)  # free(NULL) does nothing
            openmp.GOMP_parallel(nothing, None, ctypes.c_uint(size), ctypes.c_uint(0))
            begun.set()
            self._over.wait()  # the team lives as long as the thread that began it

        self._thread = threading.Thread(target=keep, name="thread-waits-team", daemon=True)
        self._thread.start()
        begun.wait()

    def end(self) -> None:
        """Let the team go."""
        self._over.set()
        self._thread.join()
