"""Rows as the model will see them, and what packing makes of them."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from orchestrator.data.dataset import Statistics, samples_of
from orchestrator.data.packing import best_fit_decreasing, padded_tokens
from orchestrator.data.prepare import options_for, renderer_for
from orchestrator.data.row import BadRow
from orchestrator.data.sources import rows_of, sources_of
from orchestrator.jobfile import Job
from orchestrator.plan_view import data_sentence

_PADDED_ROWS = 8


def look(job: Job, model_folder: Path, max_length: int, first: int, num_rows: int) -> dict[str, Any]:
    """Render every row of data.train; keeps the samples of `num_rows` rows from number `first` (1 = the first) on.

    Broken rows are counted with their reasons, whatever data.strict says: this verb is for finding them.
    """
    renderer = renderer_for(job, model_folder)
    statistics, shown, lengths = Statistics(), [], []
    formats: dict[str, int] = {}
    broken: list[str] = []
    detected: dict[str, str] = {}
    for source, files in sources_of(job, job.spec.data.train, "data.train"):
        options = options_for(job, source, max_length)
        for row in rows_of(source, files):
            statistics.rows += 1
            try:
                row_format, samples = samples_of(row, renderer, options, statistics, detected)
            except BadRow as reason:
                statistics.rejected += 1
                broken.append(f"{row.where}: {reason}")
                continue
            formats[row_format] = formats.get(row_format, 0) + 1
            lengths += [len(sample["input_ids"]) for sample in samples]
            if first <= statistics.rows < first + num_rows:
                shown += [{**sample, "text": _pieces(renderer.tokenizer, sample)} for sample in samples]
    statistics.formats = formats
    return {
        "statistics": asdict(statistics),
        "packing": _packing(lengths, max_length) if lengths else {},
        "samples": shown,
        "broken": broken[:20],
    }


def view(seen: dict[str, Any]) -> RenderableType:
    """The same, coloured: green is trained, grey is only read."""
    parts: list[RenderableType] = []
    for sample in seen["samples"]:
        text = Text(
            f"{sample['source']}  ({len(sample['input_ids'])} tokens, {sample['num_supervised']} supervised)\n",
            style="bold",
        )
        for piece, supervised in sample["text"]:
            text.append(piece, style="black on green" if supervised else "dim")
        text.append("\n")
        parts.append(text)
    legend = Text.assemble(("supervised", "black on green"), "  ", ("read only", "dim"))
    statistics, packing = seen["statistics"], seen["packing"]
    parts += [legend, Text(data_sentence(statistics))]
    parts.append(
        Text(", ".join(f"{statistics[key]} {key}" for key in ("rows", "samples", "truncated", "dropped", "rejected")))
    )
    if packing:
        parts.append(Text(_packing_sentence(packing)))
    parts += [Text(f"broken: {line}", style="red") for line in seen["broken"]]
    return Group(*parts)


def _packing_sentence(packing: dict[str, Any]) -> str:
    return (
        f"packing: {packing['packed_rows']} rows of up to {packing['max_length']} tokens, {packing['fill']:.0%} full;"
        f" padded to the longest of {_PADDED_ROWS}, {packing['padding']:.0%} of the tokens would be padding"
    )


def _packing(lengths: list[int], max_length: int) -> dict[str, Any]:
    bins = best_fit_decreasing(lengths, max_length)
    everyone = range(len(lengths))
    in_order = [everyone[start : start + _PADDED_ROWS] for start in range(0, len(lengths), _PADDED_ROWS)]
    padded = padded_tokens(lengths, in_order, packing=False)
    return {
        "packed_rows": len(bins),
        "max_length": max_length,
        "fill": sum(lengths) / (len(bins) * max_length),
        "padding": 1 - sum(lengths) / padded,
    }


def _pieces(tokenizer: Any, sample: dict[str, Any]) -> list[tuple[str, bool]]:
    """Decoded runs of tokens that are supervised or not."""
    runs: list[tuple[list[int], bool]] = []
    for token, supervised in zip(sample["input_ids"], sample["supervised"], strict=True):
        if not runs or runs[-1][1] != supervised:
            runs.append(([], supervised))
        runs[-1][0].append(token)
    return [(tokenizer.decode(ids), supervised) for ids, supervised in runs]
