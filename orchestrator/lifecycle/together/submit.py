"""Several jobs from their files to their results: those that share a base model train together.

A run folder each, as when they are submitted one by one, and the same command continues each where it stands.  What one
comes to does not stop the others.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

from clusters.ray.connect import connect
from orchestrator.errors import ClusterError, OrchestratorError, RunFailed, Stopped
from orchestrator.job.job_file import Job
from orchestrator.lifecycle import finish, machines
from orchestrator.lifecycle.background import run_in_background, run_side_by_side
from orchestrator.lifecycle.hooks import NO_BANK, BankHooks, Watcher
from orchestrator.lifecycle.recovery import Recovery, replan
from orchestrator.lifecycle.run import HeldRun, LiveRun, check_result, complete, hold
from orchestrator.lifecycle.together.share import Sharing, share
from orchestrator.planning.plan import Plan
from orchestrator.runs.events import ErrorReport
from orchestrator.runs.mirror.tracking import Mirrors
from orchestrator.runs.run_folder import RunFolder

Outcome = RunFolder | OrchestratorError


@dataclass(frozen=True)
class Submission:
    """One of the jobs, who watches it, and the id of its run; None = a new one."""

    job: Job
    watcher: Watcher
    run_id: str | None = None


def submit_together(
    submissions: Sequence[Submission], say: Callable[[str], None], bank: BankHooks = NO_BANK
) -> list[Outcome]:
    """Run the jobs; what each came to, in their order.

    Raises Stopped where the user asked for it, and ClusterError, which is none of theirs.
    """
    found: dict[int, Outcome] = {}
    with contextlib.ExitStack() as stack:
        held: dict[int, HeldRun] = {}
        for place, one in enumerate(submissions):
            with _outcome_in(found, place):
                held[place] = hold(stack, one.job, one.watcher, one.run_id, bank)
        places = {one.run.run_id: place for place, one in held.items()}
        for place, one in held.items():
            if one.plan is None:
                with _outcome_in(found, place):
                    found[place] = complete(one, submissions[place].watcher, bank)
        for one in share([one for one in held.values() if one.plan is not None], say, bank):
            if isinstance(one, HeldRun):
                place = places[one.run.run_id]
                with _outcome_in(found, place):
                    found[place] = complete(one, submissions[place].watcher, bank)
                continue
            workers = [
                WorkerRuns.begin(sharing, lambda member: submissions[places[member.run.run_id]].watcher, bank)
                for sharing in one
            ]
            for run_id, outcome in _train_sharing(workers, say, bank).items():
                found[places[run_id]] = outcome
    if stopped := next((one for one in found.values() if isinstance(one, Stopped)), None):
        raise stopped
    return [found[place] for place in range(len(submissions))]


@contextlib.contextmanager
def _outcome_in(found: dict[int, Outcome], place: int) -> Iterator[None]:
    """Keep an error of one job as what it came to."""
    try:
        yield
    except (Stopped, ClusterError):
        raise
    except OrchestratorError as error:
        found[place] = error


@dataclass(frozen=True)
class WorkerRuns:
    """A worker and its runs, which have begun."""

    sharing: Sharing
    runs: tuple[LiveRun, ...]

    @classmethod
    def begin(cls, sharing: Sharing, watcher_of: Callable[[HeldRun], Watcher], bank: BankHooks) -> WorkerRuns:
        """Begin its runs."""
        runs = (LiveRun.begin(held.run, held.job, watcher_of(held), bank) for held in sharing.runs)
        return cls(sharing, tuple(runs))


def _train_sharing(workers: Sequence[WorkerRuns], say: Callable[[str], None], bank: BankHooks) -> dict[str, Outcome]:
    """Train the runs of workers side by side, judge each by itself, and do what follows those that are finished."""
    errors: Sequence[BaseException | None]
    try:
        errors = _train_on_ray(workers, say)
    except BaseException as raised:
        errors = [raised] * len(workers)
    found: dict[str, Outcome] = {}
    for worker, error in zip(workers, errors, strict=True):
        for live in worker.runs:
            try:
                with live.judged():
                    _judge(live, error)
                finish.finish(live.run, live.job, live.watcher.event, bank)
                found[live.run.run_id] = live.run
            except OrchestratorError as own:
                found[live.run.run_id] = own
    for error in errors:
        if isinstance(error, ClusterError) or (error is not None and not isinstance(error, OrchestratorError)):
            raise error
    return found


def _judge(live: LiveRun, error: BaseException | None) -> None:
    """Raises what a run came to, where it is not finished: its own error before that of the worker."""
    run = live.run
    reports = [event for event in run.events(live.began_at)[0] if isinstance(event, ErrorReport)]
    if run.state_by_events() == "running" and reports:
        raise RunFailed(reports[-1].text)
    if run.state_by_events() == "running" and error is not None:
        raise error
    check_result(run)


def _train_on_ray(workers: Sequence[WorkerRuns], say: Callable[[str], None]) -> list[BaseException | None]:
    """Start Ray and the workers, and report of all runs until they end; what went wrong with each worker itself."""
    first, held = workers[0].runs[0], workers[0].sharing.runs[0]
    assert held.plan is not None
    say("starting Ray ...")
    recovery = Recovery(
        first.run, first.job, held.plan, first.run.capability(), partial(replan, first.run, first.job, first.bank), say
    )
    with machines.cluster_errors(), contextlib.ExitStack() as stack:
        if not recovery.lock_gpus(stack):
            for live in _runs_of(workers):
                if live is not first:
                    live.run.record_stop()
            return [None] * len(workers)
        plan = recovery.plan
        for one in workers[0].sharing.runs:
            _follow(one, plan)
        gpus = machines.planned_gpus(plan, recovery.capability)
        process = machines.worker_process(plan, first.job.spec.cluster.nice)
        cluster = stack.enter_context(connect("local", len(workers), plan.threads_per_worker, gpus, process))
        return _watch(workers, cluster.slot_resources)


def _runs_of(workers: Sequence[WorkerRuns]) -> list[LiveRun]:
    return [live for worker in workers for live in worker.runs]


def _follow(held: HeldRun, first: Plan) -> None:
    """Write into a run's plan the GPU that the first run's plan has now: another one may have been as good."""
    assert held.plan
    part, gpu = held.plan.nodes[0], first.nodes[0].uuid
    if part.uuid != gpu:
        held.run.keep("plan.json", replace(held.plan, nodes=(replace(part, uuid=gpu),)).to_json())


def _watch(workers: Sequence[WorkerRuns], slot: dict[str, float]) -> list[BaseException | None]:
    """Run the workers to their ends and report meanwhile; what went wrong with each."""
    from orchestrator.training.together.worker import SharedWork
    from orchestrator.training.workers.launch import launch

    def start(worker: WorkerRuns) -> Callable[[], None]:
        sharing, run = worker.sharing, worker.runs[0].run
        folders = tuple(str(live.run.path) for live in worker.runs)
        work = SharedWork(folders, sharing.places, sharing.memory, len(workers))
        return lambda: launch(run, run.plan(), slot, {}, work)

    errors: list[BaseException | None] = []

    def train() -> None:
        errors.extend(run_side_by_side([start(worker) for worker in workers]))

    mirrors = Mirrors([live.mirror for live in _runs_of(workers)])

    def poll() -> None:
        for live in _runs_of(workers):
            live.report()
        mirrors.send_if_due()

    def interrupt() -> None:
        for live in _runs_of(workers):
            live.interrupt()

    if own := run_in_background(train, poll, interrupt):
        raise own
    for live in _runs_of(workers):
        live.report()
    return errors
