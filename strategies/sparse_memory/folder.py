"""What training memories hands back: a folder that this program puts onto the base model again, and no other does.

adapter_config.json         peft_type SPARSE_MEMORY with the sizes, so that other loaders refuse it by name
adapter_model.safetensors   rows in fp32 and what the routers compare with, by their names in the model
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clusters.safe.reading import BadInput, read_json, record
from strategies.adapter_bank.adapter import CONFIG, WEIGHTS, Unusable, header_of

if TYPE_CHECKING:  # planning must not load torch
    import torch

    from strategies.sparse_memory.layer import RowMemory

FORMAT = "SPARSE_MEMORY"
_MOST_KEYS = 1 << 14  # of each half: more is no memory that anybody trained


@dataclass(frozen=True)
class MemoryConfig:
    """The sizes of memories as adapter_config.json holds them."""

    num_keys: int
    top_k: int
    layers_to_transform: list[int] = field(default_factory=list)
    peft_type: str = FORMAT

    def check(self, num_layers: int) -> None:
        """Raises ValueError for what no memories of a model of so many layers have."""
        keys, layers = self.num_keys, self.layers_to_transform
        sizes = 1 <= keys <= _MOST_KEYS and 1 <= self.top_k <= keys**2
        named = bool(layers) and len(set(layers)) == len(layers) and all(0 <= one < num_layers for one in layers)
        if not sizes or not named:
            raise ValueError(
                f"memories of {keys} x {keys} rows, of which a token reads {self.top_k}, beside layers {layers} of"
                f" {num_layers}"
            )


def tensors_of(memories: Mapping[str, RowMemory]) -> dict[str, torch.Tensor]:
    """All that a memory is, by name."""
    return {f"{name}.{key}": value for name, memory in memories.items() for key, value in memory.state_dict().items()}


def save(memories: Mapping[str, RowMemory], config: MemoryConfig, folder: Path) -> None:
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.detach().cpu().contiguous() for name, value in tensors_of(memories).items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(vars(config) | {"task_type": "CAUSAL_LM"}, indent=1), encoding="utf-8")


def put_on(model: Any, folder: Path) -> Any:
    """The base model with the memories of a folder, for evaluation; rows lie on the host, whatever the device.

    Raises ValueError where they do not belong to it.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from strategies.lsp_offload.transport import bus_of
    from strategies.model.architecture import decoder_layers
    from strategies.sparse_memory.layer import MemorySizes, ReadingCarrier, attach

    try:
        config = record(MemoryConfig, read_json(folder / CONFIG), str(folder / CONFIG))
        config.check(len(decoder_layers(model)))
        header = header_of(folder)
    except (BadInput, Unusable, ValueError, TypeError) as error:
        raise ValueError(f"{folder} holds no memories: {error}") from None
    width = model.config.get_text_config().hidden_size
    sizes = MemorySizes(width, config.num_keys, config.top_k)
    memories = attach(model, config.layers_to_transform, sizes, model.dtype, torch.device("meta"))
    expected = tensors_of(memories)
    for name in sorted(expected.keys() | header.keys()):
        stored = tuple(header[name].shape) if name in header else None
        wanted = tuple(expected[name].shape) if name in expected else None
        if stored != wanted:
            raise ValueError(f"{folder} belongs to another model: {name} is {stored} there, and {wanted} here")
    try:
        tensors = load_file(folder / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{folder / WEIGHTS} cannot be read: {error}") from None
    carrier = ReadingCarrier(bus_of(model.device))
    for name, memory in memories.items():
        memory.carrier = carrier
        own = {key: tensors[f"{name}.{key}"].float() for key in memory.state_dict()}
        placed = {key: value if key == "rows" else value.to(model.device) for key, value in own.items()}
        memory.load_state_dict(placed, assign=True)
    model.requires_grad_(False)
    return model.eval()
