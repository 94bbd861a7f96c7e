"""A YAML file that declares machines which are not here -> ClusterCapability, so that a purchase can be planned.

    nodes:
      - name: workstation                 # unique
        cores: 16
        memory_gib: 64
        gpus: [RTX 3090, RTX 3090]        # names of clusters/hardware/datasheet.py, each is one device
        cpu: {name: Ryzen 9 5950X, fp32_gflops: 900, memory_gb_per_s: 45, instruction_sets: [avx2]}
        gpu_link: {nvlink: true}          # between its GPUs; or {pcie: 4x8, peer_access: false}, or {gb_per_s: 40}
        disk_write_mb_per_s: 1500
        power_w: {idle: 60, load: 820}    # of the whole machine
        price: {purchase: 3400, years: 3} # written off over so many years; in the job's currency
      - name: rented
        count: 2                          # alike: rented-1 and rented-2
        cores: 32
        memory_gib: 128
        gpus:                             # any figure replaces that of the datasheet; null takes it away
          - {name: RTX 4090, count: 4, memory_gib: 48, bf16_tflops: 150, power_w: 400}
          - {name: Wonder 1, memory_gib: 32, bf16_tflops: 90, kind: rocm}  # not in the datasheet
        price: {per_hour: 1.90}
    network: {mbit_per_s: 1000, round_trip_ms: 0.3}     # between every two machines
    links:                                              # exceptions; `rented` stands for rented-1 and rented-2
      - {between: [workstation, rented], mbit_per_s: 100, round_trip_ms: 25}

Only `nodes` with `name`, `cores` and `memory_gib` are needed.  Every machine has a CPU that can train.  A GPU may also
declare fp32_tflops, fp16_tflops, int8_tops, memory_gb_per_s, host_link_gb_per_s and compute_capability; a CPU
fp16_gflops, bf16_gflops and int8_gops.  `gpu_link` states what two GPUs exchange in each direction at once: NVLink at
the board's published rate, a PCIe generation and lanes (with or without peer access; it is the GPUs' way to the host
too), or a figure.  Without it boards whose machines always have NVLink have it, and others a guess over PCIe.  A GPU
that is not in the datasheet is `kind: cuda` unless the file says rocm.
"""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from clusters.capability import ClusterCapability, DeviceCapability, Link, NodeCapability, Source
from clusters.hardware import datasheet
from clusters.hardware.gpu_links import HOST_REACHED, NVLINK_REACHED, PEER_REACHED
from clusters.hardware.hardware_section import HardwareSection, shown
from clusters.safe.reading import BadInput, compose_yaml, printable, read_text, yaml_value
from clusters.units import GIB

_TOP = ("nodes", "network", "links")
_NODE = ("name", "count", "cores", "memory_gib", "gpus", "gpu_link", "cpu", "disk_write_mb_per_s", "power_w", "price")
_PRICE = {"purchase": "purchase_price", "years": "years", "per_hour": "price_per_hour"}
_GPU = ("name", "count", "memory_gib", "display_gib", "kind", "compute_capability")
_LINK = ("mbit_per_s", "round_trip_ms")
_PEAKS = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
# Key in the file -> what one unit of it is, and the figures of DeviceCapability that it sets.
_GPU_FIGURES = {
    **{f"{short}_tflops": (1e12, (f"flops_per_s.{name}",)) for short, name in _PEAKS.items()},
    "int8_tops": (1e12, ("flops_per_s.int8",)),
    "memory_gb_per_s": (1e9, ("memory_bytes_per_s",)),
    "host_link_gb_per_s": (1e9, ("host_to_device_bytes_per_s", "device_to_host_bytes_per_s")),
    "power_w": (1.0, ("power_w",)),
}
_CPU_FIGURES = {
    **{f"{short}_gflops": (1e9, (f"flops_per_s.{name}",)) for short, name in _PEAKS.items()},
    "int8_gops": (1e9, ("flops_per_s.int8",)),
    "memory_gb_per_s": (1e9, ("memory_bytes_per_s",)),
}
_MOST_GIB = 64 * 1024
_LEAST = 1e-3  # of any rate, in its unit: a millionth of what is slow would take longer than a life
_MOST_MS = 1e6  # of a round trip
_MOST_VALUES, _MOST_NODES = 50_000, 1000  # of a file
_MOST_DEVICES = 2000  # GPUs, and machines without one: 1,500 of twelve kinds are planned in about 20 s


