"""Memory of a training step by running it on tensors that have sizes and no content.

The real model code, the real method's `setup` and the real step of `strategies.step` run under PyTorch's FakeTensorMode
while a dispatch mode adds up the storages that are alive.  Layers are alike, so two shallow models and a straight line
give the deep one.  A 7B model takes seconds and no weights; nothing here needs a GPU.
"""

from __future__ import annotations

import copy
import dataclasses
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from strategies.contract import Method
from strategies.reuse.row import lay_out
from strategies.shape import ModelShape
from strategies.step import document_attention
from strategies.step.step import Update, forward_backward, update
from strategies.step.supervised_logits import Batch
from strategies.techniques import checkpointing
from strategies.techniques.precision import gradient_scaler
from strategies.train_setup import TrainSettings, TrainSetup


class LiveStorages(TorchDispatchMode):
    """Counts the bytes of every storage that an operation made and that is still referenced."""

    def __init__(self) -> None:
        super().__init__()
        self.live_bytes = self.peak_bytes = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                self.watch(tensor)
        return made

    def watch(self, tensor: torch.Tensor) -> None:
        """Count a tensor's storage until its last reference goes; one on `meta` takes nothing."""
        if tensor.device.type == "meta":
            return
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._known:
            return
        size = storage.nbytes()
        self._known.add(key)
        self.live_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        weakref.finalize(storage, self._on_free, key, size).atexit = False

    def _on_free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live_bytes -= size

    def take_peak(self) -> int:
        """The most bytes alive since this was last asked."""
        peak, self.peak_bytes = self.peak_bytes, self.live_bytes
        return peak


@dataclass(frozen=True)
class Traced:
    """Bytes of a training step whose optimizer state exists already.

    `phases` holds the peak of each phase of the step.  The peak of the whole is the largest of them, and which one that
    is may change with depth: a straight line through peaks would be wrong, one through each phase is right.
    """

    weights_bytes: float
    gradients_bytes: float
    optimizer_bytes: float
    saved_bytes: float  # alive when the model's forward pass ends, beside weights and optimizer
    phases: dict[str, float]

    @property
    def peak_bytes(self) -> float:
        return max(self.phases.values())

    def line(self, other: Traced, near: int, far: int, num_layers: int) -> Traced:
        """The straight lines through `self` at `near` layers and `other` at `far` layers, read at `num_layers`."""
        slope = (num_layers - near) / (far - near)

        def read(first: float, second: float) -> float:
            return first + slope * (second - first)

        names = ("weights_bytes", "gradients_bytes", "optimizer_bytes", "saved_bytes")
        sizes = {name: read(getattr(self, name), getattr(other, name)) for name in names}
        common = self.phases.keys() & other.phases.keys()
        return Traced(**sizes, phases={name: read(self.phases[name], other.phases[name]) for name in sorted(common)})


@dataclass(frozen=True)
class Lengths:
    """A micro-batch without its content: tokens of each document, and how many at its end are supervised."""

    tokens: tuple[int, ...]
    supervised: tuple[int, ...]
    common: int = 0  # tokens that all begin with, where common beginnings are computed once

    def batch(self, packing: bool, share_prefixes: bool = False) -> Batch:
        """Real index tensors on the CPU: tiny, and where a loss is must be known in advance."""
        ids = [torch.arange(length) % 97 for length in self.tokens]
        masks = [torch.arange(n) >= max(1, n - learnt) for n, learnt in zip(self.tokens, self.supervised, strict=True)]
        if share_prefixes:
            alike = [torch.where(row < self.common, row, (row + n) % 97) for n, row in enumerate(ids)]
            return Batch.of_tree(lay_out(alike, masks), tuple(range(len(ids))))
        if packing:
            return Batch(torch.cat(ids)[None], torch.cat(masks)[None], self.tokens, None, tuple(range(len(ids))))
        longest = max(self.tokens)
        pad = torch.nn.utils.rnn.pad_sequence
        attend = pad([torch.ones_like(row) for row in ids], batch_first=True)
        rows, learnt = pad(ids, batch_first=True), pad(masks, batch_first=True)
        assert rows.shape[1] == longest
        return Batch(rows, learnt, None, attend, tuple(range(len(ids))))


