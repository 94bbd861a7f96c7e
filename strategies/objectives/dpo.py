"""Direct preference optimisation (Rafailov et al., arXiv 2305.18290) and its variants of one pair, as TRL has them.

Left out of TRL's are those that are no sum over pairs: `aot` and `aot_unpaired` sort a batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from strategies.contract import option
from strategies.objectives.contract import AnswerScores, ObjectiveDefaults

if TYPE_CHECKING:
    import torch

LossOfPair = Literal[
    "sigmoid",
    "hinge",
    "robust",
    "exo_pair",
    "nca_pair",
    "bco_pair",
    "sppo_hard",
    "apo_zero",
    "apo_down",
    "discopop",
    "sigmoid_norm",
]


@dataclass(frozen=True)
class Dpo(ObjectiveDefaults):
    """Make chosen answers likelier than rejected ones, each beside its likelihood under the base: no second model."""

    beta: float = option(0.1, "dpo: how closely the model stays to the reference, higher is closer", gt=0)
    loss_type: LossOfPair = option("sigmoid", "loss of a pair, by TRL's names; sigmoid = DPO's own")
    label_smoothing: float = option(
        0.0, "robust: how likely a label is the wrong way round; exo_pair: its epsilon, 0.001 say", ge=0, lt=0.5
    )
    discopop_tau: float = option(0.05, "discopop: the temperature of its blend", gt=0)

    name: ClassVar[str] = "dpo"
    needs_reference: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.loss_type == "exo_pair" and not self.label_smoothing:
            raise ValueError("loss_type: exo_pair divides by label_smoothing, which is 0: set it to 0.001")
        if self.label_smoothing and self.loss_type not in ("robust", "exo_pair"):
            raise ValueError(f"label_smoothing is of loss_type robust and exo_pair, not of {self.loss_type}: remove it")

    def losses(self, scores: AnswerScores) -> torch.Tensor:
        return _LOSSES[self.loss_type](self, scores)

    def rewards(self, scores: AnswerScores) -> torch.Tensor:
        return self.beta * scores.log_ratios_D

    def scaled(self, scores: AnswerScores) -> tuple[torch.Tensor, torch.Tensor]:
        """Rewards of the chosen and of the rejected answers (N,)."""
        return scores.pairs(self.rewards(scores))


def _sigmoid(options: Dpo, scores: AnswerScores) -> torch.Tensor:
    from torch.nn.functional import logsigmoid

    chosen, rejected = options.scaled(scores)
    return -logsigmoid(chosen - rejected)


def _hinge(options: Dpo, scores: AnswerScores) -> torch.Tensor:
    chosen, rejected = options.scaled(scores)
    return (1 - (chosen - rejected)).relu()


def _robust(options: Dpo, scores: AnswerScores) -> torch.Tensor:
    """Labels that are wrong with a known chance (Chowdhury et al., arXiv 2403.00409)."""
    from torch.nn.functional import logsigmoid

    (chosen, rejected), wrong = options.scaled(scores), options.label_smoothing
    right_way, other_way = logsigmoid(chosen - rejected), logsigmoid(rejected - chosen)
    return (wrong * other_way - (1 - wrong) * right_way) / (1 - 2 * wrong)


def _exo_pair(options: Dpo, scores: AnswerScores) -> torch.Tensor:
    """Reverse Kullback-Leibler divergence from smoothed labels (Ji et al., arXiv 2402.00856, eq. 16)."""
    from torch.nn.functional import logsigmoid

    (chosen, rejected), wrong = options.scaled(scores), options.label_smoothing
    delta = chosen - rejected
    first = delta.sigmoid() * (logsigmoid(delta) - math.log1p(-wrong))
    return first + (-delta).sigmoid() * (logsigmoid(-delta) - math.log(wrong))


def _nca_pair(options: Dpo, scores: AnswerScores) -> torch.Tensor:
    """Noise-contrastive alignment (Chen et al., arXiv 2402.05369)."""
    from torch.nn.functional import logsigmoid

    chosen, rejected = options.scaled(scores)
    return -logsigmoid(chosen) - 0.5 * (logsigmoid(-chosen) + logsigmoid(-rejected))


def _bco_pair(options: Dpo, scores: AnswerScores) -> torch.Tensor:
    """Binary classification of each answer (Jung et al., arXiv 2404.04656)."""
    from torch.nn.functional import logsigmoid

    chosen, rejected = options.scaled(scores)
    return -logsigmoid(chosen) - logsigmoid(-rejected)


def _sppo_hard(options: Dpo, scores: AnswerScores) -> torch.Tensor:
    """Self-play with certain labels (Wu et al., arXiv 2405.00675, eq. 4.7)."""
    chosen, rejected = scores.pairs(scores.log_ratios_D)
    return (chosen - 0.5 / options.beta) ** 2 + (rejected + 0.5 / options.beta) ** 2


def _apo_zero(options: Dpo, scores: AnswerScores) -> torch.Tensor:
    """Chosen answers are better than the model's own (D'Oosterlinck et al., arXiv 2408.06266, eq. 7)."""
    chosen, rejected = options.scaled(scores)
    return 1 - chosen.sigmoid() + rejected.sigmoid()


def _apo_down(options: Dpo, scores: AnswerScores) -> torch.Tensor:
    """Chosen answers are worse than the model's own (arXiv 2408.06266, eq. 8)."""
    chosen, rejected = options.scaled(scores)
    return chosen.sigmoid() + 1 - (chosen - rejected).sigmoid()


def _discopop(options: Dpo, scores: AnswerScores) -> torch.Tensor:
    """A loss that a language model proposed (Lu et al., arXiv 2406.08414, eq. 5)."""
    from torch.nn.functional import logsigmoid

    chosen, rejected = options.scaled(scores)
    delta = chosen - rejected
    blend = (delta / options.discopop_tau).sigmoid()
    return -logsigmoid(delta) * (1 - blend) + (-delta).exp() * blend


def _sigmoid_norm(options: Dpo, scores: AnswerScores) -> torch.Tensor:
    """DPO's loss of ratios a token."""
    from torch.nn.functional import logsigmoid

    chosen, rejected = scores.pairs(scores.log_ratios_D / scores.tokens_D)
    return -logsigmoid(options.beta * (chosen - rejected))


_LOSSES: dict[LossOfPair, Callable[[Dpo, AnswerScores], torch.Tensor]] = {
    "sigmoid": _sigmoid,
    "hinge": _hinge,
    "robust": _robust,
    "exo_pair": _exo_pair,
    "nca_pair": _nca_pair,
    "bco_pair": _bco_pair,
    "sppo_hard": _sppo_hard,
    "apo_zero": _apo_zero,
    "apo_down": _apo_down,
    "discopop": _discopop,
    "sigmoid_norm": _sigmoid_norm,
}
