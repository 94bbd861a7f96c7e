"""Sets up a worker: its device and group, the base model with the planned method, data, tokenizer, schedule."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from clusters.ray import remote_objects
from clusters.safe.reading import first_line
from orchestrator.data.dataset import Dataset
from orchestrator.errors import JobError, bad_input_as_job_error
from orchestrator.job.job_file import Job
from orchestrator.planning.plan import Plan
from orchestrator.planning.workload import warmup_of
from orchestrator.runs.condition import check_model, model_digests
from orchestrator.runs.digests import FileDigest
from orchestrator.runs.events import ModelReady
from orchestrator.runs.record import few
from orchestrator.runs.run_folder import RunFolder
from orchestrator.training.memory import resident_bytes
from orchestrator.training.metrics import refuse_tokenizer
from orchestrator.training.model.kernels import row_multiple, with_known_layers, with_loss_that_runs, without_leaks
from orchestrator.training.model.loading import (
    Placing,
    load_data,
    load_layers,
    load_model,
    refuse_conversion,
    tokenizer_of,
)
from orchestrator.training.model.references import attach_references
from orchestrator.training.parallel import ProcessGroup
from orchestrator.training.state import Schedule
from orchestrator.training.worker_context import WorkerContext, ignore_event
from strategies.contract import Method
from strategies.engines.shard import shard
from strategies.model.heads import inner_model
from strategies.optimizers import OPTIMIZERS
from strategies.pipeline.cut import CannotCut, load_stage
from strategies.pipeline.self_check import check_family
from strategies.pipeline.stages import WholeExport, make_stage
from strategies.schedules import lr_factor
from strategies.step import device_memory, thread_waits
from strategies.step.quantise import quantise_on
from strategies.step.weight_stream import stream_weights
from strategies.techniques import checkpointing
from strategies.techniques.embedding_noise import EmbeddingNoise
from strategies.techniques.liger import use_liger
from strategies.train_setup import SampleLoss, TrainSettings, TrainSetup
from strategies.workload import Techniques


@dataclass(frozen=True)
class Inputs:
    """What a worker trains: the model set up, its tokenizer and the samples."""

    setup: TrainSetup
    techniques: Techniques  # as this model really supports them
    tokenizer: Any
    data: Dataset
    held_out: Dataset | None
    libraries_bytes: int = 0  # memory of the process before anything was loaded


def start_worker(run: RunFolder, rank: int, size: int, node: str, slot: int) -> WorkerContext:
    """This process as one worker of a run: its device with its limit, its threads, its group."""
    plan = run.plan()
    part = plan.part_of(node, slot)
    device = torch.device("cpu" if part.torch_device == "cpu" else "cuda:0")  # it sees its own GPU and no other
    if device.type == "cuda":
        torch.cuda.set_device(device)
    thread_waits.use_threads(part.threads)
    device_memory.limit(device, part.memory_usable_bytes)
    record = run.record if rank == 0 else ignore_event
    group = group_of(rank, size, plan)
    return WorkerContext(run.job(), plan, part, run.data().model, device, group, slot, record, run_path=run.path)


def load_inputs(run: RunFolder, context: WorkerContext, rows: Sequence[int] | None = None) -> Inputs:
    """Load samples, model and tokenizer of a run; with `rows` these training samples alone.

    Raises OrchestratorError.
    """
    started, libraries_bytes = time.perf_counter(), resident_bytes(context.device)
    data, held_out = load_data(run)
    if rows is not None:
        data, held_out = data.select(rows), None
    refuse_tokenizer(context.job.spec.eval.tokenizer, context.plan.metrics)
    if context.group.size > 1:
        refuse_unlike_models(context)
    if context.slot == 0:
        check_model(run)
    if context.part.techniques.stage:
        refuse_wrong_family(context)
    setup, techniques = prepare_model(context, len(data))
    attach_references(context, setup, techniques, data, held_out, run.path)
    seconds = round(time.perf_counter() - started, 2)
    context.record(ModelReady(seconds, context.plan.num_trainable_parameters))
    return Inputs(setup, techniques, tokenizer_of(run, context.job), data, held_out, libraries_bytes)


def refuse_unlike_models(context: WorkerContext) -> None:
    """Raises JobError, on all workers, where two nodes hold different base models: stages of both would be no model.

    The first worker of each node reads it.  Collective.
    """
    own: dict[str, FileDigest] | None = None
    if context.slot == 0:
        with bad_input_as_job_error("model.model_name_or_path"):
            own = model_digests(Path(context.model_folder))
    members = context.group.gather((context.part.node, context.model_folder, own))
    (first, folder, expected), *others = (member for member in members if member[2] is not None)
    unlike = []
    for node, other, files in others:
        if names := sorted(n for n in {*expected, *files} if expected.get(n) != files.get(n)):
            unlike.append(f"{other} on {node} ({few(names)})")
    if unlike:
        raise JobError(
            f"model.model_name_or_path: {folder} on {first} is not the model of {', '.join(unlike)}. Copy it from one"
            " machine to the others"
        )


def refuse_wrong_family(context: WorkerContext) -> None:
    """Raises JobError, on all workers, where models of this family come out wrong in stages.

    The first worker tries it, on a small model of the same configuration.  Collective.
    """
    reason: str | None = None
    if context.is_first:
        try:
            check_family(Path(context.model_folder))
        except CannotCut as error:
            reason = str(error)
    if reason := context.group.gather(reason)[0]:
        raise JobError(f"model.model_name_or_path: {reason}")


def group_of(rank: int, size: int, plan: Plan) -> ProcessGroup:
    """This worker's place in the group, and how sums travel in it."""
    if size == 1:
        return ProcessGroup()
    return ProcessGroup(
        rank=rank,
        size=size,
        wire=torch.device("cuda" if plan.backend == "nccl" else "cpu"),
        sync_dtype=getattr(torch, plan.sync.dtype),
        bucket_bytes=plan.sync.bucket_bytes,
        alike=len({(part.device, part.techniques.dtype) for part in plan.nodes}) == 1,
        replica_of=plan.replica_of,
    )


