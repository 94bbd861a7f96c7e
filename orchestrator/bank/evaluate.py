"""How good a bank is at tasks it has not seen: leave each adapter out in turn and make it of the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy

from orchestrator.bank.adapter_trial import AdapterTrial
from orchestrator.bank.choosing import LabelledRows, choose_shares, labelled_rows, start_of
from orchestrator.bank.left_out import Losses, measure_each, names_of, spread
from orchestrator.bank.library import Neighbours, bank_of, base_of, neighbours
from orchestrator.data.dataset import Dataset
from orchestrator.data.prepare import datasets
from orchestrator.errors import JobError
from orchestrator.job.job_file import Job
from orchestrator.runs.run_folder import RunFolder
from strategies.adapter_bank.generation import RULES, bank_gram, combine
from strategies.adapter_bank.shares import coefficients
from strategies.adapter_bank.shares.distances import DISTANCES

FIRST = ("base", "own", "nearest", "uniform", "adapt")
PUBLISHED_TEMPERATURE = 1.0  # of arXiv 2507.01806: none


def leave_one_out(
    job: Job, runs: Path, rows: int, say: Callable[[str], None], most: int | None = None
) -> dict[str, Any]:
    """Held-out loss of every task under every setting, under the baselines, and of what `adapt` makes for this job.

    Tasks are adapters of the job's bank and base whose run, with its held-out data, is in `runs`; at most `most` of
    them.  What was measured before it was stopped is not measured again.
    """
    base, bank = base_of(job.spec.model.model_name_or_path, job.folder, say), bank_of(job)
    near = neighbours(bank, base, say)
    places = tasks_of(job, runs, near, rows, say)
    if len(places) < 3:
        raise JobError(f"{len(places)} of the bank's adapters have a run with held-out data in {runs}; 3 are needed")
    weights = dict(_settings(near))
    trial = AdapterTrial(job, base.folder, near.adapters)

    def measure(place: int) -> Losses:
        task, data = places[place], places[place].held_out
        others = near.at(other for other in range(len(near.cards)) if other != place)
        distances = DISTANCES[job.spec.bank.distance](near.evidence[place], others.evidence)
        start, tried = start_of(job.spec.bank, distances, others), dict[tuple[Any, bytes], float]()
        chosen = choose_shares(trial, task.rows, others, start, distances, job.spec.bank.rule)
        losses = {
            "base": trial.loss(data),
            "own": trial.loss(data, near.adapters[place]),
            "adapt": trial.loss(data, chosen.sum_of(others)),
        }
        for name, (rule, rows_of) in weights.items():
            own = rows_of[place]
            known = (rule, own.round(4).tobytes())  # settings that agree on all shares are one trial
            if known not in tried:
                tried[known] = trial.loss(data, combine(near.adapters, own, rule))
            losses[name] = tried[known]
        return losses

    names = names_of(near.cards, spread(list(places), most))
    question = question_of(job, near, rows)
    tasks = measure_each(bank.path / "evaluate.partial.json", question, names, measure, say, FIRST)
    return {"rows": rows, "tasks": tasks, "settings": summary(tasks, say)}


def question_of(job: Job, near: Neighbours, rows: int) -> dict[str, Any]:
    """What decides the losses of a bank's tasks."""
    asked = job.spec.bank.model_dump(exclude={"path", "add", "licence", "probe_rows"})
    return {"adapters": [card.digest for card in near.cards], "rows": rows, "bank": asked}


@dataclass(frozen=True)
class Task:
    """Rows of a data set of the bank: those that shares are chosen by, of its training data, and held-out ones."""

    rows: LabelledRows
    held_out: Dataset


def tasks_of(job: Job, runs: Path, near: Neighbours, rows: int, say: Callable[[str], None]) -> dict[int, Task]:
    """The adapters, by place, whose run with held-out data is in `runs`."""
    found = {}
    for place, card in enumerate(near.cards):
        train, rest = _data_of(RunFolder(runs / (card.run_id or "-")), say)
        if train is not None and rest is not None:
            labelled = labelled_rows(train, job.spec.bank)
            found[place] = Task(labelled, rest.select(range(min(rows, len(rest)))))
    return found


