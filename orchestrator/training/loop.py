"""Training, from top to bottom: plain PyTorch, one step after the other.

What a step computes does not depend on how it is laid out.  The samples of a step are a function of (seed, step); each
micro-batch contributes its *sum* of token losses divided by the supervised tokens of the *whole* step, a number known
from the data's index; gradients are summed, never averaged.  So micro-batch size, packing, accumulation and the number
of workers change the speed and nothing else.
"""

from __future__ import annotations

import math
import resource
import sys
import time
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from orchestrator.data.batches import collate
from orchestrator.data.dataset import Dataset
from orchestrator.data.order import Order, hash_ids
from orchestrator.data.packing import micro_batches, split_by_share
from orchestrator.errors import Diverged
from orchestrator.training.parallel import Group
from strategies.contract import Techniques, TrainSetup
from strategies.step import Update, forward_backward, update
from strategies.techniques.precision import autocast, gradient_scaler
from strategies.techniques.supervised_logits import loss_sum


@dataclass(frozen=True)
class Schedule:
    """When things happen, and the numbers of the optimisation that are not the optimizer's own."""

    lr_factor: Callable[[int], float]  # learning rate of a step over the peak
    max_grad_norm: float  # 0 = never clip
    seed: int
    save_steps: int
    eval_steps: int | None
    early_stopping_patience: int | None


@dataclass
class Progress:
    """What a checkpoint must remember beside tensors; also what the loop hands back."""

    step: int = 0  # steps done
    tokens: int = 0
    supervised_tokens: int = 0
    best_loss: float | None = None
    best_checkpoint: str | None = None
    evaluations_without_gain: int = 0
    loss_scale: dict[str, Any] = field(default_factory=dict)
    stopped: str | None = None  # why it ended before the last step: "asked" or "early"
    before: dict[str, Any] | None = None  # quality before the first step

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Hooks:
    """The loop's view of the outside world."""

    record: Callable[..., None]  # (event, **fields)
    save: Callable[[Progress], str]  # writes a checkpoint, returns its name
    should_stop: Callable[[], bool]


