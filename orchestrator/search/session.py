"""A search in progress: the points it draws, the trials that ended, what is left of its budget."""

from __future__ import annotations

import itertools
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from typing import Protocol

from clusters.capability import NodeCapability
from clusters.safe.reading import first_line
from orchestrator.errors import JobError, NothingFits, RunFailed
from orchestrator.job.job_file import Job, value_of
from orchestrator.job.space import Point, Space, canonical
from orchestrator.planning.plan import Plan
from orchestrator.planning.price import prices_every_plan
from orchestrator.runs.events import Note
from orchestrator.runs.search_folder import Samples, SearchFolder, Trial
from orchestrator.search.advice import Forecast, Planning, by_kind
from orchestrator.search.recommend import outcomes, recommend
from orchestrator.search.sampler import Sampler
from orchestrator.search.sharing import NextTrial, Share, share_of


class SearchObserver(Protocol):
    """Shows the progress of a search: a terminal, a log."""

    def say(self, text: str) -> None: ...

    def advised(self, space: Space, advised: Forecast) -> None:
        """Every combination was planned."""
        ...

    def ended(self, trial: Trial, done: Sequence[Trial], progress: str) -> None:
        """A trial ended; `done` are all that did."""
        ...


@dataclass
class _Drawn:
    """A point that was drawn and has not ended."""

    point: Point
    name: str
    began: float | None = None  # of time.monotonic; None while it waits
    own_s: float | None = None  # of a process that it shares

    @property
    def seconds(self) -> float:
        """That it has taken so far."""
        if self.own_s is not None or self.began is None:
            return self.own_s or 0.0
        return round(time.monotonic() - self.began, 3)


