"""`adapt`: an adapter for a job's data out of the bank, judged on labelled rows; nothing is trained."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy

from clusters.safe.writing import new_folder
from orchestrator.bank.adapter_trial import AdapterTrial
from orchestrator.bank.library import Base, bank_of, base_of, evidence_of, train_digest
from orchestrator.data.prepare import cache_beside, prepare_data
from orchestrator.errors import JobError
from orchestrator.job import model_files
from orchestrator.job.job_file import Job
from orchestrator.job.sections.search import BankSection
from orchestrator.lifecycle.prepare import output_dir
from orchestrator.planning import planner
from strategies.adapter_bank import coefficients as shares
from strategies.adapter_bank.adapter import Adapter, Unusable, fits_base
from strategies.adapter_bank.card import AdapterCard, BankError
from strategies.adapter_bank.distances import DISTANCES
from strategies.adapter_bank.evidence import Evidence
from strategies.adapter_bank.generation import RULES, Generated, Recipe, Rule, bank_gram, combine, generate, mix
from strategies.adapter_bank.selection import Selected, forward_selection
from strategies.adapter_bank.store import Bank

_NOTHING_SHARED = 0.98  # of ln 2, the largest divergence of token densities
_MOST_FOR_SCORER = 256  # adapters that a neural scorer is trained on
_NEAREST = 10  # towards which shares may be moved
CARD = "adapt.json"


@dataclass(frozen=True)
class Neighbours:
    """The bank's adapters for one base with what is known of their data."""

    cards: list[AdapterCard]
    evidence: list[Evidence]
    adapters: list[Adapter]

    def at(self, places: Iterable[int]) -> Neighbours:
        """Some of them."""
        places = list(places)
        return Neighbours(
            [self.cards[place] for place in places],
            [self.evidence[place] for place in places],
            [self.adapters[place] for place in places],
        )


@dataclass(frozen=True)
class Chosen:
    """How the bank's adapters are added up."""

    shares: numpy.ndarray  # what is missing to 1 is the base model's
    rule: Rule
    selected: Selected | None = None  # by labelled rows; None where there were none


def _refuse_documents(job: Job) -> None:
    if job.spec.build_objective().is_by_document:
        raise JobError(
            f"adapt compares adapters by the loss of tokens, which objective.type {job.spec.objective.type} does not"
            " train; remove objective"
        )


def adapt(job: Job, output: Path | None, say: Callable[[str], None]) -> dict[str, Any]:
    """Make, judge and write an adapter; what the verb prints.

    Raises JobError where the bank has nothing for this base or this data.
    """
    asked = job.spec.bank
    _refuse_documents(job)
    base = base_of(job.spec.model.model_name_or_path, job.folder, say)
    bank = bank_of(job)
    near = neighbours(bank, base, say)
    max_length, _ = planner.resolve_max_length(job.spec, model_files.read_config(base.folder))
    data = prepare_data(job, base.folder, max_length, cache_beside(output_dir(job)), say)
    began = time.perf_counter()
    query = evidence_of(data.train, base)
    distances = DISTANCES[asked.distance](query, near.evidence)
    _check_overlap(query, near, job)
    weights = coefficients_of(asked, distances, near)
    labelled, probe = _labelled(data, asked)
    trial, count = AdapterTrial(job, base.folder, max_length, near.adapters), len(near.cards)
    if len(labelled):
        say(f"moving shares of {count} adapters by {len(labelled)} labelled rows ...")
    chosen = choose_shares(trial, labelled, near, weights, distances, asked)
    output = (output or output_dir(job) / f"{job.spec.name}-adapted-{time.strftime('%Y%m%d-%H%M%S')}").absolute()
    nearest, found = int(distances.argmin()), {}
    methods = job.spec.methods()
    recipe = Recipe(chosen.rule, methods[0].adapter_rank if len(methods) == 1 else None)
    wanted = {"generated": chosen.shares, "nearest": numpy.eye(count)[nearest], "average": numpy.full(count, 1 / count)}

    with new_folder(output) as folder:
        made_of = {
            name: generate(near.adapters, shares, folder / name, recipe, base.name) for name, shares in wanted.items()
        }
        say(f"trying base, {', '.join(wanted)} on {len(probe)} labelled rows ...")
        verdict = _keep_best(trial, probe, folder, wanted)
        made, own = made_of[verdict["recommended"] or "generated"], train_digest(job)
        found.update(
            method="meta_generated",
            base={"name": base.name, "digest": base.digest},
            data={"digest": own, "evidence_digest": query.digest, "num_rows": query.num_rows},
            settings={
                **{key: getattr(asked, key) for key in ("distance", "coefficients", "temperature")},
                "rule": chosen.rule,
            },
            made_from=_parts(near, made, distances),
            base_share=max(0.0, 1 - sum(share for _, share in made.coefficients)),
            selection=_selection_of(chosen.selected, labelled),
            rank=made.rank,
            relative_error=made.relative_error,
            generation_s=made.seconds,
            seconds=time.perf_counter() - began,
            peak_bytes=made.peak_bytes,
            already=[card.name for card in bank.of_data(base.digest, own)] if own else [],
            nearest=near.cards[nearest].name,
            **verdict,
        )
        (folder / CARD).write_text(json.dumps(found, indent=1, ensure_ascii=False), encoding="utf-8")

    return {**found, "path": str(output)}


