"""The loss at supervised positions only.

The output matrix is a fifth of a small model's weights and its fp32 logits are the largest tensor of a step, yet prompt
tokens need none of it: hidden states are selected before the output matrix is applied.

Legend: B rows, T tokens, S supervised tokens, V vocabulary.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from strategies.techniques.attention import packed_arguments


@dataclass
class Batch:
    """Token ids with, for each, whether predicting it is trained.

    One row when `document_lengths` is set (documents end to end, no padding), else B rows padded on the right.
    """

    input_ids_BT: torch.Tensor
    supervised_BT: torch.Tensor  # bool; a document's first token is never supervised
    document_lengths: tuple[int, ...] | None
    attention_mask_BT: torch.Tensor | None
    sample_ids: tuple[int, ...]

    def to(self, device: torch.device) -> Batch:
        mask = None if self.attention_mask_BT is None else self.attention_mask_BT.to(device)
        ids, supervised = self.input_ids_BT.to(device), self.supervised_BT.to(device)
        return Batch(ids, supervised, self.document_lengths, mask, self.sample_ids)


def loss_sum(model: Any, batch: Batch) -> torch.Tensor:
    """Sum over supervised tokens of -log p(token | the document so far), a scalar in fp32."""
    logits_SV, targets_S = supervised_logits(model, batch)
    return F.cross_entropy(logits_SV.float(), targets_S, reduction="sum")


def supervised_logits(model: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (S, V) that predict the supervised tokens, and those tokens (S,)."""
    predicted_BT = batch.supervised_BT[:, 1:]  # position t predicts token t + 1
    targets_S = batch.input_ids_BT[:, 1:][predicted_BT]
    arguments: dict[str, Any] = {"use_cache": False}
    if batch.document_lengths is not None:
        arguments |= packed_arguments(batch.document_lengths, batch.input_ids_BT.device)
    else:
        arguments |= {"attention_mask": batch.attention_mask_BT}
    columns = predicted_BT.any(dim=0).nonzero()[:, 0]
    if _can_select(model):
        logits_BCV = model(batch.input_ids_BT, logits_to_keep=columns, **arguments).logits
    else:
        logits_BCV = model(batch.input_ids_BT, **arguments).logits[:, columns]
    if predicted_BT.shape[0] == 1:
        return logits_BCV[0], targets_S
    return logits_BCV[predicted_BT[:, columns]], targets_S


def _can_select(model: Any) -> bool:
    """Whether the model computes logits only where asked (transformers' `logits_to_keep`)."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "logits_to_keep" in inspect.signature(inner.forward).parameters
