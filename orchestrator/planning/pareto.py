"""The Pareto front: what nothing else beats in every cost at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")


def pareto(items: Sequence[T], costs: Callable[[T], tuple[float, ...]]) -> list[T]:
    """The items that no other one beats, in their order; of equal costs all stay.  Less is better in each cost."""
    known = [costs(item) for item in items]
    different = set(known)

    def is_beaten(mine: tuple[float, ...]) -> bool:
        return any(theirs != mine and all(a <= b for a, b in zip(theirs, mine, strict=True)) for theirs in different)

    return [item for item, mine in zip(items, known, strict=True) if not is_beaten(mine)]
