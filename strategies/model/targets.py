"""Which modules an adapter's target names mean, by PEFT's rules, and what is wrong with names that mean none.  Pure.

A text is `all-linear` or a regular expression over whole module names; a list holds names or endings of names.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

from clusters.safe.reading import BadInput, matches, printable
from strategies.families import FAMILIES
from strategies.model.architecture import Architecture
from strategies.shape import ExpertStack, Linear, ModelShape, Part
from strategies.stage_shape import StageShape
from strategies.workload import StagePart

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
    saved: tuple[tuple[int | None, Linear | Part], ...] = ()
    stacks: tuple[tuple[int, ExpertStack, int], ...] = ()  # tensors of experts that adapters correct; ranks an expert
    lowest: int | None = None  # of a stage: the layer of its own below which nothing trains, in this stage or before it

    @cached_property
    def layers(self) -> int:
        """How many decoder layers hold one of them, at least 1."""
        found = {layer for layer, _ in self.maps} | {layer for layer, _, _ in self.stacks}
        return len(found - {None}) or 1

    @cached_property
    def first_layer(self) -> int:
        """Below it nothing trains."""
        beside = [layer for layer, one in self.saved if isinstance(one, ExpertStack) or one.reads != "last"]
        corrected = [layer for layer, _ in self.maps] + [layer for layer, _, _ in self.stacks]
        lowest = min((layer or 0 for layer in (*corrected, *beside)), default=0)
        return lowest if self.lowest is None else self.lowest

    @cached_property
    def sides(self) -> int:
        """Sum of their inputs and outputs: what a correction of rank 1 has."""
        return sum(linear.inputs + linear.outputs for _, linear in self.maps)

    @cached_property
    def stacked_sides(self) -> int:
        """The same of the tensors of experts, each expert with a correction of its own."""
        return sum(ranks * stack.num_experts * (stack.inputs + stack.outputs) for _, stack, ranks in self.stacks)

    @cached_property
    def inputs(self) -> int:
        """Widths of the vectors that they read; tokens, which an embedding reads, are none."""
        return sum(linear.inputs for _, linear in self._products)

    @cached_property
    def outputs(self) -> int:
        return sum(linear.outputs for _, linear in self.maps)

    @cached_property
    def biases(self) -> int:
        return sum(linear.outputs for _, linear in self.maps if linear.bias)

    @cached_property
    def elements(self) -> int:
        """Weights of the maps themselves."""
        return sum(linear.inputs * linear.outputs for _, linear in self.maps)

    @cached_property
    def stacked_elements(self) -> int:
        return sum(stack.num_parameters for _, stack, _ in self.stacks)

    @cached_property
    def distinct_inputs(self) -> int:
        """Widths of the different tensors that they read."""
        return sum({(layer, linear.reads): linear.inputs for layer, linear in self._products}.values())

    @cached_property
    def largest(self) -> int:
        return max((linear.inputs * linear.outputs for _, linear in self.maps), default=0)

    @cached_property
    def num_saved(self) -> int:
        return sum(one.num_parameters for _, one in self.saved)

    @cached_property
    def num_saved_biases(self) -> int:
        return sum(one.outputs for _, one in self.saved if isinstance(one, Linear) and one.bias)

    @cached_property
    def num_saved_in_layers(self) -> int:
        """Of those trained in full the weights that are multiplied inside the layers."""
        return sum(one.num_parameters for layer, one in self.saved if layer is not None and not isinstance(one, Part))

    @cached_property
    def num_cast(self) -> int:
        """Of those trained in full the weights of products, which 16-bit training casts; an embedding is looked up."""
        products = (one for _, one in self.saved if not isinstance(one, Part))
        return sum(one.num_parameters for one in products if isinstance(one, ExpertStack) or one.reads != "tokens")

    def reads(self, tensor: str) -> bool:
        return any(linear.reads == tensor for _, linear in self._products)

    def saves(self, tensor: str) -> bool:
        """Whether a map that trains in full reads this: `tokens` = the embedding, `last` = the output matrix."""
        return any(isinstance(one, Linear) and one.reads == tensor for _, one in self.saved)

    @property
    def saves_norms(self) -> bool:
        return any(isinstance(one, Part) and one.reads in ("normed", "last") for _, one in self.saved)

    @cached_property
    def _products(self) -> list[tuple[int | None, Linear]]:
        """What trains and multiplies vectors inside the layers, or corrects what does so outside them."""
        saved = [(layer, one) for layer, one in self.saved if layer is not None and isinstance(one, Linear)]
        return [(layer, linear) for layer, linear in self.maps if linear.reads != "tokens"] + saved


@dataclass(frozen=True)
class AdapterChoice:
    """The options that choose what an adapter corrects and what trains in full beside it, as PEFT names them."""

    targets: str | tuple[str, ...] = ALL
    layers_to_transform: tuple[int, ...] | None = None
    modules_to_save: tuple[str, ...] = ()
    target_parameters: tuple[str, ...] = ()
    takes_earlier_names: bool = False  # experts' maps by the names they had before they were stacked


@lru_cache(256)
def adapted_maps(shape: ModelShape, choice: AdapterChoice) -> AdaptedMaps:
    """What an adapter's options mean on a model of this shape.  Raises BadInput for what cannot be matched."""
    if isinstance(shape, StageShape) and shape.whole and shape.of:
        return _of_stage(adapted_maps(shape.whole, choice), shape.of)
    maps, layers = shape.named_maps, choice.layers_to_transform
    whole = {**maps, **shape.named_parts, **shape.named_stacks}
    kept = choice.modules_to_save + ((shape.output_name,) if shape.num_scores else ())  # a score trains in full
    saved = {name: one for name, one in whole.items() if any(is_saved(name, it) for it in kept)}
    targets, experts = _split_experts(shape, choice)
    chosen = [
        name
        for name in resolve_targets(targets, tuple(maps), [one for one in maps if one not in shape.outside])
        if name not in saved and (layers is None or maps[name][0] in layers)
    ]
    routers = _routers(shape) if "gate" in experts else []
    stacks = [
        (layer, stack, experts.get(stack.name, 1))
        for name, (layer, stack) in shape.named_stacks.items()
        if stack.name in experts or any(ends_with(name, target) for target in choice.target_parameters)
    ]
    return AdaptedMaps((*(maps[name] for name in chosen), *routers), tuple(saved.values()), tuple(stacks))


