"""What training experts hands back: a folder that this program puts onto the base model again, and no other does.

adapter_config.json         peft_type MIXLORA with the sizes, so that other loaders refuse it by name
adapter_model.safetensors   every trained weight in fp32, by its name in the model
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

FORMAT = "MIXLORA"
_MOST = 4096  # experts, ranks: more is no adapter that anybody trained


@dataclass(frozen=True)
class MixtureConfig:
    """The sizes of experts as adapter_config.json holds them."""

    num_experts: int
    top_k: int
    r: int
    lora_alpha: float
    attention: list[str] = field(default_factory=list)  # maps with a pair of their own
    peft_type: str = FORMAT

    @property
    def sizes(self) -> Any:
        """Raises ValueError for what no experts have."""
        from strategies.mixture.experts import MixtureSizes

        if not (2 <= self.top_k <= self.num_experts <= _MOST and 1 <= self.r <= _MOST):
            raise ValueError(f"{self.num_experts} experts of rank {self.r}, of which a token passes {self.top_k}")
        return MixtureSizes(self.num_experts, self.top_k, self.r, self.lora_alpha / self.r, tuple(self.attention))


def save(
    parameters: Mapping[str, torch.nn.Parameter],
    config: MixtureConfig,
    folder: Path,
    weights: Mapping[str, Any] | None = None,
) -> None:
    """Write trained weights by name; `weights` stand in where no worker holds them whole."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: (weights or parameters)[name].detach().cpu().contiguous() for name in parameters}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(vars(config) | {"task_type": "CAUSAL_LM"}, indent=1), encoding="utf-8")


def put_on(model: Any, folder: Path) -> Any:
    """The base model with the experts of a folder, for evaluation.  Raises ValueError where they are not its own."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from strategies.mixture.experts import attach, fill

    try:
        sizes = record(MixtureConfig, read_json(folder / CONFIG), str(folder / CONFIG)).sizes
        header = header_of(folder)
    except (BadInput, Unusable, ValueError, TypeError) as error:
        raise ValueError(f"{folder} holds no experts: {error}") from None
    expected = attach(model, sizes)
    for name in sorted(expected.keys() | header.keys()):
        stored = tuple(header[name].shape) if name in header else None
        wanted = tuple(expected[name].shape) if name in expected else None
        if stored != wanted:
            raise ValueError(f"{folder} belongs to another model: {name} is {stored} there, and {wanted} here")
    try:
        fill(model, load_file(folder / WEIGHTS), trains=False)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{folder / WEIGHTS} cannot be read: {error}") from None
    model.requires_grad_(False)
    return model.eval()
