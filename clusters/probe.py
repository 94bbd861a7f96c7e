"""Look at this machine: cores, memory, instruction sets, GPUs.  Reads only; loads no heavy library."""

import csv
import io
import os
import platform
import shutil
import subprocess
from pathlib import Path

from clusters.capability import DeviceCapability, NodeCapability
from clusters.units import MIB

_INTERESTING_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8", "asimd", "bf16", "sve")


def probe_this_node() -> NodeCapability:
    """This machine as a container sees it: cgroup limits on cores and memory are respected."""
    memory_bytes = usable_memory_bytes()
    cpu = DeviceCapability("cpu", _cpu_name(), memory_bytes, instruction_sets=_instruction_sets())
    return NodeCapability(platform.node(), num_cores(), memory_bytes, (*_nvidia_gpus(), cpu))


def num_cores() -> int:
    """Cores this process may use: the smaller of its affinity mask and its cgroup's CPU quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _cgroup_cpu_quota()
    return max(1, min(cores, int(quota))) if quota else cores


def usable_memory_bytes() -> int | None:
    """The smallest of physical memory and every cgroup limit; None where none can be read."""
    known: list[int] = []
    if "SC_PHYS_PAGES" in os.sysconf_names:
        known.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        text = _read(path)
        if text.isdigit():
            known.append(int(text))
    return min(known) if known else None


def _cgroup_cpu_quota() -> float | None:
    v2 = _read("/sys/fs/cgroup/cpu.max").split()
    if len(v2) == 2 and v2[0] != "max":
        return int(v2[0]) / int(v2[1])
    quota = _read("/sys/fs/cgroup/cpu/cpu.cfs_quota_us")
    period = _read("/sys/fs/cgroup/cpu/cpu.cfs_period_us")
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() else None


def _cpu_name() -> str:
    for line in _read("/proc/cpuinfo").splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _instruction_sets() -> tuple[str, ...]:
    for line in _read("/proc/cpuinfo").splitlines():
        if line.startswith(("flags", "Features")):
            present = set(line.split(":", 1)[1].split())
            return tuple(flag for flag in _INTERESTING_FLAGS if flag in present)
    return ()


def _nvidia_gpus() -> tuple[DeviceCapability, ...]:
    if shutil.which("nvidia-smi") is None:
        return ()
    query = ["nvidia-smi", "--query-gpu=name,memory.free,compute_cap", "--format=csv,noheader,nounits"]
    answer = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False)
    if answer.returncode != 0:  # a driver without a card: no GPU, which is what the caller asked
        return ()
    return tuple(_gpu(row) for row in csv.reader(io.StringIO(answer.stdout), skipinitialspace=True) if row)


def _gpu(row: list[str]) -> DeviceCapability:
    name, free_mib, capability = row
    major, minor = capability.split(".")
    memory_bytes = int(free_mib) * MIB if free_mib.isdigit() else None
    return DeviceCapability("cuda", name, memory_bytes, compute_capability=(int(major), int(minor)))


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:  # the file is one of several places a kernel may keep the figure
        return ""
