"""`bank merge`: several adapters as one."""

from __future__ import annotations

import math
import time
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from orchestrator.errors import JobError
from strategies.adapter_bank.algebra import Merge
from strategies.adapter_bank.card import AdapterCard
from strategies.adapter_bank.generation import Recipe, generate
from strategies.adapter_bank.store import Bank


@dataclass(frozen=True)
class MergeOptions:
    """How adapters become one."""

    how: str | None = None
    weights: str | None = None  # numbers with commas between them; None = 1/N each
    rank: int | None = None  # of the result; None = the largest
    density: float = 0.5


def merge_adapters(bank: Bank, cards: list[AdapterCard], output: Path, options: MergeOptions) -> dict[str, Any]:
    """Merge adapters of the bank.  Raises JobError for those of several models, or weights that do not match them."""
    if len({card.base_digest for card in cards}) > 1:
        raise JobError("they belong to different models: " + ", ".join(f"{c.name} to {c.base_name}" for c in cards))
    how = options.how or "linear"
    shares = _parse_weights(how, typing.get_args(Merge), options.weights, len(cards))
    adapters = [bank.adapter(card) for card in cards]
    base = adapters[0].base_name
    if (
        Path(base).is_absolute() and not Path(base).is_dir()
    ):  # a copy of the adapter does not know the way to the folder
        base = cards[0].base_name
    made = generate(adapters, shares, output, Recipe(cast(Merge, how), options.rank, options.density), base)
    parts = [{"name": c.name, "digest": c.digest, "share": share} for c, share in zip(cards, shares, strict=True)]
    return {
        "path": str(output.absolute()),
        "how": how,
        "made_from": parts,
        "rank": made.rank,
        "relative_error": made.relative_error,
        "generation_s": made.seconds,
        "peak_bytes": made.peak_bytes,
    }


def merge_sparse(folders: list[Path], output: Path, options: MergeOptions) -> dict[str, Any]:
    """Merge SHiRA adapters.  Raises Unusable, also for those of several models, and JobError."""
    from strategies.adapter_bank import sparse

    how, weights = options.how, options.weights
    if weights and not how:
        raise JobError("sparse adapters are averaged where they overlap; --weights needs --how")
    needs_factors = ("cat", "factorwise")
    rules = tuple(rule for rule in typing.get_args(Merge) if rule not in needs_factors)
    shares = _parse_weights(how or rules[0], rules, weights, len(folders))
    began = time.perf_counter()
    entries, shared = sparse.merge(folders, output, cast("Merge | None", how), shares, options.density)
    shown = shares if how else [1.0] * len(folders)
    names = [folder.absolute().parent.name if folder.name == "adapter" else folder.name for folder in folders]
    return {
        "path": str(output.absolute()),
        "how": how or "averaged where they overlap",
        "made_from": [{"name": name, "share": share} for name, share in zip(names, shown, strict=True)],
        "entries": entries,
        "shared": shared,
        "generation_s": time.perf_counter() - began,
    }


def _parse_weights(how: str, rules: tuple[str, ...], weights: str | None, count: int) -> list[float]:
    """The weights, one for each adapter.  Raises JobError for those, or a rule, that cannot be."""
    if how not in rules:
        raise JobError(f"--how {how}: one of {', '.join(rules)}")
    try:
        shares = [float(part) for part in weights.split(",")] if weights else [1 / count] * count
    except ValueError:
        raise JobError(f"--weights {weights}: write numbers separated by commas, e.g. 1,-0.5") from None
    if len(shares) != count:
        raise JobError(f"--weights gives {len(shares)} numbers for {count} adapters")
    if not all(map(math.isfinite, shares)) or not any(shares):
        raise JobError(f"--weights {weights}: write finite numbers, at least one of them not 0")
    return shares
