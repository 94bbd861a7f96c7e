"""The whole path of a search: predict every combination, try few of them, recommend one.

job -> space -> advice (what cannot run, what cannot win, where to start) -> trials -> recommended.yaml
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from clusters.capability import ClusterCapability, NodeCapability
from clusters.connect import CannotConnect, connect
from orchestrator import calibration, models, money, planner, workload
from orchestrator.data.prepare import datasets
from orchestrator.errors import ClusterError, JobError, NothingFits, OrchestratorError, RunFailed
from orchestrator.jobfile import Job, parse_job, read_run_job, spec_with, text_with
from orchestrator.plan import Plan
from orchestrator.run import InBackground, Ready, counts_of, output_dir, prepare
from orchestrator.search.advice import Advised, Planning, Sizes, advise
from orchestrator.search.recommend import Outcome, front, outcomes, recommend
from orchestrator.search.sample import representative
from orchestrator.search.sampling import Sampler
from orchestrator.search.space import Point, Space, canonical, key_of, phrase, space_of
from orchestrator.search.trials import SearchFolder, Trial
from orchestrator.search.view import Watching, advised_text, common
from strategies.techniques import host_memory

_POLL_S = 0.2
_SET_UP_S = 3.0  # of a trial beside its steps: loading the model


@dataclass
class _Search:
    """A search in progress: what it knows, and the questions Tune asks of it."""

    folder: SearchFolder
    job: Job
    planning: Planning
    space: Space
    nodes: Sequence[NodeCapability]
    watching: Watching
    sampler: Sampler | None
    named: list[tuple[str, Point]]  # a study's list, in place of a sampler
    stopped: bool = False

    def __post_init__(self) -> None:
        self.done = self.folder.trials()
        self.next_number = max((trial.number for trial in self.done), default=0) + 1
        self.began, self.spent_before_s = time.monotonic(), sum(trial.seconds for trial in self.done)
        self.running: dict[int, tuple[Point, str, float]] = {}
        self.real: Callable[[Point], Plan] = _by_point(self.planning.real)
        tried = {trial.name for trial in self.done}
        self.named = [(name, point) for name, point in self.named if name not in tried]
        for trial in self.done:
            self._learn(trial)

    def next_trial(self) -> tuple[int, Point, Mapping[str, Plan]] | None:
        """The next point that some node can run, with its plan there."""
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

    def _plans(self, point: Point) -> tuple[dict[str, Plan], str]:
        plans, reason = {}, "no machine may take trials"
        for node in self.nodes:
            try:
                plans[node.name] = self.planning.trial(point, node)
            except (JobError, NothingFits) as error:
                reason = str(error).splitlines()[0]
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
        """Whether the budget is spent or somebody asked to stop."""
        budget = self.job.spec.search.budget
        minutes = (time.monotonic() - self.began) / 60
        over_time = budget.minutes is not None and minutes >= budget.minutes
        return self.stopped or over_time or (budget.node_hours is not None and self.node_hours >= budget.node_hours)

    @property
    def node_hours(self) -> float:
        now = time.monotonic()
        return (sum(t.seconds for t in self.done) + sum(now - began for _, _, began in self.running.values())) / 3600

    def _ended(self, trial: Trial) -> None:
        self.running.pop(trial.number, None)
        self.done.append(trial)
        self.folder.add(trial)
        self._learn(trial)
        self.watching.ended(trial, common([t for t in self.done if not t.name]), self._progress())

    def _learn(self, trial: Trial) -> None:
        if self.sampler is None:
            return
        outcome = next(iter(outcomes([trial], self.real, self.job.spec.search.metric)), None)
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
        found = outcomes(self.done, self.real, spec.search.metric)
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


def _by_point(plan: Callable[[Point], Plan]) -> Callable[[Point], Plan]:
    """Each point's real plan, made once."""
    made = cache(lambda key: plan(json.loads(key)))
    return lambda point: made(key_of(point))


