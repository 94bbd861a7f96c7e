"""An output matrix in the host's memory: slices of its rows are brought to the device one after the other.

Legend: S supervised positions, P of them, H hidden size, V vocabulary, v rows of a slice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

POSITIONS = 2048  # whose logits of one slice are held at once, as in cost/streaming.py


class OutputMatrix:
    """Rows of the vocabulary in slices; `need(place)` brings a slice's tensor to the device."""

    def __init__(
        self,
        module: torch.nn.Module,
        rows: Sequence[tuple[int, int]],
        parts: Mapping[int, torch.Tensor],
        need: Callable[[int], None],
    ) -> None:
        self.rows, self._places, self._parts, self._need = list(rows), list(parts), dict(parts), need
        bias = getattr(module, "bias", None)
        self._bias = bias if isinstance(bias, torch.Tensor) else None

    def part(self, number: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Weight (v, H) and bias (v) of a slice, on the device."""
        place = self._places[number]
        self._need(place)
        bias = self._bias
        return self._parts[place], None if bias is None else bias[slice(*self.rows[number])]

    def multiply(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits of all of the vocabulary, in place of the module's own forward pass."""
        if torch.is_autocast_enabled(hidden.device.type):
            hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
        return _Product.apply(hidden, self)

    def loss_sum(self, hidden_SH: torch.Tensor, targets_S: torch.Tensor) -> torch.Tensor:
        """Sum of -log softmax(W h)[target]: all positions at each slice's visit, never all logits.

        Two visits of the matrix: log-sum-exp grows slice by slice (Milakov & Gimelshein, arXiv 1805.02867), and the
        gradient computes the logits again (as Cut Cross-Entropy, arXiv 2411.09009).
        """
        if torch.is_autocast_enabled(hidden_SH.device.type):
            hidden_SH = hidden_SH.to(torch.get_autocast_dtype(hidden_SH.device.type))
        return _SlicedLoss.apply(hidden_SH, targets_S, self)


def slices_of(weight_VH: torch.Tensor, most_bytes: int) -> list[tuple[int, int]]:
    """Ranges of rows of at most that many bytes, about equal."""
    vocabulary, row_bytes = weight_VH.shape[0], weight_VH.shape[1] * weight_VH.element_size()
    number = max(1, -(-vocabulary * row_bytes // most_bytes))
    height = -(-vocabulary // number)
    return [(start, min(start + height, vocabulary)) for start in range(0, vocabulary, height)]


class _Product(torch.autograd.Function):
    """x W^T + b for a frozen W."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, matrix: OutputMatrix) -> torch.Tensor:
        ctx.matrix = matrix
        parts = []
        for number in range(len(matrix.rows)):
            weight_vH, bias_v = matrix.part(number)
            parts.append(F.linear(hidden.to(weight_vH.dtype), weight_vH, bias_v))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        (gradient,), matrix, total = gradients, ctx.matrix, None
        for number in reversed(range(len(matrix.rows))):
            weight_vH, _ = matrix.part(number)
            part = gradient[..., slice(*matrix.rows[number])] @ weight_vH
            total = part if total is None else total + part
        return total, None


class _SlicedLoss(torch.autograd.Function):
    """Cross-entropy over a frozen output matrix, summed."""

    @staticmethod
    def forward(ctx: Any, hidden_SH: torch.Tensor, targets_S: torch.Tensor, matrix: OutputMatrix) -> torch.Tensor:
        lse_S = torch.full(targets_S.shape, -torch.inf, device=hidden_SH.device)
        correct_S = torch.zeros_like(lse_S)
        for number, (start, stop) in enumerate(matrix.rows):
            part = matrix.part(number)
            for at in _positions(len(targets_S)):
                logits_Pv, local_P, inside_P = _logits(hidden_SH[at], targets_S[at], part, start, stop)
                lse_S[at] = torch.logaddexp(lse_S[at], logits_Pv.logsumexp(dim=-1))
                found_P = logits_Pv.gather(1, local_P[:, None])[:, 0]
                correct_S[at] += torch.where(inside_P, found_P, 0.0)
        ctx.save_for_backward(hidden_SH, targets_S, lse_S)
        ctx.matrix = matrix
        return (lse_S - correct_S).sum()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        (gradient,), matrix = gradients, ctx.matrix
        hidden_SH, targets_S, lse_S = ctx.saved_tensors
        grad_SH = torch.zeros_like(hidden_SH, dtype=torch.float32)
        for number, (start, stop) in reversed(list(enumerate(matrix.rows))):
            part = matrix.part(number)
            for at in _positions(len(targets_S)):
                logits_Pv, local_P, inside_P = _logits(hidden_SH[at], targets_S[at], part, start, stop)
                grad_Pv = (logits_Pv - lse_S[at, None]).exp_()
                grad_Pv.scatter_add_(1, local_P[:, None], -inside_P[:, None].to(grad_Pv.dtype))
                grad_SH[at] += (grad_Pv * gradient).to(part[0].dtype) @ part[0]
        return grad_SH.to(hidden_SH.dtype), None, None


def _positions(number: int) -> list[slice]:
    return [slice(start, start + POSITIONS) for start in range(0, number, POSITIONS)]


def _logits(
    hidden_PH: torch.Tensor,
    targets_P: torch.Tensor,
    part: tuple[torch.Tensor, torch.Tensor | None],
    start: int,
    stop: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits of a slice in fp32, the targets' places in it, and which targets it holds."""
    weight_vH, bias_v = part
    logits_Pv = F.linear(hidden_PH.to(weight_vH.dtype), weight_vH, bias_v).float()
    inside_P = (targets_P >= start) & (targets_P < stop)
    return logits_Pv, (targets_P - start).clamp(0, stop - start - 1), inside_P
