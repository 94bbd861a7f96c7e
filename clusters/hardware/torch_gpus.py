"""The GPUs as PyTorch sees them, and which of them is which of the driver's tool.  Its functions load torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from clusters.capability import DeviceCapability
from clusters.hardware.torch_build import TorchBuild, why_unusable
from clusters.safe.reading import first_line

_RESTART = "restart the machine (or the container, with its GPUs handed in), then `orchestrator probe --refresh`"


@dataclass(frozen=True)
class SeenGpu:
    """One GPU under PyTorch's number."""

    index: int
    name: str
    uuid: str | None = None
    pci: tuple[int, int, int] | None = None  # domain, bus, device


@dataclass(frozen=True)
class Seen:
    """What PyTorch is built for, the GPUs it sees, and its own words where it sees none."""

    build: TorchBuild
    gpus: tuple[SeenGpu, ...] = ()
    error: str = ""


def seen_by_torch() -> Seen:
    """Ask the PyTorch of this process, which sets up CUDA for that."""
    import torch

    build = TorchBuild(torch.__version__, torch.version.cuda, torch.version.hip, tuple(torch.cuda.get_arch_list()))
    if build.cuda is None and build.hip is None:
        return Seen(build)
    try:
        torch.cuda.init()
    except Exception as error:  # whatever a driver makes of it: the text is what a person needs
        return Seen(build, error=first_line(error, 200))
    return Seen(build, tuple(_seen(index) for index in range(torch.cuda.device_count())))


def _seen(index: int) -> SeenGpu:
    import torch

    known = torch.cuda.get_device_properties(index)
    place = [getattr(known, f"pci_{part}_id", None) for part in ("domain", "bus", "device")]
    pci = tuple(int(part) for part in place if part is not None)
    return SeenGpu(index, known.name, str(known.uuid), pci if len(pci) == 3 else None)


def index_of(device: DeviceCapability, alike: Sequence[DeviceCapability], gpus: Sequence[SeenGpu]) -> int | None:
    """PyTorch's number of a GPU of the driver's tool; None where it does not see it.

    By UUID, else by PCI address.  Where neither is known by both, by position among the GPUs of its kind, `alike`, and
    then only if both count as many and call it the same.
    """
    for known, key in ((_plain(device.uuid), "uuid"), (_pci(device.pci_bus_id), "pci")):
        theirs = {_plain(gpu.uuid) if key == "uuid" else gpu.pci: gpu.index for gpu in gpus}
        if known is not None and known in theirs:
            return theirs[known]
        if known is not None and device.kind == "cuda" and None not in theirs and gpus:
            return None  # ROCm and its torch do not spell a UUID alike
    position = next((place for place, other in enumerate(alike) if other is device), None)
    if position is None or len(alike) != len(gpus) or gpus[position].name != device.name:
        return None
    return gpus[position].index


def judge(device: DeviceCapability, index: int | None, seen: Seen) -> DeviceCapability:
    """The device with what stands against training on it, and with memory that its driver's tool did not tell."""
    if device.kind == "cpu" or device.problem is not None:
        return device
    problem = why_unusable(device, seen.build)
    if problem is not None:
        return replace(device, problem=problem)
    if index is None and seen.gpus:  # a processor's own graphics, which ROCm does not count
        others = f"{len(seen.gpus)} GPU{'s' if len(seen.gpus) > 1 else ''}"
        problem = f"torch {seen.build.version} sees {others} and not this one: it is hidden or not supported"
        return replace(device, problem=problem)
    if index is None:
        said = f" ({seen.error})" if seen.error else ""
        problem = f"torch {seen.build.version} does not see it{said}: {_RESTART}"
        return replace(device, problem=problem, doubt="torch did not see it")
    return with_memory(device, index) if device.memory_bytes is None else device


def with_memory(device: DeviceCapability, index: int) -> DeviceCapability:
    """Free and whole memory as CUDA tells them: where it is the host's (GB10, Jetson), the driver's tool does not."""
    import torch

    free, total = torch.cuda.mem_get_info(index)
    sources = {**device.sources, "memory_bytes": "measured", "memory_total_bytes": "measured"}
    return replace(device, memory_bytes=free, memory_total_bytes=total, sources=sources)


def _plain(uuid: str | None) -> str | None:
    """The hexadecimal digits, without the kind in front: GPU-2f0c... of nvidia-smi is 2f0c... of torch."""
    return uuid.removeprefix("GPU-").lower() if uuid else None


def _pci(address: str | None) -> tuple[int, int, int] | None:
    found = re.fullmatch(r"([0-9a-f]+):([0-9a-f]+):([0-9a-f]+)\.\d", (address or "").lower())
    return (int(found[1], 16), int(found[2], 16), int(found[3], 16)) if found else None
