"""Rows as the model will see them, and what packing makes of them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

from clusters.safe.reading import printable
from orchestrator.data.packing import best_fit_decreasing, padded_tokens
from orchestrator.data.readers.sources import rows_of, sources_of
from orchestrator.data.rows.formats import Example, read_example
from orchestrator.data.rows.guess import Guess, guess_columns
from orchestrator.data.rows.row import BadRow, Row
from orchestrator.data.samples import renderer_for
from orchestrator.data.survey import survey
from orchestrator.data.survey_cache import can_render
from orchestrator.errors import JobError
from orchestrator.job import model_files
from orchestrator.job.job_file import Job, parse_job
from orchestrator.planning import planner

PADDED_ROWS = 8
_LOOKED_AT = 50  # rows of a file that a mapping is guessed from


def inspect_data(job: Job, first: int, num_rows: int) -> dict[str, Any]:
    """Render every row; keeps the samples of `num_rows` rows of data.train from number `first` (1 = the first) on.

    Broken rows are counted with their reasons, whatever data.strict says: this verb is for finding them.
    """
    model_folder = model_files.locate(job.spec.model.model_name_or_path, job.folder, job.spec.model.model_revision)
    max_length, _ = planner.resolve_max_length(job.spec, model_files.read_config(model_folder))
    renderer = renderer_for(job, model_folder)
    shown: list[dict[str, Any]] = []

    def keep(number: int, samples: list[dict[str, Any]]) -> None:
        if first <= number < first + num_rows:
            shown.extend(_shown(renderer.tokenizer, sample) for sample in samples)

    found = survey(job, renderer, max_length, keep=keep)
    train = found.train
    return {
        "statistics": asdict(train.counts.statistics),
        "packing": _packing(train.lengths, max_length) if train.lengths else {},
        "samples": shown,
        "sources": [asdict(share) for share in train.shares],
        "check": found.lines(with_skipped=False),
        "broken": [line for key in found.keys.values() for line in key.counts.broken.lines(20)],
    }


@dataclass(frozen=True)
class FirstLook:
    """What a data file holds: the mapping of its columns, how it was read, and its first row as it will be trained."""

    guess: Guess
    readings: list[str]
    source: str
    pieces: list[tuple[str, bool]]  # the row's text and which parts of it are learnt; the turns where no model is here


def look_first(model: str, train: str, folder: Path) -> FirstLook:
    """Look at the first rows of what a new job would train on.  Raises JobError where it holds nothing that fits."""
    document: dict[str, Any] = {"model": {"model_name_or_path": model}, "data": {"train": train}}
    job = parse_job(yaml.safe_dump(document), folder)
    rows = _first_rows(job)
    guess = guess_columns(rows)
    if guess is None:
        names = f"its columns hold no text: {', '.join(map(repr, rows[0].values))}" if rows else "it holds no row"
        raise JobError(f"--train: {printable(train)}: {names}")
    stated = {"columns": guess.columns or None, "roles": guess.roles}
    document["data"] |= {key: value for key, value in stated.items() if value}
    job = parse_job(yaml.safe_dump(document), folder)
    (row, *_) = _first_rows(job)
    try:
        _, example = read_example(row, "auto")
    except BadRow as fault:
        raise JobError(f"{row.where}: {fault}") from None
    unused = [f"not used: {', '.join(example.ignored)}"] if example.ignored else []
    return FirstLook(guess, [*example.readings, *unused], row.where, _rendered(job, example))


def _first_rows(job: Job) -> list[Row]:
    (found,) = sources_of(job, job.spec.data.train, "data.train")
    return [row for row in islice(rows_of(job, *found, first=True), _LOOKED_AT) if not row.broken]


def _rendered(job: Job, example: Example) -> list[tuple[str, bool]]:
    folder = model_files.local_folder(job.spec.model.model_name_or_path, job.folder)
    if folder is None or not can_render():
        turns = [(f"{turn['role']}: {turn['content']}\n", turn["role"] == "assistant") for turn in example.messages]
        return turns or [(example.text or "", True)]
    renderer = renderer_for(job, folder)
    try:
        first, *_ = renderer.render(example)
    except BadRow as fault:
        raise JobError(f"data.train: {fault}") from None
    return _pieces(renderer.tokenizer, first.input_ids, first.supervised)


def _packing(lengths: list[int], max_length: int) -> dict[str, Any]:
    bins = best_fit_decreasing(lengths, max_length)
    everyone = range(len(lengths))
    in_order = [everyone[start : start + PADDED_ROWS] for start in range(0, len(lengths), PADDED_ROWS)]
    padded = padded_tokens(lengths, in_order, packing=False)
    return {
        "packed_rows": len(bins),
        "max_length": max_length,
        "fill": sum(lengths) / (len(bins) * max_length),
        "padding": 1 - sum(lengths) / padded,
    }


def _shown(tokenizer: Any, sample: dict[str, Any]) -> dict[str, Any]:
    """A sample with its text; the text of a pair is that of its chosen document, and the other one stands beside it."""
    ids, mask = sample["input_ids"], sample["supervised"]
    size = sample["document_lengths"][0] if "document_lengths" in sample else len(ids)
    shown = {**sample, "input_ids": list(ids), "text": _pieces(tokenizer, ids[:size], mask[:size])}
    return shown if size == len(ids) else {**shown, "rejected": _pieces(tokenizer, ids[size:], mask[size:])}


def _pieces(tokenizer: Any, input_ids: list[int], mask: list[bool]) -> list[tuple[str, bool]]:
    """Decoded runs of tokens that are supervised or not."""
    runs: list[tuple[list[int], bool]] = []
    for token, supervised in zip(input_ids, mask, strict=True):
        if not runs or runs[-1][1] != supervised:
            runs.append(([], supervised))
        runs[-1][0].append(token)
    return [(tokenizer.decode(ids), supervised) for ids, supervised in runs]
