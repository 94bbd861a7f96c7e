"""A LoRA adapter as PEFT writes it, read map by map and written whole.

Shapes: I inputs, O outputs of a linear map, R rank; dW_OI = scale * B_OR A_RI.
"""

from __future__ import annotations

import json
import math
import os
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clusters.safe.reading import BadInput, kind_of, matches, printable, read_json, record
from strategies.model.tensor_file import TensorEntry, read_header

if TYPE_CHECKING:  # listing a bank must not load torch
    from strategies.adapter_bank.algebra import Factors

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PICKLED = "adapter_model.bin"  # what PEFT wrote before safetensors; reading it runs its code
_KEY = re.compile(r"base_model\.model\.((?:[\w-]+\.)*[\w-]+)\.lora_([AB])\.weight")
_FROM_HERE = ("./", "../")
_PATTERNS_S = 1.0  # for all patterns of a configuration
_FLOATS = ("F64", "F32", "F16", "BF16")
_CHANGES_BASE = re.compile(r"(pissa|corda).*|olora|loftq|lora_ga")  # ways to begin that take a part of W away


class Unusable(ValueError):
    """An adapter that cannot be used; the text says why."""


@dataclass(frozen=True)
class LoraSettings:
    """What of a PEFT configuration decides what its tensors mean; absent fields have PEFT's defaults."""

    peft_type: str | None = None
    base_model_name_or_path: str | None = None
    r: int = 8
    lora_alpha: float = 8
    use_rslora: bool = False
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None
    target_modules: str | list[str] | None = None
    bias: str = "none"
    init_lora_weights: Any = True


_BEYOND_FACTORS = (  # settings by which an adapter is more than dW = B A
    *("use_dora", "lora_bias", "modules_to_save", "layer_replication", "trainable_token_indices"),
    *("alora_invocation_tokens", "target_parameters", "use_qalora", "use_bdlora", "arrow_config", "kasa_config"),
    *("monteclora_config", "velora_config"),
)


@dataclass(frozen=True)
class Correction:
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
        self.settings = _lora_settings(folder)
        entries = header_of(folder)
        self._deadline = time.monotonic() + _PATTERNS_S
        self.targets = {name: self._target(name, entries) for name in _targets(entries, folder)}

    @property
    def base_name(self) -> str:
        """The base as it is loaded from here: a folder that is named from the adapter's own by its whole path."""
        name = self.settings.base_model_name_or_path or ""
        return str((self.folder / name).resolve()) if name.startswith(_FROM_HERE) else name

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

        a, b = (self._tensor(f"base_model.model.{name}.lora_{side}.weight").float() for side in "AB")
        b = b * self.targets[name].scale
        if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
            raise Unusable(f"{self.folder}: the weights of {name} are not finite")
        return Factors(a, b)

    def corrections(self) -> dict[str, Factors]:
        """All of it.  Raises Unusable."""
        return {name: self.factors(name) for name in self.targets}

    def _tensor(self, key: str) -> Any:
        from safetensors import SafetensorError

        try:
            return self._tensors.get_tensor(key)
        except (SafetensorError, OSError) as error:
            raise Unusable(f"{self.folder / WEIGHTS} cannot be read: {error}") from None

    @cached_property
    def _tensors(self) -> Any:
        from safetensors import safe_open

        return safe_open(self.folder / WEIGHTS, framework="pt")  # memory-mapped

    def _target(self, name: str, entries: Mapping[str, TensorEntry]) -> Correction:
        a, b = (entries[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
        if strange := [one.dtype for one in (a, b) if one.dtype not in _FLOATS]:
            raise Unusable(f"{self.folder}: the weights of {name} are of type {printable(strange[0])}, not floats")
        if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1] or 0 in (*a.shape, *b.shape):
            raise Unusable(f"{self.folder}: A and B of {name} are {a.shape} and {b.shape}, no factors of a linear map")
        (rank, inputs), outputs = a.shape, b.shape[0]
        settings = self.settings
        try:
            stated = _of_pattern(settings.rank_pattern, name, settings.r, self._deadline)
            alpha = _of_pattern(settings.alpha_pattern, name, settings.lora_alpha, self._deadline)
            is_named = _is_named(settings.target_modules, name, self._deadline)
        except BadInput as error:
            raise Unusable(f"{self.folder}: {error}") from None
        if stated != rank:
            raise Unusable(f"{self.folder}: {name} has rank {rank}, and its {CONFIG} says {stated}")
        if not is_named:
            raise Unusable(f"{self.folder}: {name} has weights and is not in target_modules: PEFT would not use them")
        return Correction(name, rank, inputs, outputs, alpha / (math.sqrt(rank) if settings.use_rslora else rank))


def fits_base(adapter: Adapter, base: Path) -> None:
    """Raises Unusable where a map is not in the base model's files, or has other sides there."""
    try:
        headers = [read_header(file) for file in sorted(base.glob("*.safetensors"))]
    except BadInput as error:
        raise Unusable(str(error)) from None
    shapes = {key: entry.shape for header in headers for key, entry in header.items()}
    for name, target in adapter.targets.items():
        there = next((shape for key, shape in shapes.items() if same_map(key.removesuffix(".weight"), name)), None)
        if there is None:
            raise Unusable(f"{adapter.folder} corrects {name}, which {base.name} has not: it belongs to another model")
        if sorted(there) != sorted((target.inputs, target.outputs)):
            raise Unusable(
                f"{adapter.folder} corrects {name} as {target.outputs} x {target.inputs}; in {base.name} it is"
                f" {there[0]} x {there[1]}: it belongs to another model"
            )


def same_map(one: str, other: str) -> bool:
    """Whether one name ends with the other: files may leave out the model's own prefix, as GPT-2's do."""
    return f".{one}".endswith(f".{other}") or f".{other}".endswith(f".{one}")


def write(folder: Path, corrections: Mapping[str, Factors], base_name: str, rank: int) -> None:
    """A PEFT adapter of one rank: alpha equals it, so that dW = B A.  Lower ranks are filled up with zeros.

    The name of a base that is a folder of this machine is written as the way to it from the adapter's own.
    """
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
    base = Path(base_name)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": os.path.relpath(base.resolve(), folder.resolve())
        if base.is_absolute()
        else base_name,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
        "target_modules": sorted(corrections),
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=1), encoding="utf-8")


