"""Training, from top to bottom: plain PyTorch, one step after the other.

What a step computes does not depend on how it is laid out.  The samples of a step are a function of (seed, step); each
micro-batch contributes its *sum* of token losses divided by the supervised tokens of the *whole* step, a number known
from the data's index; gradients are summed, never averaged.  So micro-batch size, packing, accumulation, the number of
workers and the share of each change the speed and nothing else.
"""

from __future__ import annotations

import math
import resource
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from orchestrator.data.batches import collate
from orchestrator.data.dataset import Dataset
from orchestrator.data.order import Order, hash_ids
from orchestrator.data.packing import micro_batches, split_by_share
from orchestrator.errors import Diverged, NothingFits
from orchestrator.training.evaluate import evaluate_loss
from orchestrator.training.feed import Feed
from orchestrator.training.local_steps import LocalSteps
from orchestrator.training.out_of_memory import fallback, first_line, is_out_of_memory, release_cache
from orchestrator.training.parallel import GradientSum, Group, even_passes
from orchestrator.training.repair import UpdateFailed, Updates, update_does_not_fit
from orchestrator.training.shares import Shares
from strategies.contract import Techniques, TrainSetup
from strategies.step.step import Update, forward_backward, last_pass, update
from strategies.techniques import checkpointing
from strategies.techniques.precision import gradient_scaler


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
    eval_losses: dict[str, float] = field(default_factory=dict)  # step -> held-out loss, in nats a token
    evaluations_without_gain: int = 0
    loss_scale: dict[str, Any] = field(default_factory=dict)
    stopped: str | None = None  # why it ended before the last step: "early", or what Hooks.should_stop said
    before: dict[str, Any] | None = None  # quality before the first step

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def take(self, eval_loss: float, patience: int | None) -> bool:
        """Take in the held-out loss after this step; whether it is the lowest so far."""
        self.eval_losses[str(self.step)] = eval_loss
        improved = self.best_loss is None or eval_loss < self.best_loss
        if improved:
            self.best_loss, self.evaluations_without_gain = eval_loss, 0
        else:
            self.evaluations_without_gain += 1
        if patience and self.evaluations_without_gain >= patience:
            self.stopped = "early"
        return improved


