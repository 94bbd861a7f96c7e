"""The whole path of a job in one file: a newcomer starts here.

    job.yaml -> JobSpec -> model, data, machines -> Workload -> Plan -> Ray Train workers -> result -> MLflow

`prepare` (prepare.py) does everything that can fail before anything starts; `execute` starts the workers and watches
them.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from pathlib import Path

from clusters.capability import ClusterCapability, NodeCapability
from clusters.ray import resident
from clusters.ray.connect import CannotConnect, Connection, connect
from orchestrator.errors import JobError, OrchestratorError, RunFailed, Stopped, bad_input_as_job_error
from orchestrator.job.job_file import Job
from orchestrator.job.scoring.functions import keep_files
from orchestrator.job.secrets import secret_names
from orchestrator.lifecycle import finish, machines
from orchestrator.lifecycle.background import load_in_background, run_in_background
from orchestrator.lifecycle.baseline_helper import BaselineHelper
from orchestrator.lifecycle.hooks import NO_BANK, BankHooks, Watcher
from orchestrator.lifecycle.prepare import Ready, output_dir, prepare
from orchestrator.lifecycle.recovery import Recovery, replan
from orchestrator.lifecycle.stages.spare import StandBy
from orchestrator.lifecycle.verify import check_same_job, is_handed_back, verified_files
from orchestrator.planning.plan import Plan
from orchestrator.runs import checkpoints
from orchestrator.runs.condition import exported_damage, model_digests
from orchestrator.runs.events import ModelReady, Note, StateChange, TrackingReport
from orchestrator.runs.mirror.tracking import Mirror
from orchestrator.runs.run_folder import RunFolder
from orchestrator.runs.summary.summary_file import summary_of


def submit(job: Job, watcher: Watcher, run_id: str | None = None, bank: BankHooks = NO_BANK) -> RunFolder:
    """Run a job from its file to its evaluated result.  Raises OrchestratorError; see errors.py for the exit codes.

    A `run_id` that exists continues where it stands: the same command after a crash loses nothing.  JobError where that
    run is of other settings or other data, or where another process holds it.
    """
    with contextlib.ExitStack() as stack:
        return complete(hold(stack, job, watcher, run_id, bank), watcher, bank)


def resume(run: RunFolder, watcher: Watcher, job: Job | None = None, bank: BankHooks = NO_BANK) -> RunFolder:
    """Continue from the newest checkpoint that verifies, with the plan the run was started with; or finish its end.

    `job` is by default the run's own.  Raises JobError where it is another one, or where the files that the run began
    with were changed.
    """
    with contextlib.ExitStack() as stack:
        return complete(_hold_started(stack, run, watcher, job), watcher, bank)


@dataclass(frozen=True)
class HeldRun:
    """A run that this process holds, and the plan that is to be carried out; None where only its end is left."""

    run: RunFolder
    job: Job
    plan: Plan | None


def hold(
    stack: contextlib.ExitStack, job: Job, watcher: Watcher, run_id: str | None = None, bank: BankHooks = NO_BANK
) -> HeldRun:
    """Prepare a job and begin its run, or find the run that exists; it is held until the stack ends.  As `submit`."""
    _check_secrets(job)
    known = RunFolder(output_dir(job) / run_id) if run_id else None
    if known is None or not known.has_started:
        if run_id:
            RunFolder.check_free(output_dir(job), run_id)  # before the work of preparing; `take` decides
        ready = prepare(job, watcher.say, bank=bank)
        with contextlib.ExitStack() as attempt:
            run = attempt.enter_context(RunFolder.take(output_dir(job), job.spec.name, run_id))
            if not run.has_started:
                begin_run(run, ready, watcher.say)
                watcher.planned(run, job, ready.plan, ready.statistics)
                stack.enter_context(attempt.pop_all())
                return HeldRun(run, job, ready.plan)
        known = run  # another process was faster
    return _hold_started(stack, known, watcher, job)


def _hold_started(stack: contextlib.ExitStack, run: RunFolder, watcher: Watcher, job: Job | None) -> HeldRun:
    """Hold a run that has begun; as `resume`."""
    stack.enter_context(run.lock())
    run.restore(watcher.say)
    if job:
        check_same_job(run, job)
    job = job or run.job()
    for key in run.free_changes():
        watcher.say(f"{key} was changed since the run began; it is used as it is now")
    if is_handed_back(run, watcher.say):
        return HeldRun(run, job, None)
    files, plan = verified_files(run, job, watcher.say), run.plan()
    watcher.planned(run, job, plan, files.statistics or {})
    return HeldRun(run, job, plan)


def leaves_workers_open(job: Job, plan: Plan) -> bool:
    """Whether a job leaves it to the planner how many workers its CPU has, with how many threads."""
    cluster = job.spec.cluster
    is_open = cluster.address == "local" and cluster.num_workers == job.spec.train.threads == "auto"
    return is_open and plan.nodes[0].torch_device == "cpu" and plan.num_workers == 1


def node_of(held: HeldRun) -> NodeCapability:
    """The machine that a run was planned for."""
    assert held.plan
    name = held.plan.nodes[0].node
    return next(node for node in held.run.capability().nodes if node.name == name)


def with_part_of_cpu(held: HeldRun, num_workers: int, bank: BankHooks) -> Plan:
    """A run's plan for one of so many workers side by side: one that is left of several gets the whole CPU again.

    Nothing is written.  Raises JobError and NothingFits where the run does not fit its part.
    """
    assert held.plan
    if not leaves_workers_open(held.job, held.plan) or (node := node_of(held)).gpus:
        return held.plan
    part = node.part_of_cpu(num_workers)
    if held.plan.nodes[0].threads == part.num_cores:
        return held.plan
    again = replan(held.run, held.job, bank, held.plan, ClusterCapability((part,)))
    return replace(again, phases=again.phases.with_preparation(held.plan.phases.preparation_s))


def keep_plan(before: HeldRun, held: HeldRun, num_workers: int) -> str | None:
    """Write a run's plan for one of so many workers side by side, and say so; None where it is the one of before."""
    if held.plan is None or held.plan is before.plan:
        return None
    held.run.keep("plan.json", held.plan.to_json())
    cores = f"{held.plan.threads_per_worker} of {node_of(held).num_cores} cores"
    text = f"planned again for {cores}; workers side by side: {num_workers}"
    held.run.record(Note(text))
    return text


