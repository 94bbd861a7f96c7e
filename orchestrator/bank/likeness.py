"""Whether a bank holds anything like a data set, known before anything is tried."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy

from orchestrator.bank.library import Neighbours
from orchestrator.job.sections.search import BankSection
from strategies.adapter_bank.shares.distances import DISTANCES

_FAR = 0.2  # of the bank's own data sets at most so many are as far from their nearest: like none in the bank
_LEAST = 5  # data sets from which that can be said


@dataclass(frozen=True)
class Likeness:
    """How far the nearest data set of a bank is, beside how far those of the bank are from each other."""

    nearest: str
    distance: float
    as_far: float | None  # part of the bank's data sets that are at least as far from their own nearest; None = too few
    count: int

    @property
    def is_like_none(self) -> bool:
        return self.as_far is not None and self.as_far <= _FAR

    @property
    def sentence(self) -> str:
        near = f"the nearest data set of the bank is {self.nearest} (distance {self.distance:.3f})"
        if self.as_far is None:
            return near
        own = f"{self.as_far:.0%} of the bank's {self.count} are as far from their own nearest"
        if not self.is_like_none:
            return f"{near}; {own}"
        return (
            f"{near}; only {own}: this task is like none in the bank. Expect little of the sum alone;"
            " --then-train starts a training from it"
        )

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"is_like_none": self.is_like_none}


def likeness(distances: numpy.ndarray, near: Neighbours, asked: BankSection) -> Likeness:
    """Of a data set whose distances to the bank's are known."""
    place, count = int(distances.argmin()), len(near.cards)
    as_far = None
    if count >= _LEAST:
        as_far = float((nearest_distances(near, asked) >= distances[place]).mean())
    return Likeness(near.cards[place].name, float(distances[place]), as_far, count)


def nearest_distances(near: Neighbours, asked: BankSection) -> numpy.ndarray:
    """(N,) how far each data set of the bank is from the nearest other one."""
    measure = DISTANCES[asked.distance]
    between = numpy.stack([measure(one, near.evidence) for one in near.evidence])
    between[numpy.eye(len(between), dtype=bool)] = numpy.inf
    return between.min(1)
