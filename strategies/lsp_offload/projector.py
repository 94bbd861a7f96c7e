"""Learned sparse projectors: an m x n gradient as a d x d image and back, with r non-zeros in each row of a projector.

    image  S = P^T G Q          (d x d)        P: m x d, Q: n x d, exactly r non-zeros a row
    back   W -= lr * P D Q^T    (m x n)
    bias   ||P P^T G Q Q^T - G|| / ||G||       what an image loses of the gradient it was made of

A projector is two tensors, its values and the columns they stand in: (m, r) each.  No m x d matrix is ever made, so a
weight costs (m + n) r values and positions on the device.  Positions are drawn once and stay; the values are fitted to
a gradient, which random ones misrepresent by a factor of 2 to 11.

Source: LSP-Offload, AAAI 2025, arXiv 2406.10181, algorithm 1; positions without repetition and the exact relative bias
are ours (its public code lets positions collide).
Shapes: M N sides of a weight, R non-zeros a row, D side of an image, K any number of columns.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

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

    @property
    def num_bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in (self.values_MR, self.positions_MR))

    def compress(self, matrix_MK: torch.Tensor) -> torch.Tensor:
        """P^T X: (M, K) -> (D, K), in r passes over the matrix."""
        values = self.values_MR.to(matrix_MK.dtype)
        out = matrix_MK.new_zeros(self.size, matrix_MK.shape[1])
        for j in range(values.shape[1]):
            out = out.index_add(0, self.positions_MR[:, j], values[:, j, None] * matrix_MK)
        return out

    def expand(self, image_DK: torch.Tensor) -> torch.Tensor:
        """P X: (D, K) -> (M, K)."""
        values = self.values_MR.to(image_DK.dtype)
        out = values[:, 0, None] * image_DK[self.positions_MR[:, 0]]
        for j in range(1, values.shape[1]):
            out = out + values[:, j, None] * image_DK[self.positions_MR[:, j]]
        return out

    def overlap(self, old: SparseProjector) -> torch.Tensor:
        """P_new^T P_old, (D, D): what takes an image of the old subspace into the new one."""
        out = torch.zeros(self.size, old.size, device=self.values_MR.device)
        rows, both = self.values_MR.shape[1], old.values_MR.shape[1]
        for i in range(rows):
            for j in range(both):
                place = (self.positions_MR[:, i].long(), old.positions_MR[:, j].long())
                out.index_put_(place, self.values_MR[:, i] * old.values_MR[:, j], accumulate=True)
        return out


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

    @property
    def num_bytes(self) -> int:
        return self.rows.num_bytes + self.columns.num_bytes

    def image(self, gradient_MN: torch.Tensor) -> torch.Tensor:
        """P^T G Q, (D, D)."""
        half_DN = self.rows.compress(gradient_MN)
        return self.columns.compress(half_DN.T).T

    def back(self, image_DD: torch.Tensor) -> torch.Tensor:
        """P S Q^T, (M, N)."""
        half_MD = self.rows.expand(image_DD)
        return self.columns.expand(half_MD.T).T

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
        values = [side.values_MR.float().clone().requires_grad_(True) for side in (self.rows, self.columns)]
        optimizer = torch.optim.Adam(values, lr=learning_rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps), eta_min=learning_rate / 100)
        best, best_bias = self, float("inf")
        for step in range(steps + 1):
            trial = Subspace(
                *(SparseProjector(v, s.positions_MR, s.size) for v, s in zip(values, self.sides, strict=True))
            )
            with torch.enable_grad():
                bias = trial.bias(gradient)
            if bias.item() < best_bias:
                best_bias = bias.item()
                best = Subspace(
                    *(
                        SparseProjector(v.detach().clone(), s.positions_MR, s.size)
                        for v, s in zip(values, self.sides, strict=True)
                    )
                )
            if best_bias <= threshold or step == steps or not math.isfinite(bias.item()):
                break
            optimizer.zero_grad()
            bias.backward()
            optimizer.step()
            schedule.step()
        return best, best_bias

    @property
    def sides(self) -> tuple[SparseProjector, SparseProjector]:
        return self.rows, self.columns

    @property
    def size(self) -> int:
        return self.rows.size

    def state(self) -> dict[str, torch.Tensor]:
        """What a checkpoint holds of it."""
        return {
            f"{name}_{part}": getattr(side, attribute)
            for name, side in zip(("rows", "columns"), self.sides, strict=True)
            for part, attribute in (("values", "values_MR"), ("positions", "positions_MR"))
        }

    @classmethod
    def from_state(cls, state: dict[str, torch.Tensor], size: int) -> Subspace:
        return cls(
            *(
                SparseProjector(state[f"{side}_values"], state[f"{side}_positions"], size)
                for side in ("rows", "columns")
            )
        )


class Whole:
    """No subspace at all: the image is the gradient, as ZeRO-Offload sends it (arXiv 2101.06840)."""

    num_bytes = 0

    def image(self, gradient_MN: torch.Tensor) -> torch.Tensor:
        return gradient_MN

    def back(self, image_MN: torch.Tensor) -> torch.Tensor:
        return image_MN

    def bias(self, gradient_MN: torch.Tensor) -> torch.Tensor:
        return torch.zeros(())

    def state(self) -> dict[str, torch.Tensor]:
        return {}
