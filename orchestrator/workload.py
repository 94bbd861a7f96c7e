"""JobSpec + the model's config.json + counts of the data -> Workload."""

from __future__ import annotations

from typing import Any

from orchestrator.data.order import Order
from orchestrator.data.packing import micro_batches, padded_tokens
from orchestrator.errors import JobError
from orchestrator.spec import JobSpec
from strategies.contract import Workload
from strategies.shape import ModelShape, UnknownArchitecture


def model_shape(config: dict[str, Any]) -> ModelShape:
    """The sizes in a config.json.  Raises JobError for a model that is not a decoder-only transformer."""
    if config.get("is_encoder_decoder"):
        raise JobError(
            "model.model_name_or_path: this is an encoder-decoder model; decoder-only language models are tuned here"
        )
    try:
        return ModelShape.from_config(config)
    except UnknownArchitecture as error:
        raise JobError(f"model.model_name_or_path: {error}") from None
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise JobError(
            f"model.model_name_or_path: config.json does not describe a decoder-only language model: {error}"
        ) from None


def trainable_shape(config: dict[str, Any]) -> ModelShape:
    """The sizes of a model that can be trained here.  Raises JobError, also for an encoder, which is only planned."""
    shape = model_shape(config)
    if shape.family.encoder:
        raise JobError(
            f"model.model_name_or_path: {shape.model_type} is an encoder; it can be planned, not trained here"
        )
    return shape


def describe(
    spec: JobSpec, shape: ModelShape, lengths: list[int], num_supervised_tokens: int, num_workers: int
) -> tuple[Workload, Order, str | None]:
    """What there is to compute, the order of its samples, and the reason of the global batch size where it was open."""
    train = spec.train
    global_batch_size, reason = _global_batch_size(spec, len(lengths), num_workers)
    global_batch_size *= spec.strategy.local_steps or 1  # all of them are one step as the run counts
    order = Order(len(lengths), global_batch_size, train.seed, train.num_train_epochs, train.max_steps)
    per_epoch, rest = divmod(order.num_steps, order.steps_per_epoch)
    workload = Workload(
        shape=shape,
        mean_square_length=sum(length * length for length in lengths) / len(lengths),
        fullest_step_tokens=sum(sorted(lengths)[-global_batch_size:]),
        padded_ratio=_padded_ratios(lengths, global_batch_size),
        num_samples=len(lengths),
        num_tokens=sum(lengths),
        num_supervised_tokens=num_supervised_tokens,
        longest_sample=max(lengths),
        global_batch_size=global_batch_size,
        num_steps=order.num_steps,
        clips=train.max_grad_norm > 0,
        num_samples_seen=per_epoch * len(lengths) + min(rest * global_batch_size, len(lengths)),
    )
    return workload, order, reason


def _padded_ratios(lengths: list[int], global_batch_size: int) -> dict[int, float]:
    """Processed over real tokens for each number of rows in a micro-batch, on the first steps of the data."""
    steps = [lengths[start : start + global_batch_size] for start in range(0, len(lengths), global_batch_size)][:64]
    real = sum(map(sum, steps))
    ratios, rows = {}, 1
    while rows <= global_batch_size:
        padded = sum(padded_tokens(step, micro_batches(step, rows, 0, False), False) for step in steps)
        ratios[rows] = padded / real
        rows *= 2
    return ratios


def _global_batch_size(spec: JobSpec, num_samples: int, num_workers: int) -> tuple[int, str | None]:
    train = spec.train
    rows, steps = train.per_device_train_batch_size, train.gradient_accumulation_steps
    product = rows * steps * num_workers if isinstance(rows, int) and isinstance(steps, int) else None
    if isinstance(train.global_batch_size, int):
        if product is not None and product != train.global_batch_size:
            raise JobError(
                f"train.global_batch_size is {train.global_batch_size}, but per_device_train_batch_size {rows} x"
                f" gradient_accumulation_steps {steps} x {num_workers} workers is {product}; leave one of them auto"
            )
        return train.global_batch_size, None
    if product is not None:
        return product, "per_device_train_batch_size x gradient_accumulation_steps x workers"
    size = max(1, min(16, num_samples // 8))
    return (
        size,
        "16 samples a step suit most adapters" if size == 16 else "the data has few rows: at least 8 steps an epoch",
    )
