"""What machines can do.  Unknown is None, never a guess."""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Source = Literal["measured", "datasheet", "declared"]


@dataclass(frozen=True)
class DeviceCapability:
    """One place where a model can be trained: a GPU, or all the cores of a node together."""

    kind: Literal["cpu", "cuda"]
    name: str
    memory_bytes: int | None  # usable, not nominal
    compute_capability: tuple[int, int] | None = None  # CUDA only
    instruction_sets: tuple[str, ...] = ()  # CPU only, as /proc/cpuinfo spells them
    source: Source = "measured"

    @property
    def has_fast_bf16(self) -> bool:
        """Whether the device multiplies bf16 matrices in hardware (not merely stores them)."""
        if self.kind == "cuda":
            return self.compute_capability is not None and self.compute_capability >= (8, 0)
        return "amx_bf16" in self.instruction_sets or "avx512_bf16" in self.instruction_sets


@dataclass(frozen=True)
class NodeCapability:
    """One machine: its cores and memory as this process may use them, and its devices."""

    name: str
    num_cores: int
    memory_bytes: int | None
    devices: tuple[DeviceCapability, ...]

    @property
    def gpus(self) -> tuple[DeviceCapability, ...]:
        return tuple(device for device in self.devices if device.kind == "cuda")

    @property
    def cpu(self) -> DeviceCapability:
        return next(device for device in self.devices if device.kind == "cpu")


@dataclass(frozen=True)
class ClusterCapability:
    """All machines a job may use."""

    nodes: tuple[NodeCapability, ...] = field(default_factory=tuple)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)
