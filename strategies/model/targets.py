"""Which modules an adapter's target names mean, by PEFT's rules, and what is wrong with names that mean none.  Pure.

A text is `all-linear` or a regular expression over whole module names; a list holds names or endings of names.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

from clusters.safe.reading import BadInput, matches, printable
from strategies.model.architecture import Architecture
from strategies.shape import Linear, ModelShape

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


def resolve_targets(targets: str | Sequence[str], names: Sequence[str], all_linear: Sequence[str]) -> tuple[str, ...]:
    """Those of the module names that the targets mean.  Raises BadInput for an expression that cannot be matched."""
    if isinstance(targets, str):
        return tuple(all_linear) if targets == ALL else _matching(targets, tuple(names))
    return tuple(name for name in names if any(ends_with(name, target) for target in targets))


@dataclass(frozen=True)
class AdaptedMaps:
    """The linear maps that adapters correct, all layers together, and what trains in full beside them."""

    maps: tuple[tuple[int | None, Linear], ...]  # with the layer of each; None outside the layers
    saved: tuple[tuple[int | None, Linear], ...] = ()

    @cached_property
    def layers(self) -> int:
        """How many decoder layers hold one of them, at least 1."""
        return len({layer for layer, _ in self.maps if layer is not None}) or 1

    @cached_property
    def first_layer(self) -> int:
        """Below it nothing trains."""
        found = [layer for layer, _ in (*self.maps, *(one for one in self.saved if one[1].reads != "last"))]
        return min((layer or 0 for layer in found), default=0)

    @cached_property
    def sides(self) -> int:
        """Sum of their inputs and outputs: what a correction of rank 1 has."""
        return sum(linear.inputs + linear.outputs for _, linear in self.maps)

    @cached_property
    def inputs(self) -> int:
        return sum(linear.inputs for _, linear in self.maps)

    @cached_property
    def outputs(self) -> int:
        return sum(linear.outputs for _, linear in self.maps)

    @cached_property
    def elements(self) -> int:
        """Weights of the maps themselves."""
        return sum(linear.inputs * linear.outputs for _, linear in self.maps)

    @cached_property
    def distinct_inputs(self) -> int:
        """Widths of the different tensors that they read."""
        return sum({(layer, linear.reads): linear.inputs for layer, linear in self.maps}.values())

    @cached_property
    def largest(self) -> int:
        return max((linear.inputs * linear.outputs for _, linear in self.maps), default=0)

    @cached_property
    def num_saved(self) -> int:
        return sum(linear.num_parameters for _, linear in self.saved)

    @cached_property
    def num_cast(self) -> int:
        """Of those trained in full the weights of products, which 16-bit training casts; an embedding is looked up."""
        return sum(linear.num_parameters for _, linear in self.saved if linear.reads != "tokens")

    def reads(self, tensor: str) -> bool:
        return any(linear.reads == tensor for _, linear in self.maps)

    def saves(self, tensor: str) -> bool:
        """Whether what trains in full reads this: `tokens` = the embedding, `last` = the output matrix."""
        return any(linear.reads == tensor for _, linear in self.saved)


def adapted_maps(
    shape: ModelShape,
    targets: str | Sequence[str],
    layers: Sequence[int] | None = None,
    modules_to_save: Sequence[str] | None = None,
) -> AdaptedMaps:
    """What an adapter's options mean on a model of this shape.  Raises ValueError for what means nothing."""
    return _adapted(
        shape,
        targets if isinstance(targets, str) else tuple(targets),
        None if layers is None else tuple(layers),
        tuple(modules_to_save or ()),
    )


@lru_cache(256)
def _adapted(
    shape: ModelShape, targets: str | tuple[str, ...], layers: tuple[int, ...] | None, modules_to_save: tuple[str, ...]
) -> AdaptedMaps:
    maps = shape.named_maps
    inside = [name for name, (layer, _) in maps.items() if layer is not None]
    saved = [name for name in maps if any(is_in(name, module) for module in modules_to_save)]
    chosen = [
        name
        for name in resolve_targets(targets, tuple(maps), inside)
        if name not in saved and (layers is None or maps[name][0] in layers)
    ]
    return AdaptedMaps(tuple(maps[name] for name in chosen), tuple(maps[name] for name in saved))


def is_in(name: str, module: str) -> bool:
    """Whether a map is this module or lies in it."""
    parts = name.split(".")
    return any(ends_with(".".join(parts[: end + 1]), module) for end in range(len(parts)))


@lru_cache(256)
def _matching(pattern: str, names: tuple[str, ...]) -> tuple[str, ...]:
    until = time.monotonic() + _PATTERN_S
    return tuple(name for name in names if matches(pattern, name, "the expression", until - time.monotonic()))


def ends_with(name: str, target: str) -> bool:
    """Whether a module name is the target or ends with it, part by part."""
    return name == target or name.endswith(f".{target}")


@lru_cache(16)
def architecture_of_shape(shape: ModelShape) -> Architecture:
    """The maps of a model and what holds them by name, from its config.json alone; norms are not among them."""
    maps = shape.named_maps
    modules: dict[str, str] = {}
    for name, (layer, _) in maps.items():
        parts = name.split(".")
        modules |= {".".join(parts[:end]): "Module" for end in range(1, len(parts))}
        modules[name] = "Embedding" if name == shape.family.embedding else "Linear"
        if layer is not None and shape.model_type == "gpt2":
            modules[name] = "Conv1D"
    return Architecture(
        shape.model_type,
        modules,
        {f"{name}.weight": (linear.outputs, linear.inputs) for name, (_, linear) in maps.items()},
        shape.family.layers,
        shape.num_layers,
        shape.family.output,
        shape.num_parameters,
        is_whole=False,
    )


def mistakes(
    architecture: Architecture,
    key: str,
    targets: str | Sequence[str],
    layers: Sequence[int] | None = None,
    modules_to_save: Sequence[str] | None = None,
) -> list[str]:
    """What is wrong with the options that choose modules; `key` is the option that holds the targets."""
    found = _wrong_layers(architecture, layers)
    found += _wrong_saved(architecture, modules_to_save or ())
    try:
        wrong = _wrong_targets(architecture, key, targets)
        chosen = resolve_targets(targets, tuple(architecture.modules), architecture.linear_maps)
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
        if resolve_targets(targets, names, maps):
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
    if not architecture.is_whole:
        return []
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
