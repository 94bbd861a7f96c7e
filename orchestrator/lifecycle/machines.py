"""Where a plan's machines come from: this one, a Ray cluster, or a file that declares them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from clusters.capability import ClusterCapability, DeviceCapability, NodeCapability
from clusters.hardware import datasheet
from clusters.ray.connect import CannotConnect, WorkerProcess
from clusters.units import format_bytes
from orchestrator.errors import ClusterError, JobError
from orchestrator.job.paths import resolve_path
from orchestrator.planning.plan import Plan
from strategies.step import host_memory

SHIPPED = Path(__file__).parents[1] / "recipes" / "hardware"


def declared(file: Path) -> ClusterCapability:
    """The machines of a hardware file, or of a shipped one by its name.  Raises JobError with every mistake."""
    from clusters.hardware.hardware_file import ImpossibleHardware, read_hardware

    shipped = {each.stem: each for each in SHIPPED.glob("*.yaml")}
    is_shipped = str(file) in shipped and not file.exists()
    path = resolve_path(shipped[str(file)] if is_shipped else file, "--hardware", kind="file")
    try:
        return read_hardware(path)
    except ImpossibleHardware as error:
        raise JobError([f"--hardware {file}: {mistake}" for mistake in error.mistakes]) from None


def probe(
    address: str, say: Callable[[str], None], refresh: bool = False, num_slots: int | None = None
) -> ClusterCapability:
    """What the machines behind an address can do, measured or remembered; first `num_slots` slots are waited for.

    A node whose probe fails is reported and not used.  Raises ClusterError where none can be probed.
    """
    with cluster_errors():
        if address == "local":
            from clusters.probe.node import probe_node

            found = ClusterCapability((probe_node(refresh),))
        else:
            from clusters.ray.probe import probe_cluster

            found = probe_cluster(address, refresh, num_slots=num_slots or 0)
    nodes = tuple(replace(node, devices=tuple(_known(device) for device in node.devices)) for node in found.nodes)
    found = replace(found, nodes=nodes)
    for note in notes(found):
        say(note)
    if not found.nodes:
        raise ClusterError(f"no node of {address} could be probed")
    return found


@contextlib.contextmanager
def cluster_errors() -> Iterator[None]:
    """A cluster that cannot be connected to, as a ClusterError."""
    try:
        yield
    except CannotConnect as error:
        raise ClusterError(f"cluster.address: {error}. `local` runs on this machine") from error


def lacking_here(num_workers: int, slot: Mapping[str, float]) -> str | None:
    """What so many workers lack on this machine of the connected cluster now, and who has it."""
    from clusters.ray.gpu_reservation import own_node_id
    from clusters.ray.nodes import shortage

    return shortage({own_node_id(): {kind: num_workers * amount for kind, amount in slot.items()}})


def planned_gpus(plan: Plan, capability: ClusterCapability) -> list[DeviceCapability]:
    """The GPUs of a single machine that a plan trains on."""
    named = {part.uuid for part in plan.nodes if part.torch_device != "cpu"}
    gpus = [gpu for node in capability.nodes for gpu in node.gpus]
    return [gpu for gpu in gpus if gpu.uuid in named] if named - {None} else gpus[: len(plan.nodes) * bool(named)]


def worker_process(plan: Plan, nice: int | None) -> WorkerProcess:
    """How workers of a plan for this machine alone start."""
    on_cpu = plan.nodes[0].torch_device == "cpu"
    return WorkerProcess(host_memory.process_environment() if on_cpu else {}, nice)


def notes(cluster: ClusterCapability) -> list[str]:
    """What a user should know before a plan is read: nodes that are not used, figures in doubt, GPUs in use."""
    texts = [f"{node} could not be probed and is not used: {reason}" for node, reason in cluster.failed.items()]
    for node in cluster.nodes:
        for device in node.doubtful:
            again = "the next probe" if device.kind != "cpu" else "a probe ten minutes later"
            texts.append(f"{device.name} on {node.name}: {device.doubt} It is measured again by {again}")
        for device in node.gpus:
            total, usable = device.memory_total_bytes, device.memory_bytes
            if total and usable is not None and total - usable > 0.1 * total:
                held = format_bytes(total - usable)
                texts.append(f"{device.name} on {node.name}: {held} are in use by others; planning with the rest")
    return texts


def _known(device: DeviceCapability) -> DeviceCapability:
    """With figures of its datasheet where none was measured (on a machine without torch, all of them)."""
    is_planned = device.kind != "cpu" and device.problem is None
    card = datasheet.find(device.name, device.memory_total_bytes) if is_planned else None
    if card is None:
        return device
    published = datasheet.device(card)
    flops = {name: device.flops_per_s.get(name) or value for name, value in published.flops_per_s.items()}
    filled = {
        name: getattr(device, name) if getattr(device, name) is not None else getattr(published, name)
        for name in ("memory_bytes_per_s", "host_to_device_bytes_per_s", "device_to_host_bytes_per_s", "power_w")
    }
    return replace(device, flops_per_s=flops, sources={**published.sources, **device.sources}, **filled)


def with_less_memory(node: NodeCapability, part: float) -> NodeCapability:
    """A node of which only a part of each device's memory is counted on."""
    devices = tuple(
        replace(device, memory_bytes=int(part * device.memory_bytes)) if device.memory_bytes else device
        for device in node.devices
    )
    return replace(node, devices=devices)


def with_devices(node: NodeCapability, used: Collection[tuple[str | None, str]]) -> NodeCapability:
    """A node with these devices alone, by UUID and name, and its CPU."""
    devices = (device for device in node.devices if device.kind == "cpu" or (device.uuid, device.name) in used)
    return replace(node, devices=tuple(devices))
