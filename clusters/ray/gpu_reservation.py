"""GPUs reserved with Ray by UUID, so that the one that was planned is the one that trains and nobody else is put on it.

Ray hands out whichever GPU of a node is free, and says afterwards which one; a plan names one.  So one holder after
another asks Ray for a GPU of the node until the wanted ones are among those held, and the others are given back.  A
holder is an actor that does nothing: what it holds is held until this process ends or lets go.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from clusters.capability import DeviceCapability, Kind
from clusters.hardware.gpus import look_at_gpus
from clusters.hardware.waiting import wait_for_gpus

GPU = "GPU"  # Ray's name of the resource
_HOLDER_S = 60.0  # until a holder's process is there, on a busy machine
_SEEN_S = 2.0  # until all of Ray knows what has been given back


@dataclass(frozen=True)
class Wanted:
    """One GPU of a node: any of `uuids` will do, the planned one first; whichever where there are none."""

    node_id: str
    uuids: tuple[str, ...] = ()


@dataclass(frozen=True)
class ReservedGpu:
    """A GPU that Ray gave: its UUID where the driver tells, else the number by which Ray knows it."""

    id: str
    holder: Any


class CannotReserve(Exception):
    """A wanted GPU whose node is lost, which no waiting brings back."""


class GpuGone(CannotReserve):
    """A wanted GPU that is no longer in its node, and what is."""


@dataclass
class Reservation:
    """What is held for each wanted GPU, in their order; None where Ray does not hand it out on that node."""

    held: list[ReservedGpu | None] = field(default_factory=list)

    def release(self) -> None:
        """Give everything back."""
        _release(one for one in self.held if one)
        self.held = []


def visible(kind: Kind, gpu: str | None) -> dict[str, str]:
    """The environment in which a process sees one GPU and no other; before CUDA or HIP starts in it.

    NVIDIA: a UUID or a number, https://docs.nvidia.com/cuda/cuda-programming-guide (CUDA_VISIBLE_DEVICES).  AMD: a
    UUID goes to the runtime below HIP (ROCR_VISIBLE_DEVICES), which takes no part of one and leaves HIP a single card
    to count; Ray's numbers are HIP's.
    """
    if kind == "cuda":
        shown = {} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu}
        return {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", **shown}  # in the order of the driver's tool
    if kind == "cpu" or gpu is None:
        return {}
    if gpu.isdecimal():
        return {"HIP_VISIBLE_DEVICES": gpu}
    return {"ROCR_VISIBLE_DEVICES": gpu, "HIP_VISIBLE_DEVICES": "0"}


def by_uuid(gpus: Sequence[DeviceCapability]) -> dict[str, str]:
    """The environment in which Ray hands out these GPUs by UUID; nothing where a driver tells none.

    AMD's are handed out by number: Ray sets HIP_VISIBLE_DEVICES, which takes no UUID.
    """
    uuids = [gpu.uuid for gpu in gpus if gpu.uuid and gpu.kind == "cuda"]
    return visible("cuda", ",".join(uuids)) if uuids and len(uuids) == len(gpus) else {}


def see(environment: Mapping[str, str]) -> None:
    """Take the environment over; runs in a worker before PyTorch is loaded.  Raises RuntimeError after CUDA started."""
    torch = sys.modules.get("torch")
    if environment and torch is not None and torch.cuda.is_initialized():
        raise RuntimeError(f"CUDA has started before this worker knew its GPU: {dict(environment)}")
    os.environ.update(environment)


def own_node_id() -> str:
    """Ray's id of the node of this process; here so that a worker that is asked loads nothing else."""
    import ray

    return ray.get_runtime_context().get_node_id()


def matched(wanted: Sequence[Wanted], held: Sequence[str]) -> dict[int, int]:
    """Wanted -> held, by their places: the planned GPUs first, then who is content with fewest others."""
    found: dict[int, int] = {}
    for index, one in enumerate(wanted):
        if one.uuids and one.uuids[0] in held:
            found[index] = held.index(one.uuids[0])
    rest = [index for index in range(len(wanted)) if index not in found]
    for index in sorted(rest, key=lambda index: len(wanted[index].uuids) or len(held)):
        left = [place for place in range(len(held)) if place not in found.values()]
        fitting = [place for place in left if not wanted[index].uuids or held[place] in wanted[index].uuids]
        if fitting:
            found[index] = fitting[0]
    return found


def reserve(
    wanted: Sequence[Wanted], say: Callable[[str], None], is_over: Callable[[], bool] = lambda: False
) -> Reservation | None:
    """Hold every wanted GPU of the connected cluster, all or none; waits for those that others have.

    Says once a minute what is waited for.  None when `is_over` becomes true first.  Raises CannotReserve, GpuGone.
    """
    names = ", ".join(sorted({one.uuids[0] for one in wanted if one.uuids}))
    return wait_for_gpus(lambda: _try(wanted), lambda: f"GPUs that others use: {names}", say, is_over)


