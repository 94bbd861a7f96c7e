"""The loss of an objective over whole documents, computed from the losses of their tokens.

Legend: S supervised tokens, D documents, N samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from strategies.objectives.contract import AnswerScores, DocumentObjective
from strategies.step.supervised_logits import Batch, token_losses
from strategies.workload import LossType


class DocumentLoss:
    """An objective's loss of micro-batches, and what they were worth to it since it was last asked."""

    num_totals = 4  # chosen and rejected rewards, pairs that are the right way round, all pairs

    def __init__(self, objective: DocumentObjective) -> None:
        self.objective = objective
        self._tokens_a_sample = 1.0
        self._totals: torch.Tensor | None = None

    @property
    def needs_reference(self) -> bool:
        return self.objective.needs_reference

    def begin(self, num_samples: int, num_tokens: int) -> None:
        """A step begins, or an evaluation: its samples, and the chosen documents' tokens that are learnt in them."""
        self._tokens_a_sample = max(1, num_tokens) / max(1, num_samples)
        self._totals = None

    def loss_sum(self, model: Any, batch: Batch, loss_type: LossType) -> torch.Tensor:
        """The batch's part of the loss, times the samples of the step or evaluation that has begun; fp32.

        The reference is computed first, without gradients: its activations are gone before the model's are kept.
        """
        reference_D = self._reference(model, batch, loss_type) if self.objective.needs_reference else None
        assert batch.documents
        losses_S = token_losses(model, batch, loss_type)
        scores = AnswerScores(_answer_logps(batch, losses_S), batch.documents.tokens_D, reference_D)
        loss = self.objective.losses(scores).sum()
        if weight := self.objective.nll_weight:
            is_chosen_S = batch.documents.document_S % 2 == 0
            loss = loss + weight / self._tokens_a_sample * (losses_S * is_chosen_S).sum()
        with torch.no_grad():
            self._add(scores)
        return loss.float()

    def take(self) -> list[float]:
        """Totals since it began or this was last asked, to be added up over workers."""
        totals, self._totals = self._totals, None
        return [0.0] * self.num_totals if totals is None else totals.tolist()

    def metrics_of(self, totals: Sequence[float]) -> dict[str, float]:
        """TRL's metrics by the totals of all workers; none where there was no pair."""
        chosen, rejected, num_right, count = totals
        if not count:
            return {}
        return {
            "rewards/chosen": chosen / count,
            "rewards/rejected": rejected / count,
            "rewards/margins": (chosen - rejected) / count,
            "rewards/accuracies": num_right / count,
        }

    @torch.no_grad()
    def answer_logps(self, model: Any, batch: Batch, loss_type: LossType) -> torch.Tensor:
        """log p of each document's answer (D,) by the model as it is now, without dropout."""
        was_training = model.training
        model.eval()
        try:
            return _answer_logps(batch, token_losses(model, batch, loss_type))
        finally:
            model.train(was_training)

    def _reference(self, model: Any, batch: Batch, loss_type: LossType) -> torch.Tensor:
        assert batch.documents
        if batch.documents.reference_D is not None:
            return batch.documents.reference_D
        with model.disable_adapter():
            return self.answer_logps(model, batch, loss_type)

    def _add(self, scores: AnswerScores) -> None:
        chosen, rejected = scores.pairs(self.objective.rewards(scores))
        found = (chosen.sum(), rejected.sum(), (chosen > rejected).sum(), chosen.new_tensor(len(chosen)))
        new = torch.stack([one.to(chosen) for one in found])
        self._totals = new if self._totals is None else self._totals + new


def _answer_logps(batch: Batch, losses_S: torch.Tensor) -> torch.Tensor:
    """In fp64: a loss is of small differences between sums of hundreds of nats."""
    documents = batch.documents
    assert documents
    losses_S = losses_S.double()
    if documents.is_answer_S is not None:
        losses_S = losses_S * documents.is_answer_S
    return -losses_S.new_zeros(len(documents.tokens_D)).index_add(0, documents.document_S, losses_S)
