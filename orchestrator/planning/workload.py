"""JobSpec + the model's config.json + counts of the data -> Workload."""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from clusters.units import format_bytes, format_s
from orchestrator.data.order import Order
from orchestrator.data.packing import micro_batches, padded_tokens
from orchestrator.errors import JobError
from orchestrator.job.spec import JobSpec
from orchestrator.planning.candidates import Candidate
from strategies import schedules
from strategies.compatibility import conflict
from strategies.config_values import UnknownArchitecture, longest_sequence, stored_quantised
from strategies.cost.reuse import WORTH, keeps_by_itself, ratio_of_step, stores_reference
from strategies.optimizers import OPTIMIZERS
from strategies.shape import ModelShape
from strategies.workload import Kept, Workload


def model_shape(config: dict[str, Any]) -> ModelShape:
    """The sizes in a config.json.  Raises JobError for a model that is not a decoder-only transformer."""
    if config.get("is_encoder_decoder") is True:
        raise JobError(
            "model.model_name_or_path: this is an encoder-decoder model; decoder-only language models are tuned here"
        )
    more = isinstance(config.get("text_config"), dict)
    way = ". It is of a model that reads more than text (text_config): give its text-only model" if more else ""
    try:
        if stored := stored_quantised(config):
            raise JobError(
                f"model.model_name_or_path: its weights are stored quantised ({stored}, by its config.json), and such"
                " a model is not trained here. Give the model it was made from; method: {type: qlora} quantises that"
                " one while it is loaded"
            )
        return ModelShape.from_config(config)
    except UnknownArchitecture as error:
        raise JobError(f"model.model_name_or_path: {error}{way}") from None
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise JobError(
            f"model.model_name_or_path: config.json does not describe a decoder-only language model: {error}{way}"
        ) from None


def max_positions(config: dict[str, Any]) -> int | None:
    """The longest sequence that a model has positions for; None where config.json does not say.  Raises JobError."""
    try:
        return longest_sequence(config)
    except ValueError as error:
        raise JobError(f"model.model_name_or_path: config.json does not describe a model: {error}") from None


def trainable_shape(config: dict[str, Any]) -> ModelShape:
    """The sizes of a model that can be trained here.  Raises JobError, also for an encoder, which is only planned."""
    shape = model_shape(config)
    if shape.family.encoder:
        raise JobError(
            f"model.model_name_or_path: {shape.model_type} is an encoder; it can be planned, not trained here"
        )
    return shape


def describe(
    spec: JobSpec,
    shape: ModelShape,
    lengths: list[int],
    num_supervised_tokens: int,
    num_workers: int,
    tree_ratio: Mapping[int, float] | None = None,
) -> tuple[Workload, Order, str | None]:
    """What there is to compute, the order of its samples, and the reason of the global batch size where it was open.

    `lengths` are those of documents: of a pair the chosen one's, then the rejected one's.
    """
    train, objective = spec.train, spec.build_objective()
    count, documents = objective.num_documents, lengths
    if not objective.writes_text:
        shape, num_supervised_tokens = _with_score(shape, objective.name), len(documents)  # a score each, no logits
    lengths = [sum(lengths[start : start + count]) for start in range(0, len(lengths), count)]
    padded = [count * max(documents[start : start + count]) for start in range(0, len(documents), count)]
    num_workers = 1 if spec.strategy.mode == "pipeline" else num_workers  # whose stages all see every sample
    global_batch_size, reason = _global_batch_size(spec, len(lengths), num_workers)
    global_batch_size *= spec.strategy.local_steps or 1  # all of them are one step as the run counts
    order = Order(len(lengths), global_batch_size, train.seed, train.num_train_epochs, train.max_steps)
    per_epoch, rest = divmod(order.num_steps, order.steps_per_epoch)
    workload = Workload(
        shape=shape,
        mean_square_length=sum(length * length for length in documents) / len(lengths),
        fullest_step_tokens=sum(heapq.nlargest(global_batch_size, lengths)),
        tree_ratio=tree_ratio or {},
        padded_ratio=_padded_ratios(lengths, padded, global_batch_size),
        num_samples=len(lengths),
        num_tokens=sum(lengths),
        num_supervised_tokens=num_supervised_tokens,
        longest_sample=max(padded),
        global_batch_size=global_batch_size,
        num_steps=order.num_steps,
        clips=train.max_grad_norm > 0,
        num_samples_seen=per_epoch * len(lengths) + min(rest * global_batch_size, len(lengths)),
        needs_reference=objective.needs_reference,
        needs_divergence=objective.needs_divergence,
    )
    return workload, order, reason


