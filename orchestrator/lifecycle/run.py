"""The whole path of a job in one file: a newcomer starts here.

    job.yaml -> JobSpec -> model, data, machines -> Workload -> Plan -> Ray Train workers -> result -> MLflow

`prepare` does everything that can fail before anything starts; `execute` starts the workers and watches them.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from clusters.capability import ClusterCapability, DeviceCapability
from clusters.ray.connect import CannotConnect, connect
from clusters.safe.reading import BadInput
from orchestrator.errors import ClusterError, JobError, NothingFits, OrchestratorError, RunFailed, Stopped
from orchestrator.job import model_check, model_files
from orchestrator.job.job_file import Job, spec_with
from orchestrator.job.paths import resolve_path
from orchestrator.job.secrets import secret_names
from orchestrator.job.sections.training import HeldOut as SplitOff
from orchestrator.job.spec import JobSpec
from orchestrator.job.tokenizer_size import check_tokens
from orchestrator.job.weights import has_weights
from orchestrator.lifecycle import calibration, finish, machines
from orchestrator.lifecycle.baseline_helper import Aside
from orchestrator.lifecycle.recovery import Recovery, fixed_job, keep_numbers
from orchestrator.lifecycle.verify import check_same_job, is_handed_back, verified_files
from orchestrator.planning import planner, price, workload
from orchestrator.planning.evaluation import HeldOut
from orchestrator.planning.plan import InBank, Plan, in_bank_sentence
from orchestrator.runs import checkpoints
from orchestrator.runs.condition import exported_damage, model_digests
from orchestrator.runs.mirror.tracking import Mirror
from orchestrator.runs.run_folder import RunFolder
from strategies.contract import Workload
from strategies.shape import ModelShape

_POLL_S = 0.2


class Watcher(Protocol):
    """Whoever looks on: a terminal, a log, nobody."""

    def say(self, text: str) -> None: ...

    def planned(self, run: RunFolder, job: Job, plan: Plan, statistics: dict[str, Any]) -> None: ...

    def event(self, event: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class Ready:
    """A job with everything it needs, checked; nothing has started and no run folder exists."""

    job: Job
    plan: Plan
    capability: ClusterCapability
    work: Workload
    data_files: dict[str, Any]
    statistics: dict[str, Any]


def submit(job: Job, watcher: Watcher, run_id: str | None = None) -> RunFolder:
    """Run a job from its file to its evaluated result.  Raises OrchestratorError; see errors.py for the exit codes.

    A `run_id` that exists goes on where it stands: the same command after a crash loses nothing.  JobError where that
    run is of other settings or other data, or where another process holds it.
    """
    _must_have_secrets(job)
    known = RunFolder(output_dir(job) / run_id) if run_id else None
    if known is None or not known.is_begun:
        if run_id:
            RunFolder.check_free(output_dir(job), run_id)  # before the work of preparing; `take` decides
        ready = prepare(job, watcher.say)
        with RunFolder.take(output_dir(job), job.spec.name, run_id) as run:
            if not run.is_begun:
                _begin(run, ready, watcher.say)
                watcher.planned(run, job, ready.plan, ready.statistics)
                execute(run, job, ready.plan, ready.capability, watcher)
                return run
        known = run  # another process was faster
    return resume(known, watcher, job)


def resume(run: RunFolder, watcher: Watcher, job: Job | None = None) -> RunFolder:
    """Go on from the newest checkpoint that verifies, with the plan the run was started with; or finish its end.

    `job` is what is asked for, by default the run's own.  Raises JobError where it is another one, or where what the
    run began with was changed.
    """
    with run.lock():
        run.restore(watcher.say)
        if job:
            check_same_job(run, job)
        job = job or run.job()
        for key in run.free_changes():
            watcher.say(f"{key} was changed since the run began; it is used as it is now")
        if is_handed_back(run, watcher.say):
            finish.finish(run, job, watcher.event)
        else:
            files, plan = verified_files(run, job, watcher.say), run.plan()
            watcher.planned(run, job, plan, files.get("statistics") or {})
            execute(run, job, plan, run.capability(), watcher)
    return run


def is_complete(run: RunFolder, job: Job) -> bool:
    """Whether nothing is left to do: trained, handed back as it lies here, and its end done."""
    result = run.result()
    done = run.state() == "finished" and result is not None
    return done and not run.differences() and not exported_damage(run, result or {}) and not finish.pending(run, job)


def _must_have_secrets(job: Job) -> None:
    if missing := [name for name in secret_names(job.spec) if not os.environ.get(name)]:
        raise JobError(
            f"secrets of the job: {', '.join(missing)} is not set where the job runs. Export it before `orchestrator"
            " head` (or before `submit` on one machine); on Kubernetes kubernetes.secret brings it"
        )


def _begin(run: RunFolder, ready: Ready, say: Callable[[str], None]) -> None:
    """Write down what the run begins with; whoever calls it holds the run."""
    texts = {
        "origin.json": json.dumps({"folder": str(ready.job.folder)}),
        "capability.json": json.dumps(ready.capability.as_dict(), indent=1),
        "plan.json": ready.plan.to_json(),
        "data.json": json.dumps(ready.data_files | {"statistics": ready.statistics}, indent=1),
        "job.yaml": ready.job.text,
    }
    try:
        run.begin(texts, model_digests(Path(ready.data_files["model"]), say))
    except BadInput as error:
        raise JobError(f"model.model_name_or_path: {error}") from None


def prepare(
    job: Job,
    say: Callable[[str], None],
    declared: ClusterCapability | None = None,
    refresh: bool = False,
) -> Ready:
    """Find the model, tokenise the data, look at the machines and plan.  Raises JobError and NothingFits.

    `declared` machines take the place of the real ones; what only they could run may then be planned.
    """
    from orchestrator.data.prepare import prepare_data

    asked = job.spec.model
    model_folder = model_files.locate(
        asked.model_name_or_path, job.folder, asked.model_revision, say, asked.trust_remote_code
    )
    config = model_files.read_config(model_folder)
    for notice in workload.step_notices(job.spec):
        say(notice)
    shape = workload.trainable_shape(config)
    check_tokens(model_folder, shape.vocab_size)
    max_length, _ = planner.resolve_max_length(job.spec, config)
    capability = declared or _reached(job, say, refresh)
    data = prepare_data(job, model_folder, max_length, output_dir(job) / ".cache" / "data", say)
    train, held_out = data.train, data.held_out
    counts = counts_of(held_out)
    if held_out:
        repeated = train.overlap(held_out)
        if repeated:
            say(f"{repeated} of {len(held_out)} held-out samples also occur in the training data: scores will flatter")
    lengths, learnt = train.lengths.tolist(), int(train.num_supervised.sum())
    plan, work = _plan(job, config, shape, capability, lengths, learnt, counts)
    if declared is None or has_weights(model_folder):  # for other machines a config.json and a tokenizer are enough
        for notice in model_check.check_model(model_folder, job.spec.methods(), job.spec.model.trust_remote_code):
            say(notice)
    statistics = {"train": vars(train.statistics), "eval": vars(held_out.statistics) if held_out else None}
    return Ready(job, plan, capability, work, data.files, statistics)


def _reached(job: Job, say: Callable[[str], None], refresh: bool) -> ClusterCapability:
    asked = job.spec.cluster
    if asked.wait_for_slots and asked.address != "local":
        say(f"waiting for {asked.wait_for_slots} slots to train on ...")
    return machines.reached(asked.address, say, refresh, asked.wait_for_slots)


def counts_of(held_out: Any) -> HeldOut | None:
    """What planning needs to know of the held-out samples."""
    if held_out is None:
        return None
    return HeldOut(
        num_samples=len(held_out),
        num_tokens=int(held_out.lengths.sum()),
        longest_answer=int(held_out.num_supervised.max()),
        num_references=held_out.num_references,
        is_classification="classification" in held_out.statistics.formats,
    )


def plan_without_data(
    job: Job, declared: ClusterCapability | None, say: Callable[[str], None], refresh: bool = False
) -> Ready:
    """A plan from the model's config.json and the sizes of the data files alone: no torch, no tokenizer, in a second.

    Tokens are counted as bytes / 4 over the first rows, so times are rougher than those of `prepare`.
    """
    from orchestrator.data.sizes import rough_lengths

    config = model_files.config_of(job.spec.model.model_name_or_path, job.folder, job.spec.model.model_revision)
    for notice in workload.step_notices(job.spec):
        say(notice)
    shape = workload.model_shape(config)
    max_length, _ = planner.resolve_max_length(job.spec, config)
    lengths, learnt = rough_lengths(job, max_length, say=say)
    counts, lengths, learnt = _rough_held_out(job, max_length, lengths, learnt)
    capability = declared or _reached(job, say, refresh)
    plan, work = _plan(job, config, shape, capability, lengths, learnt, counts)
    statistics = {"train": None, "rough": f"{len(lengths)} rows of about {sum(lengths) / len(lengths):.0f} tokens"}
    return Ready(job, plan, capability, work, {}, statistics)


def _rough_held_out(
    job: Job, max_length: int, lengths: list[int], learnt: int
) -> tuple[HeldOut | None, list[int], int]:
    """Counts of the held-out rows, and what they leave of the training rows."""
    from orchestrator.data.sizes import rough_lengths

    asked = job.spec.data.eval
    if asked is None:
        return None, lengths, learnt
    if isinstance(asked, SplitOff):
        count = max(1, round(len(lengths) * asked.split))
        held, held_learnt = lengths[-count:], learnt * count // len(lengths)
        lengths, learnt = lengths[:-count] or lengths, learnt - held_learnt
    else:
        held, held_learnt = rough_lengths(job, max_length, "eval")
    mean_answer = held_learnt // len(held)
    return HeldOut(len(held), sum(held), 2 * mean_answer, len(held), False), lengths, learnt


def _plan(
    job: Job,
    config: dict[str, Any],
    shape: ModelShape,
    capability: ClusterCapability,
    lengths: list[int],
    num_supervised: int,
    counts: HeldOut | None,
) -> tuple[Plan, Workload]:
    max_length, why_length = planner.resolve_max_length(job.spec, config)
    priced = price.priced(job.spec, calibration.calibrated(capability, output_dir(job)))
    in_bank = _in_bank(job)

    def planned(spec: JobSpec, num_workers: int, why_workers: str | None) -> tuple[Plan, Workload]:
        work, _, why_batch = workload.describe(spec, shape, lengths, num_supervised, num_workers)
        if mistakes := workload.step_mistakes(spec, work.num_steps):
            raise JobError(mistakes)
        reasons = {
            "cluster.num_workers": why_workers,
            "data.max_length": why_length,
            "train.global_batch_size": why_batch,
            "train.num_train_epochs": next(iter(workload.step_notices(spec)), None),
        }
        known = {key: why for key, why in reasons.items() if why}
        try:
            plan = planner.make_plan(spec, work, priced, max_length, counts, known)
        except NothingFits as error:
            raise (NothingFits(f"{error}\n{in_bank_sentence(in_bank)}") if in_bank else error) from None
        return replace(plan, in_bank=in_bank), work

    num_slots = len(planner.slots_of(job.spec, capability))
    fixed = workload.workers_of_the_batch(job.spec, num_slots)
    if fixed not in (None, num_slots):
        return planned(spec_with(job.spec, {"cluster.num_workers": fixed}), fixed, "the stated parts of a step fix it")
    why = planner.resolve_workers(job.spec, capability.nodes[0])[1] if len(capability.nodes) == 1 else None
    plan, work = planned(job.spec, num_slots, why)
    if (
        workload.grows_with_workers(job.spec) and plan.num_workers != num_slots
    ):  # a step is so much a worker that trains
        fewer = spec_with(job.spec, {"cluster.num_workers": plan.num_workers})
        why = plan.reasons.get("cluster.num_workers", "the devices that together are best by the goal")
        return planned(fewer, plan.num_workers, why)
    return plan, work


def _in_bank(job: Job) -> tuple[InBank, ...]:
    """Adapters that were trained on this very data; most jobs have no bank, and look no further."""
    if not (job.path(job.spec.bank.path) / "objects").is_dir():
        return ()
    from orchestrator.bank.library import in_bank

    return in_bank(job)


def held_out_of(run: RunFolder, job: Job, other: Path | None, say: Callable[[str], None]) -> Any:
    """The held-out samples of a run, or those of another file read as the job reads its own."""
    from orchestrator.data.prepare import datasets, prepare_data

    if other is None:
        held_out = datasets(verified_files(run, job, say))[1]
        if held_out is None:
            raise JobError(f"{run.run_id} has no held-out rows; give some with --data FILE")
        return held_out
    model_folder, plan = Path(run.data()["model"]), run.plan()
    asked = job.spec.model_copy(
        update={"data": job.spec.data.model_copy(update={"train": str(other.absolute()), "eval": None})}
    )
    job = Job(asked, job.folder, job.text)
    cache = run.path.parent / ".cache" / "data"
    return prepare_data(job, model_folder, plan.techniques.max_length, cache, say).train


def look_at_data(job: Job, first: int, num_rows: int) -> dict[str, Any]:
    """What `inspect` shows."""
    from orchestrator.lifecycle.inspect_data import look

    model_folder = model_files.locate(job.spec.model.model_name_or_path, job.folder, job.spec.model.model_revision)
    max_length, _ = planner.resolve_max_length(job.spec, model_files.read_config(model_folder))
    return look(job, model_folder, max_length, first, num_rows)


def execute(run: RunFolder, job: Job, plan: Plan, capability: ClusterCapability, watcher: Watcher) -> None:
    """Start the workers, pass on what happens, mirror it, judge the end and do what follows it.

    Who calls it holds the run.  Raises RunFailed when the workers failed, were stopped, or did nothing; ClusterError
    when Ray cannot be reached.
    """
    run.stop_file.unlink(missing_ok=True)
    run.replan_file.unlink(missing_ok=True)
    _, offset = run.events()
    run.record("state", state="running", pid=os.getpid())
    mirror = Mirror(run, job)
    try:
        _train_on_ray(run, job, plan, capability, watcher, mirror, offset)
        _judge(run)
    except BaseException as error:
        stopped = any(e["event"] == "state" and e["state"] == "stopped" for e in run.events(offset)[0])
        if isinstance(error, OrchestratorError) and not stopped:
            run.record("state", state="failed", text=str(error))
        mirror.finish()
        for event in run.events(mirror.offset_at_start)[0]:
            if event["event"] == "tracking":
                watcher.event(event)
        raise
    finish.finish(run, job, watcher.event)


def _train_on_ray(
    run: RunFolder, job: Job, plan: Plan, capability: ClusterCapability, watcher: Watcher, mirror: Mirror, offset: int
) -> None:
    from clusters.ray.probe import wait_for_slots
    from orchestrator.training.workers.launch import launch

    address = job.spec.cluster.address
    watcher.say("starting Ray ..." if address == "local" else f"connecting to {address} ...")
    recovery = Recovery(
        run, job, plan, capability, lambda first, there: _plan_again(run, job, first, there), watcher.say
    )
    try:
        with contextlib.ExitStack() as until_the_end:
            if recovery.is_local and not recovery.hold_cards(until_the_end):
                return
            plan = recovery.plan
            gpus = planned_gpus(plan, recovery.capability) if recovery.is_local else ()
            connection = connect(address, plan.num_workers, plan.threads_per_worker, gpus=gpus)
            cluster = until_the_end.enter_context(connection)
            if job.spec.cluster.wait_for_slots and address != "local":
                wait_for_slots(job.spec.cluster.wait_for_slots)  # a run that goes on may meet a cluster that is young
            going: Plan | None = recovery.at_start()
            aside = Aside(run, plan, recovery.present())
            while going:
                attempt = partial(_attempt, launch, run, going, cluster.slot_resources, recovery)
                offset, error = _watch(InBackground(attempt), run, watcher, mirror, recovery, aside, offset)
                going = recovery.after(error)
                offset = _pass_on(run, watcher, offset)
    except CannotConnect as error:
        raise ClusterError(f"cluster.address: {error}. `local` runs on this machine") from error


def planned_gpus(plan: Plan, capability: ClusterCapability) -> list[DeviceCapability]:
    """The GPUs of a single machine that a plan trains on."""
    named = {part.uuid for part in plan.nodes if part.torch_device != "cpu"}
    gpus = [gpu for node in capability.nodes for gpu in node.gpus]
    return [gpu for gpu in gpus if gpu.uuid in named] if named - {None} else gpus[: len(plan.nodes) * bool(named)]


def _attempt(
    launch: Callable[..., None], run: RunFolder, plan: Plan, slot: dict[str, float], recovery: Recovery
) -> None:
    node_ids = recovery.node_ids()
    if recovery.wait_until_free(slot, node_ids):
        launch(run, plan, slot, node_ids)


def _watch(
    outcome: InBackground,
    run: RunFolder,
    watcher: Watcher,
    mirror: Mirror,
    recovery: Recovery,
    aside: Aside,
    offset: int,
) -> tuple[int, BaseException | None]:
    """Pass on what happens until the workers end; how far the events were read, and what went wrong."""
    asked_to_stop = False
    while True:
        try:
            offset = _pass_on(run, watcher, offset)
            mirror.now_and_then()
            aside.hear()
            if outcome.wait(_POLL_S):
                return _pass_on(run, watcher, offset), outcome.error
            recovery.look()
        except KeyboardInterrupt:
            if asked_to_stop:
                raise RunFailed(
                    f"killed. `orchestrator resume {run.run_id}` goes on from the last checkpoint"
                ) from None
            asked_to_stop = True
            run.stop_file.touch()
            watcher.say("stopping after this step and saving a checkpoint (Ctrl-C again kills)")


def _plan_again(run: RunFolder, job: Job, first: Plan, there: ClusterCapability) -> Plan:
    """The run's plan for other machines: the same method and steps, other hands."""
    from orchestrator.job.sections.methods import METHOD_SECTIONS
    from orchestrator.training.model.loading import load_data

    config = model_files.read_config(Path(run.data()["model"]))
    data, held_out = load_data(run)
    again, _ = _plan(
        fixed_job(job, first, METHOD_SECTIONS[first.method["type"]], len(planner.slots_of(job.spec, there))),
        config,
        workload.model_shape(config),
        there,
        data.lengths.tolist(),
        int(data.num_supervised.sum()),
        counts_of(held_out),
    )
    return keep_numbers(first, again)


