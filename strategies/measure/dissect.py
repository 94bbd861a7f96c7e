"""Where the time of a training step goes: by phase, by part of the model, by operator; and its memory by part.

The real step of `strategies.step` under torch.profiler.  Each operator is counted for the innermost module it ran in;
one of the backward pass for the module whose forward pass made it, found by autograd's sequence number.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from strategies.measure.trace import LiveStorages, tensors_of
from strategies.step.step import Update, backward, forward, update
from strategies.step.supervised_logits import Batch, inner_model
from strategies.techniques.precision import gradient_scaler
from strategies.train_setup import TrainSetup
from strategies.workload import Techniques

PHASES: tuple[str, ...] = ("data", "transfer", "forward", "backward", "optimizer")
_MARK = "part:"
_BACKWARD = "autograd::engine::evaluate_function"
_REST = "rest"


@dataclass(frozen=True)
class Timed:
    """Seconds of one step by phase."""

    phases: dict[str, float]

    @property
    def step_s(self) -> float:
        return sum(self.phases.values())


@dataclass(frozen=True)
class Profiled:
    """Seconds of one step by part of the model, and of its most expensive operators."""

    parts: dict[str, float]
    operators: list[tuple[str, float, int]]  # name, seconds, calls; the most expensive first


def timed_step(
    setup: TrainSetup,
    makers: Sequence[Callable[[], Batch]],
    num_supervised: float,
    techniques: Techniques,
    device: torch.device,
) -> Timed:
    """One step, each phase on the clock.  `makers` make the micro-batches on the CPU.

    On a GPU each phase waits for the one before, which a real step does not: the sum is an upper bound.
    """
    spent: dict[str, float] = dict.fromkeys(PHASES, 0.0)
    scaler = gradient_scaler(device.type, techniques.dtype)

    @contextmanager
    def clock(phase: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        _wait(device)
        spent[phase] += time.perf_counter() - began

    for make in makers:
        with clock("data"):
            batch = make()
        with clock("transfer"):
            batch = batch.to(device)
        with clock("forward"):
            part = forward(setup, batch, num_supervised, techniques)
        with clock("backward"):
            backward(setup, part, scaler)
    with clock("optimizer"):
        update(setup, scaler, Update(lr_factor=0.0, max_grad_norm=1.0))
    return Timed(spent)


def profiled_step(
    setup: TrainSetup, batches: Sequence[Batch], num_supervised: float, techniques: Techniques, most: int = 12
) -> Profiled:
    """One step under the profiler: it takes longer than a real one, its proportions are what counts."""
    device = batches[0].input_ids_BT.device
    scaler = gradient_scaler(device.type, techniques.dtype)
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with ExitStack() as marks:
        for name, module in setup.model.named_modules():
            if label := part_of(name, module, setup.model):
                marks.enter_context(_marked(module, label))
        with profile(activities=activities) as profiler:
            for batch in batches:
                with record_function(_MARK + "loss"):  # what is outside every module: the logits and the loss
                    part = forward(setup, batch, num_supervised, techniques)
                backward(setup, part, scaler)
            with record_function(_MARK + "optimizer"):
                update(setup, scaler, Update(lr_factor=0.0, max_grad_norm=1.0))
            _wait(device)
    return _count_events(list(profiler.events() or []), on_gpu, most)


def part_of(name: str, module: torch.nn.Module, model: torch.nn.Module) -> str | None:
    """The part of the model a module stands for; None where its inner modules say it."""
    kind, last = type(module).__name__.lower(), name.rpartition(".")[2]
    if name.endswith("lm_head") or module is _output_of(model):
        return "loss"
    if "lora" in kind or ".lora_" in f".{name}" or (hasattr(module, "base_layer") and hasattr(module, "lora_A")):
        return "lora"
    if isinstance(module, torch.nn.Embedding):
        return "embedding"
    if isinstance(module, torch.nn.Linear) or kind in ("conv1d", "linear4bit", "linear8bitlt"):
        return "matrix products"
    if "norm" in kind:
        return "norm"
    if "attention" in kind or last in ("self_attn", "attn", "attention"):
        return "attention"
    if kind.endswith("mlp") or last == "mlp":
        return "activation"
    if "rotary" in kind:
        return "attention"
    if kind.endswith(("layer", "block")) and hasattr(module, "forward"):
        return "residual"
    return None


def _output_of(model: Any) -> Any:
    inner = inner_model(model)
    return inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None


@contextmanager
def _marked(module: torch.nn.Module, label: str) -> Iterator[None]:
    """Every forward pass of a module inside a named range of the profiler."""
    opened: list[Any] = []

    def before(*_: Any) -> None:
        mark = record_function(_MARK + label)
        mark.__enter__()
        opened.append(mark)

    def after(*_: Any) -> None:
        opened.pop().__exit__(None, None, None)

    hooks = [module.register_forward_pre_hook(before), module.register_forward_hook(after, always_call=True)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _count_events(events: list[Any], on_gpu: bool, most: int) -> Profiled:
    """Self times of the operators, each under its part."""
    roots = [event for event in events if event.cpu_parent is None]
    made_in: dict[int, str] = {}  # autograd's sequence number -> part whose forward pass made it
    parts, operators, calls = Counter[str](), Counter[str](), Counter[str]()

    def walk(event: Any, part: str, visit: Callable[[Any, str], None], at: bool = False) -> None:
        if event.name.startswith(_MARK):
            part, at = event.name.removeprefix(_MARK), False
        elif event.name.startswith(_BACKWARD):
            part, at = made_in.get(event.sequence_nr, _REST), True
        elif event.sequence_nr >= 0 and not at:
            made_in.setdefault(event.sequence_nr, part)
        visit(event, part)
        for child in event.cpu_children:
            walk(child, part, visit, at)

    def count(event: Any, part: str) -> None:
        seconds = (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e6
        parts[part] += seconds
        if not event.name.startswith((_MARK, _BACKWARD)):
            operators[event.name] += seconds
            calls[event.name] += 1

    in_order = sorted(roots, key=lambda event: event.time_range.start)
    for root in in_order:  # once to learn which part made what, once to count
        walk(root, _REST, lambda event, part: None)
    for root in in_order:
        walk(root, _REST, count)
    listed = [(name, float(seconds), calls[name]) for name, seconds in operators.most_common(most)]
    return Profiled(dict(parts.most_common()), listed)


def memory_by_part(setup: TrainSetup, batch: Batch, num_supervised: float, techniques: Techniques) -> dict[str, float]:
    """Bytes of tensors at the peak of a step whose optimizer state exists: what stays, what the forward pass saved,
    and what is only there for a moment.  Counted by following every storage; not for a GPU's own allocator."""
    scaler = gradient_scaler(batch.input_ids_BT.device.type, techniques.dtype)
    live = LiveStorages()
    for tensor in tensors_of(setup):
        live.watch(tensor)
    optimizer = sum(
        value.untyped_storage().nbytes()
        for state in setup.optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    )
    before = live.live_bytes
    live.take_peak()
    with live:
        part = forward(setup, batch, num_supervised, techniques)
        saved = live.live_bytes - before
        backward(setup, part, scaler)
        update(setup, scaler, Update(lr_factor=0.0, max_grad_norm=1.0))
    peak = live.take_peak()
    gradients = sum(p.numel() * p.element_size() for p in setup.parameters.values())
    return {
        "weights": before - optimizer,
        "optimizer": optimizer,
        "gradients": gradients,
        "activations": saved,
        "for a moment": max(0.0, peak - before - saved - gradients),
        "peak": peak,
    }


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