def train_settings(
    job: Job, plan: Plan, techniques: Techniques, start_remote: Callable[..., Any] | None = None
) -> TrainSettings:
    """What a method needs to know of a job to build its optimizer."""
    train = job.spec.train
    return TrainSettings(
        learning_rate=train.learning_rate,
        weight_decay=train.weight_decay,
        optim=plan.optim,
        adam_beta1=train.adam_beta1,
        adam_beta2=train.adam_beta2,
        adam_epsilon=train.adam_epsilon,
        techniques=techniques,
        seed=train.seed,
        num_steps=plan.num_steps,
        start_remote=start_remote,
        warmup_steps=warmup_of(job.spec, plan.num_steps),
    )


def prepare_model(context: WorkerContext, num_samples: int = 0) -> tuple[TrainSetup, Techniques]:
    """The model set up for the planned method, and the techniques as this model really supports them.

    `num_samples` of the training data, where it is to train.
    """
    method, group = context.plan.build_method(), context.group
    model, techniques = _load_base(context, method)
    settings = train_settings(context.job, context.plan, techniques, remote_objects.reachable())
    settings = replace(settings, num_samples=num_samples)
    try:
        setup = method.setup(model, settings)
        techniques = with_loss_that_runs(setup.model, techniques, context)
        if techniques.stage:
            export = WholeExport(Path(context.model_folder), method, settings)
            make_stage(setup, settings, [group.ranks_of(replica) for replica in range(group.num_replicas)], export)
    except (ValueError, KeyError) as error:
        raise JobError(f"method: {first_line(error)}") from error
    if techniques.gradient_checkpointing:
        checkpointing.enable(setup.model)
    if techniques.streams_weights:
        stream_weights(setup, context.device)
    if techniques.torch_compile:
        setup.model.compile(dynamic=True)
    setup = _divide(context, setup, settings)
    setup.objective = loss_of(context.plan)
    _regularise(context.job, setup)
    techniques = with_known_layers(setup, techniques, context)
    setup.row_multiple = row_multiple(setup, techniques)
    for text in setup.notes:
        context.note(text)
    return setup, techniques


