"""Linear maps some of whose entries train, and the choice of those entries.

Shapes: I inputs, O outputs, N entries, T tokens.  PEFT's own forward pass keeps a whole corrected copy of every weight
until the backward pass; here it is made again there, one map at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch

from strategies.adapter_bank.sparse import select_sensitive


class _Corrected(torch.autograd.Function):
    """y = (W + S) x + b; keeps x, and gives W a gradient only where it asks for one."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight_OI: torch.Tensor, bias: Any, values: Any, places: Any) -> Any:
        ctx.save_for_backward(x, weight_OI, values, places)
        return torch.nn.functional.linear(x, _with(weight_OI, values, places), bias)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # type: ignore[override]
        x, weight_OI, values, places = ctx.saved_tensors
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad @ _with(weight_OI, values, places).to(grad.dtype)).to(x.dtype)
        whole_OI = grad.flatten(0, -2).T @ x.flatten(0, -2).to(grad.dtype)
        asked = whole_OI.to(weight_OI.dtype) if ctx.needs_input_grad[1] else None
        return grad_x, asked, None, whole_OI.flatten().index_select(0, places).to(values.dtype), None


def _with(weight_OI: torch.Tensor, values: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    return weight_OI.flatten().index_add(0, places, values.to(weight_OI.dtype)).view(weight_OI.shape)


class Entries:
    """The trained entries of one of PEFT's SHiRA layers: `places` (N,) int32 in the flattened weight, ascending."""

    def __init__(self, name: str, layer: Any, places: torch.Tensor) -> None:
        self.name, self._layer = name, layer
        layer.register_buffer("places", places.to(layer.weight.device), persistent=False)
        layer.forward = MethodType(_forward, layer)

    @property
    def weight_OI(self) -> torch.nn.Parameter:
        return self._layer.base_layer.weight

    @property
    def values(self) -> torch.nn.Parameter:
        return self._layer.shira_weight["default"]

    @property
    def places(self) -> torch.Tensor:
        return self._layer.places

    @property
    def corrected_OI(self) -> torch.Tensor:
        """The weight with its entries' values added."""
        return _with(self.weight_OI.detach(), self.values.detach(), self.places)

    def tell_peft(self) -> None:
        """Where the entries are, as PEFT saves and merges them."""
        inputs, places = self.weight_OI.shape[1], self.places.long()
        self._layer.shira_indices["default"] = torch.stack([places // inputs, places % inputs]).int()


def _forward(layer: Any, x: torch.Tensor) -> torch.Tensor:
    if layer.disable_adapters or layer.merged:
        return layer.base_layer(x)
    base = layer.base_layer
    return _Corrected.apply(x, base.weight, base.bias, layer.shira_weight["default"], layer.places)  # type: ignore[return-value]


def entries_of(peft_model: Any, seed: int) -> list[Entries]:
    """Every SHiRA layer with as many random entries as it trains; the same ones for the same seed."""
    from peft.tuners.shira.layer import ShiraLayer

    draw = torch.Generator().manual_seed(seed)
    layers: list[tuple[str, Any]] = [
        (name, module) for name, module in peft_model.named_modules() if isinstance(module, ShiraLayer)
    ]
    return [
        Entries(name, layer, scattered(layer.shira_weight["default"].numel(), layer.base_layer.weight.numel(), draw))
        for name, layer in layers
    ]


def scattered(count: int, size: int, draw: torch.Generator) -> torch.Tensor:
    """`count` distinct, ascending places below `size`: one at random in each of as many equal parts; (N,) int32."""
    edges = torch.arange(count + 1, dtype=torch.float64) * size // count
    return (edges[:-1] + (torch.rand(count, generator=draw, dtype=torch.float64) * edges.diff()).floor()).int()


@dataclass(frozen=True)
class Selection:
    """How entries are chosen: by how many rows, in squares of which side, and how often anew."""

    rows: int
    block: int = 1
    every: int | None = None  # steps; None = once, before the first
    most: int = 0  # times that they are chosen anew


class Sensitivity:
    """Chooses the entries with the largest |(W + S) dL/dW| before the first step, and anew after some steps.

    Gradients are added up in host memory, weight by weight as the backward pass makes them.  An entry that is chosen
    anew goes on with its value and its moments where it trained before; one that no longer trains is parked and takes
    no part until it is chosen again (arXiv 2507.07140).
    """

    def __init__(self, entries: Sequence[Entries], selection: Selection, optimizer: torch.optim.Optimizer) -> None:
        self.rows, self._entries, self._selection, self._optimizer = selection.rows, entries, selection, optimizer
        self._sums: dict[int, torch.Tensor] = {}
        self._hooks: list[Any] = []
        room = [selection.most * len(one.places) if selection.every else 0 for one in entries]
        self._parked = [Parked.empty(size) for size in room]

    @property
    def buffers(self) -> dict[str, torch.Tensor]:
        """What a checkpoint must hold: the values of parked entries, by name."""
        found: dict[str, torch.Tensor] = {}
        for one, parked in zip(self._entries, self._parked, strict=True):
            if len(parked.places):
                found |= {f"{one.name}.parked_places": parked.places, f"{one.name}.parked_values": parked.values}
        return found

    num_looks = 0

    def is_due(self, step: int) -> bool:
        every, most = self._selection.every, self._selection.most
        return step == 0 or (every is not None and step % every == 0 and step // every <= most)

    def begin_learning(self, num_passes: int) -> None:
        self._release()
        self._sums = {}
        for index, one in enumerate(self._entries):
            one.weight_OI.requires_grad_(True)

            def take(weight: torch.Tensor, index: int = index) -> None:
                assert weight.grad is not None
                grad_OI, weight.grad = weight.grad.to("cpu"), None
                self._sums[index] = self._sums[index].add_(grad_OI) if index in self._sums else grad_OI

            self._hooks.append(one.weight_OI.register_post_accumulate_grad_hook(take))

    def watch(self, batch: Any) -> None: ...

    def next_learning(self) -> None: ...

    def end_learning(self) -> dict[str, Any]:
        """What part of all sensitivity the chosen entries carry, beside their part of all entries."""
        self._release()
        carried = total = 0.0
        num_kept = num_back = 0
        for index, one in enumerate(self._entries):
            weight_OI, grad_OI = one.corrected_OI.to("cpu"), self._sums.pop(index)
            mask_OI = select_sensitive(weight_OI, grad_OI, len(one.places), self._selection.block)
            chosen = mask_OI.flatten().nonzero()[:, 0]
            kept, back = self._move(one, self._parked[index], chosen)
            num_kept, num_back = num_kept + kept, num_back + back
            scores = (weight_OI.flatten() * grad_OI.flatten()).abs()
            carried, total = carried + float(scores[chosen].sum()), total + float(scores.sum())
        count = sum(len(one.places) for one in self._entries)
        density = count / sum(one.weight_OI.numel() for one in self._entries)
        share = carried / total if total else 0.0
        return {
            "text": f"entries: the {density:.1%} that train carry {share:.0%} of the loss's sensitivity to the weights",
            "density": round(density, 6),
            "sensitivity": round(share, 4),
            "kept": round(num_kept / count, 4),
            "taken_back": round(num_back / count, 4),
        }

    @torch.no_grad()
    def _move(self, one: Entries, parked: Parked, chosen: torch.Tensor) -> tuple[int, int]:
        """Train other entries: how many of them trained until now, and how many were parked."""
        before, values = one.places.long().cpu(), one.values.detach().cpu().clone()
        here, at = _find(chosen, before)
        there, at_parked = _find(chosen, parked.places.long())
        # Of one that both hold, the trained value is the newer: a parked one that came back is cleared below.
        there &= ~here
        made = torch.zeros_like(values)
        made[here], made[there] = values[at[here]], parked.values[at_parked[there]]
        if len(parked.places):
            leaves = ~torch.isin(before, chosen) & (values != 0)
            stays = (parked.places >= 0) & ~torch.isin(parked.places.long(), chosen)
            parked.fill(
                torch.cat([parked.places[stays], before[leaves].int()]),
                torch.cat([parked.values[stays], values[leaves]]),
            )
        for moment in self._optimizer.state.get(one.values, {}).values():
            if torch.is_tensor(moment) and moment.shape == values.shape:
                moved = torch.zeros_like(moment)
                moved[here.to(moment.device)] = moment[at[here].to(moment.device)]
                moment.copy_(moved)
        one.values.copy_(made)
        one.places.copy_(chosen)
        return int(here.sum()), int(there.sum())

    def _release(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        for one in self._entries:
            one.weight_OI.requires_grad_(False)
            one.values.grad = None


@dataclass
class Parked:
    """Values of entries that trained and do not now, in host memory; places that are not taken are -1."""

    places: torch.Tensor  # int32
    values: torch.Tensor

    @classmethod
    def empty(cls, size: int) -> Parked:
        return cls(torch.full((size,), -1, dtype=torch.int32), torch.zeros(size))

    def fill(self, places: torch.Tensor, values: torch.Tensor) -> None:
        """Hold these, in order of their places, and no others."""
        order = places.argsort()
        self.places.fill_(-1)
        self.values.zero_()
        # Free places come first, so that all are in ascending order.
        first = len(self.places) - len(places)
        self.places[first:], self.values[first:] = places[order], values[order].to(self.values.dtype)


def _find(wanted: torch.Tensor, among: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Whether each of `wanted` is among some ascending places, and where."""
    if not len(among):
        return torch.zeros(len(wanted), dtype=torch.bool), torch.zeros(len(wanted), dtype=torch.long)
    at = torch.searchsorted(among, wanted).clamp(max=len(among) - 1)
    return among[at] == wanted, at
