"""AdamW on d x d images in host memory: gradients are compressed as they appear, updates arrive layer by layer.

Of every projected weight the device holds the weight, two sparse projectors and, between backward and update, one
image.  The host holds the two moments of the image.  A weight's gradient is freed as soon as its image is taken, so
accumulation adds images, not gradients; both are linear, so the sum is the same.

Clipping needs the norm of all gradients before the first update; the norm is that of the images, since no worker
ever holds two whole gradients.  Images still cross the bus during the backward pass; updates wait for its end.

Weight decay shrinks the weight itself, as AdamW does (arXiv 1711.05101); the published code has none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Literal

import torch

from strategies.lsp_offload.projector import Subspace, Whole
from strategies.lsp_offload.schedule import Lanes
from strategies.lsp_offload.transport import Transport

Moments = Literal["reset", "project"]


class LaneFailed(RuntimeError):
    """An update was not finite: the weight keeps its value from before the step."""


@dataclass(frozen=True)
class AdamNumbers:
    """What AdamW is told once."""

    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    weight_decay: float = 0.0


@dataclass
class ProjectedWeight:
    """One weight, its subspace and its moments on the host."""

    layer: int  # depth, 0 = first of the forward pass
    weight: torch.nn.Parameter
    subspace: Subspace | Whole
    exp_avg_DD: torch.Tensor = field(init=False)
    exp_avg_sq_DD: torch.Tensor = field(init=False)
    num_updates: int = 0
    num_learnt: int = 0
    bias: float | None = None
    image_DD: torch.Tensor | None = None

    def __post_init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Moments as if no step had been made."""
        space = self.subspace
        size = self.weight.shape if isinstance(space, Whole) else (space.rows.size, space.columns.size)
        self.exp_avg_DD, self.exp_avg_sq_DD = torch.zeros(size), torch.zeros(size)
        self.num_updates = 0

    def take(self, gradient_MN: torch.Tensor) -> None:
        """Add a gradient's image to this step's."""
        image = self.subspace.image(gradient_MN.float())
        self.image_DD = image if self.image_DD is None else self.image_DD.add_(image)

    def adam(self, image_DD: torch.Tensor, numbers: AdamNumbers) -> torch.Tensor:
        """The direction of AdamW for an image on the host, before the learning rate."""
        self.num_updates += 1
        self.exp_avg_DD.lerp_(image_DD, 1 - numbers.beta1)
        self.exp_avg_sq_DD.mul_(numbers.beta2).addcmul_(image_DD, image_DD, value=1 - numbers.beta2)
        first = 1 - numbers.beta1**self.num_updates
        second = math.sqrt(1 - numbers.beta2**self.num_updates)
        return self.exp_avg_DD / ((self.exp_avg_sq_DD.sqrt() / second).add_(numbers.epsilon)) / first

    def apply(self, direction_DD: torch.Tensor, learning_rate: float, weight_decay: float) -> None:
        """Move the weight: W <- (1 - lr wd) W - lr P D Q^T."""
        with torch.no_grad():
            change = self.subspace.back(direction_DD)
            if weight_decay:
                self.weight.mul_(1 - learning_rate * weight_decay)
            self.weight.sub_((learning_rate * change).to(self.weight.dtype))

    def learn(self, gradient_MN: torch.Tensor, steps: int, threshold: float, moments: Moments) -> bool:
        """Fit the projectors to a gradient unless their bias is small enough; whether they changed.

        What is kept touches no state.  After a change the moments begin anew, or are carried over by
        M <- (P'^T P) M (Q^T Q'), V with the squares of those: measured worse, since the projectors are not orthonormal.
        """
        old = self.subspace
        bias = float(old.bias(gradient_MN))
        if bias <= threshold or isinstance(old, Whole):
            self.bias = bias
            return False
        self.subspace, self.bias = old.fitted(gradient_MN, steps, threshold)
        new, self.num_learnt = self.subspace, self.num_learnt + 1
        if moments == "reset":
            self.forget()
            return True
        left, right = new.rows.overlap(old.rows).cpu(), old.columns.overlap(new.columns).cpu()
        self.exp_avg_DD = left @ self.exp_avg_DD @ right
        self.exp_avg_sq_DD = left.square() @ self.exp_avg_sq_DD @ right.square()
        return True


@dataclass(frozen=True)
class Learning:
    """When and how projectors are fitted.  Defaults of the paper where it states them."""

    check_every: int = 1000  # steps; the first step is one of them
    bias_threshold: float = 0.3
    fit_steps: int = 100
    moments: Moments = "reset"


