"""One training worker: everything it needs stands in the run folder, everything it makes goes back there."""

from __future__ import annotations

import contextlib
import time
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from clusters.hardware.energy import POWERCAP, Meter
from orchestrator.data.order import Order
from orchestrator.errors import RunFailed
from orchestrator.progress.updates import ProgressUpdate, every, report, reporting_to
from orchestrator.runs.events import Event, HandBack, PhaseProgress, PreflightReport, StepReport
from orchestrator.runs.run_folder import RunFolder
from orchestrator.training import checkpoint
from orchestrator.training.determinism import deterministic, resume_note
from orchestrator.training.loop import train
from orchestrator.training.memory import peak_bytes
from orchestrator.training.model import agreement, hand_back
from orchestrator.training.model.agreement import Portrait
from orchestrator.training.state import STOP_REQUESTS, Hooks, Progress, Training
from orchestrator.training.worker_context import RunSeat, WorkerContext
from orchestrator.training.workers import preflight, quality, result
from orchestrator.training.workers.pace import agree_on_shares, has_fixed_shares
from orchestrator.training.workers.result import TrainingOutcome
from orchestrator.training.workers.setup import Inputs, load_inputs, schedule_of, start_worker
from strategies.step import host_memory, thread_waits
from strategies.step.state import gather
from strategies.train_setup import TrainSetup, TrainState

_STEPS_A_TRIM = 10
_PROGRESS_S = 2.0  # between two records of how far a phase is


def work(run: RunFolder, rank: int, size: int, node: str, slot: int, seat: RunSeat | None = None) -> None:
    """Train the run's job to its end, or to where it is asked to stop, and write result.json.

    `seat` is its place where other runs train over the same base in this process.  Raises OrchestratorError for what
    the user can mend.
    """
    with deterministic(run.job().spec.train.deterministic):
        context = replace(start_worker(run, rank, size, node, slot), seat=seat)
        with _recording_progress(context):
            inputs = load_inputs(run, context)
            outcome = _train(run, context, inputs, _begin(run, context, inputs))
            stopped = outcome.progress.stopped
            if stopped not in STOP_REQUESTS:
                _hand_back(run, context, inputs, outcome)
            elif context.is_first:
                run.record_stop(stopped, outcome.progress.step)


def _recording_progress(context: WorkerContext) -> contextlib.AbstractContextManager[None]:
    """Inside the block the first worker records how far evaluations and saving are."""

    def record(update: ProgressUpdate) -> None:
        context.record(PhaseProgress(update.phase, update.done, update.total))

    return reporting_to(every(_PROGRESS_S, record)) if context.is_first else contextlib.nullcontext()


def _begin(run: RunFolder, context: WorkerContext, inputs: Inputs) -> Progress:
    """Continue from the newest checkpoint, or begin with the preflight."""
    job, setup, techniques = context.job, inputs.setup, inputs.techniques
    num_samples = preflight.num_samples_of(context.plan, context.part)
    saved = checkpoint.newest(run.checkpoints, context.note)
    if setup.engine and (saved or not job.spec.strategy.preflight):
        preflight.longest_batch(setup, inputs.data, techniques, num_samples)  # makes the states that are restored
    progress = Progress()
    if saved:
        saved.restore(setup)
        progress = Progress.from_dict(saved.state)
        devices = [node.torch_device for node in context.plan.nodes]
        equal = resume_note(devices, job.spec.train.deterministic, has_fixed_shares(job, techniques))
        context.note(f"resumed from checkpoint {saved.path.name} ({equal})")
    if progress.step == 0 and job.spec.strategy.preflight:
        _preflight(run, context, inputs, num_samples)
    return progress


def _preflight(run: RunFolder, context: WorkerContext, inputs: Inputs, num_samples: int) -> None:
    """Try what could fail later; left out where another run of this process has passed as much."""
    seat, folder = context.seat, run.path / f".preflight-{context.group.rank}"
    arguments = inputs.setup, inputs.data, inputs.held_out, inputs.techniques, num_samples, folder
    load = preflight.load_of(*arguments) if seat else None
    if seat and load and seat.has_passed(load):
        context.note("preflight: another run of this worker has passed batches as large, with weights of equal sizes")
        return
    context.record(PreflightReport(**preflight.check(*arguments)))
    if seat and load:
        seat.add_passed(load)


def _train(run: RunFolder, context: WorkerContext, inputs: Inputs, progress: Progress) -> TrainingOutcome:
    """Agree on shares, evaluate the base model where asked for, and train."""
    job, plan, spec = context.job, context.plan, context.job.spec.train
    order = Order(len(inputs.data), plan.global_batch_size, spec.seed, spec.num_train_epochs, spec.max_steps)
    shares = agree_on_shares(context, inputs, order, progress.step)
    if (
        progress.before is None
        and progress.step == 0
        and inputs.held_out
        and job.spec.eval.before
        and not plan.measuring
    ):
        progress.before = quality.measure_first(context, inputs)

    # The first worker of a node counts its CPUs, each worker its own GPU.
    meter = Meter(result.gpu_uuids(context.device), POWERCAP if context.slot == 0 else None)
    on_cpu, first_step, started = context.device.type == "cpu", progress.step, time.perf_counter()
    try:
        with _sharing(context, inputs) if context.seat else host_memory.kept() if on_cpu else contextlib.nullcontext():
            progress = train(
                Training(
                    inputs.setup,
                    inputs.data,
                    inputs.held_out,
                    order,
                    schedule_of(job, plan),
                    inputs.techniques,
                    context.group,
                    progress,
                    _hooks(run, context, inputs.setup, meter),
                    shares,
                    plan.local_batch_size,
                )
            )
    except FloatingPointError as error:
        raise RunFailed(
            f"{error}. Lower train.learning_rate or train.max_grad_norm, or set model.dtype: float32; `orchestrator"
            f" resume {run.run_id}` continues from the last checkpoint"
        ) from error
    seconds, peak = time.perf_counter() - started, peak_bytes(context.device)
    spent = meter.read()
    seat = context.seat  # where others compute meanwhile, in this process and beside it
    part = (seconds - seat.others_s) / seconds / seat.num_workers if seat else 1.0
    energy = result.sum_energy(context.group.gather({**vars(spent), "wh": part * spent.wh} if spent else None))
    return TrainingOutcome(progress, first_step, seconds, peak, energy)


