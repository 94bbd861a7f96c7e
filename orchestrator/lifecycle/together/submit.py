"""Several jobs from their files to their results: those that share a base model train in one worker.

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
from orchestrator.lifecycle.background import run_in_background
from orchestrator.lifecycle.hooks import NO_BANK, BankHooks, Watcher
from orchestrator.lifecycle.recovery import Recovery, replan
from orchestrator.lifecycle.run import HeldRun, LiveRun, check_result, complete, hold
from orchestrator.lifecycle.together.share import Sharing, share
from orchestrator.planning.plan import Plan
from orchestrator.runs.events import ErrorReport
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
        for one in share([one for one in held.values() if one.plan is not None], say):
            if isinstance(one, HeldRun):
                place = places[one.run.run_id]
                with _outcome_in(found, place):
                    found[place] = complete(one, submissions[place].watcher, bank)
                continue
            watchers = [submissions[places[member.run.run_id]].watcher for member in one.runs]
            for member, outcome in zip(one.runs, _train_sharing(one, watchers, say, bank), strict=True):
                found[places[member.run.run_id]] = outcome
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


def _train_sharing(
    sharing: Sharing, watchers: Sequence[Watcher], say: Callable[[str], None], bank: BankHooks
) -> list[Outcome]:
    """Train runs in one worker, judge each by itself, and do what follows those that are finished."""
    runs = [
        LiveRun.begin(held.run, held.job, watcher, bank) for held, watcher in zip(sharing.runs, watchers, strict=True)
    ]
    error: BaseException | None
    try:
        error = _train_on_ray(runs, sharing, say)
    except BaseException as raised:
        error = raised
    found: list[Outcome] = []
    for live in runs:
        try:
            with live.judged():
                _judge(live, error)
            finish.finish(live.run, live.job, live.watcher.event, bank)
            found.append(live.run)
        except OrchestratorError as own:
            found.append(own)
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


def _train_on_ray(runs: Sequence[LiveRun], sharing: Sharing, say: Callable[[str], None]) -> BaseException | None:
    """Start Ray and the worker, and report of all runs until it ends; what went wrong with the worker itself."""
    first, held = runs[0], sharing.runs[0]
    assert held.plan is not None
    say("starting Ray ...")
    recovery = Recovery(
        first.run, first.job, held.plan, first.run.capability(), partial(replan, first.run, first.job, first.bank), say
    )
    with machines.cluster_errors(), contextlib.ExitStack() as stack:
        if not recovery.lock_gpus(stack):
            for live in runs[1:]:
                live.run.record_stop()
            return None
        plan = recovery.plan
        for one in sharing.runs:
            _follow(one, plan)
        gpus = machines.planned_gpus(plan, recovery.capability)
        process = machines.worker_process(plan, first.job.spec.cluster.nice)
        cluster = stack.enter_context(connect("local", 1, plan.threads_per_worker, gpus, process))
        return _watch(runs, plan, cluster.slot_resources, sharing)


def _follow(held: HeldRun, first: Plan) -> None:
    """Write into a run's plan the GPU that the first run's plan has now: another one may have been as good."""
    assert held.plan
    part, gpu = held.plan.nodes[0], first.nodes[0].uuid
    if part.uuid != gpu:
        held.run.keep("plan.json", replace(held.plan, nodes=(replace(part, uuid=gpu),)).to_json())


def _watch(runs: Sequence[LiveRun], plan: Plan, slot: dict[str, float], sharing: Sharing) -> BaseException | None:
    """Run the worker to its end and report meanwhile."""
    from orchestrator.training.together.worker import SharedWork
    from orchestrator.training.workers.launch import launch

    work = SharedWork(tuple(str(live.run.path) for live in runs), sharing.places, sharing.memory)

    def train() -> None:
        launch(runs[0].run, plan, slot, {}, work)

    def poll() -> None:
        for live in runs:
            live.report()
            live.mirror.send_if_due()

    def interrupt() -> None:
        for live in runs:
            live.interrupt()

    error = run_in_background(train, poll, interrupt)
    for live in runs:
        live.report()
    return error
