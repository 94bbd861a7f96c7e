"""One training worker: everything it needs stands in the run folder, everything it makes goes back there."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import logging
import math
import os
import shutil
import statistics
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from clusters import elsewhere
from clusters.energy import POWERCAP, Meter
from orchestrator.data.batches import collate
from orchestrator.data.dataset import Dataset
from orchestrator.data.order import Order
from orchestrator.data.packing import micro_batches
from orchestrator.data.prepare import datasets
from orchestrator.errors import JobError, RunFailed
from orchestrator.jobfile import Job
from orchestrator.plan import NodePlan, Plan
from orchestrator.rundir import RunFolder
from orchestrator.runs import checkpoints, digests
from orchestrator.runs.condition import check_model
from orchestrator.training import agreement, checkpoint, export, preflight
from orchestrator.training.agreement import Portrait
from orchestrator.training.evaluate import Answer, generate_answers, num_without_room
from orchestrator.training.loop import Hooks, Progress, Schedule, evaluate_loss, peak_bytes, resident_bytes, train
from orchestrator.training.metrics import how_compared, score
from orchestrator.training.parallel import Group
from orchestrator.training.shares import Shares
from strategies.architecture import LoadReport, faults
from strategies.contract import Techniques, TrainSettings, TrainSetup, TrainState
from strategies.sharding import shard
from strategies.state import gather
from strategies.step import forward_backward
from strategies.techniques import checkpointing, device_memory, document_attention, host_memory
from strategies.techniques.precision import autocast, gradient_scaler
from strategies.techniques.supervised_logits import can_chunk

log = logging.getLogger("orchestrator.worker")
T = TypeVar("T")

_STEPS_A_TRIM = 10
_OF_TRAINING = ("train_seconds", "time", "energy", "memory", "before")  # in result.json
_HELPER_S = 120.0  # that a finished training waits for the helper
_ROUNDING = {
    "float32": 1e-3,
    "bfloat16": 0.15,
    "float16": 0.05,
}  # packing_error of a model that does not leak stays below


def work(run: RunFolder, rank: int, size: int, node: str, slot: int) -> None:
    """Train the run's job to its end, or to where it is asked to stop, and write result.json.

    Raises OrchestratorError for what the user can mend.
    """
    job, plan = run.job(), run.plan()
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

    saved = checkpoint.newest(run.checkpoints, lambda text: record("note", text=text))
    if setup.engine and (saved or not job.spec.strategy.preflight):
        preflight.longest_batch(setup, data, techniques, plan.global_batch_size)  # makes the states that are restored
    if saved:
        saved.restore(setup)
        names = {name for name in Progress.__dataclass_fields__ if name in saved.state}
        progress = Progress(**{name: saved.state[name] for name in names})
        progress.stopped = "early" if progress.stopped == "early" else None  # it had ended; others go on
        record("note", text=f"resumed from checkpoint {saved.path.name}")
    else:
        progress = Progress()
    first_step = progress.step

    if progress.step == 0 and job.spec.strategy.preflight:
        checked = preflight.check(
            setup, data, held_out, techniques, plan.global_batch_size, run.path / f".preflight-{rank}"
        )
        record("preflight", **checked)

    order = Order(
        len(data),
        plan.global_batch_size,
        job.spec.train.seed,
        job.spec.train.num_train_epochs,
        job.spec.train.max_steps,
    )
    stay = job.spec.strategy.shares == "planned" or techniques.uses_engine
    shares = agree(group, plan, part, setup, data, order, techniques, progress.step, record, stay)

    if progress.before is None and progress.step == 0 and held_out and job.spec.eval.before and not plan.helper:
        progress.before = measure(job, plan, setup, tokenizer, held_out, techniques, group)
        record("quality", when="before", **_numbers(progress.before))

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
    energy = _counted(group.gather(vars(spent) if (spent := meter.read()) else None))

    if progress.stopped in ("asked", "replan"):
        record("state", state="stopped" if progress.stopped == "asked" else "replanning", step=progress.step)
        return
    choice = best_weights(run, plan, progress, setup, group, record)
    after = measure(job, plan, setup, tokenizer, held_out, techniques, group) if held_out else None
    held = gather(setup) if setup.sharding else None
    portrait = None
    if setup.streaming:
        setup.streaming.settle()
    if rank == 0 or setup.engine:  # an engine's workers compute together
        trained = held.weights if held else {} if setup.engine else setup.parameters
        portrait = agreement.portrait_of(setup.model, trained, agreement.probe(data, len(tokenizer)), techniques.dtype)
    if rank == 0 and portrait:
        progress.before = progress.before or (_of_helper(run, record) if plan.helper else None)
        check = _hand_back(run, job, plan, setup, techniques, tokenizer, held, portrait, device, record)
        result = _result(plan, progress, after, train_s, data)
        result["handed_back"] = handed_back(run, choice) | {"check": check}
        result["time"] = step_times(plan, [event["seconds"] for _, event in sorted(run.steps().items())])
        result["time"]["uuid"] = next(iter(_uuids(device)), None)
        result["energy"] = energy
        result["versions"] = versions()
        result["memory"] = {
            "predicted_bytes": part.memory.total_bytes,
            "predicted_low_bytes": part.memory.low_bytes,
            "predicted_high_bytes": part.memory.high_bytes,
            "measured_peak_bytes": train_peak_bytes,
            "libraries_bytes": libraries_bytes,
        }
        if progress.step == first_step and (earlier := run.result()):  # exported again: what training took stands there
            result |= {key: earlier[key] for key in _OF_TRAINING if key in earlier}
        run.keep("result.json", json.dumps(result, indent=1))
        if result["time"]["measured_step_s"]:
            record(
                "prediction",
                predicted_step_s=result["time"]["predicted_step_s"],
                measured_step_s=result["time"]["measured_step_s"],
                predicted_bytes=result["memory"]["predicted_bytes"],
                measured_peak_bytes=result["memory"]["measured_peak_bytes"],
            )
        if after:
            record("quality", when="after", **_numbers(after))
        record("state", state="finished", step=progress.step)


def best_weights(
    run: RunFolder, plan: Plan, progress: Progress, setup: TrainSetup, group: Group, record: Any
) -> checkpoints.Choice:
    """Bring the weights of the lowest held-out loss into the model, of those that verify; the same on every worker."""
    losses = {int(step): loss for step, loss in progress.eval_losses.items()} if plan.load_best_model_at_end else {}
    mine = checkpoints.choose(run.checkpoints, losses, progress.step) if group.rank == 0 else None
    choice = group.gather(mine)[0]
    if choice.step != progress.step:
        best = checkpoint.read(run.checkpoints / f"step-{choice.step:08d}", lambda text: record("note", text=text))
        if best is None:
            raise RunFailed(f"the checkpoint of step {choice.step} verifies on one machine and not on another")
        best.restore(setup, with_optimizer=False)
    if choice.text and (choice.reason or choice.step != progress.step):
        record("note", text=choice.text)
    return choice


def handed_back(run: RunFolder, choice: checkpoints.Choice) -> dict[str, Any]:
    """What result.json says of the exported files: whose weights they are, and their digests."""
    exported = run.exported()
    assert exported is not None  # it has just been written
    files = {name: dataclasses.asdict(digest) for name, digest in digests.of_folder(exported).items()}
    return {"folder": exported.name, **dataclasses.asdict(choice), "files": files}


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
    if stay:
        shares = Shares(planned, stay=True)
    else:
        shares = Shares.agreed(planned, [member["tokens_per_s"] for member in members])
    rounded = [round(share, 4) for share in shares.shares]
    record("group", step=step, plan=plan.hash, members=members, shares=rounded)
    return shares


def measured_pace(
    setup: TrainSetup, data: Dataset, sample_ids: list[int], share: float, techniques: Techniques
) -> float:
    """Tokens a second of one micro-batch of this worker, forward and backward; nothing is left behind."""
    lengths = data.lengths[sample_ids].tolist()
    part = max(1, round(share * len(sample_ids)))
    rows, max_length, packing = techniques.per_device_train_batch_size, techniques.max_length, techniques.packing
    members = micro_batches(lengths[:part], rows, max_length, packing)[0]
    device = next(iter(setup.parameters.values())).device
    batch = collate(data, [sample_ids[i] for i in members], packing).to(device)
    scaler = gradient_scaler(device.type, "float32")
    seconds = math.inf
    setup.model.train()
    for _ in range(2):  # the first one compiles kernels and fills caches
        began = time.perf_counter()
        forward_backward(setup, batch, 1, techniques, scaler).item()
        seconds = time.perf_counter() - began
    setup.optimizer.zero_grad(set_to_none=True)
    return sum(lengths[i] for i in members) / seconds


def load_data(run: RunFolder) -> tuple[Dataset, Dataset | None]:
    """Training and held-out samples that data.json names.  Raises DamagedCache, JobError."""
    return datasets(run.data())


def tokenizer_of(run: RunFolder, job: Job) -> Any:
    """The tokenizer of a run with the chat template that its samples were rendered with."""
    files = run.data()
    return load_tokenizer(files["model"], job, files.get("chat_template"))


def load_tokenizer(location: str, job: Job, chat_template: str | None = None) -> Any:
    """The tokenizer of a model; `chat_template` takes the place of its own."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(location, trust_remote_code=job.spec.model.trust_remote_code)
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    return tokenizer


