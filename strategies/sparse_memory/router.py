"""Product keys: which rows of a memory a token reads (Lample et al., arXiv 1907.05242).

M = N x N rows are named by pairs of sub-keys.  A token's vector is cut in two halves, each is compared with N sub-keys,
and the K pairs with the largest sums of both scores are its rows: found among K x K pairs, since no other pair can be
among the K largest.  The device holds 4 D N bytes of sub-keys, D = 2 H: a row more costs nothing there until N grows.

Sub-keys are random directions that do not train, so a token that comes back after training reads the rows it read
before, and tokens unlike those of training mostly read others.  Vectors of a language model lie close together; what
they have in common is taken off first (mean and spread of the tokens of the first samples), or all would read the same
few rows.

Legend: T tokens, D width, H half of it, N sub-keys of each half, K rows a token.
"""

from __future__ import annotations

import math

import torch

_LEAST_SPREAD = 1e-6


class ProductKeys(torch.nn.Module):
    """Chooses top_k of num_keys ** 2 rows for each token.  Buffers: `keys`, `mean`, `spread`."""

    keys: torch.Tensor
    mean: torch.Tensor
    spread: torch.Tensor

    def __init__(self, width: int, num_keys: int, top_k: int, device: torch.device | None = None) -> None:
        super().__init__()
        self.num_keys, self.top_k = num_keys, top_k
        self.register_buffer("keys", torch.zeros(2, num_keys, width // 2, device=device))
        self.register_buffer("mean", torch.zeros(width, device=device))
        self.register_buffer("spread", torch.ones(width, device=device))

    def draw(self, generator: torch.Generator) -> None:
        """Random directions, the same on every device."""
        drawn = torch.randn(self.keys.shape, generator=generator)
        self.keys.copy_(torch.nn.functional.normalize(drawn, dim=-1))

    @torch.no_grad()
    def choose(self, x_TD: torch.Tensor) -> torch.Tensor:
        """The rows of each token (T, K), in int64; the same in every precision that x is known in."""
        with torch.autocast(x_TD.device.type, enabled=False):
            halves_T2H = ((x_TD.float() - self.mean) / self.spread).unflatten(-1, self.keys.shape[::2])
            halves_T2H = torch.nn.functional.normalize(halves_T2H, dim=-1)
            scores_2TN = torch.einsum("thd,hnd->htn", halves_T2H, self.keys)
            best_2TK, keys_2TK = scores_2TN.topk(min(self.top_k, self.num_keys), dim=-1)
            pairs_TKK = best_2TK[0, :, :, None] + best_2TK[1, :, None]
            rows_TKK = keys_2TK[0, :, :, None] * self.num_keys + keys_2TK[1, :, None]
            chosen_TK = pairs_TKK.flatten(1).topk(self.top_k, dim=-1).indices
            return rows_TKK.flatten(1).gather(1, chosen_TK)


class InputStatistics:
    """Mean and spread of the vectors that a router compares, over the batches that it is shown."""

    def __init__(self, like: torch.Tensor) -> None:
        self.num_tokens = 0
        self._sums_2D = torch.zeros(2, *like.shape, dtype=torch.float64, device=like.device)

    @torch.no_grad()
    def add(self, x_TD: torch.Tensor) -> None:
        wide_TD = x_TD.double()
        self.num_tokens += len(wide_TD)
        self._sums_2D += torch.stack([wide_TD.sum(0), wide_TD.square().sum(0)])

    def tell(self, router: ProductKeys) -> None:
        """Let the router take off what these vectors have in common."""
        mean_D, square_D = self._sums_2D / max(1, self.num_tokens)
        router.mean.copy_(mean_D)
        router.spread.copy_((square_D - mean_D.square()).clamp_min(0).sqrt().clamp_min(_LEAST_SPREAD))


def keys_for(num_rows: int) -> int | None:
    """Sub-keys of each half that name so many rows; None where no number of them does."""
    found = math.isqrt(num_rows)
    return found if found * found == num_rows else None
