"""Learned sparse projectors: an m x n gradient as a d x d image and back, with r non-zeros in each row of a projector.

    image  S = P^T G Q          (d x d)        P: m x d, Q: n x d, exactly r non-zeros a row
    back   W -= lr * P D Q^T    (m x n)
    bias   ||P P^T G Q Q^T - G|| / ||G||       what an image loses of the gradient it was made of

A projector is two tensors, its values and the columns they stand in: (m, r) each.  No m x d matrix is ever made, so a
weight costs (m + n) r values and positions on the device.  A fit changes the values and leaves the positions; without
it random projectors misrepresent a gradient by a factor of 2 to 11.

Both products are sums of a few rows, which torch calls an embedding bag: one fused kernel, on CPUs and GPUs.

Source: LSP-Offload, AAAI 2025, arXiv 2406.10181, algorithm 1; positions without repetition and the exact relative bias
are ours (its public code lets positions collide).
Shapes: M N sides of a weight, R non-zeros a row, D side of an image, K any number of columns.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch.nn.functional import embedding_bag

_TINY = 1e-30


@dataclass
class SparseProjector:
    """One side's projector: row i is zero but for `values_MR[i]` in the columns `positions_MR[i]`, all distinct."""

    values_MR: torch.Tensor
    positions_MR: torch.Tensor  # int32
    size: int  # D

    @classmethod
    def random(
        cls, rows: int, size: int, nonzeros: int, generator: torch.Generator, device: torch.device | str = "cpu"
    ) -> SparseProjector:
        """Distinct columns drawn uniformly for each row, values from N(0, 1/r): rows of length about 1.

        Raises ValueError where a row has no room for its non-zeros.
        """
        if not 1 <= nonzeros <= size:
            raise ValueError(f"nonzeros_per_row {nonzeros} must lie between 1 and the subspace's {size}")
        positions = _distinct(rows, size, nonzeros, generator)
        values = torch.randn(rows, nonzeros, generator=generator) / math.sqrt(nonzeros)
        return cls(values.to(device), positions.to(device), size)

    def compress(self, matrix_MK: torch.Tensor) -> torch.Tensor:
        """P^T X: (M, K) -> (D, K).  Reads r M rows."""
        order, rows, starts = self._by_column
        weights = self.values_MR.to(matrix_MK.dtype).reshape(-1)[order]
        return embedding_bag(rows, matrix_MK, starts, mode="sum", per_sample_weights=weights)

    def expand(self, image_DK: torch.Tensor) -> torch.Tensor:
        """P X: (D, K) -> (M, K)."""
        weights = self.values_MR.to(image_DK.dtype)
        return embedding_bag(self.positions_MR, image_DK, mode="sum", per_sample_weights=weights)

    def gram(self) -> torch.Tensor:
        """P^T P, (D, D): the identity where nothing is lost."""
        return self.overlap(self)

    @cached_property
    def _by_column(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The non-zeros sorted by column: their places, their rows, and where each column's begin."""
        columns = self.positions_MR.reshape(-1)
        order = torch.argsort(columns, stable=True)
        ends = torch.bincount(columns, minlength=self.size).cumsum(0)
        starts = torch.cat([ends.new_zeros(1), ends[:-1]])
        return order, order // self.positions_MR.shape[1], starts

    def with_values(self, values_MR: torch.Tensor) -> SparseProjector:
        """The same positions with other values."""
        other = SparseProjector(values_MR, self.positions_MR, self.size)
        other.__dict__["_by_column"] = self._by_column
        return other

    def overlap(self, old: SparseProjector) -> torch.Tensor:
        """P_new^T P_old, (D, D): what takes an image of the old subspace into the new one."""
        places = self.positions_MR.long()[:, :, None] * old.size + old.positions_MR.long()[:, None, :]
        products = self.values_MR[:, :, None] * old.values_MR[:, None, :]
        flat = products.new_zeros(self.size * old.size).index_add(0, places.reshape(-1), products.reshape(-1))
        return flat.view(self.size, old.size)


def _distinct(rows: int, size: int, count: int, generator: torch.Generator) -> torch.Tensor:
    """`count` different numbers below `size` for each row, every set equally likely, without a rows x size matrix.

    Floyd's algorithm on all rows at once (Bentley & Floyd, CACM 1987): of the j-th draw from 0..j, one that is taken
    already becomes j itself.
    """
    chosen = torch.empty(rows, count, dtype=torch.int32)
    for place, top in enumerate(range(size - count, size)):
        drawn = torch.randint(0, top + 1, (rows, 1), generator=generator, dtype=torch.int32)
        taken = (chosen[:, :place] == drawn).any(dim=1, keepdim=True)
        chosen[:, place : place + 1] = torch.where(taken, top, drawn)
    return chosen


@dataclass
class Subspace:
    """The two projectors of one weight."""

    rows: SparseProjector  # P, of the weight's M outputs
    columns: SparseProjector  # Q, of its N inputs

    @classmethod
    def random(
        cls,
        shape: tuple[int, int],
        size: int,
        nonzeros: int,
        generator: torch.Generator,
        device: torch.device | str = "cpu",
    ) -> Subspace:
        sides = [SparseProjector.random(side, size, nonzeros, generator, device) for side in shape]
        return cls(*sides)

    def image(self, gradient_MN: torch.Tensor) -> torch.Tensor:
        """P^T G Q, (D, D)."""
        half_DN = self.rows.compress(gradient_MN)
        return self.columns.compress(half_DN.T).T.contiguous()

    def back(self, image_DD: torch.Tensor) -> torch.Tensor:
        """P S Q^T, (M, N)."""
        half_MD = self.rows.expand(image_DD)
        return self.columns.expand(half_MD.T).T

    @property
    def gain(self) -> torch.Tensor:
        """1 over the root mean square lengths of both projectors' rows.

        Fitted rows are shorter than the drawn ones of length 1, each weight's by a factor of its own.  An update
        multiplied by this moves elements by about the learning rate, as Adam's does.
        """
        lengths = [side.values_MR.square().sum(1).mean().sqrt() for side in self.sides]
        return 1 / (lengths[0] * lengths[1])

    def bias(self, gradient_MN: torch.Tensor) -> torch.Tensor:
        """||P P^T G Q Q^T - G|| / ||G|| (Frobenius): 0 = nothing is lost, 1 = as good as an empty image."""
        gradient = gradient_MN.float()
        return (self.back(self.image(gradient)) - gradient).norm() / gradient.norm().clamp_min(_TINY)

    def fitted(
        self, gradient_MN: torch.Tensor, steps: int, threshold: float, learning_rate: float = 0.1
    ) -> tuple[Subspace, float]:
        """The same positions with values fitted to a gradient by Adam until the bias is at most `threshold`.

        Returns the best values met and their bias; on real gradients of high rank that stays at 0.5 to 0.95 with 4 to 8
        non-zeros, so a caller must not wait for a threshold to be reached.
        """
        gradient = gradient_MN.float()
        gradient = gradient / gradient.norm().clamp_min(_TINY)
        transposed = gradient.T.contiguous()
        values = [side.values_MR.float().clone().requires_grad_(True) for side in self.sides]
        optimizer = torch.optim.Adam(values, lr=learning_rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps), eta_min=learning_rate / 100)
        best, least = [value.detach().clone() for value in values], float("inf")
        for step in range(steps + 1):
            with torch.enable_grad():
                bias = self._with_values(values)._bias_of_unit(gradient, transposed)
            if bias.item() < least:
                best, least = [value.detach().clone() for value in values], bias.item()
            if least <= threshold or step == steps or not math.isfinite(bias.item()):
                break
            optimizer.zero_grad()
            bias.backward()
            optimizer.step()
            schedule.step()
        found = self._with_values(best)
        return found, float(found.bias(gradient))

    def _with_values(self, values: list[torch.Tensor]) -> Subspace:
        return Subspace(*(side.with_values(value) for side, value in zip(self.sides, values, strict=True)))

    def _bias_of_unit(self, gradient_MN: torch.Tensor, gradient_NM: torch.Tensor) -> torch.Tensor:
        """The bias for a gradient of norm 1 from d x d matrices alone: no way back to m x n.

        With the image K, ||P K Q^T - G||^2 = ||G||^2 - 2 ||K||^2 + <P^T P K, K Q^T Q>.  Good to 1e-3.
        """
        image_DD = _Image.apply(self.rows.values_MR, self.columns.values_MR, self, gradient_MN, gradient_NM)
        kept = ((self.rows.gram() @ image_DD) * (image_DD @ self.columns.gram())).sum()
        return (1 - 2 * image_DD.square().sum() + kept).clamp_min(1e-12).sqrt()

    @property
    def sides(self) -> tuple[SparseProjector, SparseProjector]:
        return self.rows, self.columns

    def state(self) -> dict[str, torch.Tensor]:
        """What a checkpoint holds of it."""
        return {
            f"{name}_{part}": getattr(side, attribute)
            for name, side in zip(("rows", "columns"), self.sides, strict=True)
            for part, attribute in (("values", "values_MR"), ("positions", "positions_MR"))
        }

    @classmethod
    def from_state(cls, state: dict[str, torch.Tensor], size: int) -> Subspace:
        parts = ((state[f"{side}_values"], state[f"{side}_positions"]) for side in ("rows", "columns"))
        return cls(*(SparseProjector(values, positions, size) for values, positions in parts))


