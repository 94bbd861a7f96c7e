"""Prints the progress of a run: live bars in a terminal, a line every ten seconds in a log, nothing for --json."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from clusters.units import format_bytes, format_s
from orchestrator.data.counts import check_line
from orchestrator.job.job_file import Job
from orchestrator.language.catalogue import tr
from orchestrator.lifecycle.hooks import Quiet
from orchestrator.planning.plan import Plan, summary
from orchestrator.progress.tally import Tally
from orchestrator.progress.updates import ProgressUpdate, reporting_to
from orchestrator.runs.events import (
    BetweenReport,
    Evaluation,
    Event,
    ModelReady,
    Note,
    PhaseProgress,
    PreflightReport,
    QualityReport,
    StateChange,
    StepReport,
    TrackingReport,
)
from orchestrator.runs.run_folder import RunFolder
from orchestrator.runs.summary.event_summary import EventSummary
from orchestrator.runs.summary.time_left import TimeLeft, time_left
from orchestrator.views.plan import plan_view
from orchestrator.views.screen import Screen, err, out
from strategies.cost.phases import Phases

_EVERY_S = 10.0  # between two lines about the same work
_BEFORE = ("download", "tokenising")  # phases that come before a run's events
_UNITS = {"answers": "prompts"}  # of the phases that a run reports; the others count rows


class Lines(Quiet):
    """A line per event worth keeping in a log file, and one every ten seconds about what takes longer."""

    def __init__(self, console: Console) -> None:
        self.console, self._num_steps = console, 0
        self._plan: Plan | None = None
        self._predicted = Phases()
        self._summary = EventSummary()
        self._running_since: float | None = None
        self._tally: Tally | None = None  # of what is done beside training
        self._shown_at = 0.0  # the last line about work, in seconds since the epoch

    def say(self, text: str) -> None:
        self.console.print(tr(text), markup=False, highlight=False)

    def planned(self, run: RunFolder, job: Job, plan: Plan, statistics: dict[str, Any]) -> None:
        self._begin(plan)
        self.console.print(plan_view(job, plan, statistics, full=False))
        if statistics.get("train"):
            self.console.print(tr(check_line(statistics["train"])), markup=False, highlight=False, soft_wrap=True)
        self.say(f"run {run.run_id}")

    def _begin(self, plan: Plan) -> None:
        self._plan, self._num_steps, self._predicted = plan, plan.num_steps, plan.phases

    def progress(self, update: ProgressUpdate, at: float | None = None) -> None:
        """Show how far a phase beside training has come; `at` in seconds since the epoch, by default now."""
        now = time.time() if at is None else at
        if self._tally and self._tally.continues(update):
            self._tally.add(update, now)
        else:
            self._tally, self._shown_at = Tally(update, now), now
        self._phase(self._tally, now)

    def event(self, event: Event) -> None:
        self._summary.add([(event, "")])
        match event:
            case StepReport():
                self._step(event)
            case PhaseProgress():
                unit = _UNITS.get(event.phase, "rows")
                self.progress(ProgressUpdate(event.phase, event.done, event.total, unit), event.time)
            case StateChange(state="running"):
                self._running_since = event.time
            case ModelReady():
                self.say(f"model ready after {event.seconds} s{self._start(event.time)}")
            case QualityReport():
                numbers = {"eval_loss": event.eval_loss, **event.extra}
                scores = {k: v for k, v in numbers.items() if isinstance(v, float) and k != "seconds"}
                took = f", in {format_s(seconds)}" if (seconds := event.extra.get("seconds")) else ""
                shown = ", ".join(f"{key} {value:.4f}" for key, value in scores.items())
                self.say(f"{tr(event.when)}: {shown}{took}")
            case PreflightReport():
                self.say(f"preflight: {event.text}")
            case Evaluation():
                numbers = {"eval_loss": event.eval_loss, **event.extra}
                self.say(f"step {event.step}: " + ", ".join(f"{key} {value:.4f}" for key, value in numbers.items()))
            case BetweenReport():
                self.say(f"step {event.step}: {event.text}")
            case Note():
                self.say(event.text)
            case TrackingReport():
                self.say(f"tracked in {event.text}" if event.ok else f"not tracked: {event.text}")

    def _start(self, ready: float) -> str:
        """What the whole start took, beside its prediction; nothing where it was not seen from its beginning."""
        if self._running_since is None or not self._predicted.start_s:
            return ""
        return f"; start {format_s(ready - self._running_since)} (predicted {format_s(self._predicted.start_s)})"

    def _phase(self, tally: Tally, now: float) -> None:
        if now - self._shown_at >= _EVERY_S:
            self._shown_at = now
            share, *rest = _phase_parts(tally)
            self._line(" ".join(part for part in (_name(tally), share) if part) + f": {', '.join(filter(None, rest))}")

    def _step(self, event: StepReport) -> None:
        if event.step in (1, self._num_steps) or event.time - self._shown_at >= _EVERY_S:
            self._shown_at = event.time
            parts = [_step_text(event), self._pace(), self._left()]
            share = f"{event.step / max(1, self._num_steps):.0%}"
            self._line(f"{tr('step')} {event.step}/{self._num_steps} {share}: {', '.join(filter(None, parts))}")

    def _line(self, text: str) -> None:
        """A text that is in people's language already."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _pace(self) -> str:
        step_s = self._summary.pace.step_s
        return "" if step_s is None else tr("{0} a step").format(format_s(step_s))

    def _left(self) -> str:
        """The time left, or about how long by the plan while no step was measured; nothing behind the last step."""
        last = self._summary.last_step
        if self._plan is None or (last and last.step >= self._num_steps):
            return ""
        return _left_text(time_left(self._summary, self._plan))


