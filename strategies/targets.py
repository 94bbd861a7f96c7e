"""Which modules an adapter's target names mean, by PEFT's rules, and what is wrong with names that mean none.  Pure.

A text is `all-linear` or a regular expression over whole module names; a list holds names or endings of names.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from functools import lru_cache

from clusters.safe_input import BadInput, matches, printable
from strategies.architecture import Architecture

ALL = "all-linear"
_PATTERN_S = 5.0  # for all names of a model
_SAME_PART = (  # names of maps that do the same in different families
    ("the queries, keys and values are", ("q_proj", "k_proj", "v_proj", "query", "key", "value", "q", "k", "v")),
    ("the queries, keys and values are", ("qkv_proj", "c_attn", "query_key_value", "Wqkv", "qkv", "W_pack", "in_proj")),
    ("attention's output is", ("o_proj", "out_proj", "dense", "c_proj", "wo", "o")),
    (
        "the MLP's way in is",
        ("gate_proj", "up_proj", "gate_up_proj", "fc1", "c_fc", "fc_in", "dense_h_to_4h", "w1", "w3"),
    ),
    ("the MLP's way out is", ("down_proj", "fc2", "c_proj", "fc_out", "dense_4h_to_h", "w2")),
)


def meant(targets: str | Sequence[str], names: Sequence[str], all_linear: Sequence[str]) -> tuple[str, ...]:
    """Those of the module names that the targets mean.  Raises BadInput for an expression that cannot be matched."""
    if isinstance(targets, str):
        return tuple(all_linear) if targets == ALL else _matching(targets, tuple(names))
    return tuple(name for name in names if any(ends_with(name, target) for target in targets))


@lru_cache(256)
def _matching(pattern: str, names: tuple[str, ...]) -> tuple[str, ...]:
    until = time.monotonic() + _PATTERN_S
    return tuple(name for name in names if matches(pattern, name, "the expression", until - time.monotonic()))


def ends_with(name: str, target: str) -> bool:
    """Whether a module name is the target or ends with it, part by part."""
    return name == target or name.endswith(f".{target}")


def mistakes(
    architecture: Architecture,
    key: str,
    targets: str | Sequence[str],
    layers: Sequence[int] | None = None,
    modules_to_save: Sequence[str] | None = None,
) -> list[str]:
    """What is wrong with the knobs that choose modules; `key` is the knob of the targets."""
    found = _wrong_layers(architecture, layers)
    found += _wrong_saved(architecture, modules_to_save or ())
    try:
        wrong = _wrong_targets(architecture, key, targets)
        chosen = meant(targets, tuple(architecture.modules), architecture.linear_maps)
    except BadInput as error:
        return [*found, f"method.{key}: {error}"]
    found += wrong
    if not wrong and not found and layers and not any(architecture.layer_of(name) in layers for name in chosen):
        found.append(f"method.{key}: none of these modules lies in the layers {_words(map(str, layers))}")
    both = [name for name in chosen if any(ends_with(name, saved) for saved in modules_to_save or ())]
    if both and targets != ALL:
        found.append(
            f"method.modules_to_save: {_words(architecture.last_names(both))} would be trained in full and by an"
            f" adapter; leave it out here or in method.{key}"
        )
    return found


def _wrong_targets(architecture: Architecture, key: str, targets: str | Sequence[str]) -> list[str]:
    names, maps = tuple(architecture.modules), architecture.linear_maps
    there = architecture.last_names(maps)
    if not maps:
        return [f"method.{key}: this model has no linear map that an adapter could correct"]
    if isinstance(targets, str):
        if meant(targets, names, maps):
            return []
        return [
            f"method.{key}: the expression {printable(targets)!r} matches the name of no module; the linear maps are"
            f" {_words(there)}, e.g. {maps[0]}"
        ]
    if not targets:
        return [f"method.{key} is an empty list: nothing would be adapted. The linear maps are {_words(there)}"]
    found = []
    for target in targets:
        matching = [name for name in names if ends_with(name, target)]
        if not matching:
            found.append(
                f"method.{key}: {printable(target)!r} is no module of this {architecture.model_type} model;"
                f" {_instead(target, there)}"
            )
        elif not any(architecture.adaptable(name) for name in matching):
            kind = architecture.modules[matching[0]]
            found.append(
                f"method.{key}: {printable(target)!r} is a {kind}, which adapters cannot correct; the linear maps are"
                f" {_words(there)}"
            )
    return found


def _instead(target: str, there: Sequence[str]) -> str:
    last = target.rsplit(".", 1)[-1]
    for part, names in _SAME_PART:
        like = [name for other, group in _SAME_PART if other == part for name in group if name in there]
        if last in names and like:
            return f"here {part} {_words(like)} (linear maps: {_words(there)})"
    return f"its linear maps are {_words(there)}"


def _wrong_layers(architecture: Architecture, layers: Sequence[int] | None) -> list[str]:
    if layers is None:
        return []
    if not layers:
        return ["method.layers_to_transform is an empty list: nothing would be adapted; leave it out for all layers"]
    last = architecture.num_layers - 1
    if outside := [layer for layer in layers if not 0 <= layer <= last]:
        return [f"method.layers_to_transform: {_words(map(str, outside))}: the model has layers 0 to {last}"]
    return []


def _wrong_saved(architecture: Architecture, saved: Sequence[str]) -> list[str]:
    outside = [name for name in architecture.modules if architecture.layer_of(name) is None]
    return [
        f"method.modules_to_save: {printable(name)!r} is no module of this model; outside its layers it has"
        f" {_words([name for name in outside if any(p.startswith(f'{name}.') for p in architecture.parameters)])}"
        for name in saved
        if not any(ends_with(module, name) for module in architecture.modules)
    ]


def _words(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")
