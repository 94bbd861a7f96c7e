"""Linear maps some of whose entries train, and the choice of those entries.

Shapes: I inputs, O outputs, N entries, T tokens.  PEFT's own forward pass keeps a whole corrected copy of every weight
until the backward pass; here it is made again there, one map at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
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


class Sensitivity:
    """Chooses the entries with the largest |W dL/dW| before the first step.

    Gradients are added up in host memory, weight by weight as the backward pass makes them.
    """

    def __init__(self, entries: Sequence[Entries], rows: int, block: int) -> None:
        self.rows, self._entries, self._block = rows, entries, block
        self._sums: dict[int, torch.Tensor] = {}
        self._hooks: list[Any] = []

    num_looks = 0

    def is_due(self, step: int) -> bool:
        return step == 0

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
        for index, one in enumerate(self._entries):
            weight_OI, grad_OI = one.weight_OI.detach().to("cpu"), self._sums.pop(index)
            chosen = select_sensitive(weight_OI, grad_OI, len(one.places), self._block).flatten().nonzero()[:, 0]
            one.places.copy_(chosen)
            scores = (weight_OI.flatten() * grad_OI.flatten()).abs()
            carried, total = carried + float(scores[chosen].sum()), total + float(scores.sum())
        density = sum(len(one.places) for one in self._entries) / sum(one.weight_OI.numel() for one in self._entries)
        share = carried / total if total else 0.0
        return {
            "text": f"entries: the {density:.1%} that train carry {share:.0%} of the loss's sensitivity to the weights",
            "density": round(density, 6),
            "sensitivity": round(share, 4),
        }

    def _release(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        for one in self._entries:
            one.weight_OI.requires_grad_(False)
            one.values.grad = None
