"""SimPO (Meng et al., arXiv 2405.14734) and, with a likelihood term, CPO-SimPO (Xu et al., arXiv 2401.08417)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from strategies.contract import option
from strategies.objectives.contract import AnswerScores, ObjectiveDefaults

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class SimPo(ObjectiveDefaults):
    """Make chosen answers likelier a token than rejected ones by a margin; no reference."""

    beta: float = option(2.0, "simpo: scale of the mean log-probabilities, by default 2", gt=0)
    simpo_gamma: float = option(1.0, "margin between chosen and rejected, in scaled nats a token", ge=0)
    label_smoothing: float = option(0.0, "how likely a label is the wrong way round", ge=0, lt=0.5)
    cpo_alpha: float = option(0.0, "weight of the chosen answers' mean loss of a token; 0 = SimPO's own", ge=0)

    name: ClassVar[str] = "simpo"

    @property
    def nll_weight(self) -> float:
        return self.cpo_alpha

    def losses(self, scores: AnswerScores) -> torch.Tensor:
        from torch.nn.functional import logsigmoid

        chosen, rejected = scores.pairs(scores.mean_logps_D)
        delta, wrong = self.beta * (chosen - rejected) - self.simpo_gamma, self.label_smoothing
        return -(1 - wrong) * logsigmoid(delta) - wrong * logsigmoid(-delta)

    def rewards(self, scores: AnswerScores) -> torch.Tensor:
        return self.beta * scores.mean_logps_D