def _of_stage(every: AdaptedMaps, stage: StagePart) -> AdaptedMaps:
    """Those that lie on one stage of a pipeline."""

    def is_here(layer: int | None, reads: str) -> bool:
        if layer is None:
            return stage.is_last if reads in ("last", "projected") else stage.is_first
        return stage.first_layer <= layer < stage.end_layer

    return AdaptedMaps(
        tuple((layer, one) for layer, one in every.maps if is_here(layer, one.reads)),
        tuple((layer, one) for layer, one in every.saved if is_here(layer, getattr(one, "reads", ""))),
        tuple((layer, stack, ranks) for layer, stack, ranks in every.stacks if is_here(layer, "")),
        lowest=min(max(0, every.first_layer - stage.first_layer), stage.num_layers),
    )


def _split_experts(shape: ModelShape, choice: AdapterChoice) -> tuple[str | tuple[str, ...], dict[str, int]]:
    """The targets that name modules, and the tensors of experts that the others name, with ranks an expert.

    Raises BadInput where half of a tensor is named.

    In the families whose experts had maps of their own before transformers stacked them, PEFT takes the earlier names:
    gate and up, which lie in one tensor, for a correction of twice the rank, `all-linear` for all of them.
    """
    earlier, targets = shape.family.earlier_maps, choice.targets
    if not earlier or not choice.takes_earlier_names:
        return targets, {}
    tensors = dict(zip(earlier, ("gate_up_proj", "gate_up_proj", "down_proj"), strict=True)) | {"gate": "gate"}
    if isinstance(targets, str):
        names = [name for name, (layer, _) in shape.named_maps.items() if layer is not None]
        if targets == ALL:
            targets = tuple(dict.fromkeys(name.rsplit(".", 1)[-1] for name in names))
            targets += tuple(tensors) if choice.layers_to_transform is None else ()
        elif choice.layers_to_transform is None:
            holders = {name.rsplit(".", 1)[0] for name in shape.named_stacks}
            names += [f"{holder}.{old}" for holder in holders for old in earlier]
            names += [f"{holder.rsplit('.', 1)[0]}.gate" for holder in holders]
            targets = tuple(dict.fromkeys(name.rsplit(".", 1)[-1] for name in _matching(targets, tuple(names))))
        else:
            targets = _matching(targets, tuple(names))
    found = [tensors[last] for target in targets if (last := target.rsplit(".", 1)[-1]) in tensors]
    named = {last for target in targets if (last := target.rsplit(".", 1)[-1]) in earlier[:2]}
    if len(named) == 1:
        raise BadInput(f"{' and '.join(earlier[:2])} of experts lie in one tensor: name both of them or none")
    modules = tuple(target for target in targets if target.rsplit(".", 1)[-1] not in tensors)
    return modules, {name: 2 if name == "gate_up_proj" else 1 for name in found}