def train(
    setup: TrainSetup,
    data: Dataset,
    held_out: Dataset | None,
    order: Order,
    schedule: Schedule,
    techniques: Techniques,
    group: Group,
    progress: Progress,
    hooks: Hooks,
) -> Progress:
    """Train from `progress.step` to the end of `order`; returns the progress made.

    Raises Diverged, with the step and its samples, when a loss is not a number.
    """
    model, optimizer, parameters = setup.model, setup.optimizer, list(setup.parameters.values())
    device = parameters[0].device
    scaler = gradient_scaler(device.type, techniques.dtype)
    if progress.loss_scale:
        scaler.load_state_dict(progress.loss_scale)
    model.train()

    for step in range(progress.step, order.num_steps):
        began = time.perf_counter()

        # Which samples, and which of them are mine.  Every worker computes the same division.
        sample_ids = order.sample_ids(step)
        lengths = data.lengths[sample_ids].tolist()
        num_supervised = int(data.num_supervised[sample_ids].sum())
        mine = split_by_share(lengths, [1.0] * group.size)[group.rank]
        batches = micro_batches(
            [lengths[i] for i in mine],
            techniques.per_device_train_batch_size,
            techniques.max_length,
            techniques.packing,
        )

        # Forward and backward, one micro-batch after the other; gradients add up.
        loss = torch.zeros((), device=device)
        for members in batches:
            batch = collate(data, [sample_ids[mine[i]] for i in members], techniques.packing).to(device)
            torch.manual_seed(_dropout_seed(schedule.seed, step, batch.sample_ids))
            loss += forward_backward(setup, batch, num_supervised, techniques, scaler)

        # Over all workers: the loss of the step, whether somebody wants to stop, then the gradients.
        total, stop = group.sum([loss.item(), float(group.rank == 0 and hooks.should_stop())], device)
        if not math.isfinite(total):
            suspects = group.gather([] if math.isfinite(loss.item()) else [sample_ids[i] for i in mine])
            raise Diverged(step, [sample for part_ids in suspects for sample in part_ids])
        group.sum_gradients(parameters)

        # The update.
        grad_norm = update(setup, scaler, Update(schedule.lr_factor(step), schedule.max_grad_norm)).item()

        # What happened.
        progress.step = step + 1
        progress.tokens += sum(lengths)
        progress.supervised_tokens += num_supervised
        progress.loss_scale = scaler.state_dict()
        seconds = time.perf_counter() - began
        hooks.record(
            "step",
            step=progress.step,
            epoch=round(order.epoch(progress.step), 4),
            loss=total,
            grad_norm=grad_norm,
            learning_rate=optimizer.param_groups[0]["lr"],
            tokens=sum(lengths),
            supervised_tokens=num_supervised,
            seconds=round(seconds, 4),
            tokens_per_s=round(sum(lengths) / seconds, 1),
            peak_bytes=peak_bytes(device),
            samples=hash_ids(sample_ids),
        )

        # Held-out loss, best checkpoint, early stopping: the same numbers on every worker, so the same decisions.
        last = progress.step == order.num_steps
        improved = False
        if held_out and schedule.eval_steps and (progress.step % schedule.eval_steps == 0 or last):
            eval_loss = evaluate_loss(setup, held_out, techniques, group)
            hooks.record("eval", step=progress.step, eval_loss=eval_loss)
            improved = progress.best_loss is None or eval_loss < progress.best_loss
            if improved:
                progress.best_loss, progress.evaluations_without_gain = eval_loss, 0
            else:
                progress.evaluations_without_gain += 1
            patience = schedule.early_stopping_patience
            if patience and progress.evaluations_without_gain >= patience:
                progress.stopped = "early"
        if stop and not last:
            progress.stopped = "asked"

        # Checkpoint: on schedule, at the best loss so far, and at the end however it comes.
        due = progress.step % schedule.save_steps == 0 or last or progress.stopped is not None
        if group.rank == 0 and (due or improved):
            if improved:
                progress.best_checkpoint = f"step-{progress.step:08d}"
            name = hooks.save(progress)
            hooks.record("checkpoint", step=progress.step, name=name)
        if progress.stopped:
            break
    return progress


@torch.no_grad()
def evaluate_loss(setup: TrainSetup, data: Dataset, techniques: Techniques, group: Group) -> float:
    """Mean loss of the supervised tokens of `data`, in nats a token."""
    model = setup.model
    device = next(iter(setup.parameters.values())).device
    was_training = model.training
    model.eval()
    lengths = data.lengths.tolist()
    mine = split_by_share(lengths, [1.0] * group.size)[group.rank]
    rows, max_length, packing = techniques.per_device_train_batch_size, techniques.max_length, techniques.packing
    total = 0.0
    for members in micro_batches([lengths[i] for i in mine], rows, max_length, packing):
        batch = collate(data, [mine[i] for i in members], packing).to(device)
        with autocast(device.type, techniques.dtype):
            total += loss_sum(model, batch, techniques.loss_type).item()
    model.train(was_training)
    return group.sum([total], device)[0] / int(data.num_supervised.sum())


def peak_bytes(device: torch.device) -> int:
    """Most memory this process has held: allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def resident_bytes(device: torch.device) -> int:
    """Memory held now: on a CPU the whole process, libraries included."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:  # not Linux: the peak so far is the nearest known figure
        return peak_bytes(device)
    return pages * resource.getpagesize()


def _dropout_seed(seed: int, step: int, sample_ids: tuple[int, ...]) -> int:
    """Random numbers of a micro-batch follow from what is in it: a resumed run draws the same."""
    return zlib.crc32(f"{seed}/{step}/{sample_ids[0]}".encode())
