"""What machines can do.  Unknown is None, never a guess; every figure says where it comes from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

Source = Literal["measured", "datasheet", "declared"]
CONTEXT_BYTES = 0.5 * 2**30  # of a GPU: what a process holds there before its first tensor; strategies/cost/reserved.py
Kind = Literal["cpu", "cuda", "rocm"]
LibraryState = Literal["absent", "broken", "runs"]
NUMBER_FORMATS = ("float32", "bfloat16", "float16", "int8")


@dataclass(frozen=True)
class Library:
    """An optional library on a device."""

    state: LibraryState
    error: str = ""  # of a broken one: its own words


@dataclass(frozen=True)
class DeviceCapability:
    """One place where a model can be trained: a GPU, or all the cores of a node together.

    `sources` maps a figure's name (`flops_per_s.bfloat16` for one number format) to where it comes from; a figure that
    is None has no entry.
    """

    kind: Kind
    name: str
    memory_bytes: int | None  # usable by a job: cgroup limits respected, what others hold on a GPU taken off
    memory_total_bytes: int | None = None  # nominal
    uuid: str | None = None  # of a GPU, as its driver writes it and CUDA_VISIBLE_DEVICES takes it: GPU-2f0c...
    driver_version: str | None = None  # of a GPU
    pci_bus_id: str | None = None  # of a GPU: domain:bus:device.function; a node lists its GPUs in this order
    compute_capability: tuple[int, int] | None = None  # CUDA only
    instruction_sets: tuple[str, ...] = ()  # CPU only, as /proc/cpuinfo spells them
    flops_per_s: Mapping[str, float | None] = field(default_factory=dict)  # dense matrix products by number format
    memory_bytes_per_s: float | None = None
    op_overhead_s: float | None = None  # time of one operation on an almost empty tensor
    host_to_device_bytes_per_s: float | None = None  # GPU: pinned memory
    device_to_host_bytes_per_s: float | None = None
    libraries: Mapping[str, Library] = field(default_factory=dict)  # by module; one that nobody tried has no entry
    power_w: float | None = None  # under load
    problem: str | None = None  # why nothing can be trained on a GPU, and what to do: one sentence
    doubt: str | None = None  # why the figures may be wrong: they are measured again by a later probe
    # Of a CPU that workers share, what one has of typical rates that stand in for unknown ones; known ones are divided.
    core_share: float = 1.0  # of its cores' time: below 1 where more workers than cores take turns
    memory_share: float = 1.0  # of its memory's bandwidth
    calibration: Mapping[str, float] = field(default_factory=dict)  # number format -> measured / predicted step time
    sources: Mapping[str, Source] = field(default_factory=dict)

    @property
    def torch_device(self) -> Literal["cpu", "cuda"]:
        """The name PyTorch gives such a device; ROCm answers to `cuda`."""
        return "cpu" if self.kind == "cpu" else "cuda"

    @property
    def has_bf16_units(self) -> bool | None:
        """Whether the device multiplies bf16 matrices in hardware (not merely stores them); None = cannot tell."""
        if self.kind == "cuda":
            return None if self.compute_capability is None else self.compute_capability >= (8, 0)
        if self.kind == "rocm":
            half, brain = (self.flops_per_s.get(name) or 0.0 for name in ("float16", "bfloat16"))
            return brain > half / 2 if half or brain else None  # RDNA 2 emulates it: measured, and slow
        return "amx_bf16" in self.instruction_sets or "avx512_bf16" in self.instruction_sets

    def shared(self, num_cores: int, threads: int, num_workers: int) -> DeviceCapability:
        """A CPU of so many cores as one of its workers side by side has it, with so many threads.

        Products by its threads, which take turns where all workers together have more of them than there are cores;
        an equal part of the memory's bandwidth.
        """
        part = min(threads / num_cores, 1 / num_workers)
        return replace(
            self,
            flops_per_s={dtype: rate and rate * part for dtype, rate in self.flops_per_s.items()},
            memory_bytes_per_s=self.memory_bytes_per_s and self.memory_bytes_per_s / num_workers,
            core_share=self.core_share * min(1.0, num_cores / (threads * num_workers)),
            memory_share=self.memory_share / num_workers,
        )

    @property
    def is_measured(self) -> bool:
        return "measured" in {source for name, source in self.sources.items() if name.startswith("flops_per_s")}


@dataclass(frozen=True)
class Link:
    """The network between two nodes, as one stream sees it, or the way between two GPUs of a node; symmetric."""

    between: tuple[str, str]
    bytes_per_s: float | None
    round_trip_s: float | None = None
    source: Source = "measured"
    peer_access: bool | None = None  # GPUs: whether one writes into the other's memory, without the host's


@dataclass(frozen=True)
class NodeCapability:
    """One machine: its cores and memory as this process may use them, and its devices."""

    name: str
    num_cores: int
    memory_bytes: int | None
    devices: tuple[DeviceCapability, ...]
    num_slots: int | None = None  # devices it gives to training; None = all it has
    disk_write_bytes_per_s: float | None = None
    disk_read_bytes_per_s: float | None = None
    disk_free_bytes: int | None = None  # where the cache folder is
    gpu_link_bytes_per_s: float | None = None  # between any two of its GPUs, in each direction at once
    gpu_links: tuple[Link, ...] = ()  # likewise, pair by pair as measured, by pci_bus_id
    idle_w: float | None = None  # the whole machine, doing nothing
    load_w: float | None = None  # the whole machine, training
    price_per_hour: float | None = None  # rented: what an hour costs; owned: None
    purchase_price: float | None = None  # owned, in the job's currency
    years: float | None = None  # over which the purchase is written off
    hardware_hash: str | None = None
    problems: tuple[str, ...] = ()  # why GPUs may be missing from `devices`, a sentence each
    held_layers: tuple[tuple[int, int], ...] = ()  # of the job's model, [first, end): read before, so near its devices
    sources: Mapping[str, Source] = field(default_factory=dict)

    @property
    def gpus(self) -> tuple[DeviceCapability, ...]:
        """Those that can be trained on."""
        return tuple(device for device in self.devices if device.kind != "cpu" and device.problem is None)

    @property
    def unusable(self) -> tuple[DeviceCapability, ...]:
        """GPUs that are there and cannot be trained on; each says why."""
        return tuple(device for device in self.devices if device.problem is not None)

    @property
    def cpu(self) -> DeviceCapability | None:
        return next((device for device in self.devices if device.kind == "cpu"), None)

    def part_of_cpu(self, num_workers: int) -> NodeCapability:
        """The node as one of so many workers side by side on its CPU has it: whole cores, and a part of memory,
        bandwidth, power and price.
        """

        def part(value: float | None) -> float | None:
            return value and value / num_workers

        device = self.cpu
        if device is None or num_workers <= 1:
            return self
        num_cores = max(1, self.num_cores // num_workers)
        own = replace(
            device.shared(self.num_cores, num_cores, num_workers),
            memory_bytes=device.memory_bytes and device.memory_bytes // num_workers,
            power_w=part(device.power_w),
        )
        return replace(
            self,
            num_cores=num_cores,
            memory_bytes=self.memory_bytes and self.memory_bytes // num_workers,
            devices=tuple(own if one is device else one for one in self.devices),
            idle_w=part(self.idle_w),
            load_w=part(self.load_w),
            price_per_hour=part(self.price_per_hour),
            purchase_price=part(self.purchase_price),
        )

    @property
    def doubtful(self) -> list[DeviceCapability]:
        """Devices that may be planned with and whose figures may be wrong."""
        return [device for device in self.devices if device.doubt and device.problem is None]


@dataclass(frozen=True)
class ClusterCapability:
    """All machines a job may use, the links between them, and the machines that could not be looked at."""

    nodes: tuple[NodeCapability, ...] = ()
    links: tuple[Link, ...] = ()
    failed: Mapping[str, str] = field(default_factory=dict)  # node -> why its probe failed

    def link(self, first: str, second: str) -> Link | None:
        """The link between two nodes; None = never measured nor declared."""
        return self._rows.get(first, {}).get(second)

    @cached_property
    def has_like_links(self) -> bool:
        """Whether a link is the same whichever two nodes it joins; also where none is known."""
        if not self.links:
            return True
        count, first = len(self.nodes), self.links[0]
        speed = first.bytes_per_s, first.round_trip_s
        pairs = sum(map(len, self._rows.values())) // 2
        return pairs == count * (count - 1) // 2 and all(
            (link.bytes_per_s, link.round_trip_s) == speed for link in self.links
        )

    @cached_property
    def _rows(self) -> dict[str, dict[str, Link]]:
        rows: dict[str, dict[str, Link]] = {}
        for link in reversed(self.links):
            first, second = link.between
            rows.setdefault(first, {})[second] = rows.setdefault(second, {})[first] = link
        return rows

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ClusterCapability:
        """The inverse of `as_dict`, also after a way through JSON."""
        nodes = tuple(node_from_dict(node) for node in values["nodes"])
        return cls(nodes, _links(values.get("links", ())), dict(values.get("failed", {})))


def node_from_dict(values: Mapping[str, Any]) -> NodeCapability:
    """A node as `asdict` and JSON leave it."""
    devices = tuple(_device(device) for device in values["devices"])
    changed = {"problems": tuple(values.get("problems", ())), "gpu_links": _links(values.get("gpu_links", ()))}
    changed["held_layers"] = tuple((first, end) for first, end in values.get("held_layers", ()))
    return NodeCapability(**{**values, **changed, "devices": devices})


def _links(values: Iterable[Mapping[str, Any]]) -> tuple[Link, ...]:
    return tuple(Link(**{**link, "between": tuple(link["between"])}) for link in values)


def _device(values: Mapping[str, Any]) -> DeviceCapability:
    capability = values.get("compute_capability")
    changed = {
        "compute_capability": tuple(capability) if capability else None,
        "instruction_sets": tuple(values.get("instruction_sets", ())),
        "libraries": {name: Library(**found) for name, found in values.get("libraries", {}).items()},
    }
    return DeviceCapability(**{**values, **changed})