@dataclass
class Session:
    """A search in progress: its trials so far, and what Tune needs of it."""

    folder: SearchFolder
    job: Job
    planning: Planning
    space: Space
    nodes: Sequence[NodeCapability]
    watcher: SearchObserver
    advised: Forecast | None
    named: list[tuple[str, Point]]  # a study's list, in place of a sampler
    may_share: bool = False  # whether trials may share a base model
    stopped: bool = False

    def __post_init__(self) -> None:
        self.sampler = sampler_of(self.planning, self.space, self.advised)
        self.done = self.folder.trials()
        self.next_number = max((trial.number for trial in self.done), default=0) + 1
        self.began = time.monotonic()
        self.running: dict[int, _Drawn] = {}
        self.alone: list[NextTrial] = []
        tried = {trial.name for trial in self.done}
        self.named = [(name, point) for name, point in self.named if name not in tried]
        for trial in self.done:
            self._learn(trial)

    def next_trial(self) -> NextTrial | None:
        """The next that is tried by itself: one that was set aside, or a new one."""
        return self.alone.pop(0) if self.alone else self.draw()

    def has_next(self) -> bool:
        """Whether one is left that is tried by itself."""
        if not self.alone and (one := self.draw()):
            self.alone.append(one)
        return bool(self.alone)

    def draw(self) -> NextTrial | None:
        """The next point that some node can run, with its plans there, one for each kind of its devices."""
        while self.sampler is None or len(self.done) + len(self.running) < self.job.spec.search.budget.trials:
            name, point = self._next_point()
            if point is None:
                return None
            number, self.next_number = self.next_number, self.next_number + 1
            plans, reason = self._plans(point)
            self.running[number] = _Drawn(point, name)
            if plans:
                return NextTrial(number, point, plans, self._shares(point, plans))
            self._ended(Trial(number, point, "failed", reason=reason, name=name))
        return None

    def _shares(self, point: Point, plans: Mapping[str, list[Plan]]) -> dict[str, Share] | str:
        """With whom it can share a base model, by the node where it would; or why nowhere."""
        if not self.may_share:
            return ""
        found = {name: share_of(self.job, self.planning, self._samples, point, own) for name, own in plans.items()}
        shares = {name: share for name, share in found.items() if isinstance(share, Share)}
        return shares or next(str(why) for why in found.values())

    @cached_property
    def _samples(self) -> dict[str, Samples]:
        return self.folder.samples()

    @property
    def num_left(self) -> int:
        """Trials that have not ended, of the budget or of a study's list."""
        if self.sampler is None:
            return len(self.named) + len(self.alone)
        return self.job.spec.search.budget.trials - len(self.done)

    def _next_point(self) -> tuple[str, Point | None]:
        if self.sampler is not None:
            point = self.sampler.ask()
            return "", None if point is None else canonical(point)
        return self.named.pop(0) if self.named else ("", None)

    def _plans(self, point: Point) -> tuple[dict[str, list[Plan]], str]:
        plans: dict[str, list[Plan]] = {}
        reason = "no machine can run trials"
        for node in itertools.chain.from_iterable(map(by_kind, self.nodes)):
            try:
                plan = self.planning.trial(point, node)
            except (JobError, NothingFits) as error:
                reason = first_line(error)
            else:
                plans.setdefault(node.name, []).append(plan)
        return plans, reason

    def ended(self, trial: Trial) -> None:
        """A trial came to its end, in Tune; one that was cut off by a user's stop is left for `resume`."""
        drawn = self.running[trial.number]
        if self.stopped and trial.status == "stopped":
            self.running.pop(trial.number)
            return
        values = asdict(trial) | {"point": drawn.point, "name": drawn.name, "curve": trial.curve}
        if values.get("time") and self._num_side_by_side > 1:  # another one took caches and bandwidth meanwhile
            values["time"] = values["time"] | {"formula_step_s": None}
        self._ended(Trial(**values))

    def failed(self, number: int, reason: str) -> None:
        """A trial's process died or Tune could not start it."""
        drawn = self.running[number]
        self._ended(Trial(number, drawn.point, "failed", reason=reason, name=drawn.name, seconds=drawn.seconds))

    def started(self, number: int) -> None:
        """A trial begins."""
        drawn = self.running[number]
        self.running[number] = _Drawn(drawn.point, drawn.name, time.monotonic())

    def reported(self, number: int, seconds: float) -> None:
        """What a trial that shares its process has taken of it so far."""
        self.running[number].own_s = seconds

    def enough(self) -> bool:
        """Whether the budget is spent or the search is to stop."""
        budget = self.job.spec.search.budget
        minutes = (time.monotonic() - self.began) / 60
        over_time = budget.minutes is not None and minutes >= budget.minutes
        return self.stopped or over_time or (budget.node_hours is not None and self.node_hours >= budget.node_hours)

    @property
    def node_hours(self) -> float:
        """Of all trials so far; of those side by side on one machine each took its part of it."""
        slots = self._slots_by_node
        ended = sum(trial.seconds / slots[trial.node or ""] for trial in self.done)
        # On which machine a trial runs is known at its end.
        mean = sum(slots[node.name] for node in self.nodes) / len(self.nodes)
        return (ended + sum(drawn.seconds for drawn in self.running.values()) / mean) / 3600

    @cached_property
    def _slots_by_node(self) -> Mapping[str, int]:
        """Trials at a time on each machine."""
        return defaultdict(lambda: 1, Counter(slot.node.name for slot in self.planning.slots(self.nodes)))

    @cached_property
    def _num_side_by_side(self) -> int:
        """Trials at a time on the CPU of this machine."""
        (first, *others) = self.nodes
        return 1 if others or first.gpus else self.planning.workers_on(first)[0]

    def poll(self) -> None:
        """Notice the verb `stop`."""
        self.stopped = self.stopped or self.folder.stop_file.exists()

    def interrupt(self) -> None:
        """The first Ctrl-C stops with the next report of a trial, the second kills.  Raises RunFailed."""
        if self.stopped:
            raise RunFailed(
                f"killed. `orchestrator resume {self.folder.run_id}` continues with the remaining trials"
            ) from None
        self.stopped = True
        self.watcher.say("stopping with the next report of a trial (Ctrl-C again kills)")

    def note(self, text: str) -> None:
        """Say what happens to trials, and keep it in the search's events."""
        self.watcher.say(text)
        self.folder.record(Note(text))

    def _ended(self, trial: Trial) -> None:
        self.running.pop(trial.number, None)
        self.done.append(trial)
        self.folder.add(trial)
        self._learn(trial)
        self.watcher.ended(trial, self.done, self._progress())

    def _learn(self, trial: Trial) -> None:
        if self.sampler is None:
            return
        outcome = next(iter(outcomes([trial], self.planning.real, self.job.spec.search.metric)), None)
        if outcome is None:
            self.sampler.tell(trial.point, None)
            return
        priced = [] if outcome.cost is None or "cost" not in self.sampler.objectives else [outcome.cost]
        self.sampler.tell(trial.point, [*outcome.costs, *priced])
        assert trial.step_s and trial.tensors_bytes and trial.predicted_tensors_bytes
        self.sampler.learn(
            trial.point,
            (trial.step_s, trial.predicted_step_s) if trial.predicted_step_s else None,
            (trial.tensors_bytes, trial.predicted_tensors_bytes),
        )

    def _progress(self) -> str:
        """Best so far, what is left of the budget, and when that will be over."""
        budget, spec = self.job.spec.search.budget, self.job.spec
        found = outcomes(self.done, self.planning.real, spec.search.metric)
        best, _ = recommend(spec, found)
        left = max(0, self.num_left)
        parts = [f"best so far: trial {best.trial.number}" if best else "none finished yet", f"{left} trials left"]
        seconds = (time.monotonic() - self.began) / max(1, len(self.done)) * left
        if budget.minutes is not None:
            left_s = max(0.0, budget.minutes * 60 - (time.monotonic() - self.began))
            seconds = min(seconds, left_s)
            parts.append(f"{left_s / 60:.1f} of {budget.minutes:g} minutes left")
        if budget.node_hours is not None:
            parts.append(
                f"{max(0.0, budget.node_hours - self.node_hours):.2f} of {budget.node_hours:g} node-hours left"
            )
        return ", ".join([*parts, f"about {seconds:.0f} s to go"])


def sampler_of(planning: Planning, space: Space, advised: Forecast | None) -> Sampler | None:
    """What names the points to try; None where there is nothing to choose.  It judges costs where all have one."""
    spec = planning.spec
    if not space.choices and not space.ranges:
        return None
    is_priced = prices_every_plan(spec, planning.capability)
    objectives = ["time", "memory", "quality", *(["cost"] if is_priced else [])]
    kind, prefer, seed = spec.search.sampler, spec.goal.prefer, spec.train.seed
    return Sampler(space, advised, kind, prefer, objectives, partial(value_of, spec), seed)