class InBackground:
    """A call in a thread of its own, so that the main thread can watch and hear Ctrl-C."""

    def __init__(self, call: Callable[[], None]) -> None:
        self.error: BaseException | None = None
        self._call = call
        self._done = threading.Event()
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        try:
            self._call()
        except BaseException as error:  # kept for the main thread, which judges it
            self.error = error
        finally:
            self._done.set()

    def wait(self, seconds: float) -> bool:
        """Whether it has ended.  Not Thread.join: interrupted by Ctrl-C, that one takes the thread for ended."""
        return self._done.wait(seconds)


def _pass_on(run: RunFolder, watcher: Watcher, offset: int) -> int:
    events, offset = run.events(offset)
    for event in events:
        watcher.event(event)
    return offset


def _judge(run: RunFolder) -> None:
    """A run that trained no step, saved no checkpoint or handed nothing back has failed, whatever Ray says."""
    state, result = run.state_by_events(), run.result()
    if state == "stopped":
        raise Stopped(f"stopped as asked. `orchestrator resume {run.run_id}` goes on from the last checkpoint")
    if result is None and not run.steps():
        raise RunFailed(f"no step was trained; `orchestrator logs {run.run_id}` shows what the workers said")
    if not checkpoints.complete(run.checkpoints) or result is None or state != "finished":
        raise RunFailed(f"the workers ended without a result; `orchestrator logs {run.run_id}` shows what they said")
    if damage := exported_damage(run, result):
        raise RunFailed(f"{damage}. `orchestrator resume {run.run_id}` exports it again")


def output_dir(job: Job) -> Path:
    """The folder of runs: beside the caller, not beside the job file, so that a recipe's runs land where one works."""
    return resolve_path(job.spec.checkpoint.output_dir, "checkpoint.output_dir", kind="new folder")
