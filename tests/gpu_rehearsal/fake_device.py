"""Inside a process that fake_cuda.run started: two fake cards, an Ampere and a Turing, and what a step does to them."""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

CAPABILITIES = {"cuda:0": (8, 6), "cuda:1": (7, 5)}  # RTX 3090, RTX 2080 Ti
_READS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default)
_SIZES = (torch.ops.aten.nonzero.default, torch.ops.aten.masked_select.default, torch.ops.aten._unique2.default)
_COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


def pretend() -> None:
    """Tell torch what a real card would: else autocast and loss scaling turn themselves off, and nothing is proved."""
    import torch.cuda.amp.common

    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    torch.cuda.is_bf16_supported = lambda *_, **__: True
    torch.cuda.get_device_capability = lambda device=None: CAPABILITIES[str(torch.device(device or "cuda:0"))]
    torch.cuda.Stream = torch.Stream
    torch.Tensor.pin_memory = _pinned
    torch.Tensor.record_stream = lambda self, stream: None
    torch.nn.Module._apply = _apply
    FakeTensorMode.__deepcopy__ = lambda self, memo: self
    torch.nn.functional.scaled_dot_product_attention = _scaled_dot_product_attention


FAKE = FakeTensorMode()  # one for all: what a library caches of a model would not mix with another's
ASKED: set[str] = set()  # attention kernels that a step asks for
PINNED: set[int] = set()  # storages on the host that a card reads without the host's help
_REAL = torch.nn.functional.scaled_dot_product_attention


def _pinned(self: torch.Tensor, device: Any = None) -> torch.Tensor:
    copied = self.clone()
    PINNED.add(_storage(copied))
    return copied


def _scaled_dot_product_attention(query: torch.Tensor, key: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    ASKED.add("sdpa, shared" if query.shape[1] != key.shape[1] else "sdpa")
    return _REAL(query, key, *args, **kwargs)


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


class Watch(TorchDispatchMode):
    """What a step asks of a card beyond computing: `waits` names what stops the host until the card has caught up.

    `sent` counts bytes that go to the host in the background, `sent_weights` those among them that are a parameter's
    or a cast of one.  A number read from a fake tensor is 1 on the host (steps) and 0 on a card (an overflow).
    """

    def __init__(self, parameters: Any = ()) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.sent = self.sent_weights = 0
        self._weights = {_storage(parameter) for parameter in parameters}
        self._kept: list[torch.Tensor] = []  # casts: their storages must not be given to others

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _READS:
            self._note(func, args[0])
            dtype = args[0].dtype
            value = int(args[0].device.type == "cpu")
            return bool(value) if dtype is torch.bool else float(value) if dtype.is_floating_point else value
        if "_varlen_attn.default" in str(func):
            ASKED.add(f"varlen, {args[0].dtype}")
        made = func(*args, **kwargs)
        if func in _SIZES:
            self._note(func, args[0])
        if kwargs.get("pin_memory"):
            PINNED.add(_storage(made))
        if func in _COPIES:
            self._copied(func, args, kwargs, made)
        return made

    def _note(self, func: Any, tensor: torch.Tensor) -> None:
        if tensor.device.type == "cuda":
            self.waits.append(str(func))

    def _copied(self, func: Any, args: Any, kwargs: Any, made: torch.Tensor) -> None:
        source, target = (args[1], args[0]) if func is torch.ops.aten.copy_.default else (args[0], made)
        if source.device == target.device:
            if _storage(source) in self._weights and source.dtype != target.dtype:
                self._weights.add(_storage(target))
                self._kept.append(target)
            return
        in_background = kwargs.get("non_blocking") or (len(args) > 2 and args[2] is True)
        on_host = source if source.device.type == "cpu" else target
        if not in_background or _storage(on_host) not in PINNED:
            self.waits.append(f"{func} {source.device.type} to {target.device.type}")
        elif target.device.type == "cpu":
            size = source.numel() * source.element_size()
            self.sent += size
            self.sent_weights += size * (_storage(source) in self._weights)


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def places(states: Any) -> list[dict[str, str]]:
    """Where an optimizer keeps its state and in what form, by weight."""

    def place(value: Any) -> str:
        return f"{value.device} {value.dtype}" if torch.is_tensor(value) else type(value).__name__

    return [{key: place(value) for key, value in state.items()} for state in states]