class ImpossibleHardware(Exception):
    """The mistakes of a hardware file; all that were found, one a line."""

    def __init__(self, mistakes: Sequence[str]) -> None:
        self.mistakes = list(mistakes)
        super().__init__("\n".join(self.mistakes))


def read_hardware(path: Path) -> ClusterCapability:
    """The machines that the file declares.  Raises ImpossibleHardware with every mistake found."""
    found = hardware_of(_load(path))
    if (count := sum(len(node.gpus) or 1 for node in found.nodes)) > _MOST_DEVICES:
        reason = f"{count} devices are declared; a plan takes at most {_MOST_DEVICES}. Declare a part of them"
        raise ImpossibleHardware([f"nodes: {reason}"])
    return found


def hardware_of(values: Mapping[Any, Any]) -> ClusterCapability:
    """The machines that a mapping declares, as a file would.  Raises ImpossibleHardware."""
    top = HardwareSection("", values, _TOP, [])
    groups = _nodes(top)
    nodes = tuple(itertools.chain.from_iterable(groups.values()))
    links = _links(top, groups)
    if top.mistakes:
        raise ImpossibleHardware(top.mistakes)
    return ClusterCapability(nodes, links)


def _nodes(top: HardwareSection) -> dict[str, tuple[NodeCapability, ...]]:
    """Each name of the file -> its machines."""
    groups: dict[str, tuple[NodeCapability, ...]] = {}
    owners: dict[str, str] = {}
    for section in top.sections("nodes", _NODE):
        node, count, name = _node(section), section.whole("count", at_most=1000) or 1, section.text("name")
        if name is None:
            continue
        if sum(map(len, groups.values())) + count > _MOST_NODES:
            section.wrong("count", f"more than {_MOST_NODES} machines are declared")
            break
        names = [name] if count == 1 else [f"{name}-{i + 1}" for i in range(count)]
        for taken in dict.fromkeys([name, *names]):
            if taken in owners:
                section.wrong("name", f"{taken!r} is already the name of {owners[taken]}")
            owners.setdefault(taken, section.where)
        groups[name] = tuple(replace(node, name=each) for each in names)
    if top.values.get("nodes") in (None, []):
        top.wrong("nodes", "is empty; declare at least one machine with name, cores and memory_gib")
    return groups


def _node(section: HardwareSection) -> NodeCapability:
    """A machine without its name."""
    section.need("name", "cores", "memory_gib")
    gib, disk = section.number("memory_gib", at_most=_MOST_GIB), section.number("disk_write_mb_per_s", at_least=_LEAST)
    power, price = section.section("power_w", ("idle", "load")), _price(section)
    figures: dict[str, Any] = {
        "num_cores": section.whole("cores", at_most=65536) or 1,
        "memory_bytes": _bytes(gib),
        "disk_write_bytes_per_s": disk and disk * 1e6,
        "idle_w": power.number("idle"),
        "load_w": power.number("load"),
        **{field: price.number(key, at_least=_LEAST if key == "years" else 0) for key, field in _PRICE.items()},
    }
    if figures["idle_w"] and figures["load_w"] and figures["idle_w"] > figures["load_w"]:
        power.wrong("idle", f"{figures['idle_w']:g} is above load, {figures['load_w']:g}")
    gpus, link_bytes_per_s = _linked(section, list(_gpus(section)))
    figures["gpu_link_bytes_per_s"] = link_bytes_per_s
    devices = (*gpus, _cpu(section, figures["memory_bytes"]))
    return NodeCapability("", devices=devices, sources=_declared(figures), **figures)


