"""`adapt`: an adapter for a job's data out of the bank, judged on labelled rows; nothing is trained."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy

from orchestrator import models, planner
from orchestrator.banking import Base, bank_of, base_of, data_digest, evidence_of
from orchestrator.data.prepare import prepare_data
from orchestrator.errors import JobError
from orchestrator.jobfile import Job
from orchestrator.run import output_dir
from orchestrator.spec import BankSection
from strategies.adapter_bank import coefficients as shares
from strategies.adapter_bank.adapter import Adapter
from strategies.adapter_bank.distances import DISTANCES
from strategies.adapter_bank.evidence import Evidence
from strategies.adapter_bank.generation import bank_gram, generate, into
from strategies.adapter_bank.store import Bank, Card

_NOTHING_SHARED = 0.98  # of ln 2, the largest divergence of token densities
_MOST_FOR_SCORER = 256  # adapters that a neural scorer is trained on
CARD = "adapt.json"


@dataclass(frozen=True)
class Neighbours:
    """The bank's adapters for one base with what is known of their data."""

    cards: list[Card]
    evidence: list[Evidence]
    adapters: list[Adapter]


def adapt(job: Job, output: Path | None, say: Callable[[str], None]) -> dict[str, Any]:
    """Make, judge and write an adapter; what the verb prints.

    Raises JobError where the bank has nothing for this base or this data.
    """
    asked = job.spec.bank
    base = base_of(job.spec.model.model_name_or_path, job.folder, say)
    bank = bank_of(job)
    near = neighbours(bank, base)
    max_length, _ = planner.resolve_max_length(job.spec, models.read_config(base.folder))
    data = prepare_data(job, base.folder, max_length, output_dir(job) / ".cache" / "data", say)
    began = time.perf_counter()
    query = evidence_of(data.train, base)
    distances = DISTANCES[asked.distance](query, near.evidence)
    _must_share(query, near, job)
    weights = weights_of(asked, distances, near)
    output = (output or output_dir(job) / f"{job.spec.name}-adapted-{time.strftime('%Y%m%d-%H%M%S')}").absolute()
    say(f"weighing {len(near.cards)} adapters ...")
    same = bank.of_data(base.digest, data_digest(job) or "")
    judged = _judge(job, base, near, weights, _probe(data, asked.probe_rows), max_length, output, say)
    made = judged.pop("made")
    found = {
        "method": "meta_generated",
        "base": {"name": base.name, "digest": base.digest},
        "data": {"digest": data_digest(job), "evidence_digest": query.digest, "num_rows": query.num_rows},
        "settings": {key: getattr(asked, key) for key in ("distance", "coefficients", "temperature", "rule")},
        "made_from": [
            {
                "name": near.cards[i].name,
                "digest": near.cards[i].digest,
                "share": share,
                "distance": float(distances[i]),
            }
            for i, share in sorted(made.coefficients, key=lambda pair: -abs(pair[1]))
        ],
        "rank": made.rank,
        "relative_error": made.relative_error,
        "generation_s": made.seconds,
        "seconds": time.perf_counter() - began,
        "peak_bytes": made.peak_bytes,
        "already": [card.name for card in same],
        **judged,
    }
    (output / CARD).write_text(json.dumps(found, indent=1, ensure_ascii=False), encoding="utf-8")
    return {**found, "path": str(output)}


def neighbours(bank: Bank, base: Base, without: Sequence[str] = ()) -> Neighbours:
    """Those of the bank for this base whose data is known.  Raises JobError where there are none."""
    cards = [card for card in bank.cards(base.digest) if card.evidence_digest and card.name not in without]
    if not cards:
        others = bank.cards()
        bases = ", ".join(sorted({card.base_name for card in others}))
        have = f"its {len(others)} adapters are for {bases}" if others else "it is empty"
        raise JobError(
            f"{bank.path} has no adapter of {base.name} whose data is known: {have}. `bank add RUN` after a run, or"
            " bank.add: true in its job"
        )
    known = [(card, bank.evidence(card)) for card in cards]
    there = [(card, evidence) for card, evidence in known if evidence is not None]
    return Neighbours(
        [card for card, _ in there], [evidence for _, evidence in there], [bank.adapter(card) for card, _ in there]
    )


def weights_of(asked: BankSection, distances: numpy.ndarray, near: Neighbours) -> numpy.ndarray:
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


def _must_share(query: Evidence, near: Neighbours, job: Job) -> None:
    nearest = float(DISTANCES["js"](query, near.evidence).min())
    if nearest > _NOTHING_SHARED * numpy.log(2):
        raise JobError(
            f"{job.spec.data.train}: shares next to no token with any data set of the bank (Jensen-Shannon divergence"
            f" {nearest:.3f} of at most 0.693): nothing there could help; train with `submit`"
        )


def _probe(data: Any, num_rows: int) -> Any:
    """Labelled rows to judge by: held-out ones, else training rows, which no adapter of the bank was trained on."""
    rows = data.held_out if data.held_out is not None and len(data.held_out) else data.train
    return rows.select(range(min(num_rows, len(rows))))


def _judge(
    job: Job,
    base: Base,
    near: Neighbours,
    weights: numpy.ndarray,
    probe: Any,
    max_length: int,
    output: Path,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Generate, and let the labelled rows choose between base, nearest adapter, average and what was generated."""
    from orchestrator.training.trial import Trial

    rank = getattr(job.spec.method, "lora_r", None)
    count = len(near.cards)
    wanted = {
        "generated": weights,
        "nearest": numpy.eye(count)[int(weights.argmax())],
        "average": numpy.full(count, 1 / count),
    }
    made: dict[str, Any] = {}

    def write(folder: Path) -> None:
        folder.mkdir(parents=True)
        for name, own in wanted.items():
            made[name] = generate(near.adapters, own, folder / name, job.spec.bank.rule, rank, base.name)
        say(f"trying base, nearest, average and generated on {len(probe)} labelled rows ...")
        trial = Trial(job, base.folder, max_length)
        losses["base"] = trial.loss(probe)
        for name in wanted:
            losses[name] = trial.loss(probe, Adapter(folder / name))
        best = min(losses, key=lambda name: losses[name])
        if best != "base":
            (folder / best).rename(folder / "adapter")
        for name in wanted:
            if (folder / name).exists():
                _remove(folder / name)

    losses: dict[str, float] = {}
    into(output, write)
    best = min(losses, key=lambda name: losses[name])
    return {
        "made": made["generated"],
        "nearest": near.cards[int(weights.argmax())].name,
        "probe_rows": len(probe),
        "probe_loss": losses,
        "recommended": None if best == "base" else best,
    }


def _remove(folder: Path) -> None:
    import shutil

    shutil.rmtree(folder)


def own_card(found: dict[str, Any], name: str) -> Card:
    """A card for the bank of what `adapt` made."""
    return Card(
        name=name,
        base_name=found["base"]["name"],
        base_digest=found["base"]["digest"],
        data_digest=found["data"]["digest"],
        method="meta_generated",
        made_from=[{key: part[key] for key in ("name", "digest", "share")} for part in found["made_from"]],
        scores={"probe": found["probe_loss"]},
    )


def as_dict(card: Card) -> dict[str, Any]:
    return asdict(card)
