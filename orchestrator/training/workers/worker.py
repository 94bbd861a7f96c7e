"""One training worker: everything it needs stands in the run folder, everything it makes goes back there."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import time
from typing import Any, TypeVar

import torch

from clusters.hardware.energy import POWERCAP, Meter
from clusters.ray import remote_objects
from orchestrator.data.batches import collate
from orchestrator.data.dataset import Dataset
from orchestrator.data.order import Order
from orchestrator.data.packing import micro_batches
from orchestrator.errors import JobError, RunFailed
from orchestrator.job.job_file import Job
from orchestrator.planning.plan import NodePlan, Plan
from orchestrator.runs.condition import check_model
from orchestrator.runs.run_folder import RunFolder
from orchestrator.training import checkpoint
from orchestrator.training.determinism import deterministic, resume_note
from orchestrator.training.loop import Hooks, Progress, Schedule, peak_bytes, resident_bytes, train
from orchestrator.training.model import agreement, hand_back
from orchestrator.training.model.kernels import with_loss_that_runs, without_leaks
from orchestrator.training.model.loading import load_data, load_model, tokenizer_of
from orchestrator.training.out_of_memory import is_out_of_memory, release_cache
from orchestrator.training.parallel import Group
from orchestrator.training.shares import Shares
from orchestrator.training.workers import preflight, quality
from strategies.contract import Techniques, TrainSettings, TrainSetup
from strategies.engines.shard import shard
from strategies.step import device_memory, host_memory
from strategies.step.state import gather
from strategies.step.step import forward_backward
from strategies.techniques import checkpointing
from strategies.techniques.precision import gradient_scaler

log = logging.getLogger("orchestrator.worker")
T = TypeVar("T")

_STEPS_A_TRIM = 10


def work(run: RunFolder, rank: int, size: int, node: str, slot: int) -> None:
    """Train the run's job to its end, or to where it is asked to stop, and write result.json.

    Raises OrchestratorError for what the user can mend.
    """
    job, plan = run.job(), run.plan()
    with deterministic(job.spec.train.deterministic):
        _work(run, job, plan, rank, size, node, slot)


def _work(run: RunFolder, job: Job, plan: Plan, rank: int, size: int, node: str, slot: int) -> None:
    part = plan.part_of(node, slot)
    device = torch.device("cpu" if part.torch_device == "cpu" else "cuda:0")  # it sees its own GPU and no other
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.set_num_threads(part.threads)
    device_memory.limit(device, part.memory_usable_bytes)
    group = group_of(rank, size, plan)
    record = run.record if rank == 0 else _ignore
    began = time.perf_counter()
    libraries_bytes = resident_bytes(device)
    data, held_out = load_data(run)
    if slot == 0:
        check_model(run)
    location = run.data()["model"]
    setup, techniques = prepare(job, plan, part, location, device, record, group)
    record("ready", seconds=round(time.perf_counter() - began, 2), trainable=plan.num_trainable_parameters)
    tokenizer = tokenizer_of(run, job)

    stay = job.spec.strategy.shares == "planned" or job.spec.train.deterministic or techniques.uses_engine
    samples = preflight.num_samples_of(plan, part)
    saved = checkpoint.newest(run.checkpoints, lambda text: record("note", text=text))
    if setup.engine and (saved or not job.spec.strategy.preflight):
        preflight.longest_batch(setup, data, techniques, samples)  # makes the states that are restored
    if saved:
        saved.restore(setup)
        names = {name for name in Progress.__dataclass_fields__ if name in saved.state}
        progress = Progress(**{name: saved.state[name] for name in names})
        progress.stopped = "early" if progress.stopped == "early" else None  # it had ended; others go on
        equal = resume_note([node.torch_device for node in plan.nodes], job.spec.train.deterministic, stay)
        record("note", text=f"resumed from checkpoint {saved.path.name} ({equal})")
    else:
        progress = Progress()
    first_step = progress.step

    if progress.step == 0 and job.spec.strategy.preflight:
        checked = preflight.check(setup, data, held_out, techniques, samples, run.path / f".preflight-{rank}")
        record("preflight", **checked)

    order = Order(
        len(data),
        plan.global_batch_size,
        job.spec.train.seed,
        job.spec.train.num_train_epochs,
        job.spec.train.max_steps,
    )
    shares = agree(group, plan, part, setup, data, order, techniques, progress.step, record, stay)

    if progress.before is None and progress.step == 0 and held_out and job.spec.eval.before and not plan.helper:
        progress.before = quality.measure_first(job, plan, setup, tokenizer, held_out, techniques, group, record=record)

    def save(now: Progress) -> str | None:
        held = gather(setup)
        if rank or held is None:
            return None
        state = {**now.as_dict(), "plan_hash": plan.hash, "torch": torch.__version__}
        try:
            path = checkpoint.save(run.checkpoints, held, state)
        except OSError as error:
            whole = checkpoint.newest(run.checkpoints, lambda text: None)
            kept = f"step {whole.step} is safe in {whole.path}" if whole else "there is none before it"
            raise RunFailed(
                f"the checkpoint of step {now.step} cannot be written: {error.strerror or error}; {kept}. Free some"
                f" space, then `orchestrator resume {run.run_id}`"
            ) from error
        checkpoint.prune(run.checkpoints, job.spec.checkpoint.save_total_limit, now.best_checkpoint)
        return path.name

    def reported(event: str, **fields: Any) -> None:
        record(event, **fields)
        if event == "step" and fields["step"] % _STEPS_A_TRIM == 0:
            meter.read()
            if device.type == "cpu":
                host_memory.trim()

    def wish() -> str | None:
        return "asked" if run.stop_file.exists() else "replan" if run.replan_file.exists() else None

    hooks = Hooks(reported, save, wish)
    # The first worker of a node counts its CPUs, each worker its own card.
    meter = Meter(_uuids(device), POWERCAP if slot == 0 else None)
    started = time.perf_counter()
    try:
        with host_memory.kept() if device.type == "cpu" else contextlib.nullcontext():
            if not progress.stopped:
                progress = train(
                    setup,
                    data,
                    held_out,
                    order,
                    schedule_of(job, plan),
                    techniques,
                    group,
                    progress,
                    hooks,
                    shares,
                    plan.local_batch_size,
                )
    except FloatingPointError as error:
        raise RunFailed(
            f"{error}. Lower train.learning_rate or train.max_grad_norm, or set model.dtype: float32; `orchestrator"
            f" resume {run.run_id}` goes on from the last checkpoint"
        ) from error
    train_s, train_peak_bytes = time.perf_counter() - started, peak_bytes(device)
    energy = hand_back.counted_energy(group.gather(vars(spent) if (spent := meter.read()) else None))

    if progress.stopped in ("asked", "replan"):
        record("state", state="stopped" if progress.stopped == "asked" else "replanning", step=progress.step)
        return
    choice = hand_back.best_weights(run, plan, progress, setup, group, record)
    group = group.patient()  # loading, writing and generating take longer than a collective of a step
    held = gather(setup) if setup.sharding else None
    hand_back.free_optimizer(setup)
    portrait = None
    if rank == 0 or setup.engine:  # an engine's workers compute together
        trained = held.weights if held else {} if setup.engine else setup.parameters
        portrait = agreement.portrait_of(setup.model, trained, agreement.probe(data, len(tokenizer)), techniques.dtype)
    result: dict[str, Any] = {}
    trained_now = progress.step != first_step
    if rank == 0 and portrait:
        checked = hand_back.write(run, job, setup, tokenizer, held, portrait)
        result = hand_back.result_of(plan, progress, train_s, data)
        result["handed_back"] = hand_back.handed_back(run, choice) | {"check": checked.as_dict()}
        result["time"] = hand_back.step_times(plan, [event["seconds"] for _, event in sorted(run.steps().items())])
        result["time"]["uuid"] = next(iter(_uuids(device)), None)
        result["energy"] = energy
        result["versions"] = hand_back.versions()
        result["memory"] = {
            "predicted_bytes": part.memory.total_bytes,
            "predicted_low_bytes": part.memory.low_bytes,
            "predicted_high_bytes": part.memory.high_bytes,
            "measured_peak_bytes": train_peak_bytes,
            "libraries_bytes": libraries_bytes,
        }
        hand_back.keep_result(run, result, trained_now)
    group.gather(None)  # nobody waits inside a pass for the first worker to have written
    after = None
    if held_out:
        after = quality.measure_last(run, job, plan, setup, tokenizer, held_out, techniques, group, record)
    if rank == 0 and portrait:
        checked = hand_back.check(run, job, plan, setup, techniques, portrait, device)
        record("handed_back", text=checked.text)
        before = progress.before or (quality.measured_by_helper(run, record) if plan.helper else None)
        result |= {"before": before, "after": after}
        result["handed_back"]["check"] = checked.as_dict()
        hand_back.keep_result(run, result, trained_now)
        if result["time"]["measured_step_s"]:
            record(
                "prediction",
                predicted_step_s=result["time"]["predicted_step_s"],
                measured_step_s=result["time"]["measured_step_s"],
                predicted_bytes=result["memory"]["predicted_bytes"],
                measured_peak_bytes=result["memory"]["measured_peak_bytes"],
            )
        if after:
            record("quality", when="after", **quality.numbers_of(after))
        record("state", state="finished", step=progress.step)


def group_of(rank: int, size: int, plan: Plan) -> Group:
    """This worker's place in the group, and how sums travel in it."""
    if size == 1:
        return Group()
    return Group(
        rank=rank,
        size=size,
        wire=torch.device("cuda" if plan.backend == "nccl" else "cpu"),
        sync_dtype=getattr(torch, plan.sync.dtype),
        bucket_bytes=plan.sync.bucket_bytes,
        alike=len({(part.device, part.techniques.dtype) for part in plan.nodes}) == 1,
    )


