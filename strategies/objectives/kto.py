"""Kahneman-Tversky optimisation (Ethayarajh et al., arXiv 2402.01306, eq. 7): single answers, marked good or bad."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from strategies.contract import option
from strategies.objectives.contract import AnswerScores, ObjectiveDefaults, RowKind

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Kto(ObjectiveDefaults):
    """Make good answers likelier and bad ones less likely, each beside its likelihood under the base; no pairs."""

    beta: float = option(0.1, "kto: how closely the model stays to the reference, higher is closer", gt=0)
    desirable_weight: float = option(1.0, "of the loss of good answers", ge=0)
    undesirable_weight: float = option(1.0, "of the loss of bad answers", ge=0)
    loss_type: Literal["kto", "apo_zero_unpaired"] = option(
        "kto", "kto: beside how far the model has moved; apo_zero_unpaired (arXiv 2408.06266): without"
    )

    name: ClassVar[str] = "kto"
    rows: ClassVar[RowKind] = "labelled"
    needs_reference: ClassVar[bool] = True

    @property
    def needs_divergence(self) -> bool:
        return self.loss_type == "kto"

    def losses(self, scores: AnswerScores) -> torch.Tensor:
        import torch

        assert scores.is_good_D is not None
        above_D = self.rewards(scores) - self.beta * scores.divergence
        good_D, bad_D = 1 - above_D.sigmoid(), above_D.sigmoid()  # 1 - sigmoid(-x) = sigmoid(x)
        return torch.where(scores.is_good_D, self.desirable_weight * good_D, self.undesirable_weight * bad_D)

    def rewards(self, scores: AnswerScores) -> torch.Tensor:
        return self.beta * scores.log_ratios_D
