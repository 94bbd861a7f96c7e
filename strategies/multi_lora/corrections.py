"""The corrections of several jobs added to one map's outputs as one differentiable function.

By itself each correction is a dozen operations of autograd on a few tokens, whose calls cost more than their products:
of eight jobs with 54 tokens each they were two thirds of a pass.  Here a job's part is two products in the forward pass
and four in the backward pass, and no number of one job meets another's.

Legend: T tokens of a row, I inputs and O outputs of a map, R rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

# Tokens of a job, on average.  A pass of eight jobs with fp32 corrections took 0.81 of one with bf16 ones at 54 tokens
# a job, 0.86 at 100, 0.96 at 160 (SmolLM2-135M, two cores with AMX); longer ones were not measured.
_FEW = 128


@dataclass(frozen=True)
class TokenRange:
    """A job's tokens of a row, and the scale of its correction."""

    start: int
    end: int
    scaling: float


class AddCorrections(torch.autograd.Function):
    """y + s (x A^T) B^T for the tokens of each part, with A and B of its own; y is changed in place.

    y must own its memory: no view of another tensor.  Kept for the backward pass: x, and x A^T of each part, R numbers
    a token.
    """

    @staticmethod
    def forward(
        ctx: Any, y_TO: torch.Tensor, x_TI: torch.Tensor, parts: Sequence[TokenRange], *weights: torch.Tensor
    ) -> Any:
        """(..., T, O) of (..., T, O) and (..., T, I) with T in all; `weights`: A (R, I) and B (O, R) of each part."""
        ctx.parts, ctx.dtype, hidden = parts, _precision(y_TO, parts), []
        with torch.autocast(y_TO.device.type, enabled=False):
            c_TI, flat_TO = _flat(x_TI).to(ctx.dtype), _flat(y_TO)
            for part, a_RI, b_OR in zip(parts, weights[::2], weights[1::2], strict=True):
                z_TR = c_TI[part.start : part.end] @ a_RI.to(ctx.dtype).t()
                own_TO, b_RO = flat_TO[part.start : part.end], b_OR.to(ctx.dtype).t()
                if y_TO.dtype == ctx.dtype:
                    own_TO.addmm_(z_TR, b_RO, alpha=part.scaling)
                else:
                    own_TO.add_(z_TR @ b_RO, alpha=part.scaling)
                hidden.append(z_TR)
        ctx.mark_dirty(y_TO)
        ctx.save_for_backward(x_TI, *weights, *hidden)
        return y_TO

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_TO: torch.Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        with torch.autocast(grad_TO.device.type, enabled=False):
            return grad_TO, *_gradients(ctx, grad_TO)


def _gradients(ctx: Any, grad_TO: torch.Tensor) -> list[torch.Tensor | None]:
    """Of x, of nothing, and of each part's A and B."""
    parts, dtype = ctx.parts, ctx.dtype
    x_TI, *saved = ctx.saved_tensors
    weights, hidden = saved[: 2 * len(parts)], saved[2 * len(parts) :]
    c_TI, g_TO = _flat(x_TI).to(dtype), _flat(grad_TO).to(dtype)
    d_TI = _zero_between(parts, torch.empty_like(c_TI)) if ctx.needs_input_grad[1] else None
    found: list[torch.Tensor | None] = [None, None]
    for part, a_RI, b_OR, z_TR in zip(parts, weights[::2], weights[1::2], hidden, strict=True):
        own = slice(part.start, part.end)
        g_TR = (g_TO[own] @ b_OR.to(dtype)).mul_(part.scaling)
        if d_TI is not None:
            torch.mm(g_TR, a_RI.to(dtype), out=d_TI[own])
        found.append((g_TR.t() @ c_TI[own]).to(a_RI.dtype))
        found.append((g_TO[own].t() @ z_TR).mul_(part.scaling).to(b_OR.dtype))
    found[0] = None if d_TI is None else d_TI.to(x_TI.dtype).view(x_TI.shape)
    return found


def _flat(rows: torch.Tensor) -> torch.Tensor:
    """(T, ...) of (1, T, ...)."""
    return rows.reshape(-1, rows.shape[-1])


def _precision(y_TO: torch.Tensor, parts: Sequence[TokenRange]) -> torch.dtype:
    """On a CPU products of few tokens are computed in fp32: for those in bf16 oneDNN prepares itself at each new size,
    which takes longer than they do."""
    few = sum(part.end - part.start for part in parts) < _FEW * len(parts)
    is_cpu = y_TO.device.type == "cpu"
    return torch.promote_types(y_TO.dtype, torch.float32) if few and is_cpu else y_TO.dtype


def _zero_between(parts: Sequence[TokenRange], grad_TI: torch.Tensor) -> torch.Tensor:
    """Zeros for tokens of no part."""
    end = 0
    for part in (*parts, TokenRange(len(grad_TI), len(grad_TI), 0.0)):
        if part.start > end:
            grad_TI[end : part.start].zero_()
        end = part.end
    return grad_TI
