"""What the backward pass needs waits in pinned host memory: it leaves and returns on a stream of its own.

Only activations go.  Weights stay where they are, and so do the 16-bit casts of weights that autocast makes.  What
several operations keep travels once.  In the backward pass the next few tensors are fetched before they are asked for.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from strategies.step.side_stream import SideStream

_AHEAD = 4  # tensors on their way back beside the one that is needed


@contextlib.contextmanager
def offload_activations(weights: Iterable[torch.Tensor], device: torch.device) -> Iterator[None]:
    """Keep what operations inside the block save on the host, except `weights`."""
    host_side = _HostSide(device)
    for weight in weights:
        host_side.stays(weight)
    with host_side, torch.autograd.graph.saved_tensors_hooks(host_side.pack, host_side.unpack):
        yield


class _SavedTensor:
    """A saved tensor on the host."""

    def __init__(self, host: torch.Tensor, place: int) -> None:
        self.host, self.place = host, place
        self.fetched: tuple[torch.Tensor, torch.Event] | None = None
        self.is_used = False


class _HostSide(TorchDispatchMode):
    """Packs and unpacks; as a dispatch mode it sees which tensors are casts of weights."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device, self._copies = device, SideStream(device)
        self._staying: set[int] = set()  # storages
        self._sent: dict[tuple[Any, ...], weakref.ref[_SavedTensor]] = {}  # what lies on the host already
        self._order: list[weakref.ref[_SavedTensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and id(args[0].untyped_storage()) in self._staying:
            self.stays(made)
        return made

    def stays(self, tensor: torch.Tensor) -> None:
        """Whatever looks at this tensor's memory is left where it is."""
        storage = tensor.untyped_storage()
        if id(storage) not in self._staying:
            self._staying.add(id(storage))
            weakref.finalize(storage, self._staying.discard, id(storage)).atexit = False

    def pack(self, tensor: torch.Tensor) -> torch.Tensor | _SavedTensor:
        storage = tensor.untyped_storage()
        if tensor.device != self._device or id(storage) in self._staying:
            return tensor
        look = (tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype, tensor._version)
        key = (id(storage), *look)
        if (known := self._sent.get(key)) and (kept := known()):
            return kept
        kept = _SavedTensor(self._copies.down(tensor)[0], len(self._order))
        self._order.append(weakref.ref(kept))
        self._sent[key] = self._order[-1]
        weakref.finalize(storage, self._sent.pop, key, None).atexit = False
        return kept

    def unpack(self, kept: torch.Tensor | _SavedTensor) -> torch.Tensor:
        if isinstance(kept, torch.Tensor):
            return kept
        tensor, arrived = self._fetch(kept)
        kept.is_used, kept.fetched = True, None
        for before in self._order[max(0, kept.place - _AHEAD) : kept.place]:
            if (needed_next := before()) and not needed_next.is_used:
                self._fetch(needed_next)
        return self._copies.arrived(tensor, arrived)

    def _fetch(self, kept: _SavedTensor) -> tuple[torch.Tensor, torch.Event]:
        """The tensor on its way to the device, and the event of its arrival."""
        if kept.fetched is None:
            kept.fetched = self._copies.up(kept.host)
        return kept.fetched