def _price(node: HardwareSection) -> HardwareSection:
    price = node.section("price", tuple(_PRICE))
    given = {key for key in _PRICE if price.has(key)}
    if given not in (set(), {"purchase", "years"}, {"per_hour"}):
        price.wrong("", f"has {' and '.join(sorted(given))}; give purchase with years, or per_hour")
    return price


def _cpu(node: HardwareSection, memory_bytes: int | None) -> DeviceCapability:
    cpu = node.section("cpu", ("name", "instruction_sets", *_CPU_FIGURES))
    sets = tuple(each.lower() for each in cpu.texts("instruction_sets"))
    figures = {"memory_bytes": memory_bytes, "memory_total_bytes": memory_bytes, **_figures(cpu, _CPU_FIGURES)}
    if sets:
        figures["instruction_sets"] = sets
    return _declare(DeviceCapability("cpu", cpu.text("name") or "CPU", None), figures)


def _gpus(node: HardwareSection) -> Iterator[DeviceCapability]:
    for gpu in node.sections("gpus", (*_GPU, *_GPU_FIGURES)):
        device = _gpu(gpu)
        yield from [device] * (gpu.whole("count", at_most=64) or 1) if device else []


def _gpu(gpu: HardwareSection) -> DeviceCapability | None:
    """The card of the datasheet with the figures that the file has of it; None = not enough is known."""
    gpu.need("name")
    name, kind, capability = gpu.text("name"), gpu.text("kind"), _compute_capability(gpu)
    nominal_bytes = _bytes(gpu.number("memory_gib", above=datasheet.LEAST_BYTES / GIB, at_most=_MOST_GIB))
    figures = _figures(gpu, _GPU_FIGURES)
    if kind not in (None, "cuda", "rocm"):
        gpu.wrong("kind", f"{kind!r} is neither cuda nor rocm")
    if name is None:
        return None
    card = datasheet.find(name, nominal_bytes) or datasheet.find(name)
    if card is None:
        if not (gpu.has("memory_gib") and any(gpu.has(f"{short}_tflops") for short in _PEAKS)):
            near = ", ".join(datasheet.nearest(name)) or "none"
            needed = "declare its memory_gib and one of " + ", ".join(f"{short}_tflops" for short in _PEAKS)
            gpu.wrong("", f"{name!r} is not in the datasheet; nearest: {near}. Or {needed}")
            return None
        card = datasheet.Accelerator(name, (), "rocm" if kind == "rocm" else "cuda", nominal_bytes or 0, {})
    elif kind not in (None, card.kind):
        gpu.wrong("kind", f"{card.name} is {card.kind}, not {kind!r}")
    if (display_bytes := _bytes(gpu.number("display_gib", above=-1, at_most=4))) is not None:
        card = replace(card, display_bytes=display_bytes)
    if nominal_bytes:
        card = replace(card, memory_bytes=nominal_bytes)
        figures |= {"memory_bytes": card.usable_bytes, "memory_total_bytes": nominal_bytes}
    if card.memory_bytes and not card.usable_bytes:
        taken, whole = card.display_bytes / GIB, card.memory_bytes / GIB
        of_card = f"{card.name}'s {whole:g} GiB, of which the driver keeps some"
        gpu.wrong("display_gib", f"{taken:g} leaves nothing of {of_card}; lower it, or state 0 where no screen is")
    return _declare(datasheet.device(card), figures | ({"compute_capability": capability} if capability else {}))