def _try(wanted: Sequence[Wanted]) -> Reservation | None:
    reservation = Reservation([None] * len(wanted))
    try:
        for node_id in sorted({one.node_id for one in wanted}):  # everybody in the same order
            places = [place for place, one in enumerate(wanted) if one.node_id == node_id]
            held = _hold(node_id, [wanted[place] for place in places])
            if held is None:
                reservation.release()
                return None
            for place, one in zip(places, held, strict=True):
                reservation.held[place] = one
    except CannotReserve:
        reservation.release()
        raise
    return reservation


def _hold(node_id: str, wanted: Sequence[Wanted]) -> list[ReservedGpu | None] | None:
    """The wanted GPUs of one node, None for those that Ray does not hand out; None, and nothing held, where others
    have them."""
    held: list[ReservedGpu] = []
    found: dict[int, int] = {}
    num_gpus = _num_gpus(node_id)
    while len(found) < len(wanted) and not _is_hopeless(wanted, held, num_gpus):
        count = min(len(wanted) - len(found), num_gpus - len(held))
        new = _start(node_id, count) if _is_free(node_id, count) else None
        held += new or []
        missing = _missing(wanted, new[0].holder) if new else None
        if new is None or missing:
            _release(held)
            if missing:
                raise GpuGone(missing)
            return None
        found = matched(wanted, [one.id for one in held])
    _release(one for place, one in enumerate(held) if place not in found.values())
    return [held[found[index]] if index in found else None for index in range(len(wanted))]


def _is_hopeless(wanted: Sequence[Wanted], held: Sequence[ReservedGpu], num_gpus: int) -> bool:
    """Whether holding more finds no wanted GPU: all are held, or the node's are known by number and not by UUID."""
    by_number = bool(held) and all(one.id.isdecimal() for one in held) and all(one.uuids for one in wanted)
    return len(held) == num_gpus or by_number


def _missing(wanted: Sequence[Wanted], holder: Any) -> str | None:
    """What to say of a wanted GPU that the driver of a holder's node does not list; None where it lists one that will
    do for each, or where nobody can tell."""
    import ray
    from ray.exceptions import RayError

    try:
        there = ray.get(holder.uuids.remote(), timeout=_HOLDER_S)
    except RayError:  # the holder was lost meanwhile; what follows notices
        return None
    gone = sorted({one.uuids[0] for one in wanted if one.uuids and not set(one.uuids) & {*there}})
    if not there or not gone:
        return None
    return f"{', '.join(gone)}, which the plan is for, is no longer in its node: there is {', '.join(there)}"


def _start(node_id: str, count: int) -> list[ReservedGpu] | None:
    """So many more GPUs of a node; None where Ray did not give them in time, or a holder was lost."""
    import ray
    from ray.exceptions import RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    pinned = NodeAffinitySchedulingStrategy(node_id, soft=False)
    options: dict[str, Any] = {"num_cpus": 0, "num_gpus": 1, "max_restarts": 0, "scheduling_strategy": pinned}
    holders: list[Any] = [ray.remote(_Holder).options(**options).remote() for _ in range(count)]
    answers = [holder.gpu.remote() for holder in holders]
    try:
        names = ray.get(answers, timeout=_HOLDER_S)
    except RayError:  # too late, killed, or with its node: the next try sees whether that is there
        _release(ReservedGpu("", holder) for holder in holders)
        return None
    return [ReservedGpu(name, holder) for name, holder in zip(names, holders, strict=True)]


class _Holder:
    """Has a GPU of Ray's and does nothing with it."""

    def gpu(self) -> str:
        """Its UUID; the number by which Ray knows it where the driver tells none."""
        import ray

        known = str(ray.get_runtime_context().get_accelerator_ids()[GPU][0])
        kind = "rocm" if "HIP_VISIBLE_DEVICES" in os.environ else "cuda"  # Ray hands out those of one maker
        seen = [gpu for gpu in look_at_gpus()[0] if gpu.kind == kind]  # Ray shows this process no other
        return seen[0].uuid or known if len(seen) == 1 else known

    def uuids(self) -> list[str]:
        """Of all GPUs of its node, as far as their drivers tell."""
        for variable in ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"):
            os.environ.pop(variable, None)
        return [gpu.uuid for gpu in look_at_gpus()[0] if gpu.uuid]


def _is_free(node_id: str, count: int) -> bool:
    from ray._private import state  # the public one asks the dashboard, which may be off

    until = time.monotonic() + _SEEN_S
    while state.available_resources_per_node().get(node_id, {}).get(GPU, 0.0) < count:
        if time.monotonic() > until:
            return False
        time.sleep(0.1)
    return True


def offers_gpus(node_id: str) -> bool:
    """Whether Ray has GPUs of a node to hand out: where none were declared, who asks for one waits without end."""
    import ray

    nodes = (node for node in ray.nodes() if node["Alive"])
    return any(node["NodeID"] == node_id and node["Resources"].get(GPU) for node in nodes)


def _num_gpus(node_id: str) -> int:
    """How many GPUs Ray has of a node.  Raises CannotReserve for one that is lost."""
    import ray

    for node in ray.nodes():
        if node["NodeID"] == node_id and node["Alive"]:
            return int(node["Resources"].get(GPU, 0))
    raise CannotReserve("the node of a planned GPU left the cluster before training started")


def _release(held: Iterable[ReservedGpu]) -> None:
    import ray

    for one in held:
        ray.kill(one.holder)
