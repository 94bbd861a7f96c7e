"""Adapters as vectors: sums, truncation and merges of corrections dW = B A.

Shapes: I inputs, O outputs, R rank, N adapters.  What merges of factors get wrong (PEFT's `linear` takes roots of the
weights; averaging A and B apart mixes every B with every A) does not arise where the sum is that of the products.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

_EXACT_RANK = 768  # up to which a sum is factorised exactly; beyond it by random projections
_OVERSAMPLE, _MOST_PASSES, _SETTLED = 16, 4, 1e-3
_LEAST_SINGULAR = 0.05  # of the largest
Merge = Literal["linear", "factorwise", "cat", "ties", "dare_linear", "dare_ties", "magnitude_prune"]


@dataclass(frozen=True)
class Factors:
    """dW_OI = B_OR A_RI."""

    a_RI: torch.Tensor
    b_OR: torch.Tensor

    @property
    def rank(self) -> int:
        return self.a_RI.shape[0]

    def delta(self) -> torch.Tensor:
        return self.b_OR @ self.a_RI


def add(parts: Sequence[Factors], weights: Sequence[float]) -> Factors:
    """The exact weighted sum; its rank is the sum of the ranks."""
    a = torch.cat([part.a_RI for part in parts])
    b = torch.cat([part.b_OR * weight for part, weight in zip(parts, weights, strict=True)], dim=1)
    return Factors(a, b)


def average_factors(parts: Sequence[Factors], weights: Sequence[float]) -> Factors:
    """The published rule of meta-generation (arXiv 2507.01806): A = sum c A, B = sum c B.  Raises ValueError.

    Lower ranks are filled up with zeros, which changes no product.
    """
    rank = max(part.rank for part in parts)
    a, b = torch.zeros(rank, parts[0].a_RI.shape[1]), torch.zeros(parts[0].b_OR.shape[0], rank)
    for part, weight in zip(parts, weights, strict=True):
        a[: part.rank] += weight * part.a_RI
        b[:, : part.rank] += weight * part.b_OR
    return Factors(a, b)


def truncate(factors: Factors, rank: int, seed: int = 0) -> tuple[Factors, float, float]:
    """The nearest correction of a rank, with the squares of what was left out and of the whole (Frobenius).

    Exact by QR of both factors up to rank 768.  Above it by a randomised range finder (Halko et al., arXiv 0909.4061)
    with power iterations until what they capture settles within 0.1 %; the whole's square is then an estimate from
    its random products.
    """
    if factors.rank <= rank:
        return factors, 0.0, float(factors.delta().square().sum()) if factors.rank else 0.0
    if factors.rank <= _EXACT_RANK:
        left, inner_b = torch.linalg.qr(factors.b_OR)
        right, inner_a = torch.linalg.qr(factors.a_RI.T)
        u, s, vh = torch.linalg.svd(inner_b @ inner_a.T, full_matrices=False)
        kept, root = s[:rank], s[:rank].sqrt()
        result = Factors(root[:, None] * (vh[:rank] @ right.T), (left @ u[:, :rank]) * root)
        whole = float(s.square().sum())
        return result, whole - float(kept.square().sum()), whole
    generator = torch.Generator().manual_seed(seed)
    width = min(rank + _OVERSAMPLE, *(factors.a_RI.shape[1], factors.b_OR.shape[0]))
    image = factors.b_OR @ (factors.a_RI @ torch.randn(factors.a_RI.shape[1], width, generator=generator))
    whole, before = float(image.square().sum()) / width, 0.0
    core_KI, range_OK = _captured(factors, image)
    for _ in range(_MOST_PASSES):
        captured = float(core_KI.square().sum())
        if captured - before <= _SETTLED * captured:
            break
        before = captured
        core_KI, range_OK = _captured(factors, factors.b_OR @ (factors.a_RI @ torch.linalg.qr(core_KI.T).Q))
    u, s, vh = torch.linalg.svd(core_KI, full_matrices=False)
    root = s[:rank].sqrt()
    result = Factors(root[:, None] * vh[:rank], (range_OK @ u[:, :rank]) * root)
    kept_square = float(s[:rank].square().sum())
    whole = max(whole, float(s.square().sum()))
    return result, whole - kept_square, whole


def _captured(factors: Factors, image_OK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """dW seen in the range of its image, (K, I), and that range, (O, K)."""
    range_OK = torch.linalg.qr(image_OK).Q
    return (range_OK.T @ factors.b_OR) @ factors.a_RI, range_OK


def square(factors: Factors) -> float:
    """The square of a correction's norm (Frobenius), without forming it."""
    return float(((factors.a_RI @ factors.a_RI.T) * (factors.b_OR.T @ factors.b_OR)).sum().clamp(min=0.0))


