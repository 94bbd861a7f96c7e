"""Two steps as a timeline: what the device computes layer by layer, and what an optimizer's lanes do beside it.

On a GPU the computation's times are those at which work was handed over, which is earlier than it was done.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from strategies.step.step import Update, backward, forward, last_pass, update
from strategies.step.supervised_logits import Batch
from strategies.techniques.precision import gradient_scaler
from strategies.train_setup import TrainSetup
from strategies.workload import Techniques

LAYER = re.compile(r"(?:.*\.)?(?:layers|h|layer)\.(\d+)")


@dataclass(frozen=True)
class Span:
    """A piece of work of one layer: seconds since the first step began."""

    lane: str  # forward | backward | down | update | up
    layer: int
    start_s: float
    end_s: float


def record_spans(
    setup: TrainSetup, makers: Sequence[Callable[[], Batch]], num_supervised: float, techniques: Techniques, steps: int
) -> list[Span]:
    """`steps` steps at learning rate 0; nothing is left behind but the optimizer's state."""
    spans: list[Span] = []
    started: dict[int, float] = {}
    backwards: list[tuple[int, float]] = []
    handles: list[Any] = []

    def watch(layer: int, module: torch.nn.Module) -> None:
        def begins(*_: Any) -> None:
            started[layer] = time.perf_counter()

        def ends(*_: Any) -> None:
            spans.append(Span("forward", layer, started[layer], time.perf_counter()))

        def returns(*_: Any) -> None:
            backwards.append((layer, time.perf_counter()))

        handles.append(module.register_forward_pre_hook(begins))
        handles.append(module.register_forward_hook(ends))
        handles.append(module.register_full_backward_pre_hook(returns))

    for name, module in setup.model.named_modules():
        if found := LAYER.fullmatch(name):
            watch(int(found[1]), module)
    scaler, numbers = gradient_scaler("cpu", "float32"), Update(lr_factor=0.0, max_grad_norm=1.0)
    if setup.streaming:
        setup.streaming.settle()
        setup.streaming.spans()  # what went before is not asked for
    began = time.perf_counter()
    device = setup.device
    try:
        for _ in range(steps):
            for number, make in enumerate(makers, start=1):
                part = forward(setup, make().to(device), num_supervised, techniques)
                if number == len(makers):
                    last_pass(setup, numbers)
                backwards.clear()
                backward(setup, part, scaler)
                ends = [*(start for _, start in backwards[1:]), time.perf_counter()]
                spans += [
                    Span("backward", layer, start, end) for (layer, start), end in zip(backwards, ends, strict=True)
                ]
            update(setup, scaler, numbers)
        if setup.streaming:
            setup.streaming.settle()
            spans += [Span(*one) for one in setup.streaming.spans()]
    finally:
        for handle in handles:
            handle.remove()
    return [Span(one.lane, one.layer, one.start_s - began, one.end_s - began) for one in spans]
