"""Rows as the model will see them, and what packing makes of them."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from orchestrator.data.packing import best_fit_decreasing, padded_tokens
from orchestrator.data.samples import renderer_for
from orchestrator.data.survey import survey
from orchestrator.job import model_files
from orchestrator.job.job_file import Job
from orchestrator.planning import planner

PADDED_ROWS = 8


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
        "check": found.lines(with_skipped=False),
        "broken": [line for key in found.keys.values() for line in key.counts.broken.lines(20)],
    }


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
    text = {"text": _pieces(tokenizer, ids[:size], mask[:size])}
    return {**sample, **text, **({"rejected": _pieces(tokenizer, ids[size:], mask[size:])} if size < len(ids) else {})}


def _pieces(tokenizer: Any, input_ids: list[int], mask: list[bool]) -> list[tuple[str, bool]]:
    """Decoded runs of tokens that are supervised or not."""
    runs: list[tuple[list[int], bool]] = []
    for token, supervised in zip(input_ids, mask, strict=True):
        if not runs or runs[-1][1] != supervised:
            runs.append(([], supervised))
        runs[-1][0].append(token)
    return [(tokenizer.decode(ids), supervised) for ids, supervised in runs]