def search(
    job: Job,
    watching: Watching,
    study: Callable[[Job], list[tuple[str, Point]]] | None = None,
) -> SearchFolder:
    """Search for the best combination within the job's budget.  Raises OrchestratorError.

    `study` gives a list to go through instead.  What cannot be is said before anything is written.
    """
    job = _with_held_out_rows(job, watching.say)
    ready = prepare(job, watching.say)
    named = study(job) if study else []
    # As they are known now: they stay so for the whole search.
    capability = money.priced(job.spec, calibration.calibrated(ready.capability, output_dir(job)))
    space = Space({}) if study else space_of(job.spec, planner.slots_of(job.spec, capability), _batch(ready))
    files = _files(job, ready, space, named, watching.say)
    planning = planning_of(job, files, capability, _batch(ready))
    nodes = nodes_of(job.spec, capability, ready.plan)
    advised = None if study else _advised(planning, space, nodes, watching.say)
    folder = SearchFolder.create(output_dir(job), f"search-{job.spec.name}")
    folder.write("origin.json", json.dumps({"folder": str(job.folder)}))
    folder.write("capability.json", json.dumps(capability.as_dict(), indent=1))
    folder.write("data.json", json.dumps(files, indent=1))
    folder.write("plan.json", ready.plan.to_json())
    folder.write("study.json", json.dumps(named))
    if advised:
        folder.write("advice.json", json.dumps(told(space, advised), indent=1))
    folder.write("search.yaml", job.text)  # last: a folder with it is a search
    return _go_on(_Search(folder, job, planning, space, nodes, watching, _sampler(planning, space, advised), named))


def _batch(ready: Ready) -> int:
    return ready.plan.global_batch_size


def predict(job: Job, say: Callable[[str], None]) -> tuple[Space, Advised]:
    """What a search would know before its first trial; nothing is started.  Raises OrchestratorError."""
    job = _with_held_out_rows(job, say)
    ready = prepare(job, say)
    capability = money.priced(job.spec, calibration.calibrated(ready.capability, output_dir(job)))
    space = space_of(job.spec, planner.slots_of(job.spec, capability), _batch(ready))
    files = _files(job, ready, space, [], say)
    return space, advise(planning_of(job, files, capability, _batch(ready)), space)


def resume(folder: SearchFolder, watching: Watching) -> SearchFolder:
    """Go on with a search that was stopped or killed, with what its trials taught."""
    job = read_run_job(folder.path, folder.marker)
    planning = planning_in(folder, job)
    base = Plan.from_json((folder.path / "plan.json").read_text())
    named = [(name, point) for name, point in folder.read_json("study.json") or []]
    slots = planner.slots_of(job.spec, planning.capability)
    space = Space({}) if named else space_of(job.spec, slots, planning.global_batch_size)
    nodes = nodes_of(job.spec, planning.capability, base)
    advised = None if named else _advised(planning, space, nodes, watching.say)
    sampler = None if named else _sampler(planning, space, advised)
    return _go_on(_Search(folder, job, planning, space, nodes, watching, sampler, named))


def _go_on(going: _Search) -> SearchFolder:
    folder, job = going.folder, going.job
    with folder.lock():
        folder.stop_file.unlink(missing_ok=True)
        folder.record("state", state="running", pid=os.getpid())
        try:
            _tune(going)
        except OrchestratorError as error:
            folder.record("state", state="failed", text=str(error))
            raise
        conclude(folder, job, going.planning)
        folder.record("state", state="stopped" if going.stopped else "finished")
    if going.stopped:
        raise RunFailed(f"stopped. `orchestrator resume {folder.run_id}` goes on with the trials that are left")
    return folder


def _advised(
    planning: Planning, space: Space, nodes: Sequence[NodeCapability], say: Callable[[str], None]
) -> Advised | None:
    """The plan's advice, for samplers that take it; and that the budget holds at least one trial."""
    advised = None
    if planning.spec.search.sampler == "planned":
        say(f"planning {len(space)} combinations ...")
        advised = advise(planning, space)
        say(advised_text(space, advised))
    _check_budget(planning, nodes, space, advised)
    return advised


