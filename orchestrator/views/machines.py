"""Renders machines: devices, links, and what is wrong with them."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from clusters.capability import NUMBER_FORMATS, ClusterCapability, DeviceCapability, NodeCapability
from clusters.hardware import datasheet
from clusters.units import format_bytes
from orchestrator.language.catalogue import tr
from orchestrator.planning.explain import explain_unusable
from orchestrator.views.screen import new_table
from strategies.techniques.libraries import lacks

_MARK = {"measured": "", "datasheet": "d", "declared": "D"}


def machines_view(cluster: ClusterCapability) -> RenderableType:
    """Every node with its devices, then the links, then what could not be probed."""
    parts: list[RenderableType] = []
    for node in cluster.nodes:
        parts += [_node(node), _devices(node), Text()]
    if cluster.links:
        table = new_table("link", "bandwidth", "round trip")
        for link in cluster.links:
            mark = _MARK[link.source]
            trip = tr("unknown") if link.round_trip_s is None else f"{link.round_trip_s * 1e3:.2g} ms{mark}"
            table.add_row(" - ".join(link.between), _rate(link.bytes_per_s, mark), trip)
        parts += [table, Text()]
    parts += [Text(f"{name}: {tr(why)}", style="yellow") for name, why in explain_unusable(cluster).items()]
    parts += [Text(tr(text), style="dim") for text in (*_missing(cluster), *_screens(cluster))]
    doubtful = [(node, device) for node in cluster.nodes for device in node.doubtful]
    parts += [
        Text(f"{device.name} ({node.name}): {tr(device.doubt or '')}", style="yellow") for node, device in doubtful
    ]
    parts += [
        Text(tr(f"{node}: could not be probed: {reason}"), style="red") for node, reason in cluster.failed.items()
    ]
    parts.append(Text(tr("plain = measured, d = datasheet, D = declared, - = unknown"), style="dim"))
    return Group(*parts)


def _missing(cluster: ClusterCapability) -> list[str]:
    """What optional libraries are missing, each once."""
    devices = [device for node in cluster.nodes for device in node.devices]
    found = [lacks(device, name) for device in devices for name in device.libraries]
    return list(dict.fromkeys(text for text in found if text is not None))


def _screens(cluster: ClusterCapability) -> list[str]:
    """Which cards are taken to hold a screen's memory, and how much."""
    held = {(node.name, device.name): datasheet.display_bytes(device) for node in cluster.nodes for device in node.gpus}
    return [
        f"{name} ({node}): {format_bytes(size)} are taken to be its screen's; display_gib in a hardware file states it"
        for (node, name), size in held.items()
        if size
    ]


def _node(node: NodeCapability) -> Text:
    memory = tr("unknown memory") if node.memory_bytes is None else format_bytes(node.memory_bytes)
    rate = node.gpu_link_bytes_per_s
    gpus = "" if rate is None else tr(f", {rate / 1e9:.1f} GB/s between its GPUs")
    disk = (
        ""
        if node.disk_write_bytes_per_s is None
        else tr(", disk {0} MB/s").format(f"{node.disk_write_bytes_per_s / 1e6:.0f}")
    )
    size = tr("{0} cores, {1} usable").format(node.num_cores, memory)
    return Text.assemble((node.name, "bold"), f": {size}{disk}{gpus}")


def _devices(node: NodeCapability) -> Table:
    rates = [f"{name} FLOP/s" for name in NUMBER_FORMATS]
    names = ("device", "memory", *rates, "bandwidth", "bus", "can")
    table = new_table(*names, fold=True, dispensable=("bus", "can", *reversed(rates[2:])))
    for device in node.devices:
        memory = "-" if device.memory_bytes is None else format_bytes(device.memory_bytes)
        flops = (_flops(device, name) for name in NUMBER_FORMATS)
        bandwidth = _rate(device.memory_bytes_per_s, _mark(device.sources, "memory_bytes_per_s"))
        bus = _rate(device.host_to_device_bytes_per_s, _mark(device.sources, "host_to_device_bytes_per_s"))
        table.add_row(device.name, memory, *flops, bandwidth, bus, ", ".join(_abilities(device)) or "-")
    return table


def _flops(device: DeviceCapability, name: str) -> str:
    value = device.flops_per_s.get(name)
    if value is None:
        return "-"
    text = f"{value / 1e12:.1f} T" if value >= 1e12 else f"{value / 1e9:.0f} G"
    return text + _mark(device.sources, f"flops_per_s.{name}")


def _rate(bytes_per_s: float | None, mark: str) -> str:
    if bytes_per_s is None:
        return "-"
    return (f"{bytes_per_s / 1e9:.1f} GB/s" if bytes_per_s >= 1e9 else f"{bytes_per_s / 1e6:.0f} MB/s") + mark


def _mark(sources: Mapping[str, str], name: str) -> str:
    return _MARK.get(sources.get(name, "measured"), "")


def _abilities(device: DeviceCapability) -> list[str]:
    known = list(device.instruction_sets)
    if device.compute_capability:
        known.append("compute capability {}.{}".format(*device.compute_capability))
    marks = {"runs": "{}", "absent": "no {}", "broken": "{} broken"}
    return known + [marks[library.state].format(name) for name, library in device.libraries.items()]
