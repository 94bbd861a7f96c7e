"""AdamW's direction of one tensor by torch's fused kernel, and rounding to bfloat16 that loses nothing on average."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.optim.adamw import adamw


@dataclass(frozen=True)
class AdamNumbers:
    """AdamW's constants."""

    learning_rate: float
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    weight_decay: float = 0.0


def zero_moments(shape: Sequence[int], device: torch.device) -> dict[str, torch.Tensor]:
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


def round_at_random(values: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """fp32 values that bfloat16 can hold, each rounded up or down with the probability of its nearness.

    What bfloat16 lacks are the lower 16 bits: a random number below 2^16 carries over as often as they are large.
    """
    noise = torch.randint(0, 1 << 16, values.shape, dtype=torch.int32, device=values.device, generator=generator)
    return ((values.view(torch.int32) + noise) & -65536).view(torch.float32)