class LspAdamW:
    """AdamW in learned subspaces over a bus: hook it on a model, run backward passes, call `update`.

    `hooks` wait for a layer's own update before its next forward pass.  Weights of equal `layer` are updated together.
    """

    def __init__(
        self,
        weights: Sequence[ProjectedWeight],
        transport: Transport,
        lanes: Lanes,
        numbers: AdamNumbers,
        learning_rate: float,
        learning: Learning | None = None,
    ) -> None:
        """Without `learning` the projectors stay as they are."""
        self.learning, self.num_steps = learning, 0
        self.weights, self.transport, self.lanes, self.numbers = list(weights), transport, lanes, numbers
        self.learning_rate, self.max_grad_norm = learning_rate, 0.0
        self._by_layer: dict[int, list[ProjectedWeight]] = {}
        for one in self.weights:
            self._by_layer.setdefault(one.layer, []).append(one)
        self._handles = [one.weight.register_post_accumulate_grad_hook(self._taker(one)) for one in self.weights]
        self.expect(1)

    def waiter(self, layer: int) -> Callable[..., None]:
        """A forward pre-hook for the module of a layer."""
        return lambda *_: self.lanes.wait(layer)

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()
        self.lanes.close()

    def expect(self, num_passes: int) -> None:
        """Begin a step of so many backward passes: images are sent during the last.  Without it a step has one."""
        self._missing = {layer: len(weights) for layer, weights in self._by_layer.items()}
        self._squares: dict[int, torch.Tensor] = {}
        self._norm: Future[torch.Tensor] = Future()
        self._passes_left = num_passes
        self._checks = self.learning is not None and self.num_steps % self.learning.check_every == 0

    def update(self) -> torch.Tensor:
        """End a step; the norm of its images.  The weights move in their own time: `lanes.wait_all` waits for all."""
        deepest_first = sorted(self._by_layer, reverse=True)
        if not self.lanes.overlapped:
            self._squares = {layer: self._square(layer) for layer in deepest_first}
        grad_norm = torch.stack([square.cpu() for square in self._squares.values()]).sum().sqrt()
        self._norm.set_result(grad_norm)
        if not self.lanes.overlapped:
            for layer in deepest_first:
                self._send(layer)
        self.num_steps += 1
        self.expect(1)
        return grad_norm

    def _taker(self, one: ProjectedWeight) -> Callable[[torch.Tensor], None]:
        def take(parameter: torch.Tensor) -> None:
            assert parameter.grad is not None
            if self._checks and one.image_DD is None:  # before anything of this step lies in the old subspace
                assert self.learning is not None
                asked = self.learning
                one.learn(parameter.grad, asked.fit_steps, asked.bias_threshold, asked.moments)
            one.take(parameter.grad)
            parameter.grad = None
            if self._passes_left > 1 or not self.lanes.overlapped:
                return
            self._missing[one.layer] -= 1
            if not self._missing[one.layer]:
                self._squares[one.layer] = self._square(one.layer)
                self._send(one.layer)

        return take

    def pass_done(self) -> None:
        """A backward pass of this step has ended."""
        self._passes_left -= 1

    def _square(self, layer: int) -> torch.Tensor:
        images = [one.image_DD for one in self._by_layer[layer] if one.image_DD is not None]
        return torch.stack([image.square().sum() for image in images]).sum() if images else torch.tensor(0.0)

    def _send(self, layer: int) -> None:
        """Hand a layer's images to the lanes; each lane puts what it made in place of what it took."""
        parts = [one for one in self._by_layer[layer] if one.image_DD is not None]
        held = [one.image_DD for one in parts if one.image_DD is not None]
        for one in parts:
            one.image_DD = None
        norm, limit, rate, numbers = self._norm, self.max_grad_norm, self.learning_rate, self.numbers

        def down() -> None:
            held[:] = [self.transport.down(image) for image in held]

        def update() -> None:
            if not all(torch.isfinite(image).all() for image in held):
                raise LaneFailed(f"the gradient of layer {layer} is not finite; its weights were left as they were")
            if limit:
                factor = limit / (float(norm.result()) + 1e-6)  # as torch.nn.utils.clip_grad_norm_
                if factor < 1:
                    held[:] = [image * factor for image in held]
            held[:] = [one.adam(image, numbers) for one, image in zip(parts, held, strict=True)]

        def up() -> None:
            for one, direction in zip(parts, held, strict=True):
                there = self.transport.up(direction, one.weight.device)
                one.apply(there, rate, numbers.weight_decay)

        self.lanes.submit(layer, {"down": down, "update": update, "up": up})

    def state(self) -> dict[int, Mapping[str, torch.Tensor]]:
        """Moments and projectors by place: what a checkpoint needs for the same trajectory."""
        self.lanes.wait_all()
        return {
            place: {
                "exp_avg": one.exp_avg_DD,
                "exp_avg_sq": one.exp_avg_sq_DD,
                "num_updates": torch.tensor(one.num_updates),
                **one.subspace.state(),
            }
            for place, one in enumerate(self.weights)
        }

    def restore(self, state: Mapping[int, Mapping[str, torch.Tensor]]) -> None:
        for place, one in enumerate(self.weights):
            values = dict(state[place])
            one.exp_avg_DD, one.exp_avg_sq_DD = values["exp_avg"].clone(), values["exp_avg_sq"].clone()
            one.num_updates = int(values["num_updates"])
            if isinstance(one.subspace, Subspace):
                one.subspace = Subspace.from_state(values, one.subspace.size)
