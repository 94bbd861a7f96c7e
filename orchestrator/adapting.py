"""`adapt`: an adapter for a job's data out of the bank, judged on labelled rows; nothing is trained."""

from __future__ import annotations

import json
import shutil
import time
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy

from orchestrator import models, planner
from orchestrator.banking import Base, Quiet, bank_of, base_of, data_digest, evidence_of
from orchestrator.data.prepare import prepare_data
from orchestrator.errors import JobError
from orchestrator.jobfile import Job, parse_job, text_with
from orchestrator.run import output_dir
from orchestrator.rundir import RunFolder
from orchestrator.spec import METHOD_SECTIONS, BankSection
from strategies.adapter_bank import coefficients as shares
from strategies.adapter_bank.adapter import Adapter
from strategies.adapter_bank.algebra import Merge
from strategies.adapter_bank.distances import DISTANCES
from strategies.adapter_bank.evidence import Evidence
from strategies.adapter_bank.generation import Generated, bank_gram, generate, into
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
    count, nearest, found = len(near.cards), int(distances.argmin()), {}
    wanted = {"generated": weights, "nearest": numpy.eye(count)[nearest], "average": numpy.full(count, 1 / count)}

    def write(folder: Path) -> None:
        folder.mkdir(parents=True)
        made, judged = _judged(job, base, near, wanted, _probe(data, asked.probe_rows), max_length, folder, say)
        own = data_digest(job)
        found.update(
            method="meta_generated",
            base={"name": base.name, "digest": base.digest},
            data={"digest": own, "evidence_digest": query.digest, "num_rows": query.num_rows},
            settings={key: getattr(asked, key) for key in ("distance", "coefficients", "temperature", "rule")},
            made_from=[
                {"name": c.name, "digest": c.digest, "share": share, "distance": float(distances[i])}
                for i, share in sorted(made.coefficients, key=lambda pair: -abs(pair[1]))
                for c in [near.cards[i]]
            ],
            rank=made.rank,
            relative_error=made.relative_error,
            generation_s=made.seconds,
            seconds=time.perf_counter() - began,
            peak_bytes=made.peak_bytes,
            already=[card.name for card in bank.of_data(base.digest, own)] if own else [],
            nearest=near.cards[nearest].name,
            **judged,
        )
        (folder / CARD).write_text(json.dumps(found, indent=1, ensure_ascii=False), encoding="utf-8")

    into(output, write)
    return {**found, "path": str(output)}


def neighbours(bank: Bank, base: Base) -> Neighbours:
    """Those of the bank for this base whose data is known.  Raises JobError where there are none."""
    cards = [card for card in bank.cards(base.digest) if card.evidence_digest]
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
    """Labelled rows to judge by: held-out ones, else the first to train on."""
    rows = data.held_out if data.held_out is not None and len(data.held_out) else data.train
    return rows.select(range(min(num_rows, len(rows))))


def _judged(
    job: Job,
    base: Base,
    near: Neighbours,
    wanted: dict[str, numpy.ndarray],
    probe: Any,
    max_length: int,
    folder: Path,
    say: Callable[[str], None],
) -> tuple[Generated, dict[str, Any]]:
    """What was generated, and its loss on the labelled rows beside those of the base and of the others wanted.

    The best of them becomes `folder`/adapter, none where that is the base.
    """
    from orchestrator.training.trial import Trial

    rank = getattr(job.spec.method, "lora_r", None)
    made = {
        name: generate(near.adapters, shares, folder / name, job.spec.bank.rule, rank, base.name)
        for name, shares in wanted.items()
    }
    say(f"trying base, {', '.join(wanted)} on {len(probe)} labelled rows ...")
    trial = Trial(job, base.folder, max_length, near.adapters)
    losses = {"base": trial.loss(probe)} | {name: trial.loss(probe, Adapter(folder / name)) for name in wanted}
    best = min(losses, key=lambda name: losses[name])
    for name in wanted:
        if name == best:
            (folder / name).rename(folder / "adapter")
        else:
            shutil.rmtree(folder / name)
    recommended = None if best == "base" else best
    return made["generated"], {"probe_rows": len(probe), "probe_loss": losses, "recommended": recommended}


