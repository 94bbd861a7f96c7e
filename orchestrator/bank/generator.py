"""A generator learned from a bank (`bank generator fit`), and shares by it (`bank.rule: learned`).

Fitting leaves each task out in turn: what is kept beside the bank is how to fit and how well it did.  The fit itself is
made anew from the bank's evidence and inner products, in a second, so that it is never older than the bank.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy

from clusters.safe.reading import BadInput, read_json, record
from clusters.safe.writing import write_whole
from orchestrator.bank.adapter_trial import AdapterTrial
from orchestrator.bank.choosing import Start, choose_shares, start_of
from orchestrator.bank.evaluate import Task, question_of, summary, tasks_of
from orchestrator.bank.left_out import measure_each, names_of, spread
from orchestrator.bank.library import Base, Neighbours, bank_of, base_of, neighbours
from orchestrator.errors import JobError
from orchestrator.job.job_file import Job
from strategies.adapter_bank.evidence import Evidence
from strategies.adapter_bank.generation import bank_grams, combine, combine_by_map
from strategies.adapter_bank.shares.decoder import fit_decoder
from strategies.adapter_bank.shares.distances import DISTANCES
from strategies.adapter_bank.shares.generator import FitSetting, Generator, errors_left_out
from strategies.adapter_bank.store import Bank

FILE = "generator.json"
LEAST = 20  # adapters that a generator is learned from
Variant = Literal["linear", "decoder"]
VARIANTS: tuple[Variant, ...] = ("linear", "decoder")
_BEFORE = ("nearest", "uniform", "shuffled")  # a generator must beat these without labelled rows
_FIT = "Run `orchestrator bank generator fit`"
Grams = Mapping[str, numpy.ndarray]
Shares = dict[str, numpy.ndarray]


@dataclass(frozen=True)
class Fitted:
    """How a bank's generator is made, and how it did on each task left out."""

    base_digest: str
    adapters: tuple[str, ...]  # digests of those it was judged on, sorted
    variant: Variant
    setting: FitSetting
    missed: float  # share of the adapters' squares that it does not reconstruct from the others
    losses: dict[str, float]  # mean held-out loss by way
    refusal: str | None  # why it is not offered; None = it beats `adapt`


def learned_start(bank: Bank, base: Base, near: Neighbours, query: Evidence) -> Start:
    """Shares of each map by the bank's generator.  Raises JobError where there is none, or none that is any use."""
    fitted = read_generator(bank)
    if fitted is None:
        raise JobError(f"bank.rule: learned needs a generator, and {bank.path} has none. {_FIT}")
    digests = tuple(sorted(card.digest for card in near.cards))
    if fitted.base_digest != base.digest or fitted.adapters != digests:
        raise JobError(
            f"bank.rule: the generator of {bank.path} was fitted to other adapters than it holds now. {_FIT}"
        )
    if fitted.refusal:
        raise JobError(f"bank.rule: learned is not offered for {bank.path}: {fitted.refusal}. Use rule: auto")
    everything = list(range(len(near.cards)))
    made = shares_of(fitted.variant, fitted.setting, near.evidence, bank_grams(near.adapters), everything, query)
    return Start.of_maps(made)


def shares_of(
    variant: Variant,
    setting: FitSetting,
    evidence: Sequence[Evidence],
    grams: Grams,
    keep: Sequence[int],
    query: Evidence,
) -> Shares:
    """Shares of each map (K,) over the adapters at the places `keep`, fitted to those alone."""
    if variant == "linear":
        return Generator.fit(evidence, grams, setting, keep).shares(query)
    inside = numpy.ix_(keep, keep)
    own = {name: gram[inside] for name, gram in grams.items()}
    return fit_decoder([evidence[place] for place in keep], own, setting.directions).shares(query)