def _sampler(planning: Planning, space: Space, advised: Advised | None) -> Sampler | None:
    spec = planning.spec
    if not space.choices and not space.ranges:
        return None
    is_priced = all(node.purchase_price or node.price_per_hour or node.load_w for node in planning.capability.nodes)
    objectives = ["time", "memory", "quality", *(["cost"] if is_priced or spec.cost.power_w else [])]
    kind, prefer, seed = spec.search.sampler, spec.goal.prefer, spec.train.seed
    return Sampler(space, advised, kind, prefer, objectives, _own(spec), seed)


def planning_in(folder: SearchFolder, job: Job) -> Planning:
    """The planner with a search's machines and data."""
    capability = ClusterCapability.from_dict(folder.read_json("capability.json") or {"nodes": []})
    base = Plan.from_json((folder.path / "plan.json").read_text())
    return planning_of(job, folder.read_json("data.json") or {}, capability, base.global_batch_size)


def planning_of(job: Job, files: dict[str, Any], capability: ClusterCapability, global_batch_size: int) -> Planning:
    """The planner for a search's points; sizes are those of the longest max_length, others are cut from it."""
    longest = files[max(files, key=int)]
    data, held_out = datasets(longest)
    config = models.read_config(Path(longest["model"]))
    whole = Sizes(data.lengths.tolist(), int(data.num_supervised.sum()), counts_of(held_out))
    rows = data.select(longest["train_rows"])
    held = held_out.select(longest["eval_rows"]) if held_out is not None else None
    sample = Sizes(rows.lengths.tolist(), int(rows.num_supervised.sum()), counts_of(held))
    return Planning(job.spec, config, workload.model_shape(config), capability, whole, sample, global_batch_size)


def conclude(folder: SearchFolder, job: Job, planning: Planning) -> None:
    """Write the recommendation, and the job that carries it out."""
    found = outcomes(folder.trials(), _by_point(planning.real), job.spec.search.metric)
    chosen, why = recommend(job.spec, found)
    summary = {
        "why": why,
        "prefer": job.spec.goal.prefer,
        "recommended": _of_outcome(chosen, planning) if chosen else None,
        "outcomes": [_of_outcome(outcome, planning) for outcome in found],
        "front": [outcome.trial.number for outcome in front(found)],
        "failed": [trial.number for trial in folder.trials() if not trial.measured],
        "trial_seconds": sum(trial.seconds for trial in folder.trials()),
        "wasted_seconds": sum(trial.seconds for trial in folder.trials() if not trial.measured),
    }
    folder.write("summary.json", json.dumps(summary, indent=1))
    if chosen is None:
        return
    point = {**chosen.trial.point, "train.global_batch_size": planning.global_batch_size}
    comment = (
        f"# Found by `orchestrator search` ({folder.run_id}): {why}.\n"
        f"# Predicted for this job, corrected by trial {chosen.trial.number}: {chosen.total_s / 60:.1f} minutes of"
        f" training, {chosen.peak_bytes / 2**30:.1f} GiB"
        + (f", {chosen.cost:.3g} {chosen.plan.price.currency}.\n" if chosen.cost is not None else ".\n")
    )
    folder.write("recommended.yaml", comment + text_with(_absolute(job), point))


def _absolute(job: Job) -> Job:
    """The job with paths that hold from any folder: the recommended job lies elsewhere than the one asked."""
    import yaml

    document = yaml.safe_load(job.text)
    data = document.get("data", {})
    for key in ("train", "eval"):
        if key in data:
            data[key] = _absolute_source(job, data[key])
    template = data.get("chat_template", "tokenizer")
    if template != "tokenizer":
        data["chat_template"] = str(job.path(template))
    model = document["model"]["model_name_or_path"]
    if job.path(model).is_dir():
        document["model"]["model_name_or_path"] = str(job.path(model))
    return Job(job.spec, job.folder, yaml.safe_dump(document, sort_keys=False, allow_unicode=True))


