"""Frozen weights stay in the host's memory and visit the device layer by layer (`strategy.offload: weights`).

A layer's weights are copied in while the layer before computes, in the form in which they are used (16 or 32 bits, or
bitsandbytes' 4 and 8), and leave when the next ones arrive: two layers are on the device at most.  With gradient
checkpointing the recomputation and the backward pass share a visit, so a micro-batch sends each layer twice.  RoundPipe
(arXiv 2604.27085) trains so at full speed on one card, given enough tokens a micro-batch.

Embeddings are looked up on the host; of the output matrix, slices visit the device (streamed_output.py).

A visitor's tensors keep their place in the model and their storage: only its bytes come and go, as FSDP does it
(arXiv 2304.11277).  bitsandbytes' backward pass reads the tensors that its forward pass saw, so no other would do.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from strategies.model.architecture import architecture_of
from strategies.step.passes import passes_of
from strategies.step.side_stream import SideStream
from strategies.step.streamed_output import OutputMatrix, slices_of
from strategies.step.supervised_logits import inner_model
from strategies.train_setup import TrainSetup

_ALIGNMENT = 256  # bytes, as CUDA's own allocations
LEAST_SLICE_BYTES = 64 * 2**20  # of the output matrix, as in cost/streaming.py; larger where a layer is larger


@dataclass
class Counts:
    """What has crossed so far."""

    visits: int = 0
    sent_bytes: int = 0
    most_visitors: int = 0  # on the device at once


class Visitor:
    """Tensors that lie on the device together or not at all.

    For a device with a stream they are copied into one page-locked piece of memory, unless they lie in such: `is_home`.
    """

    def __init__(self, tensors: Sequence[torch.Tensor], device: torch.device, is_home: bool = False) -> None:
        starts, end = [], 0
        for tensor in tensors:
            starts.append(end)
            end += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
        self.num_bytes = end
        flat = torch.empty(end, dtype=torch.uint8, device=device)
        self.visiting = [_view(flat, start, tensor) for start, tensor in zip(starts, tensors, strict=True)]
        self._storage = flat.untyped_storage()
        self._storage.resize_(0)
        self.home = [tensor.detach() for tensor in tensors]
        self._pairs = list(zip(self.home, self.visiting, strict=True))
        if is_home or device.type == "cpu":  # what was read from a file may stay there: the kernel drops and reads it
            return
        pinned = _pinned(end)
        self.home = [_view(pinned, start, tensor) for start, tensor in zip(starts, tensors, strict=True)]
        for home, tensor in zip(self.home, tensors, strict=True):
            home.copy_(tensor)
        self._pairs = [(pinned, flat)]

    def make_room(self) -> None:
        self._storage.resize_(self.num_bytes)

    def leave(self) -> None:
        self._storage.resize_(0)

    def pairs(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(at home, on the device) of all that has to be copied."""
        return self._pairs


class WeightStream:
    """Which visitors are on a device: the one that is needed and the one that is needed next.

    Visitors stand in a line, decoder layers first, then slices of the output matrix.  A forward pass walks up the line;
    a backward pass walks down to the lowest one that it reaches; None where there is no backward pass.

    `ahead` has the next one copied while one computes, by default where a device has a stream for it.
    """

    def __init__(
        self,
        device: torch.device,
        visitors: Sequence[Visitor],
        lowest: int | None = 0,
        ahead: bool | None = None,
    ) -> None:
        self._visitors, self._lowest = visitors, lowest
        self._copies = SideStream(device) if device.type != "cpu" else None
        self._ahead = self._copies is not None if ahead is None else ahead
        self._coming: dict[int, torch.Event] = {}
        self._here: set[int] = set()
        self._at, self._descends = -1, False
        self._order: tuple[bool, bool] | None = None
        self.counts = Counts()

    def follow(self, is_forward: bool, then_forward: bool) -> None:
        """What is computed next is a forward or a backward pass, and what comes after it.

        Without such word a backward pass follows each forward pass that keeps gradients.
        """
        self._order = is_forward, then_forward

    def need(self, place: int) -> None:
        """Have a visitor's tensors on the device for what is computed next, and the following one's on their way."""
        stays = place == self._at
        inferred = self._descends if stays else 0 < place < self._at
        descends = not self._order[0] if self._order else inferred
        if stays and descends == self._descends:
            return
        self._descends = descends
        self._at = -1  # where memory runs out below, nothing counts as here
        wanted = [place, self._after(place)] if self._ahead else [place]
        for other in self._here.difference(wanted):
            self._send_home(other)
        self._fetch(place)
        self._await(place)
        self._at = place
        self._fetch(wanted[-1])

    def _after(self, place: int) -> int:
        """What is needed next and is not `place`, if there is any other."""
        last, lowest = len(self._visitors) - 1, self._lowest
        if lowest is None:  # forward passes alone
            return place + 1 if place < last else 0
        if self._descends and place > lowest:
            return place - 1
        if not self._descends and place < last:
            return place + 1
        then_forward = self._order[1] if self._order else self._descends or not torch.is_grad_enabled()
        if then_forward:
            return min(1, last) if place == 0 else 0
        return last if self._descends else max(last - 1, lowest)

    def _fetch(self, place: int) -> None:
        if place in self._here:
            return
        visitor, copies = self._visitors[place], self._copies
        visitor.make_room()
        for home, visiting in visitor.pairs():
            if copies is None:
                visiting.copy_(home)
            else:
                self._coming[place] = copies.copy(home, visiting)
        self._here.add(place)
        self.counts.visits += 1
        self.counts.sent_bytes += visitor.num_bytes
        self.counts.most_visitors = max(self.counts.most_visitors, len(self._here))

    def _await(self, place: int) -> None:
        """Let what is computed next wait for a visitor's copy; the host does not wait."""
        event = self._coming.pop(place, None)
        if event is not None and self._copies is not None:
            self._copies.await_event(event)

    def _send_home(self, place: int) -> None:
        self._await(place)  # its memory must not be given away while a copy still writes there
        self._visitors[place].leave()
        self._here.discard(place)


