"""A LoRA adapter as PEFT writes it, read map by map and written whole.

Shapes: I inputs, O outputs of a linear map, R rank; dW_OI = scale * B_OR A_RI.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # listing a bank must not load torch
    from strategies.adapter_bank.algebra import Factors

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_KEY = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
_KEPT_EXACT = ("use_dora", "lora_bias", "modules_to_save", "layer_replication", "trainable_token_indices")
_CHANGES_BASE = re.compile(r"(pissa|corda).*|olora|loftq|lora_ga")  # ways to begin that take a part of W away


class Unusable(ValueError):
    """An adapter that cannot be used; the text says why."""


@dataclass(frozen=True)
class Target:
    """One linear map's correction."""

    name: str  # as the base model calls the map: model.layers.0.self_attn.q_proj
    rank: int
    inputs: int
    outputs: int
    scale: float


class Adapter:
    """An adapter folder; tensors are read when asked for, so that a bank can be passed over map by map."""

    def __init__(self, folder: Path) -> None:
        """Raises Unusable for what is no plain LoRA: DoRA, trained biases or whole modules, a changed base (PiSSA)."""
        self.folder = folder
        self.config = _lora_config(folder)
        shapes = _shapes(folder / WEIGHTS)
        self.targets = {name: self._target(name, shapes) for name in _targets(shapes, folder)}

    @property
    def base_name(self) -> str:
        return str(self.config.get("base_model_name_or_path") or "")

    @property
    def ranks(self) -> list[int]:
        return sorted({target.rank for target in self.targets.values()})

    @property
    def num_parameters(self) -> int:
        return sum(t.rank * (t.inputs + t.outputs) for t in self.targets.values())

    def factors(self, name: str) -> Factors:
        """The correction of one map in fp32, its scale folded into B.  Raises Unusable where it is not finite."""
        import torch

        from strategies.adapter_bank.algebra import Factors

        a, b = (self._tensors.get_tensor(f"base_model.model.{name}.lora_{side}.weight").float() for side in "AB")
        if not (torch.isfinite(a.sum()) and torch.isfinite(b.sum())):
            raise Unusable(f"{self.folder}: the weights of {name} are not finite")
        return Factors(a, b * self.targets[name].scale)

    def corrections(self) -> dict[str, Factors]:
        """All of it.  Raises Unusable."""
        return {name: self.factors(name) for name in self.targets}

    @cached_property
    def _tensors(self) -> Any:
        from safetensors import SafetensorError, safe_open

        try:
            return safe_open(self.folder / WEIGHTS, framework="pt")  # memory-mapped
        except SafetensorError as error:
            raise Unusable(f"{self.folder / WEIGHTS} cannot be read: {error}") from None

    def _target(self, name: str, shapes: Mapping[str, list[int]]) -> Target:
        a, b = (shapes[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
        if len(a) != 2 or len(b) != 2 or a[0] != b[1] or 0 in (*a, *b):
            raise Unusable(f"{self.folder}: A and B of {name} are {a} and {b}, no factors of a linear map")
        (rank, inputs), outputs = a, b[0]
        alpha = _of_pattern(self.config.get("alpha_pattern"), name, self.config.get("lora_alpha", rank))
        return Target(name, rank, inputs, outputs, alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank))


def fits_base(adapter: Adapter, base: Path) -> None:
    """Raises Unusable where a map is not in the base model's files, or has other sides there."""
    shapes: dict[str, list[int]] = {}
    for file in sorted(base.glob("*.safetensors")):
        shapes |= _shapes(file)
    for name, target in adapter.targets.items():
        there = next((shape for key, shape in shapes.items() if _same_map(key.removesuffix(".weight"), name)), None)
        if there is None:
            raise Unusable(f"{adapter.folder} corrects {name}, which {base.name} has not: it belongs to another model")
        if sorted(there) != sorted((target.inputs, target.outputs)):
            raise Unusable(
                f"{adapter.folder} corrects {name} as {target.outputs} x {target.inputs}; in {base.name} it is"
                f" {there[0]} x {there[1]}: it belongs to another model"
            )


def _same_map(one: str, other: str) -> bool:
    """Whether one name ends with the other: files may leave out the model's own prefix, as GPT-2's do."""
    return f".{one}".endswith(f".{other}") or f".{other}".endswith(f".{one}")


def write(folder: Path, corrections: Mapping[str, Factors], base_name: str, rank: int) -> None:
    """A PEFT adapter of one rank: alpha equals it, so that dW = B A.  Lower ranks are filled up with zeros."""
    import torch
    from safetensors.torch import save_file

    tensors = {}
    for name, factors in corrections.items():
        missing = rank - factors.rank
        a = torch.nn.functional.pad(factors.a_RI, (0, 0, 0, missing))
        b = torch.nn.functional.pad(factors.b_OR, (0, missing))
        tensors[f"base_model.model.{name}.lora_A.weight"] = a.contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = b.contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
        "target_modules": sorted(corrections),
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=1), encoding="utf-8")


def config_of(folder: Path) -> dict[str, Any]:
    """Raises Unusable."""
    try:
        found = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("it is no JSON object")
    except (OSError, ValueError) as error:
        raise Unusable(f"{folder} holds no readable {CONFIG}: {error}") from None
    return found


def _lora_config(folder: Path) -> dict[str, Any]:
    config = config_of(folder)
    if config.get("peft_type") != "LORA":
        raise Unusable(f"{folder} is a {config.get('peft_type')} adapter; the bank keeps LoRA")
    if refused := [key for key in _KEPT_EXACT if config.get(key)] + ["bias"] * (config.get("bias", "none") != "none"):
        raise Unusable(
            f"{folder} changes more than a product of two factors ({', '.join(refused)}): it cannot be added up"
        )
    if _CHANGES_BASE.fullmatch(begun := str(config.get("init_lora_weights"))):
        raise Unusable(
            f"{folder} began with a part of its base's weights (init_lora_weights: {begun}), from which they are"
            " missing since: PEFT's path_initial_model_for_weight_conversion saves it as a plain LoRA"
        )
    return config


def _shapes(file: Path) -> dict[str, list[int]]:
    """Names and shapes from the file's header (https://huggingface.co/docs/safetensors), without its tensors."""
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > file.stat().st_size:
                raise ValueError("its header is longer than the file")
            header = json.loads(stream.read(length))
        return {name: list(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}
    except (OSError, ValueError, struct.error, AttributeError, KeyError, TypeError) as error:
        raise Unusable(f"{file} cannot be read: {error}") from None


def _targets(shapes: Iterable[str], folder: Path) -> list[str]:
    found: dict[str, set[str]] = {}
    for key in shapes:
        match = _KEY.fullmatch(key)
        if match is None:
            raise Unusable(f"{folder}: {key} is no factor of a linear map")
        found.setdefault(match[1], set()).add(match[2])
    if not found or any(sides != {"A", "B"} for sides in found.values()):
        raise Unusable(f"{folder} has no pairs of A and B")
    return sorted(found)


def _of_pattern(patterns: Mapping[str, Any] | None, name: str, otherwise: Any) -> Any:
    """PEFT's rule: the first pattern that fits the end of the name."""
    return next((v for key, v in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", name)), otherwise)
