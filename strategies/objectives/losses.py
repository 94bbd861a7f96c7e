"""The loss of a micro-batch under an objective over whole documents, whichever it is."""

from __future__ import annotations

from strategies.objectives.contract import DocumentObjective, Objective, ScoreObjective
from strategies.objectives.documents import DocumentLoss
from strategies.objectives.scores import ScoreLoss
from strategies.train_setup import SampleLoss


def build_loss(objective: Objective) -> SampleLoss | None:
    """The loss of an objective over whole documents; None where supervised tokens are trained."""
    if isinstance(objective, ScoreObjective):
        return ScoreLoss(objective)
    return DocumentLoss(objective) if isinstance(objective, DocumentObjective) else None
