"""The planned GPU in a process that Ray Train did not start: a command's, a trial's, the baseline helper's."""

from __future__ import annotations

import torch

from clusters.hardware.gpus import look_at_gpus
from clusters.ray.gpu_reservation import see, visible
from orchestrator.errors import JobError
from orchestrator.planning.plan import NodePlan
from strategies.step import device_memory


def planned_device(part: NodePlan) -> torch.device:
    """The device a part was planned for, ready for its first tensor.  Raises JobError where the GPU is not there."""
    if part.torch_device == "cpu":
        return torch.device("cpu")
    there = [gpu.uuid for gpu in look_at_gpus()[0]]
    if part.uuid and part.uuid not in there:
        raise JobError(
            f"{part.device} ({part.uuid}), which the plan is for, is not among the GPUs of this process"
            f" ({', '.join(filter(None, there)) or 'none'}). Plan again"
        )
    return _ready(part, part.uuid)


def device_like(part: NodePlan) -> torch.device:
    """The planned device, or the GPU that this process sees in its place; the CPU where it sees none."""
    if part.torch_device == "cpu":
        return torch.device("cpu")
    is_there = part.uuid in [gpu.uuid for gpu in look_at_gpus()[0]]
    if not is_there and not torch.cuda.is_available():
        return torch.device("cpu")
    return _ready(part, part.uuid if is_there else None)


def _ready(part: NodePlan, uuid: str | None) -> torch.device:
    """Make one GPU visible to this process, or all, before CUDA starts; afterwards pick the one among them.

    The plan's memory limit applies to the planned GPU and to no other.
    """
    device_memory.grow_segments()
    if not torch.cuda.is_initialized():
        see(visible(part.kind, uuid))
    uuids = [uuid_of(torch.device("cuda", place)) for place in range(torch.cuda.device_count())]
    device = torch.device("cuda", uuids.index(uuid) if uuid in uuids else 0)
    torch.cuda.set_device(device)
    device_memory.limit(device, part.memory_usable_bytes if uuid == part.uuid else None)
    return device


def gpu_in_use(part: NodePlan, device: torch.device) -> tuple[str, str | None]:
    """Name and UUID, as the driver reports them, of the device that `device_like` chose for a part."""
    shown = [gpu for gpu in look_at_gpus()[0] if gpu.kind == part.kind] if part.torch_device != "cpu" else []
    if device.type != part.torch_device:
        return "the CPU", None
    if not shown or part.uuid in [gpu.uuid for gpu in shown]:
        return part.device, part.uuid
    return shown[0].name, shown[0].uuid


def uuid_of(device: torch.device) -> str:
    """As NVIDIA's driver writes it."""
    return f"GPU-{torch.cuda.get_device_properties(device).uuid}"
