"""The loss of an objective over the scores of whole documents: no logits, one number a document.

A document's score is read where transformers' models for sequence classification read it: at its last token that is
not the padding token.

Legend: B rows, T tokens, H hidden size, D documents.
"""

from __future__ import annotations

from typing import Any

import torch

from strategies.model.heads import hidden_states, inner_model, scores
from strategies.objectives.contract import DocumentScores, ScoreObjective
from strategies.objectives.totals import RewardTotals
from strategies.step.supervised_logits import Batch, arguments_of
from strategies.workload import LossType


class ScoreLoss(RewardTotals):
    """The loss of micro-batches of an objective over scores, and the scores' totals since it was last asked."""

    needs_reference = False
    needs_divergence = False

    def __init__(self, objective: ScoreObjective) -> None:
        super().__init__(objective.rows)
        self.objective = objective

    def begin(self, num_samples: int, num_tokens: int, divergence: float = 0.0) -> None:
        """A step begins, or an evaluation."""
        self.clear()

    def loss_sum(self, model: Any, batch: Batch, loss_type: LossType) -> torch.Tensor:
        """The summed loss of the batch's samples, in fp32."""
        assert batch.documents
        scores_D = document_scores(model, batch)
        loss = self.objective.score_losses(DocumentScores(scores_D, batch.documents.margins_N)).sum()
        with torch.no_grad():
            self.count(scores_D)  # the scores are the rewards
        return loss.float()

    def answer_logps(self, model: Any, batch: Batch, loss_type: LossType) -> torch.Tensor:
        raise TypeError("a model with a score has no likelihood of an answer")

    reference_logps = answer_logps


def document_scores(model: Any, batch: Batch) -> torch.Tensor:
    """The score of each document (D,), in fp64: a loss is of small differences between scores."""
    hidden_BTH = hidden_states(model, batch.input_ids_BT, **arguments_of(batch))
    padding = inner_model(model).config.get_text_config().pad_token_id
    return scores(model, hidden_BTH.flatten(0, 1)[last_places(batch, padding)]).double()


def last_places(batch: Batch, padding: int | None) -> torch.Tensor:
    """Where among B x T the score of each document is read (D,): its last token that is not `padding`.

    Of a document of padding alone the first token, as transformers has it.  No step waits for a device: shapes follow
    from the documents' number.
    """
    ids_BT, device = batch.input_ids_BT, batch.input_ids_BT.device
    counts_BT = torch.ones_like(ids_BT, dtype=torch.bool) if padding is None else ids_BT != padding
    if batch.shared is not None:
        found = [counts_BT[0, places_L.to(device)] for places_L in batch.shared.places]
        ends = (_last(counts_L[None])[0] for counts_L in found)
        return torch.stack([places.to(device)[end] for places, end in zip(batch.shared.places, ends, strict=True)])
    if batch.borders_D is None:
        assert batch.attention_mask_BT is not None
        starts_B = torch.arange(len(ids_BT), device=device) * ids_BT.shape[1]
        return starts_B + _last(counts_BT & batch.attention_mask_BT.bool())
    places_T, borders = torch.arange(ids_BT.shape[1], device=device), batch.borders_D.long()
    document_T = torch.searchsorted(borders[1:], places_T, right=True)
    firsts_D = borders[:-1].clone()
    return firsts_D.scatter_reduce(0, document_T, torch.where(counts_BT[0], places_T, 0), "amax")


def _last(counts_BT: torch.Tensor) -> torch.Tensor:
    """The last place that counts in each row (B,), 0 where none does."""
    places_T = torch.arange(counts_BT.shape[1], device=counts_BT.device)
    return torch.where(counts_BT, places_T, 0).amax(dim=1)