def trace(config: dict[str, Any], method: Method, settings: TrainSettings, lengths: Lengths) -> Traced:
    """Peak memory of a step of the whole model from steps of 2 and 4 of its layers.

    Where only chosen layers train, layers are not alike and all of them are run.  Raises what the model or the method
    raises; NotImplementedError for an operation without a fake version.
    """
    num_layers = ModelShape.from_config(config).num_layers
    near, far = (2, 4) if num_layers > 4 else (max(1, num_layers - 1), num_layers)
    if not method.layers_are_alike:
        near = far = num_layers
    shallow = _trace_layers(config, near, method, settings, lengths)
    if near == far:
        return shallow
    return shallow.line(_trace_layers(config, far, method, settings, lengths), near, far, num_layers)


def _trace_layers(
    config: dict[str, Any], num_layers: int, method: Method, settings: TrainSettings, lengths: Lengths
) -> Traced:
    from torch._subclasses.fake_tensor import FakeTensorMode

    batch = lengths.batch(settings.techniques.packing)
    built = build(config, num_layers, method, settings, "meta")
    with FakeTensorMode() as fake:
        for name, value in vars(batch).items():
            if isinstance(value, torch.Tensor):
                setattr(batch, name, fake.from_tensor(value))
        return run(lambda: _materialise(built), batch, sum(lengths.supervised), settings)


def _materialise(setup: TrainSetup) -> TrainSetup:
    """Every meta tensor of a set-up model as a (fake) CPU tensor.

    Not built under FakeTensorMode itself: there `Module.to`, which PEFT calls, cannot swap parameters (torch 2.13).
    """
    on_cpu = filler("cpu")
    fill(setup.model, on_cpu)
    for group in setup.optimizer.param_groups:
        group["params"] = [on_cpu(parameter) for parameter in group["params"]]
    parameters = {name: on_cpu(parameter) for name, parameter in setup.parameters.items()}
    return dataclasses.replace(setup, parameters=parameters)


