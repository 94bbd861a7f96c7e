"""Rows as the model sees them, for a person."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from clusters.safe.reading import printable
from orchestrator.language.catalogue import tr
from orchestrator.lifecycle.inspect_data import PADDED_ROWS
from orchestrator.views.plan import data_sentence


def samples_view(seen: Mapping[str, Any], in_colour: bool = True) -> RenderableType:
    """What is trained is green, or between ⟦ and ⟧ where there are no colours."""
    parts: list[RenderableType] = []
    for sample in seen["samples"]:
        counts = f"({len(sample['input_ids'])} tokens, {sample['num_supervised']} supervised)"
        title = f"{sample['source']}  {tr(counts)}"
        text = Text(f"{printable(title)}\n", style="bold")
        if "rejected" in sample:
            text.append("chosen: ", style="bold")
            _append(text, sample["text"], in_colour)
            text.append("\nrejected: ", style="bold")
        _append(text, sample.get("rejected", sample["text"]), in_colour)
        text.append("\n")
        parts.append(text)
    legend = Text.assemble((tr("supervised"), "black on green"), "  ", (tr("read only"), "dim"))
    parts.append(legend if in_colour else Text(f"⟦{tr('supervised')}⟧  {tr('read only')}"))
    statistics, packing = seen["statistics"], seen["packing"]
    parts.append(Text(data_sentence({"train": statistics})))
    parts += [Text(printable(tr(line))) for line in [*_shares(seen["sources"]), *seen["check"]]]
    if packing:
        parts.append(Text(tr(_packing_sentence(packing))))
    parts += [Text(printable(tr(f"broken: {line}")), style="red") for line in seen["broken"]]
    return Group(*parts)


def _shares(sources: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each of several sources: what comes from it, as often as its weight has it."""
    tokens, samples = (max(1, sum(one[name] for one in sources)) for name in ("supervised_tokens", "samples"))
    return [
        f"source {one['path']}: {one['samples'] / samples:.1%} of the samples ({one['samples']:,}),"
        f" {one['supervised_tokens'] / tokens:.1%} of the supervised tokens ({one['supervised_tokens']:,})"
        for one in sources
        if len(sources) > 1
    ]


def _append(text: Text, pieces: Sequence[tuple[str, bool]], in_colour: bool) -> None:
    """A document's text, what is trained of it marked."""
    for piece, supervised in pieces:
        shown = "\n".join(printable(line) for line in piece.split("\n"))
        marked = f"⟦{shown}⟧" if supervised and not in_colour else shown
        text.append(marked, style=("black on green" if supervised else "dim") if in_colour else "")


def _packing_sentence(packing: Mapping[str, Any]) -> str:
    return (
        f"packing: {packing['packed_rows']} rows of up to {packing['max_length']} tokens, {packing['fill']:.0%} full;"
        f" padded to the longest of {PADDED_ROWS}, {packing['padding']:.0%} of the tokens would be padding"
    )