def load_model(
    location: str,
    job: Job,
    dtype: str,
    device: torch.device,
    attn_implementation: str,
    arguments: dict[str, Any] | None = None,
) -> Any:
    """The pretrained model, in `dtype` on `device`."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as hf_logging

    hf_logging.disable_progress_bar()
    document_attention.register()
    model: Any
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            location,
            dtype=getattr(torch, dtype),
            attn_implementation=attn_implementation,
            trust_remote_code=job.spec.model.trust_remote_code,
            output_loading_info=True,
            **(arguments or {}),
        )
    except (ValueError, OSError, ImportError, KeyError, RuntimeError) as error:
        raise JobError(
            f"model.model_name_or_path: {location} cannot be loaded: {str(error).splitlines()[0]}"
        ) from error
    report = LoadReport.from_loading_info(info)
    if wrong := faults(report, [name for name, _ in model.named_parameters()], report.unexpected):
        raise JobError(f"model.model_name_or_path: {location}: {wrong}")
    return model if getattr(model, "is_quantized", False) else model.to(device)


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
        techniques = _without_leaks(model, job, techniques, device, record)
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
        elsewhere=elsewhere.reachable(),
    )
    try:
        setup = method.setup(model, settings)
    except (ValueError, KeyError) as error:
        raise JobError(f"method: {str(error).splitlines()[0]}") from error
    for text in setup.notes:
        record("note", text=text)
    if techniques.loss_type == "chunked_nll" and not can_chunk(setup.model):
        if job.spec.train.loss_type == "chunked_nll":
            raise JobError("train.loss_type: this model does more to its logits than a matrix product; set it to nll")
        record("note", text="this model does more to its logits than a matrix product; all are computed at once")
        techniques = dataclasses.replace(techniques, loss_type="nll")
    if techniques.gradient_checkpointing:
        checkpointing.enable(setup.model)
    if techniques.torch_compile:
        setup.model.compile(dynamic=True)
    return _divided(setup, job, plan, settings, device, record, group or Group()), techniques


def _divided(
    setup: TrainSetup, job: Job, plan: Plan, settings: TrainSettings, device: torch.device, record: Any, group: Group
) -> TrainSetup:
    """The training as the plan divides it among the workers."""
    from strategies.techniques.deepspeed_zero import CannotOffload, Options

    strategy = job.spec.strategy
    options = Options(strategy.deepspeed or {}, strategy.nvme_path, strategy.sync_dtype)
    try:
        parts = [part.techniques.state_part for part in plan.nodes]
        return shard(setup, settings, device, parts, lambda text: record("note", text=text), options, group.wire)
    except CannotOffload as error:
        raise JobError(str(error)) from error


def _without_leaks(model: Any, job: Job, techniques: Techniques, device: torch.device, record: Any) -> Techniques:
    """Check that packed documents stay apart, as they will be trained; fall back to what does keep them apart."""
    asked = job.spec.model.attn_implementation
    checked = model if model.device.type == device.type else document_attention.first_layers(model, device)
    for name in dict.fromkeys([techniques.attn_implementation, *(("sdpa", "eager") if asked == "auto" else ())]):
        checked.set_attn_implementation(name)
        checked.eval()
        with contextlib.suppress(ValueError, TypeError, RuntimeError), autocast(device.type, techniques.dtype):
            if document_attention.packing_error(checked) < _ROUNDING[techniques.dtype]:
                model.set_attn_implementation(name)
                if name != techniques.attn_implementation:
                    record(
                        "note",
                        text=f"this model does not run with {techniques.attn_implementation} attention; using {name}",
                    )
                return dataclasses.replace(techniques, attn_implementation=name)
    if job.spec.data.packing is True:
        raise JobError("data.packing: this model lets packed documents see each other; set data.packing: false")
    record("note", text="this model lets packed documents see each other; rows are padded instead")
    model.set_attn_implementation("sdpa" if asked in ("auto", "document") else asked)
    rows = max(1, techniques.micro_batch_tokens // techniques.max_length)
    return dataclasses.replace(techniques, packing=False, per_device_train_batch_size=rows, attn_implementation="sdpa")


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


def measure(
    job: Job,
    plan: Plan,
    setup: TrainSetup,
    tokenizer: Any,
    held_out: Dataset,
    techniques: Techniques,
    group: Group,
) -> dict[str, Any]:
    """Held-out loss, metrics of generated answers, and a few of them; workers share the rows."""
    began = time.perf_counter()
    quality: dict[str, Any] = {"eval_loss": evaluate_loss(setup, held_out, techniques, group), "rows": len(held_out)}
    if plan.metrics:
        indices = range(min(len(held_out), job.spec.eval.max_rows))
        mine = indices[group.rank :: group.size]
        dtype = techniques.dtype
        together = group if setup.engine else None
        mine_answered = generate_answers(setup.model, tokenizer, held_out, mine, plan.max_new_tokens, dtype, together)
        parts = group.gather(mine_answered)
        answers: list[Answer] = [answer for part in parts for answer in part]
        quality |= score(plan.metrics, [(answer.generated, answer.reference) for answer in answers])
        quality |= {"answers": len(answers), "compared": how_compared(plan.metrics)}
        if without_room := num_without_room(setup.model, held_out, indices):
            quality["without_room"] = without_room
        quality["samples"] = [dataclasses.asdict(answer) for answer in answers[: job.spec.eval.num_samples]]
    quality["seconds"] = round(time.perf_counter() - began, 2)
    return quality


def _numbers(quality: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in quality.items() if isinstance(value, int | float)}


def _of_helper(run: RunFolder, record: Any) -> dict[str, Any] | None:
    """What the machine that did not train measured; it has had the whole training for it."""
    until = time.monotonic() + _HELPER_S
    while (found := run.before()) is None and time.monotonic() < until:
        if run.read_json("before-failed.json") is not None:
            break
        time.sleep(0.5)
    if found is None:
        record("note", text="the untuned model was not measured: the machine that was to do it did not")
    return found


def _hand_back(
    run: RunFolder,
    job: Job,
    plan: Plan,
    setup: TrainSetup,
    techniques: Techniques,
    tokenizer: Any,
    held: TrainState | None,
    portrait: Portrait,
    device: torch.device,
    record: Any,
) -> dict[str, Any]:
    """Export beside the final place, check what was written against what was trained, then rename; what came of it.

    The trained model is let go of for the check.  Raises RunFailed where the two differ.
    """
    temporary, final = run.path / f"{setup.export_name}.tmp", run.path / setup.export_name
    for leftover in (temporary, final):
        if leftover.exists():
            shutil.rmtree(leftover)
    location = run.data()["model"]
    export.write(temporary, setup, held.weights if held else None, tokenizer, job, Path(location))
    is_engine, what = bool(setup.engine), f"the {setup.export_name}"
    setup.release()
    _free(device)
    load = partial(load_exported, temporary, location, job, plan, techniques, device)
    reason = agreement.no_room(portrait.bytes, device)
    try:
        found = None if reason else agreement.compare(portrait, temporary, load, what, is_engine)
    except (torch.OutOfMemoryError, MemoryError):
        found, reason = None, f"it does not fit on {device} beside what is there"
    found = found or agreement.without_logits(portrait, temporary, what, str(reason))
    temporary.rename(final)
    record("handed_back", text=found.text)
    return found.as_dict()


def load_exported(
    folder: Path, location: str, job: Job, plan: Plan, techniques: Techniques, device: torch.device, attention: str
) -> Any:
    """What a run handed back, in the precision it was trained in: a whole model, or by plain PEFT on its base."""
    method = plan.build_method()
    dtype = method.load_dtype(techniques)
    if not export.is_adapter(folder):
        return load_model(str(folder), job, dtype, device, attention)
    from peft import PeftModel

    base = load_model(location, job, dtype, device, attention, method.load_arguments(techniques))
    return PeftModel.from_pretrained(base, str(folder))


def _uuids(device: torch.device) -> tuple[str, ...]:
    """Of the card that really trains, as its driver writes it; none for a CPU."""
    return (f"GPU-{torch.cuda.get_device_properties(device).uuid}",) if device.type == "cuda" else ()


def _free(device: torch.device) -> None:
    """Give back what nobody refers to any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    else:
        host_memory.trim()


