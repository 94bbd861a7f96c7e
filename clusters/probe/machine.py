"""Look at this machine: cores, memory, instruction sets, GPUs.  Reads only; loads no heavy library."""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
from dataclasses import replace

from clusters.capability import DeviceCapability, NodeCapability, Source
from clusters.hardware import limits
from clusters.hardware.gpus import look_at_gpus
from clusters.hardware.limits import num_cores, usable_memory_bytes
from clusters.safe.cache import cache_folder
from clusters.units import GIB

_METHOD = 2  # of measuring; a new number makes figures measured the old way be measured again
_X86_FLAGS = ("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_tile", "amx_int8", "amx_bf16")
_ARM_FLAGS = ("asimd", "bf16", "sve")
# What is measured depends on their versions.
_LIBRARIES = ("torch", "bitsandbytes", "deepspeed", "flash-attn", "schedulefree", "liger-kernel")


def look_at_this_node() -> NodeCapability:
    """This machine as a container sees it, by reading only: what must be measured is None."""
    usable, physical = usable_memory_bytes(), limits.physical_memory_bytes()
    known: dict[str, Source] = {"memory_bytes": "measured", "memory_total_bytes": "measured"}
    cpu = DeviceCapability(
        "cpu",
        _cpu_name(),
        memory_bytes=usable,
        memory_total_bytes=physical,
        instruction_sets=_instruction_sets(),
        sources=known if usable and physical else {},
    )
    gpus, problems = look_at_gpus()
    node = NodeCapability(
        platform.node(),
        num_cores(),
        usable,
        (*gpus, cpu),
        disk_free_bytes=_free_bytes(),
        problems=problems,
        sources={"memory_bytes": "measured"} if usable else {},
    )
    return replace(node, hardware_hash=_hash(node))


def _free_bytes() -> int | None:
    """Free on the disk of the cache folder, which may not be there yet."""
    try:
        folder = cache_folder()
        return shutil.disk_usage(next(one for one in (folder, *folder.parents) if one.exists())).free
    except (OSError, RuntimeError, StopIteration):
        return None


def _hash(node: NodeCapability) -> str:
    """SHA-256 over all that the measured figures depend on, and nothing that changes while the machine is used."""
    seen = {
        "method": _METHOD,
        "cores": node.num_cores,
        "memory_gib": round((node.memory_bytes or 0) / GIB),
        "devices": [
            (
                device.kind,
                device.name,
                device.compute_capability,
                device.instruction_sets,
                device.problem,  # a card that fell off the bus is not measured
                None if device.kind == "cpu" else round((device.memory_total_bytes or 0) / GIB),
            )
            for device in node.devices
        ],
        "drivers": sorted({device.driver_version for device in node.devices if device.driver_version}),
        "libraries": [_version(library) for library in _LIBRARIES],
    }
    return hashlib.sha256(json.dumps(seen, sort_keys=True).encode()).hexdigest()


def _version(library: str) -> str | None:
    from importlib import metadata  # 30 ms that only a probe pays

    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    for line in limits.read(limits.PROC / "cpuinfo").splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _instruction_sets() -> tuple[str, ...]:
    for line in limits.read(limits.PROC / "cpuinfo").splitlines():
        if line.startswith(("flags", "Features")):
            present = set(line.split(":", 1)[1].split())
            return tuple(flag for flag in _X86_FLAGS + _ARM_FLAGS if flag in present)
    return ()
