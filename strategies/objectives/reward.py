"""A reward model: one score a document, higher for the better answer of a pair (as TRL's RewardTrainer).

The score stands in place of the output matrix, as in transformers' AutoModelForSequenceClassification with one label.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from strategies.contract import option
from strategies.objectives.contract import DocumentScores, Head, ObjectiveDefaults

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Reward(ObjectiveDefaults):
    """Score chosen answers above rejected ones: the result judges documents and writes none."""

    center_rewards_coefficient: float | None = option(
        None,
        "reward: weight of the squared sum of a pair's scores, which keeps them around 0 (0.01, arXiv 2312.09244)",
        ge=0,
    )

    name: ClassVar[str] = "reward"
    head: ClassVar[Head] = "score"
    reads_margins: ClassVar[bool] = True

    def score_losses(self, scores: DocumentScores) -> torch.Tensor:
        """-log sigmoid(chosen - rejected - margin) + coefficient (chosen + rejected)^2."""
        from torch.nn.functional import logsigmoid

        chosen, rejected = scores.pairs
        above = chosen - rejected if scores.margins_N is None else chosen - rejected - scores.margins_N
        loss = -logsigmoid(above)
        if self.center_rewards_coefficient:
            loss = loss + self.center_rewards_coefficient * (chosen + rejected) ** 2
        return loss