@dataclass(frozen=True)
class Hooks:
    """The loop's view of the outside world."""

    record: Callable[..., None]  # (event, **fields)
    save: Callable[[Progress], str | None]  # writes a checkpoint, returns its name; None where another worker does
    should_stop: Callable[[], str | None]  # one of WISHES


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
    shares: Shares | None = None,
    local_batch_size: int | None = None,
) -> Progress:
    """Train from `progress.step` to the end of `order`; returns the progress made.

    `techniques` are this worker's own, `shares` everybody's (equal where not given).  With
    `local_batch_size` workers train apart inside a step (local_steps.py).  Raises Diverged, with the step and its
    samples, when a loss is not a number, and NothingFits when not even one sample at a time fits.
    """
    model, optimizer = setup.model, setup.optimizer
    device = next(iter(setup.parameters.values())).device
    shares = shares or Shares([1.0 / group.size] * group.size)
    apart = LocalSteps(setup, local_batch_size) if local_batch_size else None
    # Where one worker computes in fp16 all scale their losses: what is summed must have one scale.
    any_fp16 = group.sum([techniques.dtype == "float16"])[0] > 0
    scaled = "float16" if any_fp16 else techniques.dtype
    scaler = gradient_scaler(device.type, scaled)
    if progress.loss_scale:
        scaler.load_state_dict(progress.loss_scale)
    progress.loss_scale = scaler.state_dict()
    feed = Feed(data, techniques.packing, device)
    model.train()

    def note(text: str) -> None:
        hooks.record("note", text=text)

    updates = Updates(setup, group, bool(apart), note)
    gradients = GradientSum(group, [] if setup.engine else setup.summed, updates.check)

    def sent() -> int:
        return gradients.bytes_sent + getattr(optimizer, "bytes_sent", 0)

    while progress.step < order.num_steps:
        step, began, sent_before = progress.step, time.perf_counter(), sent()

        # Which samples, and which of them are mine.  Every worker computes the same division.
        sample_ids = order.sample_ids(step)
        lengths = data.lengths[sample_ids].tolist()
        num_supervised = int(data.num_supervised[sample_ids].sum())
        dealt = split_by_share(lengths, shares.shares)
        mine = dealt[group.rank]

        # Forward and backward, one micro-batch after the other; gradients add up.
        loss, own_loss, lacking = torch.zeros((), device=device), 0.0, None
        numbers = Update(schedule.lr_factor(step), schedule.max_grad_norm)
        if setup.learner and setup.learner.is_due(step):
            techniques = _learn(setup, data, sample_ids, step, techniques, scaler, group, hooks)
        try:
            waiting = list(apart.parts(mine)) if apart else [mine]
            while waiting:
                local, loss_here = waiting[0], torch.zeros((), device=device)
                own = [lengths[i] for i in local]
                rows, max_length = techniques.per_device_train_batch_size, techniques.max_length
                batches = micro_batches(own, rows, max_length, techniques.packing)
                if setup.engine:
                    batches = even_passes(group, batches)
                counted = int(data.num_supervised[[sample_ids[i] for i in local]].sum()) if apart else num_supervised
                for number, members in enumerate(batches, start=1):
                    # A pass without samples takes any and counts for nothing.
                    taken = [sample_ids[local[i]] for i in members] or sample_ids[:1]
                    batch = feed.take(taken)
                    torch.manual_seed(_dropout_seed(schedule.seed, step, batch.sample_ids))
                    if number == len(batches) and not apart:
                        gradients.arm()
                        if group.size == 1:
                            last_pass(setup, numbers)
                    part = forward_backward(setup, batch, counted if members else math.inf, techniques, scaler)
                    loss_here += part * (counted / num_supervised)
                if apart:
                    update(setup, scaler, numbers)
                    if too_large := _rescaled(progress, scaler, step, sample_ids):
                        note(f"{too_large}; the local step is repeated")
                        continue
                loss += loss_here
                del waiting[0]
            if step + 1 < order.num_steps:
                feed.prepare(_first_of(order.sample_ids(step + 1), data, shares, group, techniques))
            own_loss = loss.item()
            if apart:
                apart.leave(sum(lengths[i] for i in mine) / sum(lengths))
            gradients.flush()
        except UpdateFailed:
            pass
        except Exception as error:
            if setup.engine or not is_out_of_memory(error):  # DeepSpeed's others wait inside this very pass
                raise
            lacking, batch = first_line(error), None
        if not updates.went_through():
            # This worker's last update did, so it hands its state over, and computes these gradients again.
            updates.repair(scaler.state_dict(), 0.0)
            optimizer.zero_grad(set_to_none=True)
            continue
        if lacking is not None:
            gradients.abandon()
        own_s = time.perf_counter() - began

        # Over all workers: the loss of the step, who wants to stop or needs it again, how long each took; gradients.
        wish = hooks.should_stop()
        wishes = [float(wish == known) for known in WISHES]
        own = [*_at(group, own_s), *_at(group, peak_bytes(device))]
        total, again, *rest = group.sum([own_loss, lacking is not None, *wishes, *own])
        stop = next((known for known, count in zip(WISHES, rest, strict=False) if count), None)
        worker_s, worker_peak = rest[len(WISHES) :][: group.size], rest[len(WISHES) + group.size :]
        if again:
            # Memory ran out somewhere: there less at a time, and the same step again, everywhere.
            gradients.discard()
            optimizer.zero_grad(set_to_none=True)
            if apart:
                apart.begin_again()
            if lacking is not None:
                techniques = _with_less(setup, techniques, int(data.lengths.max()), lacking, hooks)
            continue
        if not math.isfinite(total):
            suspects = group.gather([] if math.isfinite(own_loss) else [sample_ids[i] for i in mine])
            raise Diverged(step, [sample for part_ids in suspects for sample in part_ids])

        # The update.
        try:
            gradients.finish()
            grad_norm = apart.meet() if apart else update(setup, scaler, numbers).item()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            if not updates.can_repair:
                raise update_does_not_fit(first_line(error)) from error
            gradients.discard()
            lacking, grad_norm = first_line(error), math.nan
        last = step + 1 == order.num_steps
        evaluates = held_out and schedule.eval_steps and ((step + 1) % schedule.eval_steps == 0 or last)
        saves = (step + 1) % schedule.save_steps == 0 or last or stop is not None
        updates.begin(lacking)
        if (lacking is not None or evaluates or saves or setup.learner) and not updates.went_through():
            scale, grad_norm = updates.repair(scaler.state_dict(), grad_norm)
            if scale is not None:
                scaler = gradient_scaler(device.type, scaled)
                scaler.load_state_dict(scale)
        if not apart and (too_large := _rescaled(progress, scaler, step, sample_ids)):
            note(f"{too_large}; the step is repeated")
            continue

        # What happened.
        progress.step = step + 1
        progress.tokens += sum(lengths)
        progress.supervised_tokens += num_supervised
        seconds = time.perf_counter() - began
        worker_tokens = [sum(lengths[i] for i in part_ids) for part_ids in dealt]
        together = {} if group.size == 1 else {
            "worker_tokens": worker_tokens,
            "worker_s": [round(s, 4) for s in worker_s],
            "worker_peak_bytes": [int(peak) for peak in worker_peak],
            "step_bytes_sent": None if setup.engine else sent() - sent_before,  # DeepSpeed counts nothing
            "slowest": shares.slowest,
        }  # fmt: skip
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
            **({"loss_scale": progress.loss_scale["scale"]} if scaler.is_enabled() else {}),
            **together,
            **(setup.streaming.report() if setup.streaming else {}),
        )
        if group.size > 1 and shares.observe(worker_tokens, worker_s):
            hooks.record("shares", step=progress.step, shares=[round(share, 4) for share in shares.shares])

        # Held-out loss, best checkpoint, early stopping: the same numbers on every worker, so the same decisions.
        improved = False
        if held_out and evaluates:
            try:
                eval_loss = evaluate_loss(setup, held_out, techniques, group, shares.shares)
            except NothingFits as error:
                note(f"the held-out rows were not measured after step {progress.step}: {error}")
            else:
                hooks.record("eval", step=progress.step, eval_loss=eval_loss)
                improved = progress.take(eval_loss, schedule.early_stopping_patience)
        if stop and not last:
            progress.stopped = stop

        # Checkpoint: on schedule, at the best loss so far, and at the end however it comes.
        if saves or improved or progress.stopped is not None:
            if improved:
                progress.best_checkpoint = f"step-{progress.step:08d}"
            # Unlike devices round differently, and workers apart have moments of their own; from here on all go on
            # from what a restart would begin with.
            if (apart or not group.alike) and not setup.sharding:
                group.broadcast(_replicated(setup), 0)
            if group.rank == 0 or setup.sharding:
                name = hooks.save(progress)
                hooks.record("checkpoint", step=progress.step, name=name)
        if progress.stopped:
            break
    gradients.close()
    return progress