def _result(plan: Plan, progress: Progress, after: Any, train_s: float, data: Dataset) -> dict[str, Any]:
    return {
        "steps": progress.step,
        "tokens": progress.tokens,
        "supervised_tokens": progress.supervised_tokens,
        "train_seconds": round(train_s, 2),
        "stopped_early": progress.stopped == "early",
        "best_checkpoint": progress.best_checkpoint,
        "before": progress.before,
        "after": after,
        "data_digest": data.digest,
        "plan_hash": plan.hash,
    }


def steady(steps: Sequence[T]) -> Sequence[T]:
    """Without the first steps, which compile kernels and fill caches."""
    return steps[min(3, len(steps) // 2) :]


def step_times(plan: Plan, seconds: Sequence[float]) -> dict[str, Any]:
    """Predicted beside the median of the measured steps."""
    return {
        "predicted_step_s": plan.step_s,
        "formula_step_s": plan.step_s / plan.calibration,  # before what earlier runs taught
        "measured_step_s": statistics.median(steady(seconds)) if seconds else None,
        "device": plan.nodes[0].device,
        "uuid": plan.nodes[0].uuid,
        "dtype": plan.techniques.dtype,
    }


def _counted(told: list[dict[str, Any] | None]) -> dict[str, Any] | None:
    """Energy of this sitting's training over all workers; None unless every one of them could count it."""
    known = [one for one in told if one is not None]
    if len(known) < len(told):
        return None
    return {"wh": sum(one["wh"] for one in known), "source": " and ".join(sorted({one["source"] for one in known}))}


def versions() -> dict[str, str]:
    """What a run's numbers depend on beside its job."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for package in ("finetune-orchestrator", "torch", "transformers", "peft", "ray", "deepspeed", "bitsandbytes"):
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def _ignore(*_: Any, **__: Any) -> None:
    """Events of other ranks than 0: they would say the same."""
