"""Rows as the model will see them, and what packing makes of them."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from clusters.safe.reading import printable
from orchestrator.data.packing import best_fit_decreasing, padded_tokens
from orchestrator.data.samples import renderer_for
from orchestrator.data.survey import survey
from orchestrator.job.job_file import Job
from orchestrator.views.plan import data_sentence

_PADDED_ROWS = 8


def look(job: Job, model_folder: Path, max_length: int, first: int, num_rows: int) -> dict[str, Any]:
    """Render every row; keeps the samples of `num_rows` rows of data.train from number `first` (1 = the first) on.

    Broken rows are counted with their reasons, whatever data.strict says: this verb is for finding them.
    """
    renderer = renderer_for(job, model_folder)
    shown: list[dict[str, Any]] = []

    def keep(number: int, samples: list[dict[str, Any]]) -> None:
        if first <= number < first + num_rows:
            shown.extend({**sample, "text": _pieces(renderer.tokenizer, sample)} for sample in samples)

    found = survey(job, renderer, max_length, keep=keep)
    train = found.train
    return {
        "statistics": asdict(train.counts.statistics),
        "packing": _packing(train.lengths, max_length) if train.lengths else {},
        "samples": shown,
        "check": found.lines(with_skipped=False),
        "broken": [line for key in found.keys.values() for line in key.counts.broken.lines(20)],
    }


def view(seen: dict[str, Any], in_colour: bool = True) -> RenderableType:
    """The same for people: what is trained is green, or between ⟦ and ⟧ where there are no colours."""
    parts: list[RenderableType] = []
    for sample in seen["samples"]:
        title = f"{sample['source']}  ({len(sample['input_ids'])} tokens, {sample['num_supervised']} supervised)"
        text = Text(f"{printable(title)}\n", style="bold")
        for piece, supervised in sample["text"]:
            shown = "\n".join(printable(line) for line in piece.split("\n"))
            marked = f"⟦{shown}⟧" if supervised and not in_colour else shown
            text.append(marked, style=("black on green" if supervised else "dim") if in_colour else "")
        text.append("\n")
        parts.append(text)
    legend = Text.assemble(("supervised", "black on green"), "  ", ("read only", "dim"))
    parts.append(legend if in_colour else Text("⟦supervised⟧  read only"))
    statistics, packing = seen["statistics"], seen["packing"]
    parts.append(Text(data_sentence({"train": statistics})))
    parts += [Text(printable(line)) for line in seen["check"]]
    if packing:
        parts.append(Text(_packing_sentence(packing)))
    parts += [Text(f"broken: {printable(line)}", style="red") for line in seen["broken"]]
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