def _routers(shape: ModelShape) -> list[tuple[int, Linear]]:
    """What chooses the experts of each layer, as a map."""
    router = Linear(shape.family.router, shape.hidden_size, shape.num_experts, reads="normed for the MLP")
    return [(layer, router) for layer in range(shape.num_layers) if layer not in shape.dense_layers]


def is_saved(name: str, module: str) -> bool:
    """Whether modules_to_save trains this map in full.  PEFT compares the ends of names, whole parts or not."""
    parts = name.split(".")
    return any(".".join(parts[: end + 1]).endswith(module) for end in range(len(parts)))


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
        {f"{name}.weight": (linear.outputs, linear.inputs) for name, (_, linear) in maps.items()}
        | {name: (one.num_experts, one.outputs, one.inputs) for name, (_, one) in shape.named_stacks.items()},
        shape.family.layers,
        shape.num_layers,
        shape.output_name,
        shape.num_parameters,
        is_whole=False,
    )


def mistakes(architecture: Architecture, key: str, choice: AdapterChoice) -> list[str]:
    """What is wrong with the options that choose modules; `key` is the option that holds the targets."""
    layers, targets = choice.layers_to_transform, choice.targets
    found = _wrong_layers(architecture, layers)
    found += _wrong_saved(architecture, choice.modules_to_save)
    found += _wrong_parameters(architecture, choice)
    try:
        only_experts = choice.target_parameters and not targets
        wrong = [] if only_experts else _wrong_targets(architecture, key, targets)
        chosen = resolve_targets(targets, tuple(architecture.modules), architecture.linear_maps)
    except BadInput as error:
        return [*found, f"method.{key}: {error}"]
    found += wrong
    if not wrong and not found and layers and not any(architecture.layer_of(name) in layers for name in chosen):
        found.append(f"method.{key}: none of these modules lies in the layers {_words(map(str, layers))}")
    both = [name for name in chosen if any(ends_with(name, saved) for saved in choice.modules_to_save)]
    if both and targets != ALL:
        found.append(
            f"method.modules_to_save: {_words(architecture.last_names(both))} would be trained in full and by an"
            f" adapter; leave it out here or in method.{key}"
        )
    return found


def wrong_tokens(architecture: Architecture, tokens: Sequence[int] | None, choice: AdapterChoice) -> list[str]:
    """What is wrong with the numbers of tokens whose embeddings train."""
    if tokens is None:
        return []
    key = "method.trainable_token_indices"
    name = next((name for name, kind in architecture.modules.items() if kind == "Embedding"), "")
    rows = architecture.parameters.get(f"{name}.weight", (0,))[0]
    if not tokens:
        return [f"{key} is an empty list: no token would train; leave it out"]
    if len(set(tokens)) < len(tokens):
        return [f"{key} names {_words(map(str, sorted(t for t in set(tokens) if tokens.count(t) > 1)))} twice"]
    if outside := [token for token in tokens if not 0 <= token < rows]:
        return [f"{key}: {_words(map(str, outside))}: the model has tokens 0 to {rows - 1}"]
    adapted = () if isinstance(choice.targets, str) else choice.targets
    others = (("modules_to_save", choice.modules_to_save), ("lora_target_modules", adapted))
    return [
        f"{key}: method.{other} trains all of {name}, and its rows could not train apart: leave one of them out"
        for other, listed in others
        if any(ends_with(name, one) for one in listed)
    ]


def _wrong_parameters(architecture: Architecture, choice: AdapterChoice) -> list[str]:
    if not choice.target_parameters:
        return []
    stacked = [name for name, shape in architecture.parameters.items() if len(shape) == 3]
    if not stacked:
        return [f"method.target_parameters: this {architecture.model_type} model has no stacked tensors of experts"]
    known = dict.fromkeys(".".join(name.split(".")[-3:]) for name in stacked)
    return [
        f"method.target_parameters: {printable(one)!r} is no stacked tensor of experts; those are {_words(known)}"
        for one in choice.target_parameters
        if not any(ends_with(name, one) for name in stacked)
    ]


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
    earlier = (*family.earlier_maps, "gate") if (family := FAMILIES.get(architecture.model_type)) else ()
    for target in targets:
        if len(earlier) > 1 and target.rsplit(".", 1)[-1] in earlier:
            continue
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
        if not any(module.endswith(name) for module in architecture.modules)
    ]


def _words(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")