def _learn(
    setup: TrainSetup,
    data: Dataset,
    sample_ids: Sequence[int],
    step: int,
    techniques: Techniques,
    scaler: Any,
    group: Group,
    hooks: Hooks,
) -> Techniques:
    """Let the method learn from gradients of the step's first samples, then take over what the first worker learnt.

    Two devices of one kind differ in the last bits of a gradient, and so may choose other entries.  A worker whose
    memory runs out learns again in less; returns the techniques that fit.
    """
    assert setup.learner
    learnt: dict[str, Any] | None = None
    while learnt is None:
        lacking = ""
        try:
            learnt = _learn_once(setup, data, sample_ids[: setup.learner.rows], techniques, scaler)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            lacking = first_line(error)
        if learnt is None:
            techniques = _with_less(setup, techniques, int(data.lengths.max()), lacking, hooks)
    hooks.record("learnt", step=step, **learnt)
    hooks.record("note", text=learnt["text"])
    group.broadcast(_replicated(setup), 0)
    return techniques


def _learn_once(
    setup: TrainSetup, data: Dataset, ids: Sequence[int], techniques: Techniques, scaler: Any
) -> dict[str, Any]:
    assert setup.learner
    began = time.perf_counter()
    device = next(iter(setup.parameters.values())).device
    rows, max_length, packing = techniques.per_device_train_batch_size, techniques.max_length, techniques.packing
    batches = micro_batches(data.lengths[list(ids)].tolist(), rows, max_length, packing)
    setup.learner.begin_learning(len(batches))
    for number, members in enumerate(batches):
        if number:
            setup.learner.next_learning()
        batch = collate(data, [ids[i] for i in members], packing).to(device)
        forward_backward(setup, batch, max(1, batch.targets_S.numel()), techniques, scaler)
    return {**setup.learner.end_learning(), "seconds": round(time.perf_counter() - began, 2)}


