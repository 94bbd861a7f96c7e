"""Odds ratio preference optimisation (Hong et al., arXiv 2403.07691): one stage, no reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from strategies.contract import option
from strategies.objectives.contract import AnswerScores, ObjectiveDefaults

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Orpo(ObjectiveDefaults):
    """Train on the chosen row, its prompt included, and raise the odds of its answer over the rejected one's."""

    beta: float = option(
        0.1, "orpo: weight of the odds ratio beside the loss of the chosen row, lambda of the paper", gt=0
    )

    name: ClassVar[str] = "orpo"
    learns_prompts: ClassVar[bool] = True

    @property
    def nll_weight(self) -> float:
        return 1.0

    def losses(self, scores: AnswerScores) -> torch.Tensor:
        """-beta log sigmoid(log odds(chosen) - log odds(rejected)), odds(p) = p / (1 - p) of mean log-probabilities."""
        from torch.nn.functional import logsigmoid

        logps_D = scores.mean_logps_D.clamp(max=_CERTAIN)
        chosen, rejected = scores.pairs(logps_D - _log1mexp(logps_D))
        return -self.beta * logsigmoid(chosen - rejected)

    def rewards(self, scores: AnswerScores) -> torch.Tensor:
        return self.beta * scores.mean_logps_D


_CERTAIN = -1e-9  # an answer of probability 1 has infinite odds, and their gradient is no number


def _log1mexp(logps: torch.Tensor) -> torch.Tensor:
    """log(1 - exp(x)) of x < 0, exact near 0 and far from it (Maechler 2012)."""
    import torch

    near = logps > -0.6931471805599453
    log_near = torch.log(-torch.expm1(torch.where(near, logps, -1.0)))
    return torch.where(near, log_near, torch.log1p(-torch.exp(torch.where(near, -1.0, logps))))