def _sharing(context: WorkerContext, inputs: Inputs) -> contextlib.AbstractContextManager[None]:
    """Inside the block passes are shared with the other runs of this process."""
    assert context.seat
    return context.seat.joined(inputs.setup, inputs.techniques, context.note)


def _hooks(run: RunFolder, context: WorkerContext, setup: TrainSetup, meter: Meter) -> Hooks:
    """How the loop records into the run's folder, saves there, and is asked to stop."""

    def record(event: Event) -> None:
        if context.seat and isinstance(event, StepReport):
            event = context.seat.attributed(event)
        context.record(event)
        if isinstance(event, StepReport) and (text := thread_waits.report_change()):
            context.note(text)
        if isinstance(event, StepReport) and event.step % _STEPS_A_TRIM == 0:
            meter.read()
            if context.device.type == "cpu":
                host_memory.trim()

    def stop_request() -> str | None:
        return "asked" if run.stop_file.exists() else "replan" if run.replan_file.exists() else None

    return Hooks(record, partial(_save_checkpoint, run, context, setup), stop_request)


def _save_checkpoint(run: RunFolder, context: WorkerContext, setup: TrainSetup, progress: Progress) -> str | None:
    """Write a checkpoint and delete those that are no longer kept; its name, on the first worker."""
    held = gather(setup)
    if not context.is_first or held is None:
        return None
    report("saving", 0)
    state = {**progress.as_dict(), "plan_hash": context.plan.hash, "torch": torch.__version__}
    try:
        path = checkpoint.save(run.checkpoints, held, state)
    except OSError as error:
        complete = checkpoint.newest(run.checkpoints, lambda text: None)
        kept = f"step {complete.step} is safe in {complete.path}" if complete else "there is none before it"
        raise RunFailed(
            f"the checkpoint of step {progress.step} cannot be written: {error.strerror or error}; {kept}. Free some"
            f" space, then `orchestrator resume {run.run_id}`"
        ) from error
    checkpoint.prune(run.checkpoints, context.job.spec.checkpoint.save_total_limit, progress.best_checkpoint)
    return path.name


def _hand_back(run: RunFolder, context: WorkerContext, inputs: Inputs, outcome: TrainingOutcome) -> None:
    """Write the best weights and result.json, evaluate the model, then check what was written."""
    setup, progress = inputs.setup, outcome.progress
    choice = hand_back.best_weights(run, context, progress, setup)
    # Loading, writing and generating take longer than a collective of a step.
    context = replace(context, group=context.group.patient())
    held = gather(setup) if setup.sharding else None
    hand_back.free_optimizer(setup)
    portrait = _portrait(context, inputs, held)
    found: dict[str, Any] = {}
    report("saving", 0)
    if context.is_first and portrait:
        written = hand_back.write(run, context.job, setup, inputs.tokenizer, held, portrait)
        found = result.result_of(run, context, inputs, outcome)
        found["handed_back"] = hand_back.describe_export(run, choice) | {"check": written.as_dict()}
        result.write_result(run, found, outcome)
    context.group.gather(None)  # nobody waits inside a pass for the first worker to have written
    known_loss = progress.eval_losses.get(str(choice.step))
    after = quality.measure_last(run, context, inputs, known_loss) if inputs.held_out else None
    if context.is_first and portrait:
        checked = hand_back.check(run, context, setup, inputs.techniques, portrait)
        context.record(HandBack(checked.text))
        context.record(checked.as_proof(f"the {setup.export_folder}"))
        found["before"] = progress.before or (quality.wait_for_helper(run, context) if context.plan.measuring else None)
        found["after"] = after
        found["handed_back"]["check"] = checked.as_dict()
        result.write_result(run, found, outcome)
        result.record_result(run)


def _portrait(context: WorkerContext, inputs: Inputs, held: TrainState | None) -> Portrait | None:
    """What the model that will be loaded again is compared with; workers that share the model compute it together."""
    setup, group = inputs.setup, context.group
    if not context.is_first and not setup.passes:
        return None
    own = setup.written() if setup.written else setup.parameters
    weights = held.weights if held else {} if setup.passes else own
    probe = agreement.probe(inputs.data, len(inputs.tokenizer))
    portrait = agreement.portrait_of(setup.model, weights, probe, inputs.techniques.dtype, setup.passes)
    if not inputs.techniques.stage:
        return portrait
    own = [float(portrait.bytes) if replica == group.replica else 0.0 for replica in range(group.num_replicas)]
    return replace(portrait, bytes=int(group.sum(own)[group.replica]))  # of all stages