def _linked(node: HardwareSection, gpus: list[DeviceCapability]) -> tuple[list[DeviceCapability], float | None]:
    """The GPUs with the slots that the file states, and what any two of them exchange a second."""
    link = node.section("gpu_link", ("nvlink", "pcie", "peer_access", "gb_per_s"))
    ways = [key for key in ("nvlink", "pcie", "gb_per_s") if link.has(key)]
    if not link.values:
        return gpus, None
    if len(ways) != 1:
        link.wrong("", f"has {' and '.join(ways) or 'none'} of nvlink, pcie and gb_per_s; give one")
        return gpus, None
    if link.has("peer_access") and ways != ["pcie"]:
        link.wrong("peer_access", "says how GPUs reach each other over PCIe; give it with pcie")
    for key in ("nvlink", "peer_access"):
        if link.has(key) and not isinstance(link.values[key], bool):
            link.wrong(key, f"{shown(link.values[key])} is neither true nor false")
    if ways == ["gb_per_s"]:
        given = link.number("gb_per_s", at_least=_LEAST)
        return gpus, given and given * 1e9
    if ways == ["nvlink"]:
        return gpus, _nvlink(link, gpus) if link.values["nvlink"] is True else None
    slot = _slot(link)
    if slot is None:
        return gpus, None
    figures: dict[str, Any] = dict.fromkeys(("host_to_device_bytes_per_s", "device_to_host_bytes_per_s"), slot)
    slotted = [gpu if "declared" in map(gpu.sources.get, figures) else _declare(gpu, figures) for gpu in gpus]
    return slotted, slot * (PEER_REACHED if link.values.get("peer_access") is True else HOST_REACHED)


def _nvlink(link: HardwareSection, gpus: Sequence[DeviceCapability]) -> float | None:
    cards = [datasheet.find(gpu.name, gpu.memory_total_bytes) for gpu in gpus]
    rates = [card.nvlink_bytes_per_s for card in cards if card and card.nvlink_bytes_per_s]
    if len(rates) < max(2, len(gpus)):
        names = ", ".join(dict.fromkeys(gpu.name for gpu in gpus)) or "none"
        link.wrong("nvlink", f"needs two GPUs that have it, and here are {len(gpus)}: {names}; give pcie or gb_per_s")
    elif len(gpus) > 2 and not all(card and card.has_switched_nvlink for card in cards):
        link.wrong("nvlink", f"a bridge joins two {gpus[0].name}, and {len(gpus)} are reached over PCIe; give gb_per_s")
    else:
        return NVLINK_REACHED * min(rates)
    return None


def _slot(link: HardwareSection) -> float | None:
    match = re.fullmatch(r"(\d)x(\d{1,2})", str(link.values["pcie"]))
    if match is None or int(match[1]) not in datasheet.GT_PER_S or int(match[2]) not in (1, 2, 4, 8, 16):
        generations = ", ".join(map(str, datasheet.GT_PER_S))
        link.wrong("pcie", f"{shown(link.values['pcie'])} is not like 4x16: generation {generations}, then lanes")
        return None
    return datasheet.slot_bytes_per_s(int(match[1]), int(match[2]))


def _compute_capability(gpu: HardwareSection) -> tuple[int, int] | None:
    if not gpu.has("compute_capability"):
        return None
    match = re.fullmatch(r"(\d{1,2})\.(\d)", str(gpu.values["compute_capability"]))
    if match is None:
        gpu.wrong("compute_capability", f"{shown(gpu.values['compute_capability'])} is not like 8.6")
        return None
    return int(match[1]), int(match[2])


def _bytes(gib: float | None) -> int | None:
    return None if gib is None else round(gib * GIB)


def _figures(section: HardwareSection, units: Mapping[str, tuple[float, tuple[str, ...]]]) -> dict[str, Any]:
    """The figures that a section mentions, by their name in DeviceCapability; None where it says null."""
    found: dict[str, Any] = {}
    for key, (unit, figures) in units.items():
        if key in section.values:
            value = section.number(key, at_least=_LEAST)
            found |= dict.fromkeys(figures, value and value * unit)
    return found


def _declare(device: DeviceCapability, figures: Mapping[str, Any]) -> DeviceCapability:
    """`device` with the figures of the file in place of its own; None takes one away."""
    peaks = {name.partition(".")[2]: value for name, value in figures.items() if "." in name}
    fields = {name: value for name, value in figures.items() if "." not in name}
    kept = {name: source for name, source in device.sources.items() if name not in figures}
    flops = {**device.flops_per_s, **peaks}
    return replace(device, flops_per_s=flops, sources={**kept, **_declared(figures)}, **fields)


