"""ZeRO-1 over unequal devices: each keeps as much of the optimizer's state as its memory has room for.

All trained elements, laid end to end, are cut where the parts of the workers meet; a worker updates its own piece and
sends it to the others.  Cut by element, not by tensor, so parts are exact and the update is that of one device, bit by
bit: AdamW and SGD look at each element alone.  ZeRO: Rajbhandari et al., arXiv 1910.02054; parts of unequal size as in
Cephalo (arXiv 2411.01075).
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from strategies.step.state import homes, to_cpu, zero
from strategies.train_setup import TrainSetup, TrainState

_SENT_BYTES = 25 * 2**20  # that travel together


@dataclass(frozen=True)
class _Piece:
    """Elements [start, stop) of a parameter, which one worker updates."""

    name: str
    parameter: torch.nn.Parameter
    group: int
    start: int
    stop: int

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The same elements of a tensor of the parameter's shape, as a view."""
        return tensor.view(-1)[self.start : self.stop]


class UnevenZero1:
    """A divided optimizer: to the loop one like any other, for a checkpoint it gathers itself.

    `shares` are the workers' parts by rank, `wire` where tensors must lie to be sent.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, names: Sequence[str], shares: Sequence[float], wire: torch.device
    ) -> None:
        self.param_groups = optimizer.param_groups
        self._wire, self._rank, self.bytes_sent = wire, dist.get_rank(), 0
        self._pieces = _cut(optimizer, names, shares)
        self._mine = [(piece, torch.nn.Parameter(piece.of(piece.parameter.data))) for piece in self._pieces[self._rank]]
        groups = []
        for index, group in enumerate(optimizer.param_groups):
            own = [part for piece, part in self._mine if piece.group == index]
            groups.append({**{key: value for key, value in group.items() if key != "params"}, "params": own})
        known = inspect.signature(type(optimizer)).parameters  # defaults hold more than the constructor takes
        self._inner = type(optimizer)(groups, **{k: v for k, v in optimizer.defaults.items() if k in known})

    @property
    def state(self) -> Any:
        return self._inner.state

    def step(self) -> None:
        """Update the own piece, then give every piece to everybody."""
        for own, whole in zip(self._inner.param_groups, self.param_groups, strict=True):
            own["lr"] = whole["lr"]
        for piece, part in self._mine:
            gradient = piece.parameter.grad
            part.grad = None if gradient is None else piece.of(gradient)
        self._inner.step()
        self._inner.zero_grad(set_to_none=True)
        with torch.no_grad():
            for rank, pieces in enumerate(self._pieces):
                for together in _group_by_size(pieces):
                    self._send(rank, together)

    def zero_grad(self, set_to_none: bool = True) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    def _send(self, rank: int, pieces: Sequence[_Piece]) -> None:
        views = [piece.of(piece.parameter.data) for piece in pieces]
        flat = torch.cat(views).to(self._wire) if rank == self._rank else torch.empty(0)
        if rank != self._rank:
            flat = torch.empty(sum(view.numel() for view in views), dtype=views[0].dtype, device=self._wire)
        dist.broadcast(flat, rank)
        if rank == self._rank:
            self.bytes_sent += flat.numel() * flat.element_size()
        else:
            for view, part in zip(views, flat.split([view.numel() for view in views]), strict=True):
                view.copy_(part)

    def gather(self) -> TrainState | None:
        weights: dict[str, torch.Tensor] = {}
        moments: dict[str, dict[str, torch.Tensor]] = {}
        held = {(piece.name, piece.start): self._inner.state.get(part, {}) for piece, part in self._mine}
        any_state = next((state for state in held.values() if state), {})
        # A worker whose part is empty knows no names; everybody must ask for the same.
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, (sorted(k for k, v in any_state.items() if torch.is_tensor(v) and v.dim()),
                                      float(any_state.get("step", 0))))  # fmt: skip
        keys, step = max((keys for keys, _ in gathered), key=len), max(step for _, step in gathered)
        for piece in _first_of_each(self._pieces):
            parameter = piece.parameter
            of_this = [own for own in self._pieces[self._rank] if own.name == piece.name]
            found: dict[str, torch.Tensor] = {}
            for key in keys:
                whole = torch.zeros(parameter.numel(), device=self._wire)
                for own in of_this:
                    whole[own.start : own.stop] = held[own.name, own.start][key]
                dist.reduce(whole, 0)
                found[key] = whole.view_as(parameter)
            if self._rank == 0:
                weights[piece.name] = to_cpu(parameter)
                moments[piece.name] = {key: to_cpu(value) for key, value in found.items()}
                if keys:
                    moments[piece.name]["step"] = torch.tensor(step)
        return TrainState(weights, moments) if self._rank == 0 else None

    @torch.no_grad()
    def restore(self, state: TrainState) -> None:
        for piece in _first_of_each(self._pieces):
            piece.parameter.copy_(state.weights[piece.name])
        home = homes(self._inner)
        for piece, part in self._mine:
            if found := state.moments.get(piece.name):
                self._inner.state[part] = {
                    key: (value if key == "step" else piece.of(value.contiguous())).to(home(part, key), copy=True)
                    for key, value in found.items()
                }

    def forget(self) -> None:
        zero(self._inner.state.values())


def shard_by_memory(setup: TrainSetup, shares: Sequence[float], wire: torch.device) -> TrainSetup:
    """`setup` with its optimizer's state divided by `shares` among the workers of the default process group."""
    names = {id(parameter): name for name, parameter in setup.parameters.items()}
    order = [names[id(p)] for group in setup.optimizer.param_groups for p in group["params"]]
    optimizer = UnevenZero1(setup.optimizer, order, shares, wire)
    setup.optimizer = optimizer  # type: ignore[assignment]  # by shape, not by class
    setup.sharding = optimizer
    return setup


def _cut(optimizer: torch.optim.Optimizer, names: Sequence[str], shares: Sequence[float]) -> list[list[_Piece]]:
    """The pieces of each worker, by rank."""
    listed = [(index, p) for index, group in enumerate(optimizer.param_groups) for p in group["params"]]
    total = sum(parameter.numel() for _, parameter in listed)
    ends = [round(total * part / sum(shares)) for part in itertools.accumulate(shares)]
    pieces: list[list[_Piece]] = [[] for _ in shares]
    begins = 0
    for name, (group, parameter) in zip(names, listed, strict=True):
        at, ends_here = begins, begins + parameter.numel()
        while at < ends_here:
            rank = next(index for index, end in enumerate(ends) if end > at)
            until = min(ends[rank], ends_here)
            pieces[rank].append(_Piece(name, parameter, group, at - begins, until - begins))
            at = until
        begins = ends_here
    return pieces


def _first_of_each(pieces: Sequence[Sequence[_Piece]]) -> list[_Piece]:
    """One piece of every parameter, in order."""
    return list({piece.name: piece for part in pieces for piece in part}.values())


def _group_by_size(pieces: Sequence[_Piece]) -> list[list[_Piece]]:
    """Pieces of one precision that travel together."""
    parcels: list[list[_Piece]] = []
    room = 0
    for piece in pieces:
        size = (piece.stop - piece.start) * piece.parameter.element_size()
        if not parcels or room < size or parcels[-1][0].parameter.dtype != piece.parameter.dtype:
            parcels.append([])
            room = _SENT_BYTES
        parcels[-1].append(piece)
        room -= size
    return parcels
