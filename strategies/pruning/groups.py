"""What may be removed together from a model so that one of the same kind remains, only smaller.  No torch.

A channel of a gated MLP is a row of gate and up and a column of down; a key-value group is the rows of one key-value
head and of the query heads that share it, and their columns of the output map.  As many are kept in every layer: a
`config.json` has one width for all of them.

Legend: f the MLP's width, D the width of a head.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from strategies.shape import ModelShape

_APART = ("q_proj", "k_proj", "v_proj", "o_proj")
# Whose configuration must have a hidden size that is a multiple of the number of heads, whatever their width.
_DIVIDED = {"llama", "gemma2", "gemma3_text"}
_PROTECTED = 0.1  # of the layers, the first ones, and the last: dropping them costs most (arXiv 2402.02834, 2305.18403)


@dataclass(frozen=True)
class MapPart:
    """The rows or columns of a linear map that belong to groups: `width` a group, one group after the other."""

    path: str  # of the map within its layer, e.g. mlp.gate_proj
    is_input: bool  # columns
    count: int  # groups in this map
    width: int = 1
    offset: int = 0  # where those of the first group begin


@dataclass(frozen=True)
class PrunedGroups:
    """Groups of one kind: `kept` of `count` remain in every layer, or of the layers themselves."""

    name: str  # channels | heads | layers
    count: int
    kept: int
    rows: int  # that are chosen from apart: the layers, or 1 of layers
    parts: tuple[MapPart, ...] = ()
    protected: tuple[int, ...] = ()  # that are never removed

    @property
    def removed(self) -> int:
        return self.count - self.kept

    @property
    def masked(self) -> MapPart:
        """The map whose inputs are zero where a group is masked."""
        return next(part for part in self.parts if part.is_input)

    def removed_at(self, part: float) -> int:
        """How many are removed where so much of the way is done."""
        return round(part * self.removed)


def kept_of(count: int, ratio: float, multiple_of: int = 1) -> int:
    """How many of `count` remain when a part of them is removed, as a multiple of a number."""
    kept = multiple_of * round((count - ratio * count) / multiple_of)
    return min(count, max(kept, multiple_of))


def channels_of(shape: ModelShape, ratio: float, multiple_of: int) -> PrunedGroups:
    """The channels of a gated MLP, fused or not."""
    at, (*inward, down), f = shape.family.mlp_at, shape.family.mlp, shape.intermediate_size
    into = [(inward[0], 0), (inward[0], f)] if len(inward) == 1 else [(name, 0) for name in inward]
    parts = [MapPart(f"{at}.{name}", False, f, 1, offset) for name, offset in into]
    parts.append(MapPart(f"{at}.{down}", True, f))
    return PrunedGroups("channels", f, kept_of(f, ratio, multiple_of), shape.num_layers, tuple(parts))


def heads_of(shape: ModelShape, ratio: float) -> PrunedGroups:
    """The key-value groups of an attention whose queries, keys and values are maps of their own."""
    at, own, count = shape.family.attention_at, shape.head_dim, shape.num_kv_heads
    shared = shape.num_heads // count * own
    parts = [MapPart(f"{at}.{name}", False, count, shared if name == "q_proj" else own) for name in _APART[:3]]
    parts.append(MapPart(f"{at}.o_proj", True, count, shared))
    return PrunedGroups("heads", count, kept_of(count, ratio), shape.num_layers, tuple(parts))


def layers_of(shape: ModelShape, ratio: float) -> PrunedGroups:
    """The decoder layers themselves, without the first ones and the last."""
    count = shape.num_layers
    first = max(1, round(_PROTECTED * count))
    parts = tuple(MapPart(linear.path, False, 1, linear.outputs) for linear in shape.linears)
    return PrunedGroups("layers", count, kept_of(count, ratio), 1, parts, (*range(first), count - 1))


def why_unknown(shape: ModelShape, with_heads: bool) -> str | None:
    """Why the groups of this model are not known; None where they are."""
    family = shape.family
    if shape.num_experts:
        return f"{shape.model_type} models have experts, of which no group is known here: use a model without them"
    if family.encoder:
        return f"{shape.model_type} models do not write text: use a decoder"
    if not shape.gated_mlp:
        return (
            f"only models with gated MLPs are pruned (Llama, Qwen, Mistral, Gemma, Phi-3, OLMo 2, ...), and"
            f" {shape.model_type}'s is {' and '.join(family.mlp)}: use another model, or method.type: lora"
        )
    if with_heads and family.attention != _APART:
        return f"{shape.model_type}'s attention is {', '.join(family.attention)}: set method.groups: mlp"
    if with_heads and family.qk_norm == "full":
        return f"{shape.model_type} norms all heads together, so that none can leave: set method.groups: mlp"
    return None


def why_no_config(shape: ModelShape, heads: PrunedGroups) -> str | None:
    """Why no config.json can describe a model with the heads that remain; None where one can."""
    shared = shape.num_heads // heads.count

    def fits(kept: int) -> bool:
        return shape.model_type not in _DIVIDED or shape.hidden_size % (kept * shared) == 0

    if fits(heads.kept):
        return None
    nearest = sorted(filter(fits, range(1, heads.count)), key=lambda kept: abs(kept - heads.kept))
    ratios = " or ".join(f"{1 - kept / heads.count:.3g} ({kept * shared} heads)" for kept in nearest[:2])
    return (
        f"{heads.kept * shared} heads would remain, of which a {shape.model_type} model's hidden size"
        f" ({shape.hidden_size}) must be a multiple: set {f'method.ratio to {ratios}, or ' if ratios else ''}"
        "method.groups: mlp"
    )


def smaller_shape(shape: ModelShape, groups: Iterable[PrunedGroups]) -> ModelShape:
    """The sizes of the model that remains."""
    for one in groups:
        if one.name == "channels":
            shape = replace(shape, intermediate_size=one.kept)
        elif one.name == "heads":
            heads = shape.num_heads // shape.num_kv_heads * one.kept
            shape = replace(shape, num_heads=heads, num_kv_heads=one.kept)
        else:
            shape = replace(shape, num_layers=one.kept)
    return shape


def words_of(one: PrunedGroups, number: int) -> str:
    """So many of the groups of a kind, in words."""
    words = {
        "channels": f"{number} of {one.count} channels of each MLP",
        "heads": f"{number} of {one.count} key-value groups of each layer",
        "layers": f"{number} of {one.count} layers",
    }
    return words[one.name]


def describe(shape: ModelShape, groups: Sequence[PrunedGroups]) -> str:
    """What remains of a model, in words: groups and parameters."""
    smaller, whole = smaller_shape(shape, groups).num_parameters, shape.num_parameters
    parts = " and ".join(words_of(one, one.kept) for one in groups)
    return f"{parts} remain: {smaller:,} of {whole:,} parameters ({1 - smaller / whole:.1%} fewer)"
