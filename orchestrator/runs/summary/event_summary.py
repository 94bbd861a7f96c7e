"""What is remembered of a run's events, event by event: built in pieces it comes to what it is built at once.

`events` are those that a function of all events would have looked at: `stats_of_run`, `stages_of_run`, `timelines` and
a report's table of faults say the same of them as of the whole file.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, Self

from orchestrator.runs.events import (
    CheckpointReport,
    ErrorReport,
    Evaluation,
    Event,
    Failure,
    FinalEvaluation,
    HandBack,
    ModelReady,
    Note,
    PhaseProgress,
    QualityReport,
    Replan,
    ShareChange,
    StageTimeline,
    StateChange,
    StepReport,
    WorkerGroup,
    WorkerKilled,
    read_event,
)
from orchestrator.runs.phases import PhaseClock
from orchestrator.runs.record import MOST_NAMED, few
from orchestrator.runs.summary.curves import StepCurve, StepSet
from orchestrator.runs.summary.pace import StepPace
from orchestrator.runs.worker_stats import LAST_STEPS, stage_columns
from strategies.cost.phases import Phases

_FAULTS = (WorkerKilled, ErrorReport, Failure, Replan, Note, ShareChange)
MOST_FAULTS = 40  # that are kept, the first ones


class EventSummary:
    """What is remembered of some events.  Its size does not grow with their number, sittings and groups aside."""

    def __init__(self) -> None:
        self.num_lines = 0
        self.num_skipped = 0  # damaged lines
        self.skipped: list[str] = []  # the first of them, as `line N: ...`
        self.started: float | None = None  # seconds since the epoch
        self.state: str | None = None  # the last that was written down
        self.error: str | None = None  # the last that was reported
        self.last_step: StepReport | None = None  # the last report of the highest step
        self.steps = StepSet()
        self.losses = StepCurve()
        self.evaluations = StepCurve()
        self.loss_before: float | None = None
        self.loss_after: float | None = None
        self.before_s: float | None = None  # that the evaluation before training took
        self.pace = StepPace()  # of the sitting that runs or ran last
        self.doing: str | None = None  # start | evaluation | answers | training | saving, None once it has ended
        self.progress: PhaseProgress | None = None  # how far that is, where it is not training
        self.num_sittings = 0  # that loaded the model
        self.trained_s = 0.0  # of all steps over all sittings
        self.repeated_s = 0.0  # of those trained again
        self._clock = PhaseClock()
        self._faults: list[Event] = []
        self._group: WorkerGroup | None = None
        self._timeline: StageTimeline | None = None
        self._group_steps: dict[int, deque[tuple[int, StepReport]]] = {}  # stages, 0 for all -> its last, by line

    def add(self, lines: Iterable[tuple[Event | None, str]]) -> None:
        """Lines that follow: the event of each, or None and what is wrong with it."""
        for event, fault in lines:
            self.num_lines += 1
            if type(event) is StepReport:
                self._add_step(event)
            elif event is not None:
                self._add_other(event)
            else:
                self.num_skipped += 1
                if self.num_skipped <= MOST_NAMED:
                    self.skipped.append(f"line {self.num_lines}: {fault}")

    @property
    def damaged_lines(self) -> str | None:
        """Lines that were cut by a power loss or damaged since, in one sentence; the rest of the file is read."""
        return few(self.skipped, self.num_skipped) if self.num_skipped else None

    @property
    def phases(self) -> Phases:
        """Seconds in each phase."""
        return self._clock.phases

    @property
    def state_by_events(self) -> str:
        """The last state written down; a driver that died has written none."""
        return "interrupted" if self.state is None else self.state

    @property
    def faults(self) -> list[Event]:
        """The first events that tell of a fault or a decision."""
        return list(self._faults)

    @property
    def group_events(self) -> list[Event]:
        """Of the last group that trained: its members, its last steps, its last timeline."""
        steps = dict(pair for kept in self._group_steps.values() for pair in kept)
        found = [self._group, *(step for _, step in sorted(steps.items(), key=lambda pair: pair[0])), self._timeline]
        return [one for one in found if one is not None]

    def held_out_losses(self) -> list[tuple[int, float]]:
        """(step, held-out loss) by step, those before and after training among them."""
        held = dict(self.evaluations.points())
        if self.loss_before is not None:
            held[0] = self.loss_before
        if self.loss_after is not None and self.last_step:
            held[self.last_step.step] = self.loss_after
        return sorted(held.items())

    def _add_step(self, event: StepReport) -> None:
        if self.started is None:
            self.started = event.time
        step = event.step
        self.doing, self.progress = "training", None
        self.pace.add(step, event.time)
        self._clock.add(event)
        self.trained_s += event.seconds
        if not self.steps.add(step):
            self.repeated_s += event.seconds
        self.losses.add(step, event.loss)
        if self.last_step is None or step >= self.last_step.step:
            self.last_step = event
        if event.worker_s is not None and self._group:
            self._keep(0, event)
            columns = {len(column) for column in stage_columns(event)}
            if len(columns) == 1 and (stages := columns.pop()):
                self._keep(stages, event)

    def _keep(self, stages: int, event: StepReport) -> None:
        self._group_steps.setdefault(stages, deque(maxlen=LAST_STEPS)).append((self.num_lines, event))

    def _add_other(self, event: Event) -> None:
        if self.started is None:
            self.started = event.time
        self._clock.add(event)
        if isinstance(event, StateChange):
            self.state = event.state
            self.doing, self.progress = "start" if event.state in _AT_WORK else None, None
        if isinstance(event, ErrorReport | StateChange) and event.text:
            self.error = event.text
        if _is_fault(event) and len(self._faults) < MOST_FAULTS:
            self._faults.append(replace(event, traceback=None) if isinstance(event, ErrorReport) else event)
        if act := _ACTS.get(type(event)):
            act(self, event)

    def _add_group(self, event: WorkerGroup) -> None:
        self._group, self._timeline, self._group_steps = event, None, {}

    def _add_timeline(self, event: StageTimeline) -> None:
        self._timeline = event

    def _add_evaluation(self, event: Evaluation) -> None:
        self.evaluations.add(event.step, event.eval_loss)
        self._add_training(event)

    def _add_quality(self, event: QualityReport) -> None:
        if event.eval_loss is not None:
            setattr(self, "loss_before" if event.when == "before" else "loss_after", event.eval_loss)
        if event.when == "before" and type(event.extra.get("seconds")) in (int, float):
            self.before_s = event.extra["seconds"]
        self._add_training(event)

    def _add_sitting(self, event: ModelReady) -> None:
        self.num_sittings += 1
        self.pace = StepPace()
        self._add_training(event)

    def _add_progress(self, event: PhaseProgress) -> None:
        self.doing, self.progress = event.phase, event

    def _add_training(self, event: Event) -> None:
        """What it did beside training has ended."""
        self.doing, self.progress = "training" if self.doing else None, None

    def _add_ending(self, event: Event) -> None:
        self.doing, self.progress = ("evaluation" if isinstance(event, FinalEvaluation) else "saving"), None

    def to_json(self) -> dict[str, Any]:
        kept = {stages: [[line, one.to_json()] for line, one in steps] for stages, steps in self._group_steps.items()}
        return {
            **{name: getattr(self, name) for name in _PLAIN},
            **{name: one and one.to_json() for name in _EVENTS for one in [getattr(self, name)]},
            "steps": self.steps.to_json(),
            "pace": self.pace.to_json(),
            "losses": self.losses.to_json(),
            "evaluations": self.evaluations.to_json(),
            "clock": self._clock.to_json(),
            "faults": [one.to_json() for one in self._faults],
            "group_steps": list(kept.items()),
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """Raises ValueError, TypeError or LookupError for what `to_json` did not write."""
        made = cls()
        for name in _PLAIN:
            setattr(made, name, values[name])
        for name in _EVENTS:
            setattr(made, name, values[name] and read_event(values[name]))
        made.steps = StepSet(values["steps"])
        made.pace = StepPace.from_json(values["pace"])
        made.losses, made.evaluations = (
            StepCurve.from_json(values["losses"]),
            StepCurve.from_json(values["evaluations"]),
        )
        made._clock = PhaseClock.from_json(values["clock"])
        made._faults = [read_event(one) for one in values["faults"]]
        for stages, steps in values["group_steps"]:
            kept = [(line, StepReport.from_json(one)) for line, one in steps]
            made._group_steps[stages] = deque(kept, maxlen=LAST_STEPS)
        return made


_PLAIN = ("num_lines", "num_skipped", "skipped", "started", "state", "error", "loss_before", "loss_after")
_PLAIN += ("before_s", "doing", "num_sittings", "trained_s", "repeated_s")
_EVENTS = ("last_step", "progress", "_group", "_timeline")
_AT_WORK = ("running", "replanning")
_ACTS: dict[type[Event], Callable[[EventSummary, Any], None]] = {
    WorkerGroup: EventSummary._add_group,
    StageTimeline: EventSummary._add_timeline,
    Evaluation: EventSummary._add_evaluation,
    QualityReport: EventSummary._add_quality,
    ModelReady: EventSummary._add_sitting,
    PhaseProgress: EventSummary._add_progress,
    CheckpointReport: EventSummary._add_training,
    FinalEvaluation: EventSummary._add_ending,
    HandBack: EventSummary._add_ending,
}


def _is_fault(event: Event) -> bool:
    is_odd = isinstance(event, StateChange) and event.state not in ("running", "finished")
    return isinstance(event, _FAULTS) or is_odd