def fit_generator(
    job: Job, runs: Path, rows: int, variant: Variant, say: Callable[[str], None], most: int | None = None
) -> dict[str, Any]:
    """Choose how to fit, leave each task (at most `most`) out in turn, and keep the verdict on `variant`.

    What was measured before it was stopped is not measured again.  Raises JobError for a bank of fewer than 20 adapters
    of the job's base whose runs are in `runs`.
    """
    base, bank = base_of(job.spec.model.model_name_or_path, job.folder, say), bank_of(job)
    near = neighbours(bank, base, say)
    tasks = tasks_of(job, runs, near, rows, say)
    if len(tasks) < LEAST:
        raise JobError(
            f"{len(tasks)} adapters of {bank.path} have a run with held-out data in {runs}; a generator is learned from"
            f" {LEAST} or more. Build more with `orchestrator bank build`"
        )
    grams = bank_grams(near.adapters)
    errors = errors_left_out(near.evidence, grams)
    setting = min(errors, key=lambda one: errors[one])
    say(f"{setting.kernel}, ridge {setting.ridge:g}, {setting.directions} directions: {errors[setting]:.0%} missed")
    trial = AdapterTrial(job, base.folder, near.adapters)
    fit = Fit(near, grams, setting, variant)
    names = names_of(near.cards, spread(list(tasks), most))
    question = question_of(job, near, rows) | {"variant": variant, "setting": asdict(setting)}
    losses = measure_each(
        bank.path / "generator.partial.json",
        question,
        names,
        lambda place: _left_out(trial, fit, job, place, tasks[place]),
        say,
    )
    found = summary(losses, say)
    means = {way: row["loss"] for way, row in found.items()}
    digests = tuple(sorted(card.digest for card in near.cards))
    refusal = refusal_of(means, variant)
    fitted = Fitted(base.digest, digests, variant, setting, errors[setting], means, refusal)
    write_whole(bank.path / FILE, json.dumps(asdict(fitted), indent=1))
    return {"path": str(bank.path / FILE), **asdict(fitted), "tasks": losses, "settings": found}


def refusal_of(means: Mapping[str, float], variant: str) -> str | None:
    """Why a generator is not offered, by mean held-out losses; None where it beats all that it must."""
    own = means[variant]
    for way in _BEFORE:
        if own >= means[way]:
            return f"without labelled rows its loss is {own:.3f}, that of {way} {means[way]:.3f}"
    if means["learned"] >= means["adapt"]:
        return f"with labelled rows its loss is {means['learned']:.3f}, that of adapt {means['adapt']:.3f}"
    return None


@dataclass(frozen=True)
class Fit:
    """What generators are fitted to and how."""

    near: Neighbours
    grams: Grams
    setting: FitSetting
    variant: Variant

    def shares(self, place: int, shuffled: bool = False) -> Shares:
        """For the data set at a place by a generator that has not seen it; shuffled: each with another's adapter."""
        keep = [other for other in range(len(self.near.cards)) if other != place]
        evidence = list(self.near.evidence)
        if shuffled:
            for at, other in enumerate(keep):
                evidence[other] = self.near.evidence[keep[at - 1]]
        return shares_of(self.variant, self.setting, evidence, self.grams, keep, self.near.evidence[place])


def _left_out(trial: AdapterTrial, fit: Fit, job: Job, place: int, task: Task) -> dict[str, float]:
    """Held-out loss of a task by every way to make its adapter of the others."""
    near, asked, data = fit.near, job.spec.bank, task.held_out
    others = near.at(other for other in range(len(near.cards)) if other != place)
    parts = [adapter.corrections() for adapter in others.adapters]
    distances = DISTANCES[asked.distance](near.evidence[place], others.evidence)
    by_distance, count = start_of(asked, distances, others), len(parts)
    losses = {
        "base": trial.loss(data),
        "own": trial.loss(data, near.adapters[place]),
        "nearest": trial.loss(data, parts[int(distances.argmin())]),
        "uniform": trial.loss(data, combine(others.adapters, numpy.full(count, 1 / count))),
        "distance": trial.loss(data, combine(others.adapters, by_distance.shares_N)),
    }
    ways = {fit.variant: fit.shares(place), "shuffled": fit.shares(place, shuffled=True)}
    losses |= {way: trial.loss(data, combine_by_map(parts, shares)) for way, shares in ways.items()}
    learned = Start.of_maps(ways[fit.variant])
    for way, start, rule in (("adapt", by_distance, asked.rule), ("learned", learned, "learned")):
        chosen = choose_shares(trial, task.rows, others, start, distances, rule)
        losses[way] = trial.loss(data, chosen.sum_of(others))
    return losses


def read_generator(bank: Bank) -> Fitted | None:
    """What `fit_generator` kept; None where nothing was.  Raises JobError for a damaged file."""
    file = bank.path / FILE
    if not file.exists():
        return None
    try:
        return record(Fitted, read_json(file), str(file))
    except BadInput as error:
        raise JobError(f"{error}. {_FIT} again") from None