def _data_of(run: RunFolder, say: Callable[[str], None]) -> tuple[Dataset | None, Dataset | None]:
    """Training and held-out samples of a run; none of one without held-out files, or whose files are damaged: said."""
    try:
        files = run.data() if run.has_started else None
        return datasets(files) if files and files.eval else (None, None)
    except JobError as error:
        say(f"not a task: {error}")
        return None, None


def table(found: dict[str, Any]) -> Any:
    """Settings, best first."""
    from rich.table import Table

    legend = (
        "gap: of the mean loss, closed. gain: mean of each task's share of its own adapter's gain. > base, > nearest:"
        " on how many tasks it is better"
    )
    shown = Table(box=None, caption=legend, caption_justify="left")
    shown.add_column("setting", overflow="fold")
    for column in ("loss", "gap", "gain", "median", "> base", "> nearest"):
        shown.add_column(column, justify="right", no_wrap=True)
    ratios = ("gap_closed", "gain", "median_gain", "better_than_base", "better_than_nearest")
    for name, row in sorted(found["settings"].items(), key=lambda pair: -pair[1]["gain"]):
        shown.add_row(name, f"{row['loss']:.3f}", *(f"{row[key]:.0%}" for key in ratios))
    return shown


def gains(found: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Setting -> task -> share of what the task's own adapter gains; the best setting first."""
    order = sorted(found["settings"], key=lambda name: -found["settings"][name]["gain"])
    gained = {task: row for task, row in found["tasks"].items() if row["own"] < row["base"]}
    return {name: {task: _gain(row, name) for task, row in gained.items()} for name in order if name != "own"}


def _settings(near: Neighbours) -> Iterator[tuple[str, tuple[Any, numpy.ndarray]]]:
    """Name -> rule, and for each adapter its shares of the others."""
    count = len(near.cards)
    itself = numpy.eye(count, dtype=bool)
    gram = bank_gram(near.adapters)
    yield "uniform", ("delta", numpy.where(itself, 0, 1 / (count - 1)))
    for distance, measure in DISTANCES.items():
        between = numpy.stack([measure(one, near.evidence) for one in near.evidence])
        between = numpy.where(itself, numpy.inf, between)
        if distance == next(iter(DISTANCES)):
            yield "nearest", ("delta", numpy.eye(count)[between.argmin(1)])
        ways = {
            "attentional": coefficients.attentional(between),
            "attentional, t = 1": coefficients.attentional(between, PUBLISHED_TEMPERATURE),
            "normalised": coefficients.normalised(between),
            "neural": _neural(between, gram),
        }
        for way, rows in ways.items():
            for rule in RULES:
                yield f"{distance} | {way} | {rule}", (rule, rows)


def _neural(between: numpy.ndarray, gram: numpy.ndarray) -> numpy.ndarray:
    """Each row by a scorer that was trained without that adapter."""
    rows = []
    for place in range(len(between)):
        others = numpy.delete(numpy.arange(len(between)), place)
        rows.append(
            coefficients.Scorer(between[numpy.ix_(others, others)], gram[numpy.ix_(others, others)])(between[place])
        )
    return numpy.stack(rows)


def summary(tasks: Mapping[str, Losses], say: Callable[[str], None]) -> dict[str, dict[str, float]]:
    """`gap_closed` is of the mean losses, as published systems give it; `gain` the mean of every task's own share.

    Tasks whose own adapter gains nothing have no share of it: they are named and count in means of losses alone.
    """
    if useless := [task for task, row in tasks.items() if row["own"] >= row["base"]]:
        say(f"without a share of their own adapter's gain, which is none: {', '.join(useless)}")
    counted = [row for task, row in tasks.items() if task not in useless]
    if not counted:
        raise JobError("no task's own adapter is better than the base model: train the bank's adapters for longer")
    found = {}
    means = {name: float(numpy.mean([row[name] for row in tasks.values()])) for name in next(iter(tasks.values()))}
    for name, loss in means.items():
        gains = [_gain(row, name) for row in counted]
        found[name] = {
            "loss": loss,
            "gap_closed": _gain(means, name),
            "gain": float(numpy.mean(gains)),
            "median_gain": float(numpy.median(gains)),
            "better_than_base": float(numpy.mean([row[name] < row["base"] for row in tasks.values()])),
            "better_than_nearest": float(numpy.mean([row[name] < row["nearest"] for row in tasks.values()])),
        }
    return found


def _gain(row: dict[str, float], name: str) -> float:
    return (row["base"] - row[name]) / (row["base"] - row["own"])
