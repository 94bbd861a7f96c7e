"""Inside a process that fake_cuda.run started: two fake cards, an Ampere and a Turing, and what a step does to them."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from strategies.measure.trace import LiveStorages

CAPABILITIES = {"cuda:0": (8, 6), "cuda:1": (7, 5)}  # RTX 3090, RTX 2080 Ti
_PRODUCT = tuple(str(Path(__file__).resolve().parents[2] / part) + os.sep for part in ("strategies", "orchestrator"))
_aten = torch.ops.aten
# What waits to know a size raises by itself: fake tensors have no content.
_READS = (_aten._local_scalar_dense.default, _aten.is_nonzero.default)
_COPIES = (_aten._to_copy.default, _aten.copy_.default)
_PRODUCTS = (_aten.mm.default, _aten.addmm.default)
_FULL, _UNSCALE = _aten.full.default, _aten._amp_foreach_non_finite_check_and_unscale_.default


def pretend() -> None:
    """Tell torch what a real card would: else autocast and loss scaling turn themselves off, and nothing is proved."""
    import torch.cuda.amp.common

    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    torch.cuda.is_bf16_supported = lambda *_, **__: True
    torch.cuda.get_device_capability = lambda device=None: CAPABILITIES[str(torch.device(device or "cuda:0"))]
    torch.cuda.Stream = torch.Stream
    torch.Tensor.pin_memory = _pinned
    torch.Tensor.data_ptr = _address
    torch.cuda.cudart = _Runtime
    torch.Tensor.record_stream = lambda self, s: None
    torch.nn.Module._apply = _apply
    FakeTensor.data = property(_DATA.__get__, _set_data)  # type: ignore[assignment]
    # Else a copied tensor is of another mode, which does not mix with this one (and a mode's caches are no small copy).
    FakeTensorMode.__deepcopy__ = lambda self, memo: self  # type: ignore[attr-defined]
    torch.nn.functional.scaled_dot_product_attention = _scaled_dot_product_attention


FAKE = FakeTensorMode()  # one for all: what a library caches of a model would not mix with another's
_DATA: Any = torch.Tensor.data
_SDPA = torch.nn.functional.scaled_dot_product_attention
_watches: list[Watch] = []
_addresses: dict[int, Any] = {}  # what a tensor without memory says instead of an address -> its storage


class _Runtime:
    """Of CUDA's own calls, those that lock pages of memory by their address."""

    def cudaHostRegister(self, address: int, num_bytes: int, flags: int) -> int:
        storage = _addresses[address]
        assert storage.nbytes() == num_bytes
        storage.reads_in_background = True
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        return 0


def _address(self: torch.Tensor) -> int:
    storage = _marks(self)
    _addresses[id(storage)] = storage
    return id(storage)


def _pinned(self: torch.Tensor, device: Any = None) -> torch.Tensor:
    copied = self.clone()
    _marks(copied).reads_in_background = True
    return copied