def complete(held: HeldRun, watcher: Watcher, bank: BankHooks = NO_BANK) -> RunFolder:
    """Do what is left of a run; one that was planned beside others has all cores again."""
    if held.plan is None:
        finish.finish(held.run, held.job, watcher.event, bank)
        return held.run
    plan = with_part_of_cpu(held, 1, bank)
    if said := keep_plan(held, replace(held, plan=plan), 1):
        watcher.say(said)
    execute(held.run, held.job, plan, held.run.capability(), watcher, bank)
    return held.run


def is_complete(run: RunFolder, job: Job) -> bool:
    """Whether nothing is left to do: trained, handed back as it lies here, and its end done."""
    result = run.result()
    if run.state() != "finished" or result is None:
        return False
    return not run.differences() and not exported_damage(run, result) and not finish.pending(run, job)


def _check_secrets(job: Job) -> None:
    if missing := [name for name in secret_names(job.spec) if not os.environ.get(name)]:
        raise JobError(
            f"secrets of the job: {', '.join(missing)} is not set where the job runs. Export it before `orchestrator"
            " head` (or before `submit` on one machine); on Kubernetes kubernetes.secret brings it"
        )


def begin_run(run: RunFolder, ready: Ready, say: Callable[[str], None]) -> None:
    """Write down what the run begins with; the caller holds the run."""
    assert ready.data_files is not None  # a run is prepared
    texts = {
        "origin.json": json.dumps({"folder": str(ready.job.folder)}),
        "capability.json": json.dumps(ready.capability.as_dict(), indent=1),
        "plan.json": ready.plan.to_json(),
        "data.json": replace(ready.data_files, statistics=ready.statistics).to_json(),
        "job.yaml": ready.job.text,
    }
    keep_files(ready.plan.metrics, ready.job.folder, run.path)
    with bad_input_as_job_error("model.model_name_or_path"):
        run.begin(texts, model_digests(Path(ready.data_files.model), say))