def _with_score(shape: ModelShape, objective: str) -> ModelShape:
    """The sizes of a model with a score.  Raises JobError for a family that has no such model."""
    try:
        return shape.with_score()
    except ValueError as error:
        raise JobError(f"objective.type {objective}: {error}; use another model") from None


def why_shared(chosen: Candidate, workload: Workload) -> str:
    """Why what a step's rows begin with alike is computed once, or is not."""
    part = chosen.placed[0]
    ratio, shared = ratio_of_step(replace(workload, share=part.share)), part.plan.computed_part
    if not workload.tree_ratio:
        return "the rows' tokens are not compared for a rough plan: `plan --exact` and `submit` do"
    counted = f"the rows of a step have {ratio:.2f} tokens for each one that is left when common beginnings count once"
    if part.plan.techniques.share_prefixes:
        return f"{counted}: {1 - shared:.0%} of the tokens are not computed"
    if ratio < WORTH:
        return f"{counted}: less than {WORTH} is not worth it"
    return f"{counted}, but {_conflict(chosen, workload, share_prefixes=True) or 'something else is faster'}"


def why_kept(chosen: Candidate, workload: Workload) -> str:
    """Why what frozen lower layers make of a sample is kept, or is not."""
    plan, epochs = chosen.placed[0].plan, workload.num_samples_seen / workload.num_samples
    if kept := plan.techniques.cache_frozen_activations:
        return _what_is_kept(chosen, workload, on_disk=kept == "disk")
    if epochs <= 1:
        return "no sample is seen twice"
    if refusal := _conflict(chosen, workload, cache_frozen_activations=True):
        return refusal
    if not keeps_by_itself(chosen.placed[0].slot.device):
        return "on a GPU it is not measured: true keeps it in the host's memory"
    return "steps would not become clearly shorter in a tenth of the memory or half of the free disk"


def _what_is_kept(chosen: Candidate, workload: Workload, on_disk: bool) -> str:
    """What is kept of frozen layers, where, and how many seconds that spares."""
    saved_s, sizes = 0.0, []
    for part in chosen.placed:
        work = replace(workload, share=part.share)
        kinds: tuple[Kept, ...] = (part.plan.techniques.cache_frozen_activations, False)
        kept, plain = (
            chosen.method.estimate(
                work, part.slot.device, part.slot.node, replace(part.plan.techniques, cache_frozen_activations=kind)
            )
            for kind in kinds
        )
        saved_s = max(saved_s, (plain.time.step_s - kept.time.step_s) * chosen.num_steps)
        in_memory = kept.memory.total_bytes - plain.memory.total_bytes
        in_memory += kept.memory.host_bytes - plain.memory.host_bytes
        sizes.append(kept.disk_bytes if on_disk else in_memory)
    epochs, size = workload.num_samples_seen / workload.num_samples, format_bytes(max(sizes))
    free = chosen.placed[0].slot.node.disk_free_bytes
    place = f"{size} of memory"
    if on_disk:
        place = f"{size} of the disk" if free is None else f"{size} of the disk's free {format_bytes(free)}"
    text = (
        f"each sample passes the layers below the first that trains once, in {epochs:.1f} epochs: about"
        f" {format_s(saved_s)} less for {place}"
    )
    return f"{text}; each worker keeps what it has seen itself" if len(sizes) > 1 else text


def explain_kinds(chosen: Candidate, workload: Workload) -> dict[str, str]:
    """What is to be said of method, objective and threads, whether the job states them or not, by key."""
    sizes = chosen.method.exports(workload.shape).sizes
    reasons = {"method.type": f"as the job says; what is handed back: {sizes}"} if sizes else {}
    if workload.needs_reference:
        reasons["objective.type"] = _why_reference(chosen, workload)
    slot = chosen.placed[0].slot
    if slot.device.kind == "cpu" and slot.threads > 1:
        reasons["train.threads"] = "those that wait spin, and sleep at once while other programs use the cores"
    return reasons


