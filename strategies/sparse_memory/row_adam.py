"""AdamW of single rows: each counts its own steps, those in which it had a gradient.

A row's trajectory is that of AdamW (arXiv 1711.05101) on this row alone, over the steps in which it had a gradient:
between them neither weights nor moments move, and weight decay waits as well.
"""

from __future__ import annotations

import torch

from strategies.lsp_offload.adam import AdamNumbers


def zero_row_moments(rows_MW: torch.Tensor) -> dict[str, torch.Tensor]:
    """Under torch's names; the number of steps is one of each row."""
    return {
        "step": torch.zeros(len(rows_MW), dtype=torch.int32),
        "exp_avg": torch.zeros_like(rows_MW, requires_grad=False),
        "exp_avg_sq": torch.zeros_like(rows_MW, requires_grad=False),
    }


@torch.no_grad()
def move_rows(
    rows_MW: torch.Tensor,
    state: dict[str, torch.Tensor],
    places_P: torch.Tensor,
    gradient_PW: torch.Tensor,
    numbers: AdamNumbers,
) -> None:
    """One step of the rows at different `places_P` (int64); all others stay as they are, bit by bit."""
    state["step"][places_P] += 1
    steps_P1 = state["step"][places_P].double()[:, None]
    first_PW = state["exp_avg"][places_P].lerp_(gradient_PW, 1 - numbers.beta1)
    second_PW = state["exp_avg_sq"][places_P].mul_(numbers.beta2)
    second_PW.addcmul_(gradient_PW, gradient_PW, value=1 - numbers.beta2)
    state["exp_avg"][places_P], state["exp_avg_sq"][places_P] = first_PW, second_PW
    correction_P1 = (1 - numbers.beta2**steps_P1).sqrt().float()
    rate_P1 = (numbers.learning_rate / (1 - numbers.beta1**steps_P1)).float()
    change_PW = first_PW.div_(second_PW.sqrt_().div_(correction_P1).add_(numbers.epsilon)).mul_(rate_P1)
    kept_PW = rows_MW[places_P].mul_(1 - numbers.learning_rate * numbers.weight_decay)
    rows_MW[places_P] = kept_PW.sub_(change_PW)
