"""Renders the contents of a bank and what `adapt` and `bank merge` made."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from rich.table import Table
from rich.text import Text

from clusters.safe.reading import printable
from orchestrator.language.catalogue import tr
from strategies.adapter_bank.card import AdapterCard


def table(cards: Iterable[AdapterCard]) -> Table:
    """One adapter per row."""
    shown = Table(box=None)
    heads = tr("name"), tr("base"), tr("rank"), tr("rows"), tr("held-out loss"), tr("licence"), tr("digest")
    for column in heads:
        shown.add_column(column, overflow="fold")
    for card in cards:
        ranks = "-".join(str(rank) for rank in sorted({min(card.ranks), max(card.ranks)})) if card.ranks else ""
        rows = "" if card.num_rows is None else str(card.num_rows)
        cells = (card.name, card.base_name, ranks, rows, card.loss_change, card.licence or "", card.digest[:8])
        shown.add_row(*(Text(printable(cell)) for cell in cells))
    return shown


def describe(found: dict[str, Any]) -> Iterator[str]:
    """What `adapt` and `bank merge` made, one line at a time."""
    largest = sorted(found["made_from"], key=lambda part: -abs(part["share"]))
    shown = ", ".join(f"{part['name']} {part['share']:.0%}" for part in largest[:6])
    rest = len(largest) - 6
    left = f"; the base model keeps {share:.0%}" if (share := found.get("base_share", 0.0)) > 0.005 else ""
    yield "made from " + shown + (f" and {rest} more" if rest > 0 else "") + left
    if "entries" in found:
        every = found["entries"] + found["shared"]
        yield f"{found['entries']} entries of {every}, {found['how']}; {found['generation_s']:.1f} s"
    else:
        yield (
            f"rank {found['rank']}, {found['relative_error']:.1%} of the exact sum lost;"
            f" {found['generation_s']:.1f} s, {found['peak_bytes'] / 2**30:.2f} GiB at its peak"
        )
    yield from _by_labelled_rows(found)
    if "probe_loss" in found:
        yield from _verdict(found)
    if trained := found.get("then_train"):
        yield from _trained(trained)
    if found.get("recommended", True):
        yield f"adapter: {found['path']}" + ("/adapter" if "probe_loss" in found else "")


def _by_labelled_rows(found: dict[str, Any]) -> Iterator[str]:
    if selection := found.get("selection"):
        losses = selection["losses"]
        yield (
            f"shares moved {len(losses) - 1} times by {selection['rows']} labelled rows ({selection['trials']} trials):"
            f" loss {losses[0]:.3f} -> {losses[-1]:.3f}"
        )
    if tuning := found.get("tuning"):
        losses = tuning["losses"]
        kept = "" if tuning["kept"] else "; not kept"
        yield (
            f"shares of each map tuned in {tuning['steps']} steps on {tuning['rows']} labelled rows: loss of those held"
            f" back {losses[0]:.3f} -> {min(losses):.3f}{kept}"
        )


def _verdict(found: dict[str, Any]) -> Iterator[str]:
    losses = sorted(found["probe_loss"].items(), key=lambda pair: pair[1])
    yield f"loss on {found['probe_rows']} labelled rows: " + ", ".join(f"{name} {loss:.3f}" for name, loss in losses)
    yield (
        f"recommended: {found['recommended']}"
        if found["recommended"]
        else "not recommended: none is better than the base model; train with `submit`"
    )
    if found["already"]:
        yield f"the bank already has an adapter for exactly this data: {', '.join(found['already'])}"


def _trained(trained: dict[str, Any]) -> Iterator[str]:
    yield f"trained from it: {trained['path']}"
    if "steps_saved" in trained:
        saved = trained["steps_saved"]
        yield (
            f"it did not reach the final loss of {trained['against']}"
            if saved is None
            else f"where {trained['against']} ended after {trained['reached_at']} steps: {saved} saved"
        )
