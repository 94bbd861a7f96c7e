"""The weights that are projected, and when their projectors are fitted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from strategies.lsp_offload.projector import Subspace


@dataclass(frozen=True)
class Learning:
    """When and how projectors are fitted.  Defaults of the paper where it states them."""

    check_every: int = 1000  # steps; the first step is one of them
    bias_threshold: float = 0.3
    fit_steps: int = 100
    rows: int = 16  # samples whose gradients are fitted
    moments: Literal["reset", "project"] = "reset"


@dataclass(frozen=True)
class Projected:
    """One weight, its depth in the model (0 = first of the forward pass), and how it is projected."""

    layer: int
    weight: torch.nn.Parameter
    size: int | None  # d; None = the gradient itself travels
    nonzeros: int = 4

    @property
    def image_shape(self) -> tuple[int, ...]:
        return tuple(self.weight.shape) if self.size is None else (self.size, self.size)

    def image_parameter(self) -> torch.nn.Parameter:
        """Something of an image's shape that a gradient can hang on, and no more memory than one number."""
        return torch.nn.Parameter(torch.zeros((), device=self.weight.device).expand(*self.image_shape))

    def draw(self, generator: torch.Generator) -> Subspace:
        """Random projectors of a projected weight."""
        assert self.size is not None
        rows, columns = self.weight.shape
        return Subspace.random((rows, columns), self.size, self.nonzeros, generator, self.weight.device)
