"""Reads catalogue.toml, which holds what each technique states."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from strategies.contract import Method
from strategies.techniques import changes, refusals
from strategies.techniques.attention import refuse_kernel
from strategies.techniques.libraries import lacks
from strategies.techniques.technique import Choice, Refusal, Technique

_REFUSALS: dict[str, Refusal] = {
    "bf16": refusals.refuse_bf16,
    "bitsandbytes": refusals.refuse_bitsandbytes,
    "chunked loss": refusals.refuse_chunked_loss,
    "compiler": refusals.refuse_compiler,
    "liger": refusals.refuse_liger,
    "deepspeed": lambda device, shape: lacks(device, "deepspeed"),
    "deepspeed offload": lambda device, shape: refusals.refuse_offload(device, shape) or lacks(device, "deepspeed"),
    "offload": refusals.refuse_offload,
    "shared beginnings": refusals.refuse_sharing,
}
_REFUSALS |= {
    kernel: partial(refuse_kernel, kernel) for kernel in ("eager", "sdpa", "flash_attention_2", "flex_attention")
}
_CHANGES: dict[str, Callable[[Choice], Choice]] = {
    change.__name__: change
    for change in (changes.all_rows, changes.one_row, changes.grouped_rows, changes.mixed_rows, changes.half_length)
}
_CHANGES |= {f"zero_{stage}": partial(changes.shard, stage) for stage in (1, 2, 3)}


def read_catalogue(methods: Mapping[str, type[Method]]) -> tuple[Technique, ...]:
    """Every technique, in the order of the file; `methods` are the registered ones."""
    file = Path(__file__).with_suffix(".toml")
    return tuple(_technique(stated, methods) for stated in tomllib.loads(file.read_text("utf-8"))["technique"])


def _technique(stated: dict[str, Any], methods: Mapping[str, type[Method]]) -> Technique:
    sides = {side: _change(stated[side], methods) for side in ("on", "off")}
    refused = {"impossible": _REFUSALS[stated.pop("refused_by")]} if "refused_by" in stated else {}
    return Technique(**{**stated, **sides, **refused})


def _change(stated: str | dict[str, Any], methods: Mapping[str, type[Method]]) -> Callable[[Choice], Choice]:
    if isinstance(stated, str):
        return _CHANGES[stated]
    if "method" not in stated:
        return lambda choice: choice.with_(**stated)
    method = methods[stated["method"]]
    options_of: Any = method  # a dataclass, which its protocol cannot say
    names = {field.name for field in fields(options_of)}
    options = {key: value for key, value in stated.items() if key in names}
    others = {key: value for key, value in stated.items() if key not in {*names, "method"}}
    return lambda choice: replace(choice.with_(**others), method=method(**options))
