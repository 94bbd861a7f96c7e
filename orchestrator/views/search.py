"""Renders a search: what was pruned, what was tried, what to use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from clusters.units import format_bytes, format_s
from orchestrator.job.space import Space, phrase
from orchestrator.language.catalogue import tr
from orchestrator.runs.search_folder import SearchFolder, Trial
from orchestrator.search.advice import Forecast
from orchestrator.search.recommend import Outcome, front


def advised_text(space: Space, advised: Forecast) -> str:
    """How many combinations there are, and what the planner decided about them before any trial."""
    first = advised.worth[0]
    lines = [
        f"{len(space)} combinations: {sum(advised.impossible.values())} cannot run, {len(advised.dominated)} cannot win"
        f" (another trains the same weights clearly faster in no more memory), {len(advised.worth)} are worth a trial,"
        f" {advised.num_front} of them on the predicted Pareto front",
        f"predicted best: {phrase(first.point)}: {format_s(first.plan.total_s)},"
        f" {format_bytes(first.plan.memory.total_bytes)}",
    ]
    lines += [f"  {count} cannot: {reason}" for reason, count in advised.impossible.most_common(3)]
    return "\n".join(lines)


def trial_text(trial: Trial, fixed: Mapping[str, Any]) -> str:
    """One line for a trial that ended."""
    what = trial.name or phrase(trial.point, fixed)
    if not trial.measured:
        return f"trial {trial.number}: {what}: failed: {trial.reason}"
    assert trial.step_s and trial.tensors_bytes and trial.predicted_tensors_bytes
    ended = "" if trial.status == "finished" else f", stopped after {trial.steps} steps"
    predicted = trial.predicted_step_s
    beside = f"(predicted {format_s(predicted)})" if predicted else "of shared passes"
    return (
        f"trial {trial.number}: {what}: {format_s(trial.step_s)} a step {beside},"
        f" {format_bytes(trial.tensors_bytes)} (predicted {format_bytes(trial.predicted_tensors_bytes)}),"
        f" eval_loss {trial.eval_loss:.4f}{ended}"
    )


def _step_text(trial: Trial) -> str:
    """Seconds of a step, with the predicted ones where it computed by itself."""
    measured, predicted = format_s(trial.step_s or 0.0), trial.predicted_step_s
    return f"{measured} ({format_s(predicted)})" if predicted else f"{measured} shared"


def common(trials: Sequence[Trial]) -> dict[str, Any]:
    """What is the same in every point and need not be shown."""
    if len(trials) < 2:
        return {}
    first = trials[0].point
    return {key: value for key, value in first.items() if all(t.point.get(key) == value for t in trials)}


def trials_table(
    found: Sequence[Outcome], failed: Sequence[Trial], recommended: int | None, steps_per_epoch: int
) -> RenderableType:
    """Every trial: measured and, in brackets, predicted; then scaled to the real job, or to an epoch of a study."""
    is_study = any(outcome.trial.name for outcome in found)
    same = common([outcome.trial for outcome in found] + list(failed))
    on_front = {outcome.trial.number for outcome in front(found)}
    priced = any(outcome.cost is not None for outcome in found)
    table = Table(box=None, pad_edge=False, header_style="bold")
    whole = "an epoch" if is_study else "whole job"
    names = ["", "combination", "step", "tensors", "eval_loss", whole, "memory", *(["cost"] if priced else [])]
    for name in names:
        table.add_column(tr(name) if name else "", overflow="fold", min_width=22 if name == "combination" else None)
    for outcome in found:
        trial = outcome.trial
        mark = "➤" if trial.number == recommended else "*" if trial.number in on_front else ""
        row = [
            f"{mark}{trial.number}",
            trial.name or phrase(trial.point, same),
            _step_text(trial),
            f"{format_bytes(trial.tensors_bytes or 0.0)} ({format_bytes(trial.predicted_tensors_bytes or 0.0)})",
            f"{trial.eval_loss:.4f}" + ("" if outcome.whole else f" at step {trial.steps}"),
            format_s(outcome.total_s / outcome.plan.num_steps * steps_per_epoch if is_study else outcome.total_s),
            format_bytes(outcome.peak_bytes),
        ]
        if priced:
            row.append("-" if outcome.cost is None else f"{outcome.cost:.3g} {outcome.plan.price.currency}")
        table.add_row(*row)
    lines = [f"{trial.number} failed: {trial.name or phrase(trial.point, same)}: {trial.reason}" for trial in failed]
    if same:
        lines.append(f"in every trial: {phrase(same)}")
    lines.append("➤ recommended  * on the front of time, memory and quality; in brackets what was predicted;")
    lines.append(f"{whole} and memory are the plan's, corrected by what the trial measured")
    if any(outcome.trial.predicted_step_s is None for outcome in found):
        lines.append(f"shared: its part of passes that trials shared, which corrects no time of the {whole}")
    return Group(table, Text("\n".join(map(tr, lines)), style="dim"))


def recommendation_text(folder: SearchFolder) -> str:
    """What to do next."""
    summary = folder.summary()
    if summary is None or summary.recommended is None:
        return summary.why if summary else "no trial has run"
    chosen = summary.recommended
    cost = "" if chosen.cost is None else f", {chosen.cost:.3g} {chosen.currency}"
    return (
        f"recommended: {phrase(chosen.point)}\n"
        f"the real job with it: {format_s(chosen.total_s)}, {format_bytes(chosen.peak_bytes)}{cost} ({summary.why})\n"
        f"run it: orchestrator submit {folder.path / 'recommended.yaml'}"
    )


class SearchWatcher:
    """Prints a search in a terminal or a log: a line per trial, and the progress."""

    def __init__(self, console: Console | None) -> None:
        self._console = console

    def say(self, text: str) -> None:
        if self._console:
            self._console.print(tr(text), markup=False, highlight=False, soft_wrap=True)

    def advised(self, space: Space, advised: Forecast) -> None:
        self.say(advised_text(space, advised))

    def ended(self, trial: Trial, done: Sequence[Trial], progress: str) -> None:
        fixed = common([one for one in done if not one.name])
        self.say(f"{trial_text(trial, fixed)}\n  {progress}")