def _first_of(
    sample_ids: Sequence[int], data: Dataset, shares: Shares, group: Group, techniques: Techniques
) -> list[int]:
    """The samples of this worker's first micro-batch of a step, should shares and techniques stay as they are."""
    lengths = data.lengths[list(sample_ids)].tolist()
    mine = split_by_share(lengths, shares.shares)[group.rank]
    rows, max_length, packing = techniques.per_device_train_batch_size, techniques.max_length, techniques.packing
    batches = micro_batches([lengths[i] for i in mine], rows, max_length, packing)
    return [sample_ids[mine[i]] for i in batches[0]] if batches else list(sample_ids[:1])


def _rescaled(progress: Progress, scaler: torch.amp.GradScaler, step: int, sample_ids: Sequence[int]) -> str | None:
    """Note the loss scale after an update; what happened where a gradient was not finite and nothing has moved.

    Raises Diverged where the loss as it is, unscaled, has no finite gradients either.
    """
    before, progress.loss_scale = progress.loss_scale, scaler.state_dict()
    if not scaler.is_enabled() or progress.loss_scale["scale"] >= before["scale"]:
        return None
    if before["scale"] <= 1.0:
        raise Diverged(step, sample_ids)
    return (
        f"step {step}: a gradient left fp16's range at a loss scale of {before['scale']:g}, now"
        f" {progress.loss_scale['scale']:g}"
    )


WISHES = ("asked", "replan")  # to save and end after this step; the first that anybody has counts


def _at(group: Group, value: float) -> list[float]:
    """`value` at this worker's place among zeros: summed over the workers, everybody's value."""
    return [value if rank == group.rank else 0.0 for rank in range(group.size)]


def _with_less(setup: TrainSetup, techniques: Techniques, longest: int, lacking: str, hooks: Hooks) -> Techniques:
    """Switch this worker to the next way that takes less memory.  Raises NothingFits where there is none."""
    less = fallback(techniques, longest)
    if less is None:
        raise NothingFits(f"not even one sample at a time fits: {lacking}. Lower data.max_length, or add a device")
    if less.gradient_checkpointing and not techniques.gradient_checkpointing:
        checkpointing.enable(setup.model)
    setup.optimizer.zero_grad(set_to_none=True)
    release_cache()
    hooks.record(
        "note",
        text=f"out of memory; the step is repeated with micro-batches of {less.per_device_train_batch_size} x"
        f" {less.max_length} tokens{', activations computed again' if less.gradient_checkpointing else ''} ({lacking})",
    )
    return less


def _replicated(setup: TrainSetup) -> list[torch.Tensor]:
    """Trained weights, buffers and optimizer state, in an order that is the same on every worker."""
    tensors: list[torch.Tensor] = list(setup.buffers.values())
    for parameter in setup.parameters.values():
        state = setup.optimizer.state.get(parameter, {})
        tensors += [parameter, *(state[key] for key in sorted(state) if torch.is_tensor(state[key]))]
    return tensors


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