def execute(
    run: RunFolder,
    job: Job,
    plan: Plan,
    capability: ClusterCapability,
    watcher: Watcher,
    bank: BankHooks = NO_BANK,
) -> None:
    """Start the workers, report what happens, mirror it, judge the end and do what follows it.

    The caller holds the run.  Raises RunFailed when the workers failed, were stopped, or did nothing; ClusterError when
    Ray cannot be reached.
    """
    live = LiveRun.begin(run, job, watcher, bank)
    with live.judged():
        _train_on_ray(live, plan, capability)
        check_result(run)
    finish.finish(run, job, watcher.event, bank)


@dataclass
class LiveRun:
    """A run while its workers train: who watches it, where it is mirrored, how far its events were read."""

    run: RunFolder
    job: Job
    watcher: Watcher
    bank: BankHooks
    mirror: Mirror
    offset: int
    is_interrupted: bool = False
    began_at: int = 0  # how far its events were when this began

    @classmethod
    def begin(cls, run: RunFolder, job: Job, watcher: Watcher, bank: BankHooks = NO_BANK) -> LiveRun:
        """Record that it runs, in this process."""
        run.stop_file.unlink(missing_ok=True)
        run.replan_file.unlink(missing_ok=True)
        _, start = run.events()
        run.record(StateChange("running", pid=os.getpid()))
        return cls(run, job, watcher, bank, Mirror(run, job), start, began_at=start)

    @contextlib.contextmanager
    def judged(self) -> Iterator[None]:
        """Record a failure of the block, unless the run was stopped, and send it to MLflow."""
        try:
            yield
        except BaseException as error:
            events = self.run.events(self.began_at)[0]
            stopped = any(isinstance(event, StateChange) and event.state == "stopped" for event in events)
            if isinstance(error, OrchestratorError) and not stopped:
                self.run.record(StateChange("failed", text=str(error)))
            self.mirror.finish()
            for event in self.run.events(self.mirror.offset_at_start)[0]:
                if isinstance(event, TrackingReport):
                    self.watcher.event(event)
            raise
        self.mirror.close("finished")
        self.report()

    def report(self) -> None:
        """Pass new events to the watcher."""
        events, self.offset = self.run.events(self.offset)
        for event in events:
            self.watcher.event(event)
            if isinstance(event, ModelReady):  # workers have loaded what they need, and the driver only watches
                load_in_background(self.mirror.load)

    def interrupt(self) -> None:
        """The first Ctrl-C asks the workers to save and stop, the second kills them.  Raises RunFailed."""
        if self.is_interrupted:
            raise RunFailed(
                f"killed. `orchestrator resume {self.run.run_id}` continues from the last checkpoint"
            ) from None
        self.is_interrupted = True
        self.run.stop_file.touch()
        self.watcher.say("stopping after this step and saving a checkpoint (Ctrl-C again kills)")