class _Image(torch.autograd.Function):
    """P^T G Q, differentiable by the projectors' values only.

    With the image's gradient S', a value of row i in column c has the gradient <(G Q)_i, S'_c>: products as wide as the
    image, where plain autograd would go back through the gradient's whole width.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        rows_MR: torch.Tensor,
        columns_NR: torch.Tensor,
        space: Subspace,
        gradient_MN: torch.Tensor,
        gradient_NM: torch.Tensor,
    ) -> torch.Tensor:
        left_DN, right_DM = space.rows.compress(gradient_MN), space.columns.compress(gradient_NM)
        ctx.space = space
        ctx.save_for_backward(left_DN, right_DM)
        return space.columns.compress(left_DN.T).T

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> Any:
        left_DN, right_DM = ctx.saved_tensors
        rows, columns = ctx.space.sides
        return (
            _row_products(right_DM.T, outer[0], rows.positions_MR),
            _row_products(left_DN.T, outer[0].T, columns.positions_MR),
            *(None,) * 3,
        )


def _row_products(left_MD: torch.Tensor, right_DD: torch.Tensor, positions_MR: torch.Tensor) -> torch.Tensor:
    """Of each row of `left` its products with the rows of `right` that its positions name: (M, R)."""
    right = right_DD.contiguous()
    return torch.stack([(left_MD * right[column]).sum(1) for column in positions_MR.T], dim=1)


class Whole:
    """No subspace at all: the image is the gradient, as ZeRO-Offload sends it (arXiv 2101.06840)."""

    gain = 1.0

    def image(self, gradient_MN: torch.Tensor) -> torch.Tensor:
        return gradient_MN

    def back(self, image_MN: torch.Tensor) -> torch.Tensor:
        return image_MN
