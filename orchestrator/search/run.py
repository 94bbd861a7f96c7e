"""The whole path of a search: predict every combination, try few of them, recommend one.

job -> space -> advice (what cannot run, what cannot win, where to start) -> trials -> recommended.yaml
"""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Protocol

from clusters.capability import ClusterCapability, NodeCapability
from clusters.ray.connect import WorkerProcess, connect
from clusters.safe.reading import first_line
from orchestrator.errors import JobError, NothingFits, OrchestratorError, RunFailed
from orchestrator.job.job_file import Job, value_of
from orchestrator.job.space import Point, Space, canonical, space_of
from orchestrator.lifecycle import calibration, machines
from orchestrator.lifecycle.background import run_in_background
from orchestrator.lifecycle.hooks import NO_BANK, BankHooks
from orchestrator.lifecycle.prepare import Ready, output_dir, prepare
from orchestrator.planning import planner, price
from orchestrator.planning.plan import Plan
from orchestrator.runs.events import StateChange
from orchestrator.runs.search_folder import SearchFolder, Trial
from orchestrator.search.advice import Forecast, Planning, advice_json, advise, by_kind
from orchestrator.search.conclusion import conclude
from orchestrator.search.prepare import check_budget, files_of, nodes_of, planning_in, planning_of, with_held_out_rows
from orchestrator.search.recommend import outcomes, recommend
from orchestrator.search.sampler import Sampler
from orchestrator.training.workers.gpu_locks import hold_one_each
from strategies.step import host_memory


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
class _Search:
    """A search in progress: its trials so far, and what Tune needs of it."""

    folder: SearchFolder
    job: Job
    planning: Planning
    space: Space
    nodes: Sequence[NodeCapability]
    watcher: SearchObserver
    advised: Forecast | None
    named: list[tuple[str, Point]]  # a study's list, in place of a sampler
    stopped: bool = False

    def __post_init__(self) -> None:
        self.sampler = _sampler(self.planning, self.space, self.advised)
        self.done = self.folder.trials()
        self.next_number = max((trial.number for trial in self.done), default=0) + 1
        self.began = time.monotonic()
        self.running: dict[int, tuple[Point, str, float]] = {}
        tried = {trial.name for trial in self.done}
        self.named = [(name, point) for name, point in self.named if name not in tried]
        for trial in self.done:
            self._learn(trial)

    def next_trial(self) -> tuple[int, Point, Mapping[str, Sequence[Plan]]] | None:
        """The next point that some node can run, with its plans there, one for each kind of its devices."""
        while self.sampler is None or len(self.done) + len(self.running) < self.job.spec.search.budget.trials:
            name, point = self._next_point()
            if point is None:
                return None
            number, self.next_number = self.next_number, self.next_number + 1
            plans, reason = self._plans(point)
            self.running[number] = (point, name, time.monotonic())
            if plans:
                return number, point, plans
            self._ended(Trial(number, point, "failed", reason=reason, name=name))
        return None

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
        point, name, _ = self.running[trial.number]
        if self.stopped and trial.status == "stopped":
            self.running.pop(trial.number)
            return
        self._ended(Trial(**{**asdict(trial), "point": point, "name": name, "curve": trial.curve}))

    def failed(self, number: int, reason: str) -> None:
        """A trial's process died or Tune could not start it."""
        point, name, began = self.running[number]
        seconds = round(time.monotonic() - began, 3)
        self._ended(Trial(number, point, "failed", reason=reason, name=name, seconds=seconds))

    def started(self, number: int) -> None:
        point, name, _ = self.running[number]
        self.running[number] = (point, name, time.monotonic())

    def enough(self) -> bool:
        """Whether the budget is spent or the search is to stop."""
        budget = self.job.spec.search.budget
        minutes = (time.monotonic() - self.began) / 60
        over_time = budget.minutes is not None and minutes >= budget.minutes
        return self.stopped or over_time or (budget.node_hours is not None and self.node_hours >= budget.node_hours)

    @property
    def node_hours(self) -> float:
        now = time.monotonic()
        return (sum(t.seconds for t in self.done) + sum(now - began for _, _, began in self.running.values())) / 3600

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
        priced = [] if outcome.cost is None else [outcome.cost]
        self.sampler.tell(trial.point, [*outcome.costs, *priced])
        assert trial.step_s and trial.predicted_step_s and trial.tensors_bytes and trial.predicted_tensors_bytes
        self.sampler.learn(
            trial.point,
            (trial.step_s, trial.predicted_step_s),
            (trial.tensors_bytes, trial.predicted_tensors_bytes),
        )

    def _progress(self) -> str:
        """Best so far, what is left of the budget, and when that will be over."""
        budget, spec = self.job.spec.search.budget, self.job.spec
        found = outcomes(self.done, self.planning.real, spec.search.metric)
        best, _ = recommend(spec, found)
        left = len(self.named) if self.sampler is None else max(0, budget.trials - len(self.done))
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


