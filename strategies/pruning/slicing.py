"""A model without its masked groups: base and correction as one, sliced; any program for such models loads it.

Legend: I inputs, O outputs of a map.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from strategies.model.architecture import architecture_of
from strategies.pruning.groups import MapPart, PrunedGroups
from strategies.pruning.masks import GATE, GroupMasks
from strategies.shape import ModelShape
from strategies.train_setup import AdapterPair

_OF_LAYERS = ("layer_types", "no_rope_layers")  # keys of a configuration that are lists with an entry a layer


@dataclass(frozen=True)
class SmallerModel:
    """What remains of a model with adapters and masks, made when it is asked for."""

    peft_model: Any
    masks: GroupMasks
    pairs: Sequence[AdapterPair]
    shape: ModelShape

    @property
    def _inner(self) -> Any:
        return self.peft_model.get_base_model()

    def _kept(self, name: str, number: int) -> torch.Tensor:
        """Places of the groups that remain in a layer."""
        return self.masks.kept_KN[name][number].nonzero().flatten().cpu()

    def _layers(self) -> list[int]:
        """The layers that remain."""
        if "layers" in self.masks.groups:
            return self._kept("layers", 0).tolist()
        return list(range(self.shape.num_layers))

    def config(self) -> Any:
        """The base's configuration with the sizes that remain.  Raises ValueError where layers differ in size."""
        config, layers = self._inner.config, self._layers()
        changes: dict[str, Any] = {}
        for name, one in self.masks.groups.items():
            (kept, *others) = {int(row.sum()) for row in self.masks.kept_KN[name]}
            if others:
                raise ValueError(f"as many {name} must remain in every layer, or no config.json describes the model")
            if name == "channels":
                changes[self.shape.family.width] = kept
            elif name == "heads":
                shared = self.shape.num_heads // one.count
                changes |= {"num_attention_heads": kept * shared, "head_dim": self.shape.head_dim}
                changes |= {self.shape.family.kv_heads: kept}
            else:
                changes |= {"num_hidden_layers": len(layers)}
                lists = {key: getattr(config, key, None) for key in _OF_LAYERS}
                changes |= {key: [known[layer] for layer in layers] for key, known in lists.items() if known}
        return type(config).from_dict({**config.to_dict(), **changes})

    @torch.no_grad()
    def weights(self, only_changed: bool = False) -> dict[str, torch.Tensor]:
        """Its tensors by their names in the smaller model, those that were made anew on the CPU.

        A correction is added in fp32 and the sum rounded once to the base's precision.
        """
        inner = self._inner
        prefix, layers = architecture_of(inner).layers, self._layers()
        new_number = {layer: number for number, layer in enumerate(layers)}
        corrected = {id(pair.layer): pair for pair in self.pairs}
        corrections = {
            f"{name}.base_layer.weight": corrected[id(module)]
            for name, module in inner.named_modules()
            if id(module) in corrected
        }
        found = {}
        for key, tensor in inner.state_dict().items():
            if ".lora_A." in key or ".lora_B." in key or key.endswith(GATE):
                continue
            name, pair = key.replace(".base_layer.", "."), corrections.get(key)
            layer, path = _place(name, prefix)
            if layer is not None and layer not in new_number:
                continue
            if pair is not None:
                delta_OI = pair.b_OR.float() @ pair.a_RI.float()
                tensor = tensor.float().add(delta_OI, alpha=pair.scale).to(tensor.dtype)
            parts = self._parts_of(path) if layer is not None else []
            if layer is not None:
                tensor = self._slice(tensor, layer, parts)
                name = f"{prefix}.{new_number[layer]}.{name.removeprefix(f'{prefix}.{layer}.')}"
            if pair is not None or parts:
                found[name] = tensor.cpu().contiguous()
            elif not only_changed:
                found[name] = tensor
        return found

    def _parts_of(self, path: str) -> list[tuple[PrunedGroups, MapPart]]:
        """The groups that lie in a tensor of a layer, e.g. mlp.gate_proj.weight."""
        module, _, kind = path.rpartition(".")
        return [
            (one, part)
            for one in self.masks.groups.values()
            for part in one.parts
            if one.name != "layers" and part.path == module and not (kind == "bias" and part.is_input)
        ]

    def _slice(self, tensor: torch.Tensor, layer: int, parts: Sequence[tuple[PrunedGroups, MapPart]]) -> torch.Tensor:
        for is_input in (False, True):
            places = [
                (self._kept(one.name, layer)[:, None] * part.width + torch.arange(part.width)).flatten() + part.offset
                for one, part in parts
                if part.is_input == is_input
            ]
            if places:
                tensor = tensor.index_select(int(is_input), torch.cat(places).to(tensor.device))
        return tensor

    def build(self) -> Any:
        """The smaller model itself, a transformers model without adapters."""
        inner = self._inner
        config = self.config()
        with torch.device("meta"):
            model = type(inner)(config)
        model.load_state_dict(self.weights(), strict=True, assign=True)
        model.tie_weights()
        return model

    def save(self, folder: Path, weights: Mapping[str, torch.Tensor] | None = None) -> None:
        """Write it as transformers reads it."""
        self.build().save_pretrained(folder, safe_serialization=True)


def _place(name: str, prefix: str) -> tuple[int | None, str]:
    """The layer of a tensor, and its name within it."""
    if not name.startswith(f"{prefix}."):
        return None, name
    number, _, path = name.removeprefix(f"{prefix}.").partition(".")
    return int(number), path
