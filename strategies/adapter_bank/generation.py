"""An adapter for a new data set: the bank's corrections, weighted, one linear map after the other.

Memory holds one map's factors of all adapters, whatever the size of model and bank; adapters are memory-mapped files.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy

from clusters.safe.writing import new_folder
from strategies.adapter_bank import adapter, algebra
from strategies.adapter_bank.adapter import Adapter, Unusable

Rule = Literal["delta", "factorwise"]
RULES: tuple[Rule, ...] = ("delta", "factorwise")
_NEGLIGIBLE = 1e-3  # what dropped coefficients may add up to


@dataclass(frozen=True)
class Recipe:
    """How adapters are added up.

    `delta` is the exact sum of products, truncated to the rank; `factorwise` the published sums of A and of B; the
    others as in `algebra.merge`.
    """

    rule: Rule | algebra.Merge = "delta"
    rank: int | None = None  # None = the largest of the adapters'
    density: float = 0.5  # of the entries that a sparse rule keeps


@dataclass(frozen=True)
class Generated:
    """A generated adapter, and how near it is to the exact sum."""

    folder: Path
    coefficients: tuple[tuple[int, float], ...]  # (place in the bank, weight) of those that count
    rank: int
    relative_error: float  # || made - exact sum || / || exact sum ||, Frobenius over all maps
    seconds: float
    peak_bytes: int  # most memory this process has held


def generate(
    adapters: Sequence[Adapter],
    coefficients: Sequence[float] | numpy.ndarray,
    output: Path,
    recipe: Recipe = Recipe(),
    base_name: str | None = None,
) -> Generated:
    """Write the weighted sum as a PEFT adapter; the folder appears whole or not at all.

    Ranks and sets of maps may differ.  One adapter alone is returned as it is.  Raises Unusable for weights that are
    not finite, for maps of other shapes and for a rank that no map has.
    """
    began = time.perf_counter()
    counted = _drop_negligible(numpy.asarray(coefficients, dtype=float))
    chosen = [adapters[place] for place, _ in counted]
    largest = sum(max(one.ranks) for one in chosen) if recipe.rule == "cat" else max(max(one.ranks) for one in chosen)
    rank = recipe.rank or largest
    most = max(min(target.inputs, target.outputs) for one in chosen for target in one.targets.values())
    if rank > max(most, largest):
        raise Unusable(f"a rank of {rank} cannot be: the maps of these adapters have at most {most}")
    made, error = _sum(chosen, [weight for _, weight in counted], replace(recipe, rank=rank))
    with new_folder(output) as folder:
        adapter.write(folder, made, base_name or chosen[0].base_name, rank)
    return Generated(output, counted, rank, error, time.perf_counter() - began, _peak_bytes())


def _peak_bytes() -> int:
    import resource  # not on Windows, where nothing is generated

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def write_corrections(
    corrections: Mapping[str, algebra.Factors],
    coefficients: tuple[tuple[int, float], ...],
    output: Path,
    rank: int,
    base_name: str,
) -> Generated:
    """Write corrections of any rank as a PEFT adapter of `rank`; the folder appears whole or not at all.

    `coefficients` say what they were made of.  Raises Unusable for corrections that are not finite.
    """
    began = time.perf_counter()
    made, error = truncated(corrections, rank)
    with new_folder(output) as folder:
        adapter.write(folder, made, base_name, rank)
    return Generated(output, coefficients, rank, error, time.perf_counter() - began, _peak_bytes())


def combine_by_map(
    parts: Sequence[Mapping[str, algebra.Factors]], shares: Mapping[str, numpy.ndarray]
) -> dict[str, algebra.Factors]:
    """The exact sum of corrections whose shares are each map's own (P,), with the rank that it has."""
    made = {}
    for name, weights in shares.items():
        pairs = [(part[name], float(weight)) for part, weight in zip(parts, weights, strict=True) if name in part]
        made[name] = algebra.add([factors for factors, _ in pairs], [weight for _, weight in pairs])
    return made


def combine(
    adapters: Sequence[Adapter], coefficients: Sequence[float] | numpy.ndarray, rule: Rule = "delta"
) -> dict[str, algebra.Factors]:
    """The weighted sum in memory: the corrections by map, of the adapters' largest rank."""
    counted = _drop_negligible(numpy.asarray(coefficients, dtype=float))
    chosen = [adapters[place] for place, _ in counted]
    recipe = Recipe(rule, max(max(one.ranks) for one in chosen))
    return _sum(chosen, [weight for _, weight in counted], recipe)[0]


