"""AdamW's direction of one tensor, by torch's fused kernel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.optim.adamw import adamw


@dataclass(frozen=True)
class AdamNumbers:
    """What AdamW is told once."""

    learning_rate: float
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    weight_decay: float = 0.0


def no_moments(shape: Sequence[int], device: torch.device) -> dict[str, torch.Tensor]:
    """Under torch's names."""
    return {
        "step": torch.zeros((), device=device),
        "exp_avg": torch.zeros(*shape, device=device),
        "exp_avg_sq": torch.zeros(*shape, device=device),
    }


def direction(
    state: dict[str, torch.Tensor], gradient: torch.Tensor, numbers: AdamNumbers, out: torch.Tensor
) -> torch.Tensor:
    """What AdamW adds to a weight at learning rate 1, without decay: -m / (sqrt(v) + epsilon), by its fused kernel."""
    with torch.no_grad():
        adamw(
            [out.zero_()], [gradient], [state["exp_avg"]], [state["exp_avg_sq"]], [], [state["step"]],
            fused=True, amsgrad=False, beta1=numbers.beta1, beta2=numbers.beta2, lr=1.0, weight_decay=0.0,
            eps=numbers.epsilon, maximize=False,
        )  # fmt: skip
    return out