def _scaled_dot_product_attention(query: torch.Tensor, key: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    for watch in _watches:
        watch.attention.add("sdpa, shared" if query.shape[1] != key.shape[1] else "sdpa")
    return _SDPA(query, key, *args, **kwargs)


def _set_data(self: FakeTensor, value: FakeTensor) -> None:
    """The inside of a tensor becomes another's, its card too: a fake one notes that beside its inside."""
    _DATA.__set__(self, value)
    self.fake_device = value.fake_device


def _apply(self: torch.nn.Module, fn: Any, recurse: bool = True) -> torch.nn.Module:
    """torch's own swaps the inside of tensors, which fake ones refuse; this puts new ones in their place."""
    for module in self.modules() if recurse else [self]:
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and (moved := fn(parameter)) is not parameter:
                module._parameters[name] = torch.nn.Parameter(moved.detach(), parameter.requires_grad)
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = fn(buffer)
    return self


class Watch(LiveStorages):
    """What is asked of a card beyond computing, and the most bytes it holds at a time.

    `waits` names what stops the host until the card has caught up, and the product's function that asked.  `sent`
    counts bytes that go to the host in the background, `sent_weights` those among them that are a parameter's or a cast
    of one.  A number read from a card is what its tensor was filled with, else 0; one from the host (steps) is 1.
    """

    def __init__(self) -> None:
        super().__init__()
        self.begin()

    def begin(self) -> None:
        """Forget what was seen."""
        self.waits: list[str] = []
        self.attention: set[str] = set()  # kernels asked for
        self.products: set[str] = set()  # number formats of matrix products
        self.is_unscaled = False
        self.sent = self.sent_weights = 0
        self.take_peak()

    def seen(self) -> dict[str, Any]:
        """Since `begin`."""
        return {
            "waits": list(self.waits),
            "attention": sorted(self.attention),
            "products": sorted(self.products),
            "is_unscaled": self.is_unscaled,
            "sent": self.sent,
            "sent_weights": self.sent_weights,
            "peak": self.take_peak(),
        }

    def know(self, parameters: Iterable[torch.Tensor]) -> None:
        """What must not be sent to the host."""
        for parameter in parameters:
            _marks(parameter).is_weight = True

    def watch(self, tensor: torch.Tensor) -> None:
        if tensor.device.type == "cuda":
            super().watch(tensor)

    def __enter__(self) -> Watch:
        _watches.append(self)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        _watches.remove(self)
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _READS:
            return self._read(args[0])
        made = super().__torch_dispatch__(func, types, args, kwargs)
        if func in _PRODUCTS:
            self.products.add(str(made.dtype))
        elif func in _COPIES:
            self._copied(func, args, kwargs, made)
        elif func is _FULL:
            _marks(made).filled = args[1]
        elif func is _UNSCALE:
            self.is_unscaled = True
        elif "_varlen_attn.default" in str(func):
            self.attention.add(f"varlen, {args[0].dtype}")
        if kwargs.get("pin_memory"):
            _marks(made).reads_in_background = True
        return made

    def _read(self, tensor: torch.Tensor) -> Any:
        on_card = tensor.device.type == "cuda"
        if on_card:
            self.waits.append(f"a number is read in {_asked_by()}")
        value = getattr(_marks(tensor), "filled", 0 if on_card else 1)
        kind = bool if tensor.dtype is torch.bool else float if tensor.dtype.is_floating_point else int
        return kind(value)

    def _copied(self, func: Any, args: Any, kwargs: Any, made: torch.Tensor) -> None:
        source, target = (args[1], args[0]) if func is torch.ops.aten.copy_.default else (args[0], made)
        is_weight = getattr(_marks(source), "is_weight", False)
        if source.device == target.device:
            if is_weight and source.dtype != target.dtype:
                _marks(target).is_weight = True
            return
        in_background = kwargs.get("non_blocking") or (len(args) > 2 and args[2] is True)
        on_host = source if source.device.type == "cpu" else target
        if not in_background or not getattr(_marks(on_host), "reads_in_background", False):
            self.waits.append(f"{source.device.type} to {target.device.type} in {_asked_by()}")
        elif target.device.type == "cpu":
            size = source.numel() * source.element_size()
            self.sent += size
            self.sent_weights += size * is_weight


def _marks(tensor: torch.Tensor) -> Any:
    """What holds notes about a tensor's memory: the same object for every view, gone with the last."""
    return tensor.untyped_storage()


def _asked_by() -> str:
    """The product's innermost function that runs now."""
    frame: Any = sys._getframe(1)
    while frame and not frame.f_code.co_filename.startswith(_PRODUCT):
        frame = frame.f_back
    return frame.f_code.co_name if frame else "a thread of the backward pass"


def places(states: Any) -> list[dict[str, str]]:
    """Where an optimizer keeps its state and in what form, by weight."""

    def place(value: Any) -> str:
        return f"{value.device} {value.dtype}" if torch.is_tensor(value) else type(value).__name__

    return [{key: place(value) for key, value in state.items()} for state in states]
