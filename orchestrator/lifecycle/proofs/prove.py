"""A job or a run -> its workers, started for a few steps that leave nothing behind -> what they proved."""

from __future__ import annotations

import contextlib
import shutil
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from clusters.ray.connect import connect
from clusters.units import format_count, format_s
from orchestrator.data.order import Order
from orchestrator.errors import RunFailed
from orchestrator.job.job_file import Job
from orchestrator.lifecycle import machines
from orchestrator.lifecycle.background import run_in_background
from orchestrator.lifecycle.finish import mirror_again
from orchestrator.lifecycle.hooks import NO_BANK, BankHooks
from orchestrator.lifecycle.prepare import Ready, output_dir, prepare
from orchestrator.lifecycle.recovery import Recovery, replan
from orchestrator.lifecycle.run import begin_run
from orchestrator.lifecycle.verify import verified_files
from orchestrator.planning.plan import Plan
from orchestrator.runs.events import Note
from orchestrator.runs.proofs.proof import Proof, proofs_of, write_table
from orchestrator.runs.run_folder import RunFolder
from orchestrator.training.proofs.sample import ProofSample, choose_sample, uneven_shares

_FOLDER = ".verify"  # in the folder of runs: on a cluster all machines see it
Say = Callable[[str], None]


def prove_job(job: Job, say: Say, bank: BankHooks = NO_BANK) -> list[Proof]:
    """The proofs of a job, as it would be planned now.  Raises as `submit` does; nothing is left behind."""
    return _prove(prepare(job, say, bank=bank), None, say, bank)


def prove_run(run: RunFolder, say: Say, bank: BankHooks = NO_BANK) -> list[Proof]:
    """The proofs of a run with its plan, kept in its folder and sent to MLflow; the whole table.

    A run that has not ended keeps its proofs too.  Raises JobError where it is running, or its files were changed.
    """
    job = run.job()
    with run.lock():
        files = verified_files(run, job, say)
        nothing: Any = None  # of what only planning needs
        ready = Ready(job, run.plan(), run.capability(), nothing, files, files.statistics or {})
        for proof in _prove(ready, run if run.result() else None, say, bank):
            run.record(proof)
        write_table(run)
    if run.result():
        mirror_again(run, job, say)
    return proofs_of(run)


def _prove(ready: Ready, finished: RunFolder | None, say: Say, bank: BankHooks) -> list[Proof]:
    assert ready.data_files is not None
    ready, reasons = _with_two_workers(ready)
    sample = _sample(ready)
    say(
        f"{sample.num_steps} steps of {sample.rows_a_step} rows ({format_count(sample.num_tokens)} tokens), in several"
        f" ways: about {format_s(sample.expected_s)}"
    )
    with _scratch(ready, say) as run:
        error = _start(run, ready, _Wish(sample, finished and str(finished.path), reasons), say, bank)
        found = run.events_of(Proof)
    if error is not None:
        raise error
    if not found:
        raise RunFailed("the workers ended without a proof")
    return found


@dataclass(frozen=True)
class _Wish:
    """What the workers are to prove: the fields of `ProofWork`, which is imported with torch."""

    sample: ProofSample
    finished: str | None
    reasons: dict[str, str]


def _with_two_workers(ready: Ready) -> tuple[Ready, dict[str, str]]:
    """A plan with one CPU worker as two on the same machine, and why a check cannot be run where that is not so."""
    plan = ready.plan
    if plan.num_workers > 1:
        return ready, {}
    part = plan.nodes[0]
    if part.torch_device != "cpu":
        return ready, {"uneven": "one GPU here: a second process would need one of its own"}
    if part.techniques.uses_engine:
        return ready, {"uneven": "one machine, and DeepSpeed would divide the model among two processes"}
    if part.threads < 2:
        return ready, {"uneven": "one core here"}
    if part.memory_usable_bytes and 2 * part.memory.high_bytes > part.memory_usable_bytes:
        return ready, {"uneven": "one machine, and two copies of the model may not fit into its memory"}
    half = replace(part, threads=part.threads // 2)
    parts = tuple(replace(half, share=share) for share in uneven_shares((1.0, 1.0)))
    return replace(ready, plan=replace(plan, nodes=parts)), {}


def _sample(ready: Ready) -> ProofSample:
    from orchestrator.data.prepare import datasets

    assert ready.data_files is not None
    lengths = datasets(ready.data_files)[0].lengths.tolist()
    order = Order(len(lengths), len(lengths), ready.job.spec.train.seed, 1.0).sample_ids(0)
    return choose_sample(lengths, order, ready.plan)


@contextlib.contextmanager
def _scratch(ready: Ready, say: Say) -> Iterator[RunFolder]:
    """A run's folder for the length of the block, in which workers find what they find in a run's."""
    base = output_dir(ready.job) / _FOLDER
    run = RunFolder(base / f"{ready.job.spec.name}-{uuid.uuid4().hex[:8]}")
    run.logs.mkdir(parents=True)
    try:
        begin_run(run, ready, say)
        yield run
    finally:
        shutil.rmtree(run.path, ignore_errors=True)
        with contextlib.suppress(OSError):  # another one is at work
            base.rmdir()


def _start(run: RunFolder, ready: Ready, wish: _Wish, say: Say, bank: BankHooks) -> BaseException | None:
    """Start the workers as a run does and wait for their end; what went wrong."""
    job, address = ready.job, ready.job.spec.cluster.address
    recovery = Recovery(run, job, ready.plan, ready.capability, partial(replan, run, job, bank), say)
    with machines.cluster_errors(), contextlib.ExitStack() as stack:
        if recovery.is_local and not recovery.lock_gpus(stack):
            return RunFailed("stopped as asked")
        plan = recovery.plan
        gpus = machines.planned_gpus(plan, recovery.capability) if recovery.is_local else ()
        process = machines.worker_process(plan, job.spec.cluster.nice) if recovery.is_local else None
        say("starting Ray ..." if recovery.is_local else f"connecting to {address} ...")
        cluster = stack.enter_context(connect(address, plan.num_workers, plan.threads_per_worker, gpus, process))
        return _watch(run, plan, cluster.slot_resources, recovery, wish, say)
    return None


def _watch(
    run: RunFolder, plan: Plan, slot: dict[str, float], recovery: Recovery, wish: _Wish, say: Say
) -> BaseException | None:
    from orchestrator.training.proofs.work import ProofWork
    from orchestrator.training.workers.launch import launch

    work, offset = ProofWork(wish.sample, wish.finished, wish.reasons), 0

    def train() -> None:
        node_ids = recovery.node_ids()
        if recovery.wait_until_free(slot, node_ids):
            launch(run, plan, slot, node_ids, work)

    def poll() -> None:
        nonlocal offset
        events, offset = run.events(offset)
        for event in events:
            if isinstance(event, Proof):
                say(f"{event.title}: {event.outcome}")
            elif isinstance(event, Note):
                say(event.text)

    def interrupt() -> None:
        raise RunFailed("interrupted: nothing was kept") from None

    error = run_in_background(train, poll, interrupt)
    poll()
    return error
