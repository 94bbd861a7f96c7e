"""Rows as the model sees them, for a person."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from clusters.safe.reading import printable
from orchestrator.lifecycle.inspect_data import PADDED_ROWS
from orchestrator.views.plan import data_sentence


def samples_view(seen: Mapping[str, Any], in_colour: bool = True) -> RenderableType:
    """What is trained is green, or between ⟦ and ⟧ where there are no colours."""
    parts: list[RenderableType] = []
    for sample in seen["samples"]:
        title = f"{sample['source']}  ({len(sample['input_ids'])} tokens, {sample['num_supervised']} supervised)"
        text = Text(f"{printable(title)}\n", style="bold")
        if "rejected" in sample:
            text.append("chosen: ", style="bold")
            _append(text, sample["text"], in_colour)
            text.append("\nrejected: ", style="bold")
        _append(text, sample.get("rejected", sample["text"]), in_colour)
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
