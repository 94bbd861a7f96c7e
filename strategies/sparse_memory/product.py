"""What chosen rows add to each token, and its gradients, without ever holding a row once for each token.

    y_t = scale * sum over a token's rows of relu(k_r . x_t) v_r

A row is its key k_r and its value v_r end to end.  Gradients of rows do not come back as a tensor of the graph: they
are handed to whoever keeps the rows, which need not lie where this is computed.

Legend: T tokens, K rows a token, C of them at a time, U different rows of the batch, D width, 2D a row's numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

_AT_ONCE = 1 << 22  # numbers of rows that are copied for tokens at a time
Sink = Callable[[torch.Tensor, torch.Tensor], None]  # gradient of the rows (U, 2D), tokens that read each (U,)


@dataclass(frozen=True)
class Brought:
    """The different rows of a batch where they are computed with, and which of them each token reads."""

    rows_U2D: torch.Tensor
    places_TK: torch.Tensor  # in U
    scale: float


def read_rows(x_TD: torch.Tensor, master: torch.Tensor, brought: Brought, sink: Sink) -> torch.Tensor:
    """y (T, D) in x's precision.  `master`, wherever it lies, is what trains: where it does, gradients go to `sink`."""
    return _ReadRows.apply(x_TD, master, brought.rows_U2D, brought.places_TK, (brought.scale, sink))


class _ReadRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TD: torch.Tensor, master: torch.Tensor, rows_U2D: torch.Tensor, places_TK: torch.Tensor, how: Any
    ) -> torch.Tensor:
        scale, _ = ctx.how = how
        ctx.save_for_backward(x_TD, rows_U2D, places_TK)
        keys_UD, values_UD = rows_U2D.chunk(2, dim=1)
        y_TD = torch.zeros(x_TD.shape, dtype=torch.float32, device=x_TD.device)
        for part in _parts(places_TK, x_TD.shape[1]):
            read_TC = torch.relu(_score(x_TD, keys_UD, part))
            y_TD += torch.einsum("tc,tcd->td", read_TC, _of(values_UD, part))
        return (scale * y_TD).to(x_TD.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_TD, rows_U2D, places_TK = ctx.saved_tensors
        scale, sink = ctx.how
        keys_UD, values_UD = rows_U2D.chunk(2, dim=1)
        (grad_TD,) = grads
        y_grad_TD = scale * grad_TD.float()
        x_grad_TD = torch.zeros_like(y_grad_TD)
        rows_grad_U2D = torch.zeros(rows_U2D.shape, dtype=torch.float32, device=x_TD.device)
        for part_TC in _parts(places_TK, x_TD.shape[1]):
            scores_TC = _score(x_TD, keys_UD, part_TC)
            scores_grad_TC = torch.einsum("td,tcd->tc", y_grad_TD, _of(values_UD, part_TC)) * (scores_TC > 0)
            x_grad_TD += torch.einsum("tc,tcd->td", scores_grad_TC, _of(keys_UD, part_TC))
            read_TC = torch.relu(scores_TC)
            both_TC2D = torch.cat([_outer(scores_grad_TC, x_TD.float()), _outer(read_TC, y_grad_TD)], dim=2)
            rows_grad_U2D.index_add_(0, part_TC.flatten(), both_TC2D.flatten(0, 1))
        matters_TK = (grad_TD != 0).any(dim=1, keepdim=True).expand_as(places_TK)
        readers_U = torch.zeros(len(rows_U2D), dtype=torch.int32, device=x_TD.device)
        readers_U.index_add_(0, places_TK.flatten(), matters_TK.flatten().int())
        sink(rows_grad_U2D, readers_U)
        return x_grad_TD.to(x_TD.dtype) if ctx.needs_input_grad[0] else None, None, None, None, None


def _parts(places_TK: torch.Tensor, width: int) -> Iterator[torch.Tensor]:
    """Some of each token's rows at a time."""
    tokens, rows = places_TK.shape
    return iter(places_TK.split(max(1, min(rows, _AT_ONCE // max(1, tokens * width))), dim=1))


def _of(values_UD: torch.Tensor, part_TC: torch.Tensor) -> torch.Tensor:
    """Rows for tokens (T, C, D); index_select copies them several times faster on a CPU than indexing does."""
    return values_UD.index_select(0, part_TC.flatten()).float().unflatten(0, part_TC.shape)


def _outer(weights_TC: torch.Tensor, x_TD: torch.Tensor) -> torch.Tensor:
    return weights_TC[:, :, None] * x_TD[:, None]


def _score(x_TD: torch.Tensor, keys_UD: torch.Tensor, part_TC: torch.Tensor) -> torch.Tensor:
    return torch.einsum("td,tcd->tc", x_TD.float(), _of(keys_UD, part_TC))
