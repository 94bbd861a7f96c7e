"""AdamW on d x d images in host memory: gradients are compressed as they appear, updates arrive layer by layer.

Of every projected weight the device holds the weight, two sparse projectors and, between backward and update, one
image.  The host holds the two moments of the image.  A weight's gradient is freed as soon as its image is taken, so
accumulation adds images, not gradients; both are linear, so the sum is the same.  For the same reason workers add up
images.

Clipping needs the norm of all gradients before the first update; the norm is that of the images, since no worker
ever holds two whole gradients.  Images still cross the bus during the backward pass; updates wait for its end and run
beside the next forward pass.

Weight decay shrinks the weight itself, as AdamW does (arXiv 1711.05101); the published code has none.  A weight in
bfloat16 is rounded at random, up or down by how near it lies, or small updates would vanish.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from strategies.lsp_offload.adam import AdamNumbers, direction, round_at_random, zero_moments
from strategies.lsp_offload.projector import Subspace, Whole
from strategies.lsp_offload.remote_update import CpuSide, take_moments
from strategies.lsp_offload.schedule import LANES, Lanes, Step
from strategies.lsp_offload.transport import EmulatedBus, Transport
from strategies.lsp_offload.weights import Learning, Projected

_ON_HOST = frozenset(("step", "exp_avg", "exp_avg_sq", "num_learnt", "bias"))


class LaneFailed(FloatingPointError):
    """A gradient was not finite: what it would have moved keeps its value from before the step."""


@dataclass(frozen=True)
class Route:
    """Where images go: over the bus, through the lanes, to the process that updates them (None = this one)."""

    transport: Transport
    lanes: Lanes
    cpu_side: CpuSide | None = None


class LspAdamW(torch.optim.Optimizer):
    """AdamW in learned subspaces over a bus.  The contract's `Streaming`: call `last_pass`, then `update`.

    `hooks` wait for a layer's own update before its next forward pass.  Weights of equal `layer` are updated together.
    `others` are trained on the device by plain AdamW.  All that a checkpoint needs lies in `state`: by weight the
    moments and, of projected ones, the projectors' values and positions.
    """

    def __init__(
        self,
        weights: Sequence[Projected],
        route: Route,
        numbers: AdamNumbers,
        learning: Learning | None = None,
        others: Sequence[torch.nn.Parameter] = (),
        seed: int = 0,
    ) -> None:
        """Without `learning` projectors stay as they are drawn."""
        self.weights, self.numbers = list(weights), numbers
        self.transport, self.lanes, self._cpu_side = route.transport, route.lanes, route.cpu_side
        self.learning, self._others, self._seed = learning, list(others), seed
        rates = {"lr": numbers.learning_rate, "base_lr": numbers.learning_rate}
        groups = [{"params": part, **rates} for part in ([one.weight for one in self.weights], self._others) if part]
        super().__init__(groups, {})
        self.device = self.weights[0].weight.device
        self._place = {one.weight: place for place, one in enumerate(self.weights)}
        self._spaces: dict[torch.nn.Parameter, Subspace] = {}
        self._by_layer: dict[int, list[Projected]] = {}
        for one in self.weights:
            self._by_layer.setdefault(one.layer, []).append(one)
        self._images = [one.image_parameter() for one in self.weights]
        self.summed: Sequence[torch.nn.Parameter] = [*self._images, *self._others]
        self._handles = [one.weight.register_post_accumulate_grad_hook(self._image_hook(one)) for one in self.weights]
        self._missing: dict[int, int] | None = None  # in a step's last pass: weights a layer still waits for
        self._step = Step(0.0)
        self.rows = learning.rows if learning else 0
        self._learning_pass: int | None = None
        self._fits_left = 0
        self._reported = (0, 0)

    # What the training loop calls.

    num_looks = 0

    def is_due(self, step: int) -> bool:
        """Whether the projectors are looked at before this step."""
        return self.learning is not None and step % self.learning.check_every == 0 and any(o.size for o in self.weights)

    def begin_learning(self, num_passes: int) -> None:
        """The next backward passes only teach: their gradients move nothing."""
        assert self.learning is not None
        self.settle()
        if self.learning.moments == "project":
            self.collect()
        self._learning_pass, self._fits_left = 0, max(1, self.learning.fit_steps // max(1, num_passes))

    def watch(self, batch: Any) -> None: ...

    def next_learning(self) -> None:
        assert self._learning_pass is not None
        self._learning_pass += 1

    def end_learning(self) -> dict[str, Any]:
        """What became of the projectors."""
        assert self.learning is not None
        self._learning_pass = None
        states = [self._state_of(one) for one in self.weights if one.size is not None]
        biases = [float(state["bias"]) for state in states]
        mean, above = sum(biases) / len(biases), sum(bias > self.learning.bias_threshold for bias in biases)
        text = f"projectors: relative bias {mean:.2f} on average, {max(biases):.2f} at worst"
        if above:
            text += f"; {above} of {len(biases)} stay above bias_threshold {self.learning.bias_threshold:g}, as is"
            text += " usual for gradients of high rank: training continues with the best that were found"
        return {
            "text": text,
            "bias": round(mean, 4),
            "worst_bias": round(max(biases), 4),
            "above_threshold": above,
            "num_projected": len(biases),
            "learnt": int(sum(float(state["num_learnt"]) for state in states)),
            "bias_threshold": self.learning.bias_threshold,
        }

    def last_pass(self, max_grad_norm: float) -> None:
        """The next backward pass is the step's last: layers leave as it finishes them."""
        if self.lanes.overlapped:
            self._step = Step(max_grad_norm)
            self._missing = {layer: len(weights) for layer, weights in self._by_layer.items()}

    def update(self, max_grad_norm: float) -> torch.Tensor:
        """End a step; the norm of its images.  The weights move in their own time: `settle` waits for all.

        Raises LaneFailed where a gradient is not finite; then nothing that waited for the norm has moved.
        """
        if self._missing is None:
            self._step = Step(max_grad_norm)
        step, self._missing = self._step, None
        late = [layer for layer in sorted(self._by_layer, reverse=True) if layer not in step.squares]
        step.squares |= {layer: self._square(layer) for layer in late}
        squares = [square.cpu() for square in step.squares.values()]
        squares += [p.grad.float().square().sum().cpu() for p in self._others if p.grad is not None]
        grad_norm = torch.stack(squares).sum().sqrt()
        if not torch.isfinite(grad_norm):
            self._cancel(step)
            moved = "layers that had finite ones have moved" if max_grad_norm == 0 else "no weight has moved"
            raise LaneFailed(f"a gradient is not finite; {moved}")
        step.norm.set_result(float(grad_norm))
        for layer in late:
            self._send(layer)
        self._update_others(step.factor())
        return grad_norm

    def settle(self) -> None:
        """Until every update has arrived.  Raises LaneFailed."""
        self.lanes.wait_all()

    def collect(self) -> None:
        """Until every update has arrived and all moments lie in `state`.  Raises LaneFailed."""
        self.settle()
        if self._cpu_side is None:
            return
        away = [one for one in self.weights if "exp_avg" not in self.state.get(one.weight, {"exp_avg": None})]
        for one, moments in zip(away, self._cpu_side.give_moments([self._place[o.weight] for o in away]), strict=True):
            self.state[one.weight] |= moments

    def home(self, parameter: torch.nn.Parameter, key: str) -> torch.device:
        """The host for moments and numbers of what crosses the bus, the device for projectors and all else."""
        return torch.device("cpu") if parameter in self._place and key in _ON_HOST else parameter.device

    def report(self) -> dict[str, Any]:
        """Bytes over the bus and seconds of each lane since the last report."""
        down, up = self._reported
        self._reported = self.transport.down_bytes, self.transport.up_bytes
        busy: dict[str, float] = dict.fromkeys(LANES, 0.0)
        for lane, _, start_s, end_s in self.spans():
            busy[lane] += end_s - start_s
        return {
            "bus_down_bytes": self.transport.down_bytes - down,
            "bus_up_bytes": self.transport.up_bytes - up,
            "lane_s": {lane: round(seconds, 4) for lane, seconds in busy.items()},
        }

    def spans(self) -> list[tuple[str, int, float, float]]:
        return [(span.lane, span.layer, span.start_s, span.end_s) for span in self.lanes.take_spans()]

    def emulate_bus(self, bytes_per_s: float) -> None:
        if not isinstance(self.transport, EmulatedBus):
            raise ValueError("this machine has a real bus")
        self.transport.bytes_per_s = bytes_per_s

    # What torch calls.

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """As a plain optimizer: no clipping, and every update has arrived."""
        self.update(0.0)
        self.settle()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget what this step has gathered.  Raises RuntimeError where layers have moved by it already."""
        step, self._missing, self._learning_pass = self._step, None, None
        if step.squares and not step.norm.done():
            self._cancel(step)
            if not step.max_grad_norm:
                raise RuntimeError(
                    "a step cannot be repeated when layers have moved by it: resume from the checkpoint with a smaller"
                    " train.per_device_train_batch_size, or set train.max_grad_norm, which lets updates wait"
                )
        for parameter in self.summed:
            parameter.grad = None
        for one in self.weights:
            one.weight.grad = None

    def waiter(self, layer: int) -> Callable[..., None]:
        """A forward pre-hook for the module of a layer."""
        return lambda *_: self.lanes.wait(layer)

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()
        self.lanes.close()

    # A step.

    def _image_hook(self, one: Projected) -> Callable[[torch.Tensor], None]:
        image = self._images[self._place[one.weight]]

        def take(parameter: torch.Tensor) -> None:
            gradient, parameter.grad = parameter.grad, None
            assert gradient is not None
            if self._learning_pass is not None:
                self._learn(one, gradient)
                return
            added = self._space_of(one).image(gradient.float())
            image.grad = added if image.grad is None else image.grad.add_(added)
            if self._missing is None:
                return
            self._missing[one.layer] -= 1
            if not self._missing[one.layer]:
                self._step.squares[one.layer] = self._square(one.layer)
                self._send(one.layer)

        return take

    def _square(self, layer: int) -> torch.Tensor:
        images = [self._images[self._place[one.weight]].grad for one in self._by_layer[layer]]
        squares = [image.square().sum() for image in images if image is not None]
        return torch.stack(squares).sum() if squares else torch.zeros(())

    def _send(self, layer: int) -> None:
        """Hand a layer's images to the lanes; each lane puts what it made in place of what it took."""
        parts, held = [], []
        for one in self._by_layer[layer]:
            image = self._images[self._place[one.weight]]
            if image.grad is not None:
                parts.append(one)
                held.append(image.grad)
                image.grad = None
        if not parts:
            return
        step, rate, mark = self._step, self.param_groups[0]["lr"], self.transport.mark()

        def down() -> None:
            held[:] = [self.transport.down(image, mark) for image in held]

        def update() -> None:
            factor = step.factor()
            if factor is None:
                held.clear()
                return
            if not all(torch.isfinite(image.sum()) for image in held):
                raise LaneFailed(f"the gradient of layer {layer} is not finite; its weights were left as they were")
            for place, (one, image) in enumerate(zip(parts, held, strict=True)):
                if factor < 1:
                    image.mul_(factor)
                held[place] = self._direction(one, image)
                self.transport.buffers.give(image)

        def up() -> None:
            for one, change in zip(parts, held, strict=False):
                space = self._space_of(one)
                num_steps = int(self.state[one.weight]["step"])

                def move(there: torch.Tensor, one: Projected = one, space: Any = space, at: int = num_steps) -> None:
                    self._move(one.weight, space.back(there) * space.gain, rate, (self._place[one.weight], at))

                self.transport.up(change, one.weight.device, move)

        self.lanes.submit(layer, {"down": down, "update": update, "up": up}, step.norm if step.max_grad_norm else None)

    def _direction(self, one: Projected, image: torch.Tensor) -> torch.Tensor:
        """What an image becomes, in one of the host's buffers."""
        state, out = self._state_of(one), self.transport.buffers.take(image.shape)
        if self._cpu_side is None:
            return direction(state, image, self.numbers, out)
        out.copy_(self._cpu_side.update(self._place[one.weight], image, take_moments(state)))
        state["step"] += 1
        return out

    def _cancel(self, step: Step) -> None:
        step.norm.set_result(None)
        self.lanes.abandon()
        for parameter in self.summed:
            parameter.grad = None

    def _update_others(self, factor: float | None) -> None:
        if not self._others or factor is None:
            return
        rate = self.param_groups[-1]["lr"]
        for place, parameter in enumerate(self._others):
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if not state:
                state |= zero_moments(parameter.shape, parameter.device)
            gradient, parameter.grad = parameter.grad.float() * factor, None
            change = direction(state, gradient, self.numbers, torch.empty_like(gradient))
            self._move(parameter, change, rate, (len(self.weights) + place, int(state["step"])))

    @torch.no_grad()
    def _move(self, weight: torch.Tensor, change: torch.Tensor, rate: float, at: tuple[int, int]) -> None:
        """W <- (1 - lr wd) W + lr change; vectors, which are norms and biases here, do not decay."""
        decay = self.numbers.weight_decay if weight.dim() > 1 else 0.0
        moved = weight.float() * (1 - rate * decay) + rate * change
        if weight.dtype == torch.bfloat16:
            generator = torch.Generator(weight.device).manual_seed(self._seed_of(*at))
            moved = round_at_random(moved, generator)
        weight.copy_(moved)

    # Projectors and moments.

    def _state_of(self, one: Projected) -> dict[str, torch.Tensor]:
        """The moments on the host and the projectors on the device; drawn when first asked for."""
        state = self.state[one.weight]
        if "step" not in state:
            if one.size is not None:
                state |= self._draw(one, 0).state()
                state |= {"num_learnt": torch.zeros(()), "bias": torch.tensor(math.inf)}
            state |= zero_moments(one.image_shape, torch.device("cpu"))
        return state

    def _space_of(self, one: Projected) -> Subspace | Whole:
        if one.size is None:
            return Whole()
        state, known = self._state_of(one), self._spaces.get(one.weight)
        if known is None or known.rows.values_MR is not state["rows_values"]:
            known = self._spaces[one.weight] = Subspace.from_state(state, one.size)
        return known

    def _draw(self, one: Projected, number: int) -> Subspace:
        """Random projectors, the same on every worker and after a restart."""
        return one.draw(torch.Generator().manual_seed(self._seed_of(self._place[one.weight], number)))

    def _seed_of(self, place: int, number: int) -> int:
        return ((self._seed * 1_000_003 + place) * 1_000_003 + number) % 2**63

    def _learn(self, one: Projected, gradient_MN: torch.Tensor) -> None:
        """Fit the projectors to a gradient unless their bias is small enough; what is kept touches no state.

        New projectors are drawn and fitted to the first pass's gradient, then further to those of the other passes.
        The moments start anew, or are carried over by M <- (P'^T P) M (Q^T Q'), V with the squares of those: measured
        worse, since the projectors are not orthonormal.
        """
        if one.size is None or self.learning is None:
            return
        state, old, asked = self._state_of(one), self._space_of(one), self.learning
        assert isinstance(old, Subspace)
        if not torch.isfinite(gradient_MN).all():
            return
        if self._learning_pass == 0:
            bias = float(old.bias(gradient_MN))
            state["bias"] = torch.tensor(bias)
            if bias <= asked.bias_threshold:
                return
            state["num_learnt"] = state["num_learnt"] + 1
            start = self._draw(one, int(state["num_learnt"])) if state["num_learnt"] > 1 else old
        elif float(state["bias"]) <= asked.bias_threshold:
            return
        else:
            start = old
        new, bias = start.fitted(gradient_MN, self._fits_left, asked.bias_threshold)
        state |= {**new.state(), "bias": torch.tensor(bias)}
        if asked.moments == "reset" or not int(state["step"]):
            state |= zero_moments(one.image_shape, torch.device("cpu"))
            return
        left, right = new.rows.overlap(old.rows).cpu(), old.columns.overlap(new.columns).cpu()
        state["exp_avg"] = left @ state["exp_avg"] @ right
        state["exp_avg_sq"] = left.square() @ state["exp_avg_sq"] @ right.square()