def agree(
    group: Group,
    plan: Plan,
    part: NodePlan,
    setup: TrainSetup,
    data: Dataset,
    order: Order,
    techniques: Techniques,
    step: int,
    record: Any,
    stay: bool,
) -> Shares:
    """Every worker measures itself on its part of the next step and tells the others; shares follow from that."""
    if group.size == 1:
        return Shares([1.0])
    sample_ids = order.sample_ids(min(step, order.num_steps - 1))  # a run that only hands back has no next step
    mine = {
        "node": part.node,
        "device": part.device,
        "pid": os.getpid(),
        "planned_share": part.share,
        # Under DeepSpeed a worker cannot run a pass by itself, and all are alike.
        "tokens_per_s": None if setup.engine else measured_pace(setup, data, sample_ids, part.share, techniques),
        "plan": plan.hash,
    }
    members = group.gather(mine)
    if len({member["plan"] for member in members}) > 1:
        raise RunFailed(
            "the workers read different plans: is the run folder the same on every machine? "
            + ", ".join(f"{member['node']}: {member['plan']}" for member in members)
        )
    planned = [member["planned_share"] for member in members]
    paces = [member["tokens_per_s"] for member in members]
    shares = Shares(planned, stay=stay) if stay or None in paces else Shares.agreed(planned, paces)
    rounded = [round(share, 4) for share in shares.shares]
    record("group", step=step, plan=plan.hash, members=members, shares=rounded)
    return shares