def _regularise(job: Job, setup: TrainSetup) -> None:
    """What makes training passes harder than evaluation: noise on embeddings, labels that are not certain."""
    train = job.spec.train
    setup.label_smoothing = train.label_smoothing_factor
    if train.neftune_noise_alpha:
        embedding = inner_model(setup.model).get_input_embeddings()
        setup.noise = EmbeddingNoise(embedding, train.neftune_noise_alpha, train.seed)


def loss_of(plan: Plan) -> SampleLoss | None:
    """The loss of an objective over whole documents; None where supervised tokens are trained."""
    if not plan.build_objective().is_by_document:
        return None
    from strategies.objectives.losses import build_loss

    return build_loss(plan.build_objective())


def _load_base(context: WorkerContext, method: Method) -> tuple[Any, Techniques]:
    """The base model, or this worker's stage of it, and the techniques with an attention that it supports."""
    job, techniques, folder = context.job, context.part.techniques, context.model_folder
    # What DeepSpeed divides or what stays on the host never lies whole on the device.
    on_host = techniques.uses_engine or techniques.streams_weights
    dtype, arguments = method.load_dtype(techniques), method.load_arguments(techniques)
    placed = Placing(
        dtype, torch.device("cpu") if on_host else context.device, techniques.attn_implementation, arguments
    )
    if techniques.streams_weights and context.device.type == "cpu":
        refuse_conversion(Path(folder), dtype)
    visits = method.is_quantised and techniques.streams_weights and context.device.type != "cpu"
    supported = techniques

    def checked(model: Any) -> Any:
        nonlocal supported
        if techniques.liger_kernel:
            use_liger(model)
        supported = without_leaks(model, techniques, context) if techniques.packing else techniques
        return model

    def load_part(kind: Any, config: Any, tensors: dict[str, torch.Tensor]) -> tuple[Any, dict[str, Any]]:
        model, info = load_layers(kind, config, tensors, placed)
        return checked(model), info

    def load() -> Any:
        return load_model(folder, job, placed)

    with quantise_on(context.device) if visits else contextlib.nullcontext():
        if techniques.stage:
            return load_stage(Path(folder), techniques.stage, load_part), supported
        return checked(context.seat.copy_base(load) if context.seat else load()), supported


def _divide(context: WorkerContext, setup: TrainSetup, settings: TrainSettings) -> TrainSetup:
    """The training as the plan divides it among the workers."""
    from strategies.engines.deepspeed_zero import CannotOffload, DeepSpeedOptions

    strategy = context.job.spec.strategy
    options = DeepSpeedOptions(strategy.deepspeed or {}, strategy.nvme_path, strategy.sync_dtype)
    parts = [part.techniques.state_part for part in context.plan.nodes]
    try:
        return shard(setup, settings, context.device, parts, options, context.group.wire)
    except CannotOffload as error:
        raise JobError(str(error)) from error


def schedule_of(job: Job, plan: Plan) -> Schedule:
    """When things happen in a planned job."""
    train = job.spec.train
    kind, options, warmup = train.lr_scheduler_type, train.lr_scheduler_kwargs, warmup_of(job.spec, plan.num_steps)
    if OPTIMIZERS[plan.optim].averages:  # it lets its rate rise itself
        kind, options, warmup = "constant", {}, 0
    return Schedule(
        lr_factor=lr_factor(kind, options, train.learning_rate, plan.num_steps, warmup),
        max_grad_norm=train.max_grad_norm,
        seed=train.seed,
        save_steps=plan.save_steps,
        eval_steps=plan.eval_steps,
        early_stopping_patience=job.spec.eval.early_stopping_patience,
    )