def stream_weights(
    setup: TrainSetup, device: torch.device, slice_bytes: int | None = None, ahead: bool | None = None
) -> WeightStream:
    """Stream the frozen weights of a model that was set up in the host's memory; all else moves to `device`.

    `slice_bytes` is the size of a slice of the output matrix, by default about a layer's.  The stream belongs to the
    model: its hooks hold it.  A stage of a pipeline streams what it has: its layers, and at the ends the embedding and
    the output matrix.
    """
    model = inner_model(setup.model)
    held = _held_in_layers(model)
    visitors, modules_at = [], []
    for layer in sorted(held):
        found = [(module, list(_frozen(module))) for module in held[layer]]
        visitor = Visitor([slot.tensor for _, slots in found for slot in slots], device)
        for slot, visiting in zip((slot for _, slots in found for slot in slots), visitor.visiting, strict=True):
            slot.put(visiting)
        visitors.append(visitor)
        modules_at.append([module for module, slots in found if slots])
    embedding, output = model.get_input_embeddings(), model.get_output_embeddings()
    looked_up, multiplied = (getattr(module, "weight", None) for module in (embedding, output))
    largest = max((visitor.num_bytes for visitor in visitors), default=0)
    size = slice_bytes or max(LEAST_SLICE_BYTES, largest)
    rows = slices_of(multiplied, size) if multiplied is not None and not multiplied.requires_grad else []
    host_rows = getattr(looked_up, "data", None)
    if multiplied is not None and rows:
        matrix = _locked(multiplied.data, device)
        visitors += [Visitor([matrix[start:stop]], device, is_home=True) for start, stop in rows]
        if looked_up is multiplied:  # looked up where its slices come from: the host holds it once
            host_rows = matrix
    stream = WeightStream(device, visitors, _lowest_trained_layer(setup, held), ahead)
    passes_of(setup).tell_order(stream.follow)
    for place, modules in enumerate(modules_at):
        for module in modules:
            module.register_forward_pre_hook(partial(_enter, stream, place))
    if rows:
        first = len(modules_at)
        parts = {first + number: visitor.visiting[0] for number, visitor in enumerate(visitors[first:])}
        output.streamed = OutputMatrix(output, rows, parts, stream.need)
        output.weight.data = _without_bytes(output.weight.data, device)
        output.forward = output.streamed.multiply
    if host_rows is not None:
        _look_up_on_host(embedding, host_rows, device)
    _move_rest(setup, embedding, device)
    return stream


def _lowest_trained_layer(setup: TrainSetup, held: Mapping[int, Sequence[torch.nn.Module]]) -> int | None:
    """Where backward passes end: the place of the lowest layer that trains, or the first where they continue below."""
    if passes_of(setup).sends_back:
        return 0
    trained = [place for place, layer in enumerate(sorted(held)) if any(map(_trains, held[layer]))]
    return min(trained, default=0 if setup.parameters else None)


def _enter(stream: WeightStream, place: int, module: torch.nn.Module, arguments: Any) -> None:
    if torch.is_grad_enabled() and not module.training:
        raise RuntimeError(
            "weights that visit are gone when the backward pass of a model in evaluation mode needs them, since nothing"
            " is computed again there: call train(), or compute under no_grad()"
        )
    stream.need(place)