def measured_pace(
    setup: TrainSetup, data: Dataset, sample_ids: list[int], share: float, techniques: Techniques
) -> float | None:
    """Tokens a second of one micro-batch of this worker, forward and backward; nothing is left behind.

    A micro-batch that runs out of memory is halved; None where not even one sample fits, for which training finds
    another way.
    """
    lengths = data.lengths[sample_ids].tolist()
    part = max(1, round(share * len(sample_ids)))
    rows, max_length, packing = techniques.per_device_train_batch_size, techniques.max_length, techniques.packing
    members = micro_batches(lengths[:part], rows, max_length, packing)[0]
    pace = None
    while members and pace is None:
        try:
            seconds = _pass_s(setup, data, [sample_ids[i] for i in members], techniques)
            pace = sum(lengths[i] for i in members) / seconds
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        setup.optimizer.zero_grad(set_to_none=True)
        if pace is None:
            release_cache()
            members = members[: len(members) // 2]
    return pace


def _pass_s(setup: TrainSetup, data: Dataset, sample_ids: list[int], techniques: Techniques) -> float:
    """Seconds of a pass forward and backward."""
    device = next(iter(setup.parameters.values())).device
    batch = collate(data, sample_ids, techniques.packing).to(device)
    scaler = gradient_scaler(device.type, "float32")
    seconds = math.inf
    setup.model.train()
    for _ in range(2):  # the first one compiles kernels and fills caches
        began = time.perf_counter()
        forward_backward(setup, batch, 1, techniques, scaler).item()
        seconds = time.perf_counter() - began
    return seconds


def prepare(
    job: Job, plan: Plan, part: NodePlan, location: str, device: torch.device, record: Any, group: Group | None = None
) -> tuple[TrainSetup, Techniques]:
    """The model set up for the planned method, and the techniques as this model really supports them."""
    method, techniques = plan.build_method(), part.techniques
    arguments = method.load_arguments(techniques)
    # What DeepSpeed divides or keeps on the host never lies whole on the device.
    first = torch.device("cpu") if techniques.uses_engine else device
    model = load_model(location, job, method.load_dtype(techniques), first, techniques.attn_implementation, arguments)
    if techniques.packing:
        techniques = without_leaks(model, job, techniques, device, record)
    train = job.spec.train
    settings = TrainSettings(
        learning_rate=train.learning_rate,
        weight_decay=train.weight_decay,
        optim=plan.optim,
        adam_beta1=train.adam_beta1,
        adam_beta2=train.adam_beta2,
        adam_epsilon=train.adam_epsilon,
        techniques=techniques,
        seed=train.seed,
        start_remote=remote_objects.reachable(),
    )
    try:
        setup = method.setup(model, settings)
    except (ValueError, KeyError) as error:
        raise JobError(f"method: {str(error).splitlines()[0]}") from error
    techniques = with_loss_that_runs(setup.model, job, techniques, record)
    if techniques.gradient_checkpointing:
        checkpointing.enable(setup.model)
    if techniques.torch_compile:
        setup.model.compile(dynamic=True)
    setup = _divided(setup, job, plan, settings, device, group or Group())
    for text in setup.notes:
        record("note", text=text)
    return setup, techniques


def _divided(
    setup: TrainSetup, job: Job, plan: Plan, settings: TrainSettings, device: torch.device, group: Group
) -> TrainSetup:
    """The training as the plan divides it among the workers."""
    from strategies.engines.deepspeed_zero import CannotOffload, Options

    strategy = job.spec.strategy
    options = Options(strategy.deepspeed or {}, strategy.nvme_path, strategy.sync_dtype)
    try:
        parts = [part.techniques.state_part for part in plan.nodes]
        return shard(setup, settings, device, parts, options, group.wire)
    except CannotOffload as error:
        raise JobError(str(error)) from error


def schedule_of(job: Job, plan: Plan) -> Schedule:
    """When things happen in a planned job."""
    train = job.spec.train
    return Schedule(
        lr_factor=lr_factor(train.lr_scheduler_type, plan.num_steps, train.warmup_ratio, train.warmup_steps),
        max_grad_norm=train.max_grad_norm,
        seed=train.seed,
        save_steps=plan.save_steps,
        eval_steps=plan.eval_steps,
        early_stopping_patience=job.spec.eval.early_stopping_patience,
    )


def lr_factor(name: str, num_steps: int, warmup_ratio: float, warmup_steps: int) -> Any:
    """Learning rate over its peak as a function of the step, by transformers' schedule of that name.

    A pure function of the step: a resumed run needs no scheduler state.
    """
    from transformers import get_scheduler

    warmup = warmup_steps or round(warmup_ratio * num_steps)
    throwaway = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    throwaway.step()  # the scheduler's first step expects one
    scheduler: Any = get_scheduler(name, throwaway, num_warmup_steps=warmup, num_training_steps=num_steps)
    factor = scheduler.lr_lambdas[0]
    return (lambda step: factor(step + 1)) if warmup else factor  # step 0 of a warm-up would train with rate 0


def _uuids(device: torch.device) -> tuple[str, ...]:
    """Of the card that really trains, as its driver writes it; none for a CPU."""
    return (f"GPU-{torch.cuda.get_device_properties(device).uuid}",) if device.type == "cuda" else ()


def _ignore(*_: Any, **__: Any) -> None:
    """Events of other ranks than 0: they would say the same."""
