"""The loss of an objective over whole documents, computed from the losses of their tokens.

Legend: S supervised tokens, D documents, N samples.
"""

from __future__ import annotations

from typing import Any

import torch

from strategies.objectives.contract import AnswerScores, DocumentObjective
from strategies.objectives.totals import RewardTotals
from strategies.step.supervised_logits import Batch, token_losses
from strategies.workload import LossType


class DocumentLoss(RewardTotals):
    """An objective's loss of micro-batches, and what they were worth to it since it was last asked."""

    def __init__(self, objective: DocumentObjective) -> None:
        super().__init__(objective.rows)
        self.objective = objective
        self._tokens_a_sample, self._divergence = 1.0, 0.0

    @property
    def needs_reference(self) -> bool:
        return self.objective.needs_reference

    @property
    def needs_divergence(self) -> bool:
        return self.objective.needs_divergence

    def begin(self, num_samples: int, num_tokens: int, divergence: float = 0.0) -> None:
        """A step begins, or an evaluation: its samples, and the chosen documents' tokens that are learnt in them."""
        self._tokens_a_sample, self._divergence = max(1, num_tokens) / max(1, num_samples), max(0.0, divergence)
        self.clear()

    def loss_sum(self, model: Any, batch: Batch, loss_type: LossType) -> torch.Tensor:
        """The batch's part of the loss, times the samples of the step or evaluation that has begun; fp32.

        The reference is computed first, without gradients: its activations are gone before the model's are kept.
        """
        reference_D = self.reference_logps(model, batch, loss_type) if self.objective.needs_reference else None
        documents, losses_S = batch.documents, token_losses(model, batch, loss_type)
        assert documents
        logps_D = _answer_logps(batch, losses_S)
        scores = AnswerScores(logps_D, documents.tokens_D, reference_D, documents.is_good_D, self._divergence)
        loss = self.objective.losses(scores).sum()
        if weight := self.objective.nll_weight:
            is_chosen_S = documents.document_S % 2 == 0
            loss = loss + weight / self._tokens_a_sample * (losses_S * is_chosen_S).sum()
        with torch.no_grad():
            self.count(self.objective.rewards(scores), scores.is_good_D)
        return loss.float()

    @torch.no_grad()
    def answer_logps(self, model: Any, batch: Batch, loss_type: LossType) -> torch.Tensor:
        """log p of each document's answer (D,) by the model as it is now, without dropout."""
        was_training = model.training
        model.eval()
        try:
            return _answer_logps(batch, token_losses(model, batch, loss_type))
        finally:
            model.train(was_training)

    def reference_logps(self, model: Any, batch: Batch, loss_type: LossType) -> torch.Tensor:
        """`answer_logps` of the reference: as they are known, or with the adapter off."""
        assert batch.documents
        if batch.documents.reference_D is not None:
            return batch.documents.reference_D
        with model.disable_adapter():
            return self.answer_logps(model, batch, loss_type)


def _answer_logps(batch: Batch, losses_S: torch.Tensor) -> torch.Tensor:
    """In fp64: a loss is of small differences between sums of hundreds of nats."""
    documents = batch.documents
    assert documents
    losses_S = losses_S.double()
    if documents.is_answer_S is not None:
        losses_S = losses_S * documents.is_answer_S
    return -losses_S.new_zeros(len(documents.tokens_D)).index_add(0, documents.document_S, losses_S)