def _parts(near: Neighbours, made: Generated, distances: numpy.ndarray) -> list[dict[str, Any]]:
    """The adapters that one was made from, the largest share first."""
    return [
        {"name": card.name, "digest": card.digest, "share": share, "distance": float(distances[place])}
        for place, share in sorted(made.coefficients, key=lambda pair: -abs(pair[1]))
        for card in [near.cards[place]]
    ]


def neighbours(bank: Bank, base: Base, say: Callable[[str], None] = lambda text: None) -> Neighbours:
    """Those of the bank for this base whose data is known, their bytes checked; what is damaged is said and not used.

    Raises JobError where there are none.
    """
    contents, near, damaged = bank.contents(), [], [str(one) for one in bank.contents().damaged]
    for card in contents.cards:
        if card.base_digest == base.digest and card.evidence_digest:
            try:
                near.append((card, bank.evidence(card), _checked(bank.adapter(card), base)))
            except (BankError, Unusable) as error:
                damaged.append(f"{card.name}: {error}")
    near = [one for one in near if one[1].is_like(near[0][1])]
    if damaged:
        say("\n".join([*damaged, f"{len(damaged)} damaged are not used; `orchestrator bank verify --repair`"]))
    if not near:
        bases = ", ".join(sorted({card.base_name for card in contents.cards}))
        have = f"its {len(contents.cards)} adapters are for {bases}" if bases else "it is empty"
        other = "Give a job of that model (`bank evaluate --job FILE`), or add: " if bases else ""
        raise JobError(
            f"{bank.path} has no adapter of {base.name} whose data is known: {have}. {other}`bank add RUN` after a run,"
            " or bank.add: true in its job"
        )
    return Neighbours([card for card, _, _ in near], [one for _, one, _ in near], [one for _, _, one in near])


def _checked(adapter: Adapter, base: Base) -> Adapter:
    fits_base(adapter, base.folder)
    return adapter


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


def _check_overlap(query: Evidence, near: Neighbours, job: Job) -> None:
    nearest = float(DISTANCES["js"](query, near.evidence).min())
    if nearest > _NOTHING_SHARED * numpy.log(2):
        raise JobError(
            f"{job.spec.data.train}: has almost no token in common with any data set of the bank (Jensen-Shannon"
            f" divergence {nearest:.3f} of at most 0.693): no adapter there can help; train with `submit`"
        )


def choose_shares(
    trial: AdapterTrial,
    labelled: Any,
    near: Neighbours,
    shares: numpy.ndarray,
    distances: numpy.ndarray,
    asked: BankSection,
) -> Chosen:
    """The rule and the shares of least loss on labelled rows, starting with those that follow from the distances."""
    rules = RULES if asked.rule == "auto" else (asked.rule,)
    if not len(labelled):
        return Chosen(shares, rules[0])
    starts = {rule: combine(near.adapters, shares, rule) for rule in rules}
    rule = min(rules, key=lambda rule: trial.loss(labelled, starts[rule]))
    nearest = numpy.argsort(distances, kind="stable")[:_NEAREST]
    parts = [starts[rule], *(one.corrections() for one in near.at(nearest).adapters)]
    found = forward_selection(len(nearest), lambda weights: trial.loss(labelled, mix(parts, weights, rule)))
    moved = found.weights[0] * shares
    moved[nearest] += found.weights[1:]
    return Chosen(moved, rule, found)


def _selection_of(selected: Selected | None, labelled: Any) -> dict[str, Any] | None:
    if selected is None:
        return None
    return {"rows": len(labelled), "losses": list(selected.losses), "trials": selected.num_trials}


def _labelled(data: Any, asked: BankSection) -> tuple[Any, Any]:
    """Rows to choose shares by, of those to train on, and others to judge the result by: held-out ones if there are."""
    count = min(asked.selection_rows, len(data.train))
    choose, rest = data.train.select(range(count)), data.train.select(range(count, len(data.train)))
    judge = next((rows for rows in (data.held_out, rest) if rows is not None and len(rows)), data.train)
    return choose, judge.select(range(min(asked.probe_rows, len(judge))))


def _keep_best(trial: AdapterTrial, probe: Any, folder: Path, names: Iterable[str]) -> dict[str, Any]:
    """The loss of `folder`/name for each name on labelled rows, beside the base model's.

    The best becomes `folder`/adapter and the others go; where the base is the best, none is kept.
    """
    losses = {"base": trial.loss(probe)} | {name: trial.loss(probe, Adapter(folder / name)) for name in names}
    best = min(losses, key=lambda name: losses[name])
    for name in names:
        if name == best:
            (folder / name).rename(folder / "adapter")
        else:
            shutil.rmtree(folder / name)
    return {"probe_rows": len(probe), "probe_loss": losses, "recommended": None if best == "base" else best}
