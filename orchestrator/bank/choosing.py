"""How much of each adapter: by what is known of data sets, then moved and tuned by labelled rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy

from orchestrator.bank.adapter_trial import AdapterTrial
from orchestrator.bank.library import Neighbours
from orchestrator.data.dataset import Dataset
from orchestrator.errors import JobError
from orchestrator.job.sections.search import BankSection
from strategies.adapter_bank.algebra import Factors
from strategies.adapter_bank.generation import RULES, Rule, bank_gram, combine, combine_by_map, mix, truncated
from strategies.adapter_bank.shares import coefficients as shares
from strategies.adapter_bank.shares.distances import DISTANCES
from strategies.adapter_bank.shares.selection import Selected, forward_selection
from strategies.adapter_bank.shares.tuning import TunedShares

_MOST_FOR_SCORER = 256  # adapters that a neural scorer is trained on
_NEAREST = 10  # towards which shares may be moved
_TUNED = 32  # nearest adapters whose shares of each map are tuned
_RANKS_OF_START = 4  # times the largest adapter's rank: of the sum that tuning begins with, cut to one in the end


@dataclass(frozen=True)
class Start:
    """Shares before any labelled row was looked at."""

    shares_N: numpy.ndarray  # sum to 1; where maps have shares of their own, their mean
    by_map: Mapping[str, numpy.ndarray] | None = None  # (N,) of each map; None = the same for all

    @classmethod
    def of_maps(cls, by_map: Mapping[str, numpy.ndarray]) -> Start:
        return cls(numpy.mean(list(by_map.values()), axis=0), by_map)


@dataclass(frozen=True)
class LabelledRows:
    """Rows by which shares are chosen; where there are none, they are not."""

    selection: Dataset  # they move shares that all maps have in common
    tuning: Dataset  # they tune those of each map


@dataclass(frozen=True)
class Chosen:
    """How the bank's adapters are added up."""

    shares: numpy.ndarray  # what is missing to 1 is the base model's; means over maps where those differ
    rule: Rule
    corrections: Mapping[str, Factors] | None = None  # where maps differ: the sum; None = `shares` say it all
    selected: Selected | None = None  # None where there were no labelled rows
    tuned: TunedShares | None = None

    def sum_of(self, near: Neighbours) -> dict[str, Factors]:
        """The corrections, of the adapters' largest rank."""
        if self.corrections is None:
            return combine(near.adapters, self.shares, self.rule)
        return truncated(self.corrections, _largest_rank(near))[0]


def _largest_rank(near: Neighbours) -> int:
    return max(max(one.ranks) for one in near.adapters)


def labelled_rows(train: Dataset, asked: BankSection) -> LabelledRows:
    """The first rows of training data, as many as the job says."""
    first = min(asked.selection_rows, len(train))
    last = min(first + asked.tuning_rows, len(train))
    return LabelledRows(train.select(range(first)), train.select(range(first, last)))


def start_of(asked: BankSection, distances: numpy.ndarray, near: Neighbours) -> Start:
    """Shares by distance, as the job asks for them."""
    return Start(coefficients_of(asked, distances, near))


def coefficients_of(asked: BankSection, distances: numpy.ndarray, near: Neighbours) -> numpy.ndarray:
    """Coefficients as the job asks for them."""
    if asked.coefficients == "attentional":
        return shares.attentional(distances, asked.temperature)
    if asked.coefficients == "normalised":
        return shares.normalised(distances, asked.temperature)
    if len(near.cards) < 3:
        raise JobError("bank.coefficients: a neural scorer needs at least 3 adapters to learn from")
    step = -(-len(near.cards) // _MOST_FOR_SCORER)
    evidence = near.evidence[::step]
    between = numpy.stack([DISTANCES[asked.distance](one, evidence) for one in evidence])
    return shares.Scorer(between, bank_gram(near.adapters[::step]))(distances, asked.temperature)


def choose_shares(
    trial: AdapterTrial, rows: LabelledRows, near: Neighbours, start: Start, distances: numpy.ndarray, rule: str
) -> Chosen:
    """The shares, and the rule, of least loss on labelled rows; they begin with `start`."""
    chosen = _select(trial, rows.selection, near, start, distances, rule)
    if len(rows.tuning) < 2:
        return chosen
    return _tune(trial, rows.tuning, near, chosen, distances)


def _select(
    trial: AdapterTrial, rows: Dataset, near: Neighbours, start: Start, distances: numpy.ndarray, rule: str
) -> Chosen:
    if start.by_map is None:
        rules: tuple[Rule, ...] = RULES if rule == "auto" else tuple(one for one in RULES if one == rule)
        tried = rules if len(rows) else rules[:1]
        starts: dict[Rule, dict[str, Factors]] = {one: combine(near.adapters, start.shares_N, one) for one in tried}
    else:
        parts = [adapter.corrections() for adapter in near.adapters]
        starts = {RULES[0]: combine_by_map(parts, start.by_map)}
    first = next(iter(starts))
    if not len(rows):
        return Chosen(start.shares_N, first, starts[first] if start.by_map else None)
    best = min(starts, key=lambda one: trial.loss(rows, starts[one])) if len(starts) > 1 else first
    nearest = numpy.argsort(distances, kind="stable")[:_NEAREST]
    parts = [starts[best], *(one.corrections() for one in near.at(nearest).adapters)]
    found = forward_selection(len(nearest), lambda weights: trial.loss(rows, mix(parts, weights, best)))
    moved = found.weights[0] * start.shares_N
    moved[nearest] += found.weights[1:]
    corrections = mix(parts, found.weights, best) if start.by_map else None
    return Chosen(moved, best, corrections, found)


def _tune(trial: AdapterTrial, rows: Dataset, near: Neighbours, chosen: Chosen, distances: numpy.ndarray) -> Chosen:
    nearest = numpy.argsort(distances, kind="stable")[:_TUNED]
    begun, _ = truncated(
        chosen.corrections or combine(near.adapters, chosen.shares, chosen.rule), _RANKS_OF_START * _largest_rank(near)
    )
    parts = [begun, *(one.corrections() for one in near.at(nearest).adapters)]
    tuned = trial.tune(rows, parts, [1.0] + [0.0] * len(nearest))
    if not tuned.gained:
        return Chosen(chosen.shares, chosen.rule, chosen.corrections, chosen.selected, tuned)
    mean = numpy.mean(list(tuned.shares.values()), axis=0)
    moved = mean[0] * chosen.shares
    moved[nearest] += mean[1:]
    return Chosen(moved, chosen.rule, combine_by_map(parts, tuned.shares), chosen.selected, tuned)