def filler(device: str) -> Callable[[torch.Tensor], Any]:
    """Gives every tensor one of its size on `device`, always the same one, and a parameter for a parameter."""
    memo: dict[int, torch.Tensor] = {}

    def filled(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in memo:
            empty = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
            is_parameter = isinstance(tensor, torch.nn.Parameter)
            memo[id(tensor)] = torch.nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
        return memo[id(tensor)]

    return filled


def fill(model: torch.nn.Module, filled: Callable[[torch.Tensor], Any]) -> None:
    """Put what `filled` gives in the place of every tensor that a model's modules hold."""
    for module in model.modules():
        for tensors in (module._parameters, module._buffers, vars(module)):
            for name, tensor in tensors.items():
                if isinstance(tensor, torch.Tensor):
                    tensors[name] = filled(tensor)


def run(make: Callable[[], TrainSetup], batch: Batch, num_supervised: int, settings: TrainSettings) -> Traced:
    """Two steps of what `make` builds, watched; works on fake and on real tensors alike."""
    live = LiveStorages()
    techniques = settings.techniques
    scaler = gradient_scaler("cpu", techniques.dtype)
    with live:
        setup = make()
        weights = live.live_bytes
        setup.model.train()
        forward_backward(setup, batch, num_supervised, techniques, scaler)
        gradients = live.live_bytes - weights
        update(setup, scaler, Update(1.0, 1.0))
        optimizer_bytes = live.live_bytes - weights

        watch = _Phases(setup.model, live)
        live.take_peak()
        forward_backward(setup, batch, num_supervised, techniques, scaler)
        watch.ended("backward of the first layer")
        update(setup, scaler, Update(1.0, 1.0))
        watch.ended("update")
        watch.remove()
    return Traced(weights, gradients, optimizer_bytes, watch.saved_bytes - weights - optimizer_bytes, watch.peaks)


_BETWEEN = "between"  # not looked at: see below


class _Phases:
    """Cuts a step at the borders between which live memory moves in one direction, layer by layer.

    Forward and the logits' backward pass; the last layer's backward pass; those between; the first layer's.  Between
    the first cut and the last the live bytes rise or fall evenly, so the largest are at the ends.
    """

    def __init__(self, model: torch.nn.Module, live: LiveStorages) -> None:
        self.peaks: dict[str, float] = {}
        self.saved_bytes = 0
        self._live = live
        lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
        layers = list(max(lists, key=lambda layer_list: sum(p.numel() for p in layer_list.parameters())))
        self._hooks = [model.register_forward_hook(self._forward_ended)]
        if len(layers) > 1:
            last, second = layers[-1], layers[1]
            self._hooks.append(last.register_forward_hook(self._on_output("forward and loss")))
            # In this order: of two layers the second is the last, and its input's gradient ends both phases.
            for layer, phase in ((last, "backward of the last layer"), (second, _BETWEEN)):
                self._hooks.append(layer.register_forward_pre_hook(self._on_input(phase), with_kwargs=True))
        self._seen: set[str] = set()

    def ended(self, phase: str) -> None:
        peak = self._live.take_peak()
        if phase != _BETWEEN:
            self.peaks[phase] = max(self.peaks.get(phase, 0), peak)

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _forward_ended(self, *_: Any) -> None:
        self.saved_bytes = self._live.live_bytes

    def _on_gradient(self, phase: str, value: Any) -> None:
        tensor = value[0] if isinstance(value, tuple) else value
        if phase not in self._seen and isinstance(tensor, torch.Tensor) and tensor.requires_grad:
            self._seen.add(phase)  # checkpointing runs a layer twice: only the first has the gradient's path
            tensor.register_hook(lambda _: self.ended(phase))

    def _on_output(self, phase: str) -> Any:
        return lambda module, args, output: self._on_gradient(phase, output)

    def _on_input(self, phase: str) -> Any:
        return lambda module, args, kwargs: self._on_gradient(phase, args[0] if args else kwargs["hidden_states"])


def build(config: dict[str, Any], num_layers: int, method: Method, settings: TrainSettings, device: str) -> TrainSetup:
    """A model of `num_layers` layers with the method's changes and techniques; its weights are random."""
    with torch.device(device):
        setup = method.setup(plain_model(config, num_layers, method, settings, device), settings)
    if settings.techniques.gradient_checkpointing:
        checkpointing.enable(setup.model)
    return setup


def plain_model(config: dict[str, Any], num_layers: int, method: Method, settings: TrainSettings, device: str) -> Any:
    """The untouched model in the precision the method asks for."""
    from transformers import AutoConfig, AutoModelForCausalLM

    document_attention.register()
    known = {key: value for key, value in copy.deepcopy(config).items() if key not in ("model_type", "auto_map")}
    shallow = AutoConfig.for_model(config["model_type"], **known)
    shallow.num_hidden_layers = num_layers
    if getattr(shallow, "layer_types", None):
        shallow.layer_types = shallow.layer_types[:num_layers]
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(
            shallow,
            dtype=getattr(torch, method.load_dtype(settings.techniques)),
            attn_implementation=settings.techniques.attn_implementation,
        )
        model.tie_weights()
    return model


def tensors_of(setup: TrainSetup) -> Iterator[torch.Tensor]:
    """Everything a set-up model holds between two steps."""
    yield from setup.model.parameters()
    yield from setup.model.buffers()
    for state in setup.optimizer.state.values():
        yield from (value for value in state.values() if isinstance(value, torch.Tensor))


def even(num_documents: int, length: int, supervised_fraction: float) -> Lengths:
    """A micro-batch of equal documents."""
    learnt = max(1, round(length * supervised_fraction))
    return Lengths((length,) * num_documents, (learnt,) * num_documents)