def search(
    job: Job,
    watcher: SearchObserver,
    study: Callable[[Job], list[tuple[str, Point]]] | None = None,
    bank: BankHooks = NO_BANK,
) -> SearchFolder:
    """Search for the best combination within the job's budget.  Raises OrchestratorError.

    `study` gives a list of points instead.  Mistakes are raised before anything is written.
    """
    original, job = job, with_held_out_rows(job, watcher.say)
    named = study(job) if study else []
    ready, files, planning, space = _prepare(job, named, watcher.say, bank)
    nodes = nodes_of(job.spec, planning.capability, ready.plan)
    advised = None if named else _advised(planning, space, nodes, watcher)
    texts = {
        "origin.json": json.dumps({"folder": str(job.folder)}),
        "capability.json": json.dumps(planning.capability.as_dict(), indent=1),
        "data.json": json.dumps({length: one.as_dict() for length, one in files.items()}, indent=1),
        "plan.json": ready.plan.to_json(),
        "study.json": json.dumps(named),
        **({"advice.json": json.dumps(advice_json(space, advised), indent=1)} if advised else {}),
        "asked.yaml": original.text,
        "search.yaml": job.text,
    }
    with SearchFolder.take(output_dir(job), f"search-{job.spec.name}") as folder:
        folder.begin(texts)
        return _try_rest(_Search(folder, job, planning, space, nodes, watcher, advised, named))


def _prepare(
    job: Job, named: list[tuple[str, Point]], say: Callable[[str], None], bank: BankHooks
) -> tuple[Ready, dict[str, Any], Planning, Space]:
    """A search's base plan, its data by max_length, its planner and what it may try."""
    ready = prepare(job, say, bank=bank)
    batch = ready.plan.global_batch_size
    # As they are known now: they stay so for the whole search.
    capability = price.priced(job.spec, calibration.calibrated(ready.capability, output_dir(job)))
    space = _space_of(job, capability, batch, named)
    files = files_of(job, ready, space, named, say)
    return ready, files, planning_of(job, files, capability, batch), space


def _space_of(job: Job, capability: ClusterCapability, batch: int, named: list[tuple[str, Point]]) -> Space:
    """What a sampler may try; nothing beside the points of a study."""
    devices = [slot.device for slot in planner.slots_of(job.spec, capability)]
    return Space({}) if named else space_of(job.spec, devices, batch)


def predict(job: Job, say: Callable[[str], None], bank: BankHooks = NO_BANK) -> tuple[Space, Forecast]:
    """What a search would know before its first trial; nothing is started.  Raises OrchestratorError."""
    job = with_held_out_rows(job, say)
    _, _, planning, space = _prepare(job, [], say, bank)
    return space, advise(planning, space)


def resume(folder: SearchFolder, watcher: SearchObserver) -> SearchFolder:
    """Continue a search that was stopped or killed, with what its trials taught."""
    with folder.lock():
        folder.restore(watcher.say)
        return _try_rest(_restore(folder, watcher))