def _train_on_ray(live: LiveRun, plan: Plan, capability: ClusterCapability) -> None:
    from clusters.ray.probe import wait_for_slots

    run, job, say = live.run, live.job, live.watcher.say
    address = job.spec.cluster.address
    recovery = Recovery(run, job, plan, capability, partial(replan, run, job, live.bank), say)
    with machines.cluster_errors(), contextlib.ExitStack() as stack:
        if recovery.is_local and not recovery.lock_gpus(stack):
            return
        plan = recovery.plan
        gpus = machines.planned_gpus(plan, recovery.capability) if recovery.is_local else ()
        process = machines.worker_process(plan, job.spec.cluster.nice) if recovery.is_local else None
        load_in_background(partial(import_module, "orchestrator.training.workers.launch"))  # while Ray starts
        reach = partial(connect, address, plan.num_workers, plan.threads_per_worker, gpus, process)
        cluster = _connect_to_resident(stack, job, plan, reach, say) if recovery.is_local else None
        if cluster is None:
            say("starting Ray ..." if recovery.is_local else f"connecting to {address} ...")
            cluster = stack.enter_context(reach())
        if job.spec.cluster.wait_for_slots and address != "local":
            wait_for_slots(job.spec.cluster.wait_for_slots)  # a resumed run may meet a cluster that is just starting
        next_plan: Plan | None = recovery.at_start()
        helper, spares = BaselineHelper(run, plan, recovery.present()), StandBy(run)
        while next_plan:
            spares.begin(next_plan, recovery.present())
            error = _attempt(live, next_plan, cluster.slot_resources, recovery, (helper, spares))
            next_plan = recovery.after(error)
            live.report()


def _connect_to_resident(
    stack: contextlib.ExitStack,
    job: Job,
    plan: Plan,
    reach: Callable[..., contextlib.AbstractContextManager[Connection]],
    say: Callable[[str], None],
) -> Connection | None:
    """Connect to the Ray that this user keeps on this machine; None where a job is to start its own, which is said."""
    found = resident.find() if job.spec.cluster.resident else None
    if found is None:
        return None
    with contextlib.ExitStack() as attempt:
        reason = resident.why_not(found, plan.num_workers, job.spec.cluster.nice)
        if reason is None and not attempt.enter_context(resident.taken()):
            reason = "another job uses it"
        if reason is None:
            try:
                cluster = attempt.enter_context(reach(resident=found))
                reason = machines.lacking_here(plan.num_workers, cluster.slot_resources)
            except CannotConnect as error:
                reason = str(error)
            else:
                if reason is None:
                    say(f"using the Ray of `orchestrator head` at {found.address} (cluster.resident: false does not)")
                    stack.enter_context(attempt.pop_all())
                    return cluster
    say(f"not using the Ray of `orchestrator head` at {found.address}: {reason}")
    return None


def _attempt(
    live: LiveRun, plan: Plan, slot: dict[str, float], recovery: Recovery, beside: tuple[BaselineHelper, StandBy]
) -> BaseException | None:
    """Run the workers of a plan to their end and report meanwhile; what went wrong."""
    from orchestrator.training.workers.launch import launch

    def train() -> None:
        node_ids = recovery.node_ids()
        if recovery.wait_until_free(slot, node_ids):
            launch(live.run, plan, slot, node_ids)

    def poll() -> None:
        live.report()
        live.mirror.send_if_due()
        for one in beside:
            one.poll()
        recovery.look()

    live.is_interrupted = False
    error = run_in_background(train, poll, live.interrupt)
    live.report()
    return error


def check_result(run: RunFolder) -> None:
    """A run that trained no step, saved no checkpoint or handed nothing back has failed, whatever Ray says."""
    events, result = summary_of(run), run.result()  # a summary of a long run is there from its end on
    state = events.state_by_events
    if state == "stopped":
        raise Stopped(f"stopped as asked. `orchestrator resume {run.run_id}` continues from the last checkpoint")
    if result is None and events.last_step is None:
        raise RunFailed(f"no step was trained; `orchestrator logs {run.run_id}` shows what the workers reported")
    if not checkpoints.complete(run.checkpoints) or result is None or state != "finished":
        raise RunFailed(
            f"the workers ended without a result; `orchestrator logs {run.run_id}` shows what they reported"
        )
    if damage := exported_damage(run, result):
        raise RunFailed(f"{damage}. `orchestrator resume {run.run_id}` exports it again")
