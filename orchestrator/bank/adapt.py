"""`adapt`: an adapter for a job's data out of the bank, judged on labelled rows; nothing is trained."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy

from clusters.safe.writing import new_folder
from orchestrator.bank.adapter_trial import AdapterTrial
from orchestrator.bank.choosing import Chosen, LabelledRows, choose_shares, labelled_rows, start_of
from orchestrator.bank.generator import learned_start
from orchestrator.bank.library import Neighbours, bank_of, base_of, evidence_of, neighbours, train_digest
from orchestrator.bank.likeness import likeness
from orchestrator.data.prepare import cache_beside, prepare_data
from orchestrator.errors import JobError
from orchestrator.job import model_files
from orchestrator.job.job_file import Job
from orchestrator.job.sections.search import BankSection
from orchestrator.lifecycle.prepare import output_dir
from orchestrator.planning import planner
from strategies.adapter_bank.adapter import Adapter
from strategies.adapter_bank.evidence import Evidence
from strategies.adapter_bank.generation import Generated, Recipe, generate, write_corrections
from strategies.adapter_bank.shares.distances import DISTANCES
from strategies.adapter_bank.shares.selection import Selected
from strategies.adapter_bank.shares.tuning import TunedShares

_NOTHING_SHARED = 0.98  # of ln 2, the largest divergence of token densities
CARD = "adapt.json"


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
    start = learned_start(bank, base, near, query) if asked.rule == "learned" else start_of(asked, distances, near)
    rows, probe = _labelled(data, asked)
    like = likeness(distances, near, asked)
    say(like.sentence)
    trial, count = AdapterTrial(job, base.folder, near.adapters), len(near.cards)
    if len(rows.selection) or len(rows.tuning):
        say(f"moving shares of {count} adapters by {len(rows.selection) + len(rows.tuning)} labelled rows ...")
    chosen = choose_shares(trial, rows, near, start, distances, asked.rule)
    output = (output or output_dir(job) / f"{job.spec.name}-adapted-{time.strftime('%Y%m%d-%H%M%S')}").absolute()
    nearest, found = int(distances.argmin()), {}
    methods = job.spec.methods()
    recipe = Recipe(chosen.rule, methods[0].adapter_rank if len(methods) == 1 else None)
    wanted = {"generated": chosen.shares, "nearest": numpy.eye(count)[nearest], "average": numpy.full(count, 1 / count)}

    with new_folder(output) as folder:
        made_of = {
            name: generate(near.adapters, shares, folder / name, recipe, base.name)
            for name, shares in wanted.items()
            if name != "generated" or chosen.corrections is None
        }
        if chosen.corrections is not None:
            made_of["generated"] = _write_by_map(chosen, near, folder / "generated", recipe.rank, base.name)
        say(f"trying base, {', '.join(wanted)} on {len(probe)} labelled rows ...")
        verdict = _keep_best(trial, probe, folder, wanted)
        made, own = made_of[verdict["recommended"] or "generated"], train_digest(job)
        found.update(
            method="meta_generated",
            base={"name": base.name, "digest": base.digest},
            data={"digest": own, "evidence_digest": query.digest, "num_rows": query.num_rows},
            likeness=like.as_dict(),
            **_choice_of(asked, chosen, rows),
            **_made_of(near, made, distances),
            seconds=time.perf_counter() - began,
            already=[card.name for card in bank.of_data(base.digest, own)] if own else [],
            nearest=near.cards[nearest].name,
            **verdict,
        )
        (folder / CARD).write_text(json.dumps(found, indent=1, ensure_ascii=False), encoding="utf-8")

    return {**found, "path": str(output)}


def _choice_of(asked: BankSection, chosen: Chosen, rows: LabelledRows) -> dict[str, Any]:
    """How shares were chosen."""
    settings = {key: getattr(asked, key) for key in ("distance", "coefficients", "temperature")}
    return {
        "settings": settings | {"rule": "learned" if asked.rule == "learned" else chosen.rule},
        "selection": _selection_of(chosen.selected, rows.selection),
        "tuning": _tuning_of(chosen.tuned, rows.tuning),
    }


def _made_of(near: Neighbours, made: Generated, distances: numpy.ndarray) -> dict[str, Any]:
    """Of what an adapter was made, and what that took."""
    return {
        "made_from": _parts(near, made, distances),
        "base_share": max(0.0, 1 - sum(share for _, share in made.coefficients)),
        "rank": made.rank,
        "relative_error": made.relative_error,
        "generation_s": made.seconds,
        "peak_bytes": made.peak_bytes,
    }


def _parts(near: Neighbours, made: Generated, distances: numpy.ndarray) -> list[dict[str, Any]]:
    """The adapters that one was made from, the largest share first."""
    return [
        {"name": card.name, "digest": card.digest, "share": share, "distance": float(distances[place])}
        for place, share in sorted(made.coefficients, key=lambda pair: -abs(pair[1]))
        for card in [near.cards[place]]
    ]


def _write_by_map(chosen: Chosen, near: Neighbours, output: Path, rank: int | None, base_name: str) -> Generated:
    """The generated adapter where each map has shares of its own; shares said of it are their means."""
    assert chosen.corrections is not None
    counted = tuple((int(place), float(chosen.shares[place])) for place in numpy.flatnonzero(chosen.shares))
    largest = max(max(one.ranks) for one in near.adapters)
    return write_corrections(chosen.corrections, counted, output, rank or largest, base_name)


def _check_overlap(query: Evidence, near: Neighbours, job: Job) -> None:
    nearest = float(DISTANCES["js"](query, near.evidence).min())
    if nearest > _NOTHING_SHARED * numpy.log(2):
        raise JobError(
            f"{job.spec.data.train}: has almost no token in common with any data set of the bank (Jensen-Shannon"
            f" divergence {nearest:.3f} of at most 0.693): no adapter there can help; train with `submit`"
        )


def _selection_of(selected: Selected | None, labelled: Any) -> dict[str, Any] | None:
    if selected is None:
        return None
    return {"rows": len(labelled), "losses": list(selected.losses), "trials": selected.num_trials}


def _tuning_of(tuned: TunedShares | None, rows: Any) -> dict[str, Any] | None:
    if tuned is None:
        return None
    return {"rows": len(rows), "losses": list(tuned.losses), "steps": tuned.num_steps, "kept": tuned.gained}


def _labelled(data: Any, asked: BankSection) -> tuple[LabelledRows, Any]:
    """Rows to choose shares by, of those to train on, and others to judge the result by: held-out ones if there are."""
    rows = labelled_rows(data.train, asked)
    rest = data.train.select(range(len(rows.selection) + len(rows.tuning), len(data.train)))
    judge = next((rows for rows in (data.held_out, rest) if rows is not None and len(rows)), data.train)
    return rows, judge.select(range(min(asked.probe_rows, len(judge))))


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