def _absolute_source(job: Job, value: Any) -> Any:
    if isinstance(value, list):
        return [_absolute_source(job, one) for one in value]
    if isinstance(value, dict):
        return {**value, "path": _absolute_source(job, value["path"])} if "path" in value else value
    return str(job.path(value)) if job.path(value).exists() else value


def _tune(going: _Search) -> None:
    """Run the trials, pass Ctrl-C on, and wait for the end."""
    from orchestrator.search.tuning import tune_trials

    spec = going.job.spec
    budget = len(going.named) if going.sampler is None else spec.search.budget.trials - len(going.done)
    if budget <= 0:
        return
    address = spec.cluster.address
    going.watching.say("starting Ray ..." if address == "local" else f"connecting to {address} ...")
    names = {node.name for node in going.nodes}
    places = [slot for slot in planner.slots_of(spec, going.planning.capability) if slot.node.name in names]
    num_slots, threads = len(places), max(slot.threads for slot in places)
    try:
        with connect(address, num_slots, threads, host_memory.ENVIRONMENT) as cluster:
            node_ids = _node_ids(address, names)

            def run() -> None:
                from orchestrator.search.tuning import Asked

                tune_trials(
                    going.folder.path,
                    Asked(going.next_trial, going.ended, going.enough),
                    spec.search.scheduler if going.sampler is not None else "none",
                    budget,
                    spec.search.trial_steps,
                    num_slots,
                    cluster.slot_resources,
                    node_ids,
                    going.failed,
                    going.started,
                )

            _wait(InBackground(run), going)
    except CannotConnect as error:
        raise ClusterError(f"cluster.address: {error}. `local` runs on this machine") from error


def _wait(outcome: InBackground, going: _Search) -> None:
    while True:
        try:
            if outcome.wait(_POLL_S):
                break
            going.stopped = going.stopped or going.folder.stop_file.exists()
        except KeyboardInterrupt:
            if going.stopped:
                raise RunFailed(
                    f"killed. `orchestrator resume {going.folder.run_id}` goes on with the trials that are left"
                ) from None
            going.stopped = True
            going.watching.say("stopping with the next report of a trial (Ctrl-C again kills)")
    if outcome.error is not None:
        if isinstance(outcome.error, OrchestratorError):
            raise outcome.error
        raise RunFailed(
            f"Ray Tune ended with {type(outcome.error).__name__}: {str(outcome.error).splitlines()[0]}. `orchestrator"
            f" resume {going.folder.run_id}` goes on"
        ) from outcome.error


def _node_ids(address: str, names: set[str]) -> dict[str, str]:
    """Ray's id of each node by the name the plan knows; empty where there is one machine."""
    if address == "local":
        return {}
    from clusters.roster import present

    return {name: node_id for name, node_id in present().items() if name in names}


def nodes_of(spec: Any, capability: ClusterCapability, base: Plan) -> list[NodeCapability]:
    """Machines that may take trials."""
    if spec.search.nodes == "all":
        return list(capability.nodes)
    busy = {part.node for part in base.nodes}
    idle = [node for node in capability.nodes if node.name not in busy]
    if not idle:
        raise NothingFits("search.nodes: the job itself would use every machine; set it to all")
    return idle


def _check_budget(planning: Planning, nodes: Sequence[NodeCapability], space: Space, advised: Advised | None) -> None:
    """Raises JobError for a budget that not even one trial fits in."""
    budget = planning.spec.search.budget
    limits = {
        "minutes": budget.minutes and 60 * budget.minutes,
        "node_hours": budget.node_hours and 3600 * budget.node_hours,
    }
    known = {key: seconds for key, seconds in limits.items() if seconds is not None}
    if not known:
        return
    point = advised.worth[0].point if advised else next(space.points())
    seconds = []
    for node in nodes:
        try:
            plan = planning.trial(point, node)
        except (JobError, NothingFits):
            continue
        seconds.append(plan.step_s * plan.num_steps + _SET_UP_S)
    for key, limit in known.items():
        if seconds and limit < min(seconds):
            raise JobError(
                f"search.budget.{key}: one trial takes about {min(seconds):.0f} s, more than the budget of {limit:.0f};"
                " raise it, or lower search.trial_steps"
            )