def _declared(figures: Mapping[str, Any]) -> dict[str, Source]:
    return {name: "declared" for name, value in figures.items() if value is not None}


def _links(top: HardwareSection, groups: Mapping[str, tuple[NodeCapability, ...]]) -> tuple[Link, ...]:
    """The network between every two machines, exceptions applied; none where nobody declared one."""
    network = top.section("network", _LINK)
    if network.values:
        network.need("mbit_per_s")
    usual = _speed(network)
    exceptions: dict[frozenset[str], tuple[float | None, float | None]] = {}
    for section in top.sections("links", ("between", *_LINK)):
        section.need("between", "mbit_per_s")
        bytes_per_s, round_trip_s = _speed(section)
        for pair in _pairs(section, groups):
            if pair in exceptions:
                section.wrong("between", f"{' - '.join(sorted(pair))} is declared twice")
            exceptions[pair] = bytes_per_s, round_trip_s or usual[1]
    names = [node.name for nodes in groups.values() for node in nodes]
    speeds = {pair: exceptions.get(frozenset(pair), usual) for pair in itertools.combinations(names, 2)}
    return tuple(Link(pair, *speed, source="declared") for pair, speed in speeds.items() if speed != (None, None))


def _speed(section: HardwareSection) -> tuple[float | None, float | None]:
    """Bytes per second and round trip in seconds."""
    mbit = section.number("mbit_per_s", at_least=_LEAST)
    milliseconds = section.number("round_trip_ms", at_most=_MOST_MS)
    return mbit and mbit * 1e6 / 8, milliseconds and milliseconds / 1e3


def _pairs(link: HardwareSection, groups: Mapping[str, tuple[NodeCapability, ...]]) -> list[frozenset[str]]:
    """The machines that a link joins, two and two."""
    machines = {node.name: (node.name,) for nodes in groups.values() for node in nodes}
    machines |= {name: tuple(node.name for node in nodes) for name, nodes in groups.items()}
    ends = link.values.get("between") or []
    two_texts = isinstance(ends, list) and [type(end) for end in ends] == [str, str]
    if link.has("between") and not two_texts:
        link.wrong("between", f"{shown(ends)} is not a list of two machines")
        return []
    for end in ends:
        if end not in machines:
            near = ", ".join(difflib.get_close_matches(end, machines)) or ", ".join(itertools.islice(machines, 5))
            link.wrong("between", f"there is no machine {end!r}; nearest: {near or 'none'}")
    pairs = {frozenset(pair) for pair in itertools.product(*(machines.get(end, ()) for end in ends))}
    if pairs and max(map(len, pairs)) == 1:
        link.wrong("between", f"{ends[0]!r} is linked to itself")
    return sorted((pair for pair in pairs if len(pair) == 2), key=sorted)


def _load(path: Path) -> dict[Any, Any]:
    """The file's mapping.  A key that is written twice is refused, of which YAML would silently keep the last."""
    try:
        node = compose_yaml(read_text(path), str(path), _MOST_VALUES)
        _refuse_doubles(node, str(path))
        values = None if node is None else yaml_value(node, str(path))
    except BadInput as error:
        raise ImpossibleHardware([str(error)]) from None
    if isinstance(values, dict):
        return values
    seen = "is empty" if values is None else f"holds {shown(values)}"
    raise ImpossibleHardware([f"{path}: {seen}; give a mapping with {', '.join(_TOP)}"])


def _refuse_doubles(node: yaml.Node | None, label: str) -> None:
    nodes = [node]
    while nodes:
        node = nodes.pop()
        if isinstance(node, yaml.SequenceNode):
            nodes += node.value
        elif isinstance(node, yaml.MappingNode):
            seen = set()
            for key, value in node.value:
                nodes.append(value)
                if isinstance(key, yaml.ScalarNode) and key.value in seen:
                    line = key.start_mark.line + 1
                    raise BadInput(f"{label}: line {line}: is not YAML: {printable(key.value)} is written twice")
                seen.add(str(key.value))