def config_of(folder: Path) -> dict[str, Any]:
    """The values of an adapter's configuration, none of them checked.  Raises Unusable."""
    try:
        found = read_json(folder / CONFIG)
        if not isinstance(found, dict):
            raise BadInput("it is not a JSON object")
    except BadInput as error:
        raise Unusable(f"{folder} holds no readable {CONFIG}: {error}") from None
    return found


def header_of(folder: Path) -> dict[str, TensorEntry]:
    """The tensors of an adapter.  Raises Unusable."""
    try:
        if kind_of(folder / WEIGHTS) is None and kind_of(folder / PICKLED):
            raise BadInput(
                f"{folder} holds {PICKLED}, a pickle that runs code when it is read. Where you trust it, load it with"
                " PEFT and save it again: save_pretrained writes safetensors"
            )
        return read_header(folder / WEIGHTS)
    except BadInput as error:
        raise Unusable(str(error)) from None


def changes_base(init_lora_weights: Any) -> bool:
    """Whether PEFT takes a part of the base's weights away where A and B begin so, each time it loads the adapter."""
    return _CHANGES_BASE.fullmatch(str(init_lora_weights).lower()) is not None


def _lora_settings(folder: Path) -> LoraSettings:
    values = config_of(folder)
    if values.get("peft_type") != "LORA":
        kind = values.get("peft_type")
        raise Unusable(f"{folder} is a {printable(str(kind)[:40])} adapter; the bank keeps LoRA")
    try:
        known = {key: values[key] for key in LoraSettings.__dataclass_fields__ if key in values}
        settings = record(LoraSettings, known, str(folder / CONFIG))
    except BadInput as error:
        raise Unusable(str(error)) from None
    if refused := [key for key in _BEYOND_FACTORS if values.get(key)] + ["bias"] * (settings.bias != "none"):
        raise Unusable(
            f"{folder} changes more than a product of two factors ({', '.join(refused)}): it cannot be added up"
        )
    if changes_base(start := str(settings.init_lora_weights).lower()):
        raise Unusable(
            f"{folder} was initialised with a part of its base's weights (init_lora_weights: {start}), which training"
            " took out of the base: PEFT's path_initial_model_for_weight_conversion saves it as a plain LoRA"
        )
    return settings


def _targets(shapes: Iterable[str], folder: Path) -> list[str]:
    found: dict[str, set[str]] = {}
    for key in shapes:
        match = _KEY.fullmatch(key)
        if match is None:
            raise Unusable(f"{folder}: {printable(key[:120])} is no factor of a linear map")
        found.setdefault(match[1], set()).add(match[2])
    if not found or any(sides != {"A", "B"} for sides in found.values()):
        raise Unusable(f"{folder} has no pairs of A and B")
    return sorted(found)


def _of_pattern(patterns: Mapping[str, Any] | None, name: str, otherwise: Any, deadline: float) -> Any:
    """PEFT's rule: the first pattern that fits the end of the name.  Raises BadInput for one that cannot be matched."""
    for pattern, value in (patterns or {}).items():
        if _is_plain(pattern):
            found = f".{name}".endswith(f".{pattern}")
        else:
            found = matches(rf"(?:.*\.)?(?:{pattern})", name, CONFIG, deadline - time.monotonic())
        if found:
            return value
    return otherwise


def _is_named(targets: str | list[str] | None, name: str, deadline: float) -> bool:
    """PEFT's rule: in a list the end of the name, else a pattern for all of it.  Raises BadInput."""
    if targets is None or targets == "all-linear":
        return True
    if isinstance(targets, list):
        return any(f".{name}".endswith(f".{one}") for one in targets)
    return matches(targets, name, f"{CONFIG}: target_modules", deadline - time.monotonic())


def _is_plain(pattern: str) -> bool:
    return re.fullmatch(r"[\w.-]+", pattern) is not None