def _with_held_out_rows(job: Job, say: Callable[[str], None]) -> Job:
    """Trials are compared by a held-out loss: a job without held-out rows lends a tenth of its training rows."""
    metric = job.spec.search.metric
    if job.spec.data.eval is not None:
        if metric != "eval_loss" and job.spec.eval.metrics != "auto" and metric not in job.spec.eval.metrics:
            raise JobError(f"search.metric: {metric} is never measured; add it to eval.metrics, or set that to auto")
    else:
        say("the job has no held-out rows: a tenth of the training rows is held out to compare trials")
        job = parse_job(job.text, job.folder, "job", ['data.eval={"split": 0.1}'])
    if metric != "eval_loss":
        job = parse_job(job.text, job.folder, "job", [f'eval.metrics=["{metric}"]'])
    return job


def _files(
    job: Job, ready: Ready, space: Space, named: list[tuple[str, Point]], say: Callable[[str], None]
) -> dict[str, Any]:
    """By max_length: where the samples lie, and which of them the trials see."""
    listed = {point.get("data.max_length") for _, point in named} | set(space.choices.get("data.max_length", ()))
    lengths = sorted(length for length in listed if length is not None)
    files = {}
    for length in lengths or [ready.plan.techniques.max_length]:
        one = ready.data_files
        if length != ready.plan.techniques.max_length:
            other = Job(spec_with(job.spec, {"data.max_length": length}), job.folder, job.text)
            one = prepare(other, say).data_files
        data, held_out = datasets(one)
        if held_out is None:
            raise JobError("search needs held-out rows to compare quality: set data.eval: {split: 0.1}")
        spec = job.spec
        count = spec.search.trial_steps * ready.plan.global_batch_size
        files[str(length)] = {
            **one,
            "train_rows": representative(data.lengths.tolist(), count, spec.train.seed),
            "eval_rows": representative(held_out.lengths.tolist(), spec.search.eval_rows, spec.train.seed),
        }
    return files


def _own(spec: Any) -> Callable[[str], Any]:
    """The job's own value of a key."""

    def value(key: str) -> Any:
        section, _, name = key.partition(".")
        return getattr(getattr(spec, section), name, None)

    return value


def told(space: Space, advised: Advised) -> dict[str, Any]:
    """advice.json: every point with its prediction."""

    def one(advice: Any) -> dict[str, Any]:
        return {
            "point": advice.point,
            "total_s": advice.plan.total_s,
            "peak_bytes": advice.plan.memory.total_bytes,
            "quality_prior": advice.score,
        }

    return {
        "combinations": len(space),
        "impossible": dict(advised.impossible),
        "num_front": advised.num_front,
        "worth": [one(advice) for advice in advised.worth],
        "dominated": [one(advice) for advice in advised.dominated],
    }


def _of_outcome(outcome: Outcome, planning: Planning) -> dict[str, Any]:
    return {
        "trial": outcome.trial.number,
        "name": outcome.trial.name or phrase(outcome.trial.point),
        "point": outcome.trial.point,
        "status": outcome.trial.status,
        "total_s": outcome.total_s,
        "epoch_s": outcome.total_s / outcome.plan.num_steps * planning.steps_per_epoch,
        "predicted_total_s": outcome.plan.total_s,
        "peak_bytes": outcome.peak_bytes,
        "predicted_peak_bytes": outcome.plan.memory.total_bytes,
        "cost": outcome.cost,
        "currency": outcome.plan.price.currency,
        "eval_loss": outcome.trial.eval_loss,
        "lack": outcome.lack,
    }