def _restore(folder: SearchFolder, watcher: SearchObserver) -> _Search:
    """A search as it is in its files."""
    job = folder.job()
    planning = planning_in(folder, job)
    named = [(name, point) for name, point in folder.study()]
    space = _space_of(job, planning.capability, planning.global_batch_size, named)
    nodes = nodes_of(job.spec, planning.capability, folder.plan())
    advised = None if named else _advised(planning, space, nodes, watcher)
    return _Search(folder, job, planning, space, nodes, watcher, advised, named)


def _try_rest(search: _Search) -> SearchFolder:
    """Try what is left; the caller holds the folder."""
    folder, job = search.folder, search.job
    folder.stop_file.unlink(missing_ok=True)
    folder.record(StateChange("running", pid=os.getpid()))
    try:
        _tune(search)
    except OrchestratorError as error:
        folder.record(StateChange("failed", text=str(error)))
        raise
    conclude(folder, job, search.planning)
    folder.record(StateChange("stopped" if search.stopped else "finished"))
    if search.stopped:
        raise RunFailed(f"stopped. `orchestrator resume {folder.run_id}` continues with the remaining trials")
    return folder


def _advised(
    planning: Planning, space: Space, nodes: Sequence[NodeCapability], watcher: SearchObserver
) -> Forecast | None:
    """The plan's advice, for samplers that take it; and that the budget holds at least one trial."""
    advised = None
    if planning.spec.search.sampler == "planned":
        watcher.say(f"planning {len(space)} combinations ...")
        advised = advise(planning, space)
        watcher.advised(space, advised)
    check_budget(planning, nodes, space, advised)
    return advised


def _sampler(planning: Planning, space: Space, advised: Forecast | None) -> Sampler | None:
    spec = planning.spec
    if not space.choices and not space.ranges:
        return None
    is_priced = all(node.purchase_price or node.price_per_hour or node.load_w for node in planning.capability.nodes)
    objectives = ["time", "memory", "quality", *(["cost"] if is_priced or spec.cost.power_w else [])]
    kind, prefer, seed = spec.search.sampler, spec.goal.prefer, spec.train.seed
    return Sampler(space, advised, kind, prefer, objectives, partial(value_of, spec), seed)


def _tune(search: _Search) -> None:
    """Run the trials, pass Ctrl-C on, and wait for the end."""
    from orchestrator.search.tuning import Slots, tune_trials

    spec = search.job.spec
    num_trials = len(search.named) if search.sampler is None else spec.search.budget.trials - len(search.done)
    if num_trials <= 0:
        return
    address = spec.cluster.address
    search.watcher.say("starting Ray ..." if address == "local" else f"connecting to {address} ...")
    names = {node.name for node in search.nodes}
    places = [slot for slot in planner.slots_of(spec, search.planning.capability) if slot.node.name in names]
    threads = max(slot.threads for slot in places)
    gpus = [slot.device for slot in places if slot.device.kind != "cpu"] if address == "local" else []
    process = WorkerProcess(host_memory.process_environment(), spec.cluster.nice)
    uuids = [[gpu.uuid] for gpu in gpus if gpu.uuid]
    with machines.cluster_errors(), hold_one_each(uuids, search.watcher.say, search.folder.stop_file.exists) as held:
        if held is None:
            search.stopped = True
            return
        with connect(address, len(places), threads, gpus, process) as cluster:
            slots = Slots(len(places), cluster.slot_resources, _node_ids(address, names))
            scheduler = spec.search.scheduler if search.sampler is not None else "none"
            tune = partial(
                tune_trials, search.folder.path, search, slots, num_trials, spec.search.trial_steps, scheduler
            )
            error = run_in_background(tune, search.poll, search.interrupt)
    if error is None:
        return
    if isinstance(error, OrchestratorError):
        raise error
    raise RunFailed(
        f"Ray Tune ended with {type(error).__name__}: {first_line(error)}. `orchestrator resume"
        f" {search.folder.run_id}` continues"
    ) from error


def _node_ids(address: str, names: set[str]) -> dict[str, str]:
    """Ray's id of each node by the name the plan knows; empty where there is one machine."""
    if address == "local":
        return {}
    from clusters.ray.nodes import present

    return {name: node_id for name, node_id in present().items() if name in names}
