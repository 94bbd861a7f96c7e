"""One optimizer step, in two halves: the only place where a loss is computed and a weight is changed.

The training loop runs these on real tensors, the tracer on fake ones, `techniques --measure` on a clock.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from strategies.step.activation_offload import offload_activations
from strategies.step.supervised_logits import Batch, loss_sum, places_of_samples, token_losses
from strategies.techniques.precision import autocast
from strategies.train_setup import TrainSetup
from strategies.workload import Techniques


def forward_backward(
    setup: TrainSetup, batch: Batch, num_counted: float, techniques: Techniques, scaler: torch.amp.GradScaler
) -> torch.Tensor:
    """Add a micro-batch's part to the gradients; returns its part of the step's loss, detached.

    `num_counted` is what the loss of the whole step is a mean over, supervised tokens or an objective's samples, so
    that parts add up whatever their sizes; infinity makes a pass that counts for nothing.
    """
    part = forward(setup, batch, num_counted, techniques)
    extra = extra_part(setup, batch, num_counted)
    backward(setup, part if extra is None else part + extra, scaler)
    return part.detach()


def forward(setup: TrainSetup, batch: Batch, num_counted: float, techniques: Techniques) -> torch.Tensor:
    """A micro-batch's part of the step's loss, with what its backward pass needs."""
    device = batch.input_ids_BT.device
    batch = batch.filled(setup.row_multiple)
    smoothing = setup.label_smoothing
    beside = setup.extra_loss.over(batch) if setup.extra_loss else nullcontext()
    with setup.noise.over(batch) if setup.noise else nullcontext(), beside:
        if setup.engine:  # its weights are in the compute precision already
            return loss_sum(setup.engine.model, batch, techniques.loss_type, smoothing) / num_counted
        with autocast(device.type, techniques.dtype), _offload(setup, techniques, device), _known_layers(setup, batch):
            return _weighed_loss(setup, batch, techniques, smoothing) / num_counted


def extra_part(setup: TrainSetup, batch: Batch, num_counted: float) -> torch.Tensor | None:
    """The part of the step's loss beside the tokens' that belongs to the batch of the last `forward`; None without."""
    if setup.extra_loss is None:
        return None
    own = len(batch.sample_ids) if setup.objective else batch.targets_S.numel()
    return setup.extra_loss() * (own / num_counted)


def _weighed_loss(setup: TrainSetup, batch: Batch, techniques: Techniques, smoothing: float) -> torch.Tensor:
    """`summed_loss` with the weight of each sample, where the method has some."""
    if setup.weighing is None:
        return summed_loss(setup, batch, techniques, smoothing)
    losses_S = token_losses(setup.model, batch, techniques.loss_type, smoothing)
    return (losses_S * setup.weighing.weights_N[list(batch.sample_ids)][places_of_samples(batch)]).sum()


def summed_loss(setup: TrainSetup, batch: Batch, techniques: Techniques, smoothing: float = 0.0) -> torch.Tensor:
    """The loss of a batch's supervised tokens, or of its samples under an objective over documents, summed."""
    if setup.objective is not None:
        return setup.objective.loss_sum(setup.model, batch, techniques.loss_type)
    return loss_sum(setup.model, batch, techniques.loss_type, smoothing)


def _known_layers(setup: TrainSetup, batch: Batch) -> AbstractContextManager[None]:
    """Skip the layers whose results for these samples are known, inside the block."""
    parts = batch.parts
    if setup.lower is None or parts is None:
        return nullcontext()
    return setup.lower.serve(batch.sample_ids, parts)


def _offload(setup: TrainSetup, techniques: Techniques, device: torch.device) -> AbstractContextManager[None]:
    """Keep what the backward pass needs in pinned host memory inside the block, where the techniques say so."""
    if techniques.offload != "activations" or device.type == "cpu":
        return nullcontext()
    return offload_activations(setup.model.parameters(), device)


def backward(setup: TrainSetup, part: torch.Tensor, scaler: torch.amp.GradScaler) -> None:
    """Add the gradients of a part of the loss."""
    if setup.engine:
        setup.engine.backward(part)
    else:
        scaler.scale(part).backward()


@dataclass(frozen=True)
class Update:
    """The numbers of the update that are not the optimizer's own."""

    lr_factor: float  # learning rate of this step over the peak
    max_grad_norm: float  # 0 = never clip


def last_pass(setup: TrainSetup, numbers: Update) -> None:
    """The next backward pass is the step's last: an optimizer that works beside the computation may begin."""
    if setup.streaming:
        _set_rates(setup, numbers)
        setup.streaming.last_pass(numbers.max_grad_norm)


def update(
    setup: TrainSetup, scaler: torch.amp.GradScaler, numbers: Update, before_clipping: Callable[[], None] | None = None
) -> torch.Tensor:
    """Clip the gradients, move the weights, forget the gradients; returns the norm before clipping.

    `before_clipping` is called when the gradients are as they are to be clipped, but for an overflow, which moves
    nothing.  Engines and optimizers that stream have no such moment.
    """
    _set_rates(setup, numbers)
    if setup.engine or setup.streaming:
        return (setup.engine or setup.streaming).update(numbers.max_grad_norm)  # type: ignore[union-attr]
    if setup.passes and scaler.is_enabled():
        setup.passes.spread_overflow()
    scaler.unscale_(setup.optimizer)
    if before_clipping and not _has_overflowed(scaler, setup.optimizer):
        before_clipping()
    grad_norm = setup.passes.gradient_norm() if setup.passes else norm_of(setup.parameters.values())
    limit = numbers.max_grad_norm or math.inf
    torch.nn.utils.clip_grads_with_norm_(list(setup.parameters.values()), limit, grad_norm)
    scaler.step(setup.optimizer)
    scaler.update()
    setup.optimizer.zero_grad(set_to_none=True)
    return grad_norm


def _has_overflowed(scaler: torch.amp.GradScaler, optimizer: torch.optim.Optimizer) -> bool:
    """Whether an unscaled gradient is not finite, so that the scaler will pass over this update."""
    return scaler.is_enabled() and any(found.item() for found in scaler._found_inf_per_device(optimizer).values())


def norm_of(parameters: Iterable[torch.nn.Parameter]) -> torch.Tensor:
    """The norm of the gradients that these parameters have."""
    return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


def _set_rates(setup: TrainSetup, numbers: Update) -> None:
    for group in setup.optimizer.param_groups:
        group["lr"] = group["base_lr"] * numbers.lr_factor