def _why_reference(chosen: Candidate, workload: Workload) -> str:
    """Where the log-probabilities under the reference come from, and what they cost."""
    epochs = workload.num_samples_seen / workload.num_samples
    if not stores_reference(workload, chosen.method.starts_as_base):
        return (
            f"the reference is the base with the adapter off: a forward pass more of each step, in {epochs:.2g} epochs"
        )
    why = (
        f"each sample is seen {epochs:.2g} times" if chosen.method.starts_as_base else "no adapter can be switched off"
    )
    return f"the reference is the model at the start: a forward pass of each row before the first step, stored; {why}"


def _conflict(chosen: Candidate, workload: Workload, **switches: Kept) -> str | None:
    part = chosen.placed[0]
    techniques = replace(part.plan.techniques, **switches)  # type: ignore[arg-type]
    return conflict(chosen.method, techniques, part.slot.device, workload.shape, len(chosen.placed))


_MOST_ROWS = 2**14  # whose padding is counted: more rows of the same data pad alike


def _padded_ratios(lengths: list[int], padded_lengths: list[int], global_batch_size: int) -> dict[int, float]:
    """Processed over real tokens for each number of rows in a micro-batch, on the first steps of the data."""
    num_rows = min(len(lengths), max(global_batch_size, min(64 * global_batch_size, _MOST_ROWS)))
    starts = range(0, num_rows, global_batch_size)
    steps = [padded_lengths[start : start + global_batch_size] for start in starts]
    real = sum(sum(lengths[start : start + global_batch_size]) for start in starts)
    ratios, rows = {}, 1
    while rows <= global_batch_size:
        padded = sum(padded_tokens(step, micro_batches(step, rows, 0, False), False) for step in steps)
        ratios[rows] = padded / real
        rows *= 2
    return ratios


_ROWS_OF_TRANSFORMERS = 8  # its default of per_device_train_batch_size
_OPEN_SIZE = 16
_LEAST_STEPS_PER_EPOCH = 8  # of larger steps that are offered