class Named(Lines):
    """Lines that begin with the job's name, for several jobs in one log."""

    def __init__(self, name: str) -> None:
        super().__init__(out)
        self._name = name

    def say(self, text: str) -> None:
        super().say(f"{self._name}: {text}")

    def _line(self, text: str) -> None:
        super()._line(f"{self._name}: {text}")

    def planned(self, run: RunFolder, job: Job, plan: Plan, statistics: dict[str, Any]) -> None:
        self._begin(plan)
        self.say(f"run {run.run_id}: {summary(plan)}")


class Live(Lines):
    """A bar for what is being done, with its speed and the time left; other lines scroll above it."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[detail]}", markup=False),
            console=console,
            transient=True,
        )
        self._shown: tuple[str, TaskID] | None = None  # the phase that has the bar

    def say(self, text: str) -> None:
        if self._shown and self._shown[0] in _BEFORE:
            self.close()  # no event ends it
        super().say(text)

    def planned(self, run: RunFolder, job: Job, plan: Plan, statistics: dict[str, Any]) -> None:
        self.close()
        super().planned(run, job, plan, statistics)

    def event(self, event: Event) -> None:
        super().event(event)
        if self._shown and self._shown[0] != self._summary.doing:
            self.close()

    def _phase(self, tally: Tally, now: float) -> None:
        update, (_, *rest) = tally.latest, _phase_parts(tally)
        self._show(update.phase, _name(tally), update.done, update.total, ", ".join(filter(None, rest)))

    def _step(self, event: StepReport) -> None:
        parts = [f"{event.step}/{self._num_steps}", _step_text(event), self._left()]
        self._show("training", tr("training"), event.step, self._num_steps, ", ".join(filter(None, parts)))
        if event.step >= self._num_steps:
            self.close()

    def _show(self, phase: str, name: str, done: float, total: float | None, detail: str) -> None:
        if self._shown and self._shown[0] != phase:
            self.close()
        if self._shown is None:
            self._bar.start()
            self._shown = phase, self._bar.add_task(name, total=total, completed=int(done), detail=detail)
        self._bar.update(self._shown[1], completed=done, total=total, detail=detail)

    def close(self) -> None:
        self._bar.stop()
        if self._shown:
            self._bar.remove_task(self._shown[1])
            self._shown = None


@contextmanager
def watch_run(as_json: bool) -> Iterator[Quiet]:
    """A watcher for the run inside the block, which outlives a reader that closes the pipe."""
    watcher = Quiet() if as_json else Live(out) if out.is_terminal else Lines(out)
    Screen.outlives_reader = True
    try:
        with reporting_to(watcher.progress) if isinstance(watcher, Lines) else nullcontext():
            yield watcher
    finally:
        if isinstance(watcher, Live):
            watcher.close()
        Screen.outlives_reader = False


@contextmanager
def show_work(as_json: bool) -> Iterator[None]:
    """Shows on standard error how far the work of the block is, of a verb that prints an answer."""
    watcher = Live(err) if err.is_terminal else Lines(err)
    try:
        with nullcontext() if as_json else reporting_to(watcher.progress):
            yield
    finally:
        if isinstance(watcher, Live):
            watcher.close()


def _name(tally: Tally) -> str:
    """What is done, as a heading."""
    names = {
        "download": tr("download"),
        "tokenising": tr("tokenising"),
        "evaluation": tr("evaluation"),
        "answers": tr("generating answers"),
        "saving": tr("saving"),
    }
    return names.get(tally.latest.phase, tally.latest.phase)


def _phase_parts(tally: Tally) -> tuple[str, str, str, str]:
    """Its percent, what is done of how much, its pace, its time left; empty where that is not known."""
    update, rate = tally.latest, tally.rate
    if not update.done and update.total is None:
        return "", "...", "", ""
    unit = tr("prompts") if update.unit == "prompts" else tr("rows")
    counts = update.unit != "bytes"
    show = (lambda number: f"{number:,.0f} {unit}") if counts else format_bytes
    done = f"{update.done:,.0f}" if counts and update.total is not None else show(update.done)
    amount = done if update.total is None else f"{done} / {show(update.total)}"
    share = f"{update.done / update.total:.0%}" if update.total else ""
    pace = f"{show(rate)}/s" if rate is not None and (rate >= 1 or not counts) else ""
    left = "" if tally.left_s is None else _left_text(TimeLeft(tally.left_s, True))
    return share, amount, pace, left


def _left_text(left: TimeLeft) -> str:
    """In people's language at once, as `_step_text`."""
    text = format_s(left.seconds)
    return tr("{0} left").format(text if left.is_measured else tr("about {0}").format(text))


def _step_text(event: StepReport) -> str:
    """In people's language at once: matching a text with values would take milliseconds of every step."""
    spared = ""
    if event.computed_tokens:
        spared = " " + tr("({0} not computed)").format(f"{1 - event.computed_tokens / event.tokens:.0%}")
    numbers = f"{event.loss:.4f}", f"{event.tokens_per_s:.0f}", spared, format_bytes(event.peak_bytes)
    return tr("loss {0}, {1} tokens/s{2}, {3}").format(*numbers)
