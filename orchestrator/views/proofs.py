"""What was proven of a job: two ways to the same answer, and how far apart they were."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.console import Group, RenderableType
from rich.text import Text

from clusters.safe.reading import printable
from orchestrator.language.catalogue import tr
from orchestrator.runs.proofs.proof import DIFFERS, NOT_RUN, PASSED, Proof
from orchestrator.views.screen import new_table

HEAD = ("check", "outcome", "difference", "tolerance")


def proofs_view(proofs: Sequence[Proof]) -> RenderableType:
    """The table, and below it what was compared, and why something was not."""
    table = new_table(*HEAD, fold=True)
    styles = {PASSED: "green", DIFFERS: "red"}
    for one in proofs:
        table.add_row(tr(one.title), Text(outcome(one, tr), style=styles.get(one.outcome, "")), *numbers(one))
    lines = [Text(f"{tr(one.title)}: {printable(about(one, tr))}", style="dim") for one in proofs]
    return Group(table, Text(), *lines)


def outcome(one: Proof, w: Callable[[str], str]) -> str:
    """In people's language."""
    return {PASSED: w("passed"), DIFFERS: w("differs"), NOT_RUN: w("not run")}.get(one.outcome, one.outcome)


def numbers(one: Proof) -> tuple[str, str]:
    """Difference and tolerance."""
    difference, tolerance = ("" if value is None else f"{value:.2g}" for value in (one.difference, one.tolerance))
    return difference, tolerance


def about(one: Proof, w: Callable[[str], str]) -> str:
    """What was compared, why the tolerance is what it is, and why it was not run or what a difference means."""
    return "; ".join(w(text) for text in (one.compared, one.why, one.reason) if text)
