"""Scores of public tasks: base and tuned model side by side, and how sure the difference is."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.console import Group, RenderableType
from rich.text import Text

from orchestrator.language.catalogue import tr
from orchestrator.runs.tasks.task_score import TaskScore
from orchestrator.views.screen import new_table

HEAD = ("task", "metric", "rows", "before", "after", "difference (95 %)")


def tasks_view(scores: Sequence[TaskScore]) -> RenderableType:
    """A table, and below it how the differences were judged."""
    table = new_table(*HEAD, fold=True)
    for one in scores:
        table.add_row(*cells(one, tr))
    return Group(table, Text(tr(how_judged(scores)), style="dim"))


def cells(one: TaskScore, w: Callable[[str], str]) -> tuple[str, ...]:
    """A metric's row."""
    before, after = _with_error(one.before, one.before_stderr), _with_error(one.after, one.after_stderr)
    difference = "" if one.difference is None else f"{one.difference:+.4f}"
    if one.low is not None and one.high is not None:
        difference += f" ({one.low:+.4f} {w('to')} {one.high:+.4f})"
        difference += f", {w('which may be chance')}" if one.may_be_chance else ""
    return one.task, one.metric, str(one.rows), before, after, difference


def how_judged(scores: Sequence[TaskScore]) -> str:
    """In one sentence."""
    if all(one.is_paired for one in scores):
        return "\u00b1 one standard error; intervals of the differences row by row, on the same rows"
    return "\u00b1 one standard error; intervals row by row where rows have a value of their own, else of both errors"


def _with_error(value: float | None, stderr: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.4f}" if stderr is None else f"{value:.4f} \u00b1 {stderr:.4f}"