@dataclass(frozen=True)
class _Slot:
    """A frozen tensor and the attributes that hold it."""

    tensor: torch.Tensor
    holders: tuple[tuple[Any, str], ...]

    def put(self, tensor: torch.Tensor) -> None:
        for holder, name in self.holders:
            setattr(holder, name, tensor)


def _frozen(module: torch.nn.Module) -> Iterator[_Slot]:
    """A module's own frozen weights with what bitsandbytes needs to expand them."""
    if getattr(getattr(module, "weight", None), "CB", None) is not None:
        module.init_8bit_state()  # type: ignore[operator]  # of Linear8bitLt, else done in its first forward pass
    for name, parameter in module.named_parameters(recurse=False):
        if parameter.requires_grad:
            continue
        state: Any = getattr(module, "state", None)
        if name == "weight" and getattr(state, "CB", None) is not None:
            yield _Slot(state.CB, ((parameter, "data"), (state, "CB")))
            yield _Slot(state.SCB, ((state, "SCB"),))
            continue
        yield _Slot(parameter.data, ((parameter, "data"),))
        if (scales := getattr(parameter, "quant_state", None)) is not None:
            yield _Slot(scales.absmax, ((scales, "absmax"),))
            if scales.nested:
                yield _Slot(scales.state2.absmax, ((scales.state2, "absmax"),))


def _held_in_layers(model: Any) -> dict[int, list[torch.nn.Module]]:
    """The modules of each decoder layer that hold weights of their own."""
    built, held = architecture_of(model), {}
    for name, module in model.named_modules():
        layer = built.layer_of(name)
        if layer is not None and any(True for _ in module.parameters(recurse=False)):
            held.setdefault(layer, []).append(module)
    return held


def _trains(module: torch.nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters(recurse=False))


def _look_up_on_host(embedding: Any, rows: torch.Tensor, device: torch.device) -> None:
    """Rows of the embedding are read in the host's memory; only they are sent.

    The host waits for the device once a micro-batch, to know which rows.
    """
    elsewhere = _without_bytes(rows, device)  # as everything about the weights: they are not here, their size is known

    def enter(module: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        module.weight.data = rows
        return (arguments[0].to("cpu"), *arguments[1:])

    def leave(module: Any, arguments: Any, looked_up: torch.Tensor) -> torch.Tensor:
        module.weight.data = elsewhere
        held = looked_up if device.type == "cpu" else looked_up.pin_memory()
        return held.to(device, non_blocking=True)

    embedding.weight.data = elsewhere
    embedding.register_forward_pre_hook(enter)
    embedding.register_forward_hook(leave, prepend=True)  # before the one that lets gradients begin here


def _move_rest(setup: TrainSetup, embedding: Any, device: torch.device) -> None:
    """What does not stream lives on the device: trained weights, norms at the end, positions, tables."""
    for module in setup.model.modules():
        if module is embedding:
            continue
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            if tensor.device != device:
                tensor.data = tensor.data.to(device)
        scales = getattr(getattr(module, "weight", None), "quant_state", None)
        if scales is not None:
            for state in (scales, *((scales.state2,) if scales.nested else ())):
                state.code = state.code.to(device)
            scales.offset = scales.offset.to(device) if scales.nested else scales.offset
    for tensor in setup.buffers.values():
        tensor.data = tensor.data.to(device)


def _view(flat: torch.Tensor, start: int, like: torch.Tensor) -> torch.Tensor:
    """A part of flat bytes in the form of another tensor."""
    return flat[start : start + like.nbytes].view(like.dtype).view(like.shape)


def _without_bytes(like: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the same form whose storage is empty."""
    tensor = torch.empty_like(like, device=device)
    tensor.untyped_storage().resize_(0)
    return tensor


def _locked(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy in page-locked memory, for a device whose stream reads there; for the CPU the tensor itself."""
    if device.type == "cpu":
        return tensor
    return _view(_pinned(tensor.nbytes), 0, tensor).copy_(tensor)


def _pinned(num_bytes: int) -> torch.Tensor:
    """Page-locked host memory of exactly this size: torch's own is rounded up to a power of two."""
    flat = torch.empty(num_bytes, dtype=torch.uint8)
    runtime: Any = torch.cuda.cudart()
    code = int(runtime.cudaHostRegister(flat.data_ptr(), num_bytes, 0))
    if code:
        raise RuntimeError(
            f"{num_bytes} bytes of host memory cannot be locked for copies (cudaHostRegister: error {code}): the host"
            " is out of memory, or a limit on locked memory (ulimit -l) is too low"
        )
    weakref.finalize(flat, runtime.cudaHostUnregister, flat.data_ptr()).atexit = False
    return flat
