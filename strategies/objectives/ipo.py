"""Identity preference optimisation (Azar et al., arXiv 2310.12036, eq. 17), a token as its authors compute it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from strategies.contract import option
from strategies.objectives.contract import AnswerScores, ObjectiveDefaults

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Ipo(ObjectiveDefaults):
    """Bring chosen answers a set margin above rejected ones and no further: labels that are certain do no harm."""

    beta: float = option(0.1, "ipo: the margin is 1 / (2 beta) nats a token, tau of the paper", gt=0)

    name: ClassVar[str] = "ipo"
    needs_reference: ClassVar[bool] = True

    def losses(self, scores: AnswerScores) -> torch.Tensor:
        chosen, rejected = scores.pairs(scores.log_ratios_D / scores.tokens_D)
        return (chosen - rejected - 1 / (2 * self.beta)) ** 2

    def rewards(self, scores: AnswerScores) -> torch.Tensor:
        return self.beta * scores.log_ratios_D