def near(factors: Factors, like_RI: torch.Tensor) -> Factors:
    """The same correction with the A that is nearest to another A of its rank.

    B M and M^-1 A are the same for every M; a training that continues with the moments of the other A needs one like
    it.  Nearest within the rows' space, and so that M can be inverted in fp32 (condition at most 20).
    """
    right_IR, inner = torch.linalg.qr(factors.a_RI.T.double())
    u, s, vh = torch.linalg.svd(like_RI.double() @ right_IR)
    if not s.max():
        return factors
    s = s.clamp(min=_LEAST_SINGULAR * float(s.max()))
    a, b = (u * s) @ vh @ right_IR.T, factors.b_OR.double() @ inner.T @ (vh.T / s) @ u.T
    return Factors(a.to(factors.a_RI.dtype), b.to(factors.b_OR.dtype))


def gram(parts: Sequence[Factors | None]) -> torch.Tensor:
    """Inner products of corrections, N x N; None stands for no correction of this map."""
    there = [index for index, part in enumerate(parts) if part is not None]
    found = [parts[index] for index in there]
    result = torch.zeros(len(parts), len(parts))
    a = torch.cat([part.a_RI for part in found if part])
    b = torch.cat([part.b_OR for part in found if part], dim=1)
    products = (a @ a.T) * (b.T @ b)  # summed over blocks: <B A, B' A'> = sum of (A A'^T) o (B^T B')
    owner = torch.repeat_interleave(torch.tensor(there), torch.tensor([part.rank for part in found if part]))
    rows = torch.zeros(len(parts), products.shape[1]).index_add_(0, owner, products)
    return result.index_add_(1, owner, rows)


def merge(
    parts: Sequence[Factors], weights: Sequence[float], how: Merge, density: float = 0.5, seed: int = 0
) -> Factors | torch.Tensor:
    """Some corrections of one map as one, before truncation: factors, or a whole dW where entries are chosen.

    linear adds up (with negative weights: task arithmetic, arXiv 2212.04089), cat is the same with the rank it has.
    Of dW's entries, ties keeps the largest, elects signs and averages who agrees (arXiv 2306.01708), dare drops some at
    random and lets the others grow (arXiv 2311.03099), magnitude_prune keeps the largest; `density` is what is kept.
    """
    if how in ("linear", "cat"):
        return add(parts, weights)
    if how == "factorwise":
        return average_factors(parts, weights)
    return by_entries([part.delta() for part in parts], weights, how, density, seed)


def by_entries(
    deltas: Sequence[torch.Tensor], weights: Sequence[float], how: Merge, density: float = 0.5, seed: int = 0
) -> torch.Tensor:
    """Tensors of one shape merged entry by entry: those rules of `merge` that need no factors."""
    if how == "linear":
        return torch.stack([delta * weight for delta, weight in zip(deltas, weights, strict=True)]).sum(0)
    from peft.utils import merge_utils  # works on any tensors; PEFT itself hands it factors, whose merge is not exact

    rule = getattr(merge_utils, how)
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The density")  # all kept is what was asked for
        torch.manual_seed(seed)
        return rule(list(deltas), torch.tensor(list(weights)), density)


def factorise(delta_OI: torch.Tensor, rank: int) -> tuple[Factors, float, float]:
    """A whole dW as factors of a rank, with the squares of what was left out and of the whole."""
    u, s, vh = torch.linalg.svd(delta_OI, full_matrices=False)
    root, whole = s[:rank].sqrt(), float(s.square().sum())
    kept = Factors(root[:, None] * vh[:rank], u[:, :rank] * root)
    return kept, whole - float(s[:rank].square().sum()), whole
