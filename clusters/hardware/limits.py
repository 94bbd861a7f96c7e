"""How much of this machine a process may use: its cores and memory, cgroup limits (v1, v2, nested) respected."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

PROC = Path("/proc")
CGROUPS = Path("/sys/fs/cgroup")


def num_cores() -> int:
    """Cores this process may use: the smaller of its affinity mask and the CPU quotas of its cgroups."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([cores, *(int(quota) for quota in _cpu_quotas())]))


def physical_memory_bytes() -> int | None:
    """What is built in, as the kernel reports it."""
    if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", {}):  # Windows has no such table
        return None
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def usable_memory_bytes() -> int | None:
    """The smallest of physical memory and the limits of this process's cgroups; None where none can be read."""
    physical = physical_memory_bytes()
    known = [physical] if physical else []
    for folder in _cgroup_folders("memory"):
        for name in ("memory.max", "memory.high", "memory.limit_in_bytes"):  # v2, v2 (soft: throttles), v1
            text = read(folder / name)
            if text.isdigit():  # v2 writes `max` for no limit
                known.append(int(text))
    return min(known) if known else None


def read(path: Path) -> str:
    """The text of a kernel file; empty where there is none."""
    try:
        return path.read_text(errors="replace").strip()
    except OSError:  # the file is one of several places a kernel may keep the figure
        return ""


def _cpu_quotas() -> Iterator[float]:
    for folder in _cgroup_folders("cpu"):
        v2 = read(folder / "cpu.max").split()  # `QUOTA PERIOD` or `max PERIOD`
        v1 = [read(folder / "cpu.cfs_quota_us"), read(folder / "cpu.cfs_period_us")]  # a quota of -1 is none
        for quota, period in (v2, v1) if len(v2) == 2 else (v1,):
            if quota.isdigit() and period.isdigit() and int(period):
                yield int(quota) / int(period)


def _cgroup_folders(controller: str) -> Iterator[Path]:
    """The folder of this process's cgroup and of each cgroup around it: every one of them limits it.

    A container often sees its own cgroup mounted as the root while /proc still names it by the host's path, so the
    root is always looked at and folders that do not exist are no error.
    """
    mounts = [(CGROUPS, ""), (CGROUPS / controller, "")]
    for line in read(PROC / "self" / "cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:  # v2; `unified` where v1 is mounted beside it
            mounts += [(CGROUPS, path), (CGROUPS / "unified", path)]
        elif controller in controllers.split(","):
            mounts += [(CGROUPS / controller, path), (CGROUPS / controllers, path)]
    for root, path in mounts:
        parts = [part for part in path.split("/") if part]
        if ".." in parts:  # a cgroup outside of this namespace: not visible from here
            parts = []
        for depth in range(len(parts), -1, -1):
            yield root.joinpath(*parts[:depth])