def then_train(
    job: Job, found: dict[str, Any], against: str | None, runs: Path, say: Callable[[str], None]
) -> dict[str, Any]:
    """Train on from what was made, and count the steps until it is where a run that began afresh ended.

    `against` is that run, or `fresh` to train it first.  Raises JobError where nothing was recommended, or where the
    runs do not evaluate as they go.
    """
    from orchestrator.run import submit

    if found["recommended"] is None:
        raise JobError("nothing that the bank made is better than the base model: train afresh with `submit`")
    goes_on = {"method.type": _that_goes_on(job)}
    if against and job.spec.eval.eval_steps is None:
        raise JobError(
            "--against compares held-out losses on the way: set eval.eval_steps, e.g. to a tenth of the steps"
        )
    fresh = None
    if against == "fresh":
        say("training afresh, to compare ...")
        fresh = submit(_with(job, goes_on), Quiet())
    elif against:
        fresh = RunFolder.find(against, runs)
    say("training on from the bank's adapter ...")
    run = submit(_with(job, {**goes_on, "method.init_adapter": str(Path(found["path"]) / "adapter")}), Quiet())
    told: dict[str, Any] = {"run_id": run.run_id, "path": str(run.path), "eval_loss": _evaluations(run)}
    if fresh is None:
        return told
    ended = _evaluations(fresh)
    if not ended:
        raise JobError(f"{fresh.run_id} was not evaluated on its way: nothing to compare with")
    goal_step, goal = max(ended.items())
    reached = next((step for step, loss in sorted(told["eval_loss"].items()) if loss <= goal), None)
    return told | {
        "against": fresh.run_id,
        "against_eval_loss": ended,
        "reached_at": reached,
        "steps_saved": None if reached is None else goal_step - reached,
    }


def merged(
    bank: Bank, cards: list[Card], output: Path, how: str, weights: str | None, rank: int | None, density: float
) -> dict[str, Any]:
    """`bank merge`.  Raises JobError for adapters of several models, or weights that do not match them."""
    if len({card.base_digest for card in cards}) > 1:
        raise JobError("they belong to different models: " + ", ".join(f"{c.name} to {c.base_name}" for c in cards))
    if how not in typing.get_args(Merge):
        raise JobError(f"--how {how}: one of {', '.join(typing.get_args(Merge))}")
    try:
        shares = [float(part) for part in weights.split(",")] if weights else [1 / len(cards)] * len(cards)
    except ValueError:
        raise JobError(f"--weights {weights}: write numbers with commas between them, e.g. 1,-0.5") from None
    if len(shares) != len(cards):
        raise JobError(f"--weights gives {len(shares)} numbers for {len(cards)} adapters")
    made = generate([bank.adapter(card) for card in cards], shares, output, cast(Merge, how), rank, None, density)
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


def merged_sparse(folders: list[Path], output: Path) -> dict[str, Any]:
    """`bank merge` of SHiRA adapters.  Raises Unusable, ValueError for those of several models."""
    from strategies.adapter_bank import sparse

    began = time.perf_counter()
    entries, shared = sparse.merge(folders, output)
    return {
        "path": str(output.absolute()),
        "how": "averaged where they meet",
        "made_from": [{"name": folder.name, "share": 1.0} for folder in folders],
        "entries": entries,
        "shared": shared,
        "generation_s": time.perf_counter() - began,
    }


def told(found: dict[str, Any]) -> Iterator[str]:
    """What `adapt` and `bank merge` found, for a person."""
    largest = sorted(found["made_from"], key=lambda part: -abs(part["share"]))
    shown = ", ".join(f"{part['name']} {part['share']:.0%}" for part in largest[:6])
    rest = len(largest) - 6
    yield "made from " + shown + (f" and {rest} more" if rest > 0 else "")
    if "entries" in found:
        yield f"{found['entries']} entries, averages where they meet ({found['shared']}); {found['generation_s']:.1f} s"
    else:
        yield (
            f"rank {found['rank']}, {found['relative_error']:.1%} of the exact sum left out;"
            f" {found['generation_s']:.1f} s, {found['peak_bytes'] / 2**30:.2f} GiB at its peak"
        )
    if "probe_loss" in found:
        losses = sorted(found["probe_loss"].items(), key=lambda pair: pair[1])
        yield f"loss on {found['probe_rows']} labelled rows: " + ", ".join(
            f"{name} {loss:.3f}" for name, loss in losses
        )
        yield (
            f"recommended: {found['recommended']}"
            if found["recommended"]
            else "not recommended: none is better than the base model; train with `submit`"
        )
        if found["already"]:
            yield f"the bank already has an adapter of this very data: {', '.join(found['already'])}"
    if trained := found.get("then_train"):
        yield f"trained on: {trained['path']}"
        if "steps_saved" in trained:
            saved = trained["steps_saved"]
            yield (
                f"it did not get as low as {trained['against']}"
                if saved is None
                else f"where {trained['against']} ended after {trained['reached_at']} steps: {saved} saved"
            )
    if found.get("recommended", True):
        yield f"adapter: {found['path']}" + ("/adapter" if "probe_loss" in found else "")


def _evaluations(run: RunFolder) -> dict[int, float]:
    """Held-out loss by step, in nats a token."""
    return {event["step"]: event["eval_loss"] for event in run.events()[0] if event["event"] == "eval"}


def _with(job: Job, values: dict[str, Any]) -> Job:
    return parse_job(text_with(job, values), job.folder)


def _that_goes_on(job: Job) -> str:
    """The job's method if it can begin with an adapter, else the first that can."""
    able = [name for name, section in METHOD_SECTIONS.items() if "init_adapter" in section.model_fields]
    return job.spec.method.type if job.spec.method.type in able else able[0]