def _global_batch_size(spec: JobSpec, num_samples: int, num_workers: int) -> tuple[int, str | None]:
    """Samples a step and why, where the job does not state them itself.

    Where nothing is stated the data decides, never the machines: another batch makes another model.  As in
    transformers rows x accumulation x workers is the step, whatever parts the workers then take of it; of the two keys
    the one that is not stated is transformers' default.  Raises JobError for keys that contradict each other.
    """
    train = spec.train
    rows, steps = train.per_device_train_batch_size, train.gradient_accumulation_steps
    if isinstance(train.global_batch_size, int):
        _check_parts(train.global_batch_size, rows, steps, num_workers)
        if (size := train.global_batch_size) > num_samples:
            return num_samples, f"{size} is stated, and the data has {num_samples} rows: each epoch is one step of all"
        return size, None
    if rows == "auto" and steps == "auto":
        size = max(1, min(_OPEN_SIZE, num_samples // 8))
        few = "the data has few rows: at least 8 steps an epoch"
        return size, "16 samples a step suit most adapters, on whatever machines" if size == _OPEN_SIZE else few
    a_device = rows if isinstance(rows, int) else _ROWS_OF_TRANSFORMERS
    micro_batches = steps if isinstance(steps, int) else 1
    product = a_device * micro_batches * num_workers
    reason = (
        f"per_device_train_batch_size {a_device} x gradient_accumulation_steps {micro_batches} x workers {num_workers}"
    )
    if rows == "auto":
        reason += ", 8 rows a device where none are stated, as in transformers"
    if product > num_samples:
        return num_samples, f"{reason} is {product}, and the data has {num_samples} rows: each epoch is one step of all"
    return product, reason


def _check_parts(size: int, rows: int | str, steps: int | str, num_workers: int) -> None:
    """Raises JobError where stated parts of a step do not make the stated step."""
    if isinstance(rows, int) and isinstance(steps, int):
        if rows * steps * num_workers != size:
            raise JobError(
                f"train.global_batch_size is {size}, but per_device_train_batch_size {rows} x"
                f" gradient_accumulation_steps {steps} x {num_workers} workers is {rows * steps * num_workers}; leave"
                " one of them auto"
            )
        return
    for key, part in (("per_device_train_batch_size", rows), ("gradient_accumulation_steps", steps)):
        if isinstance(part, int) and part > size:
            raise JobError(
                f"train.{key} is {part}, more than train.global_batch_size, which is {size}; leave one of them auto"
            )


def check_batch(spec: JobSpec, num_slots: int | None) -> None:
    """Raises JobError for parts of a step that make the stated step with no number of workers.

    `num_slots` is how many there can be, None where that is not known.
    """
    size = spec.train.global_batch_size
    if isinstance(size, int):
        rows, steps = spec.train.per_device_train_batch_size, spec.train.gradient_accumulation_steps
        fixed = 1 if spec.strategy.mode == "pipeline" else num_workers_of_batch(spec, num_slots or size)
        _check_parts(size, rows, steps, fixed or num_slots or 1)


def grows_with_workers(spec: JobSpec) -> bool:
    """Whether the samples a step are stated as so many a worker."""
    train = spec.train
    parts = (train.per_device_train_batch_size, train.gradient_accumulation_steps)
    several = train.global_batch_size == "auto" and spec.strategy.mode != "pipeline"
    return several and any(isinstance(part, int) for part in parts)


def num_workers_of_batch(spec: JobSpec, num_slots: int) -> int | None:
    """How many workers the stated batch keys fix together; None where they leave that open."""
    train = spec.train
    parts = (train.global_batch_size, train.per_device_train_batch_size, train.gradient_accumulation_steps)
    if not all(isinstance(part, int) for part in parts) or spec.strategy.mode == "pipeline":
        return None
    size, rows, steps = parts
    workers, rest = divmod(size, rows * steps)  # type: ignore[operator]
    return workers if not rest and 1 <= workers <= num_slots else None


def step_mistakes(spec: JobSpec, num_steps: int | None = None) -> list[str]:
    """What is wrong with the number of steps, which is `num_steps` where it is known already."""
    train = spec.train
    if train.max_steps == 0:
        return ["train.max_steps is 0: nothing would be trained; leave it out (-1) to train by num_train_epochs"]
    steps = num_steps or (train.max_steps if train.max_steps > 0 else None)
    if steps is not None and train.warmup_steps > steps:
        return [
            f"train.warmup_steps is {train.warmup_steps}, more than the {steps} steps of the training: the learning"
            f" rate would never get beyond {steps / train.warmup_steps:.0%} of train.learning_rate; lower it, or use"
            " train.warmup_ratio"
        ]
    if steps is None:
        return []
    return schedules.step_mistakes(train.lr_scheduler_type, train.lr_scheduler_kwargs, steps, warmup_of(spec, steps))


def warmup_of(spec: JobSpec, num_steps: int) -> int:
    """Steps with a rising learning rate."""
    if spec.train.optim != "auto" and not OPTIMIZERS[spec.train.optim].warms_up:
        return 0
    return spec.train.warmup_steps or round(spec.train.warmup_ratio * num_steps)


def step_notices(spec: JobSpec) -> list[str]:
    """What is worth saying of the number of steps."""
    train, notices = spec.train, []
    if train.max_steps > 0 and "num_train_epochs" in train.model_fields_set:
        notices.append(
            f"train.max_steps: {train.max_steps} decides, as in transformers; train.num_train_epochs:"
            f" {train.num_train_epochs:g} is not used"
        )
    if spec.build_objective().is_by_document and "learning_rate" not in train.model_fields_set:
        notices.append(
            f"train.learning_rate is {train.learning_rate:g}, which suits adapters that copy answers; examples of TRL"
            " and LLaMA-Factory train preferences with 5e-6"
        )
    return notices


def with_more_samples(workload: Workload, factor: int, num_epochs: float) -> Workload | None:
    """The same samples in fewer, larger steps; None where an epoch would have too few of them."""
    size = factor * workload.global_batch_size
    order = Order(workload.num_samples, size, 0, num_epochs)
    if order.steps_per_epoch < _LEAST_STEPS_PER_EPOCH:
        return None
    return replace(
        workload,
        global_batch_size=size,
        num_steps=order.num_steps,
        fullest_step_tokens=factor * workload.fullest_step_tokens if workload.fullest_step_tokens else None,
    )