def mix(
    parts: Sequence[Mapping[str, algebra.Factors]], weights: Sequence[float] | numpy.ndarray, rule: Rule
) -> dict[str, algebra.Factors]:
    """The weighted sum of corrections by map, with the rank that it has."""
    add = algebra.add if rule == "delta" else algebra.average_factors
    counted = [(part, float(weight)) for part, weight in zip(parts, weights, strict=True) if weight]
    made = {}
    for name in sorted({name for part, _ in counted for name in part}):
        pairs = [(part[name], weight) for part, weight in counted if name in part]
        made[name] = add([factors for factors, _ in pairs], [weight for _, weight in pairs])
    return made


def _sum(
    chosen: Sequence[Adapter], weights: Sequence[float], recipe: Recipe
) -> tuple[dict[str, algebra.Factors], float]:
    """Corrections of the recipe's rank, and their relative error."""
    assert recipe.rank is not None
    same_shapes(chosen)
    how = "linear" if recipe.rule == "delta" else recipe.rule
    made, dropped, whole = {}, 0.0, 0.0
    for name in sorted({name for one in chosen for name in one.targets}):
        pairs = [(one.factors(name), w) for one, w in zip(chosen, weights, strict=True) if name in one.targets]
        parts, shares = [part for part, _ in pairs], [w for _, w in pairs]
        correction = algebra.merge(parts, shares, how, recipe.density)
        made[name], missing, square = (
            algebra.truncate(correction, recipe.rank)
            if isinstance(correction, algebra.Factors)
            else algebra.factorise(correction, recipe.rank)
        )
        dropped, whole = dropped + missing, whole + square
    return _finite(made), (max(0.0, dropped) / whole) ** 0.5 if whole else 0.0


def truncated(corrections: Mapping[str, algebra.Factors], rank: int) -> tuple[dict[str, algebra.Factors], float]:
    """Corrections of a rank, and their relative error."""
    found = {name: algebra.truncate(factors, rank) for name, factors in corrections.items()}
    dropped, whole = sum(one[1] for one in found.values()), sum(one[2] for one in found.values())
    return _finite({name: one[0] for name, one in found.items()}), (max(0.0, dropped) / whole) ** 0.5 if whole else 0.0


def _finite(made: dict[str, algebra.Factors]) -> dict[str, algebra.Factors]:
    import torch

    if not all(torch.isfinite(f.a_RI.sum()) and torch.isfinite(f.b_OR.sum()) for f in made.values()):
        raise Unusable("the sum of these adapters is not finite")
    return made


def bank_grams(adapters: Sequence[Adapter]) -> dict[str, numpy.ndarray]:
    """Inner products of adapters for each map, N x N."""
    return {
        name: algebra.gram([one.factors(name) if name in one.targets else None for one in adapters]).numpy()
        for name in sorted({name for one in adapters for name in one.targets})
    }


def bank_gram(adapters: Sequence[Adapter]) -> numpy.ndarray:
    """Inner products of whole adapters, N x N."""
    return sum(bank_grams(adapters).values(), numpy.zeros((len(adapters), len(adapters)), numpy.float32))


def same_shapes(adapters: Sequence[Adapter]) -> None:
    """Raises Unusable where two adapters do not fit one model."""
    known: dict[str, tuple[int, int, Path]] = {}
    for one in adapters:
        for name, target in one.targets.items():
            inputs, outputs, folder = known.setdefault(name, (target.inputs, target.outputs, one.folder))
            if (inputs, outputs) != (target.inputs, target.outputs):
                raise Unusable(
                    f"{name} is {target.outputs} x {target.inputs} in {one.folder} and {outputs} x {inputs} in"
                    f" {folder}: they were trained on different models"
                )


def _drop_negligible(coefficients: numpy.ndarray) -> tuple[tuple[int, float], ...]:
    """The largest coefficients that make up all but a thousandth, and sum to what all did; with negatives, all."""
    if (coefficients < 0).any():
        return tuple((int(place), float(coefficients[place])) for place in numpy.flatnonzero(coefficients))
    order = numpy.argsort(-numpy.abs(coefficients), kind="stable")
    sizes = numpy.abs(coefficients)[order]
    tail = sizes[::-1].cumsum()[::-1]  # of this one and all smaller ones
    keep = numpy.sort(order[(tail > _NEGLIGIBLE * sizes.sum()) & (sizes > 0)])
    scale = coefficients.sum() / coefficients[keep].sum()
    return tuple((int(place), float(coefficients[place] * scale)) for place in keep)
