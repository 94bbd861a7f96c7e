"""Writes base and adapter as one plain model: tensor by tensor where that can be, else by PEFT in memory.

Tensor by tensor memory holds one linear map in fp32, so a model can be merged where it would not fit.  What is more
than a product of two factors (DoRA, whole modules, a base that PEFT changes first) is merged by PEFT.
"""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import torch

from clusters.safe.reading import BadInput
from orchestrator.job import model_files
from orchestrator.training.model import export
from orchestrator.training.model.tied import merged_model
from strategies.adapter_bank.adapter import Adapter, Unusable, config_of, same_map
from strategies.model.tensor_stream import DTYPES, SHARD_BYTES, TensorFiles, TensorPlan, unknown_dtype, write_shards

STORED = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_CONFIGS = ("config.json", "generation_config.json")
_OF_THE_ADAPTER = ("adapter_config.json", "base_model.json", "README.md")


class NotStreamable(ValueError):
    """What cannot be merged tensor by tensor; the text says why."""


def stream(exported: Path, base: Path, folder: Path, shard_bytes: int = SHARD_BYTES) -> str:
    """Write what a run handed back as one plain model into `folder`, in the base's precision; that precision.

    dW = s B A is added to W in fp32 and rounded once.  Raises NotStreamable before anything is written.
    """
    is_adapter = export.is_adapter(exported)
    stored, source = _tensors(base), _tensors(exported) if not is_adapter else None
    plans = [stored.plan(name) for name in stored.entries]
    dtype = _main_dtype(stored)
    if source is None:
        make = partial(_corrected, stored, *_corrections(exported, stored))
    else:  # trained as a whole, in fp32: as precise as the base is
        plans = [_like(source.plan(name), stored, dtype) for name in source.entries]
        by_name = {plan.name: DTYPES[plan.dtype] for plan in plans}
        make = partial(_read_as, source, by_name)
    folder.mkdir(parents=True, exist_ok=True)
    write_shards(folder, plans, make, shard_bytes)
    _write_beside(folder, exported, base, STORED.get(dtype, "bfloat16"))
    return STORED.get(dtype, "bfloat16")


def _read_as(source: TensorFiles, dtypes: dict[str, torch.dtype], name: str) -> torch.Tensor:
    return source.read(name).to(dtypes[name])


def write_whole(model: Any, tokenizer: Any, exported: Path, folder: Path, dtype: torch.dtype) -> None:
    """The same of a loaded model, merged by PEFT."""
    merged = merged_model(model).to(dtype)
    with export.plain_generation(merged):
        merged.save_pretrained(folder)
    export.write_beside(folder, merged, tokenizer, exported)
    export.share(folder)


def _tensors(folder: Path) -> TensorFiles:
    """Raises NotStreamable where a folder's weights cannot be read by their places."""
    try:
        found = TensorFiles(folder)
    except (BadInput, OSError) as error:
        raise NotStreamable(str(error)) from None
    if not found.entries:
        raise NotStreamable(f"{folder} holds no safetensors files")
    if kind := unknown_dtype(found.entries):
        raise NotStreamable(f"{folder} holds tensors of type {kind}")
    if not export.is_adapter(folder) and model_files.read_config(folder).get("quantization_config"):
        raise NotStreamable(f"{folder} is quantised")
    return found


def stored_dtype(folder: Path) -> str:
    """The precision that a model's weights are stored in: of most of their bytes."""
    files = TensorFiles(folder)
    return STORED.get(_main_dtype(files), "bfloat16") if files.entries else "float32"


def _main_dtype(files: TensorFiles) -> str:
    """As safetensors spells it."""
    sizes: dict[str, int] = {}
    for name in files.entries:
        plan = files.plan(name)
        sizes[plan.dtype] = sizes.get(plan.dtype, 0) + plan.bytes
    return max(sizes, key=lambda kind: sizes[kind])


def _like(plan: TensorPlan, stored: TensorFiles, dtype: str) -> TensorPlan:
    if not DTYPES[plan.dtype].is_floating_point:
        return plan
    return TensorPlan(plan.name, stored.entries[plan.name].dtype if plan.name in stored.entries else dtype, plan.shape)


def _corrections(exported: Path, stored: TensorFiles) -> tuple[Adapter, dict[str, str], bool]:
    """The adapter, which of its maps each corrected tensor of the base is, and whether the base stores them turned.

    Raises NotStreamable.
    """
    try:
        adapter = Adapter(exported)
    except Unusable as error:
        raise NotStreamable(str(error)) from None
    is_turned = bool(config_of(exported).get("fan_in_fan_out"))  # GPT-2's maps: inputs x outputs
    maps: dict[str, str] = {}
    for name, target in adapter.targets.items():
        places = [key for key in stored.entries if same_map(key.removesuffix(".weight"), name)]
        sides = [target.outputs, target.inputs]
        if len(places) != 1 or stored.entries[places[0]].shape != (sides[::-1] if is_turned else sides):
            raise NotStreamable(f"{name} is not one tensor of the base's files")  # tied, stacked or fused there
        maps[places[0]] = name
    return adapter, maps, is_turned


def _corrected(stored: TensorFiles, adapter: Adapter, maps: dict[str, str], is_turned: bool, name: str) -> torch.Tensor:
    tensor = stored.read(name)
    if name not in maps:
        return tensor
    factors, whole_OI = adapter.factors(maps[name]), tensor.float()
    (whole_OI.T if is_turned else whole_OI).addmm_(factors.b_OR, factors.a_RI)
    return whole_OI.to(tensor.dtype)


def _write_beside(folder: Path, exported: Path, base: Path, dtype: str) -> None:
    """Configuration, tokenizer, template, settings of generation, and the model's own code where it has some."""
    beside = {file.name: file for file in base.iterdir() if file.name in _CONFIGS or file.suffix == ".py"}
    beside |= {file.name: file for file in exported.iterdir() if _travels(file)}  # what was trained with
    for name, file in beside.items():
        shutil.copyfile(file, folder / name)
    config = model_files.read_config(folder)
    for key in ("torch_dtype", "_name_or_path"):
        config.pop(key, None)
    text = json.dumps(config | {"dtype": dtype}, indent=2, sort_keys=True)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")
    export.share(folder)


def _travels(file: Path) -> bool:
    is_weight = file.name.endswith((".safetensors", ".bin", ".index.json"))
    return file.is_file() and not is_weight and file.name not in _OF_THE_ADAPTER
