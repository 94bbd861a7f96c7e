"""Prints the progress of a run: a live bar in a terminal, a few lines in a log, nothing for --json."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from clusters.units import format_bytes, format_s
from orchestrator.data.counts import check_line
from orchestrator.job.job_file import Job
from orchestrator.language.catalogue import tr
from orchestrator.lifecycle.hooks import Quiet
from orchestrator.planning.plan import Plan, summary
from orchestrator.runs.events import (
    BetweenReport,
    Evaluation,
    Event,
    ModelReady,
    Note,
    PreflightReport,
    QualityReport,
    StateChange,
    StepReport,
    TrackingReport,
)
from orchestrator.runs.run_folder import RunFolder
from orchestrator.views.plan import plan_view
from orchestrator.views.screen import Screen, out
from strategies.cost.phases import Phases


class Lines(Quiet):
    """A line per event worth keeping in a log file; about ten for the training itself."""

    def __init__(self, console: Console) -> None:
        self.console, self._num_steps = console, 0
        self._predicted = Phases()
        self._running_since: float | None = None

    def say(self, text: str) -> None:
        self.console.print(tr(text), markup=False, highlight=False)

    def planned(self, run: RunFolder, job: Job, plan: Plan, statistics: dict[str, Any]) -> None:
        self._num_steps, self._predicted = plan.num_steps, plan.phases
        self.console.print(plan_view(job, plan, statistics, full=False))
        if statistics.get("train"):
            self.console.print(tr(check_line(statistics["train"])), markup=False, highlight=False, soft_wrap=True)
        self.say(f"run {run.run_id}")

    def event(self, event: Event) -> None:
        match event:
            case StepReport():
                self._step(event)
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

    def _step(self, event: StepReport) -> None:
        every = max(1, self._num_steps // 10)
        if event.step % every == 0 or event.step == 1:
            self.say(f"step {event.step}/{self._num_steps}: {_step_text(event)}")


class Named(Lines):
    """Lines that begin with the job's name, for several jobs in one log."""

    def __init__(self, name: str) -> None:
        super().__init__(out)
        self._name = name

    def say(self, text: str) -> None:
        super().say(f"{self._name}: {text}")

    def planned(self, run: RunFolder, job: Job, plan: Plan, statistics: dict[str, Any]) -> None:
        self._num_steps, self._predicted = plan.num_steps, plan.phases
        self.say(f"run {run.run_id}: {summary(plan)}")


class Live(Lines):
    """A progress bar with loss, speed, memory and time left; other lines scroll above it."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TextColumn("{task.fields[detail]}", markup=False),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}", markup=False),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        self._task: TaskID | None = None

    def _step(self, event: StepReport) -> None:
        if self._task is None:
            self._bar.start()
            self._task = self._bar.add_task(
                tr("training"), total=self._num_steps, completed=event.step - 1, detail="", left=tr("left")
            )
        self._bar.update(self._task, completed=event.step, detail=_step_text(event))
        if event.step >= self._num_steps:
            self.close()

    def close(self) -> None:
        self._bar.stop()


@contextmanager
def watch_run(as_json: bool) -> Iterator[Quiet]:
    """A watcher for the run inside the block, which outlives a reader that closes the pipe."""
    watcher = Quiet() if as_json else Live(out) if out.is_terminal else Lines(out)
    Screen.outlives_reader = True
    try:
        yield watcher
    finally:
        if isinstance(watcher, Live):
            watcher.close()
        Screen.outlives_reader = False


def _step_text(event: StepReport) -> str:
    """In people's language at once: matching a text with values would take milliseconds of every step."""
    spared = ""
    if event.computed_tokens:
        spared = " " + tr("({0} not computed)").format(f"{1 - event.computed_tokens / event.tokens:.0%}")
    numbers = f"{event.loss:.4f}", f"{event.tokens_per_s:.0f}", spared, format_bytes(event.peak_bytes)
    return tr("loss {0}, {1} tokens/s{2}, {3}").format(*numbers)
