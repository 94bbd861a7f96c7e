"""The loss that keeps all experts in use, and how evenly tokens are spread over them.

    L = c / layers * sum_layers E sum_e f_e P_e        f_e: tokens of a document that chose e, P_e: its mean probability

as MixLoRA's code has it (f sums to K, so that even use costs c K), but of each document by itself, and over documents
as the tokens' loss is: each weighs as many supervised tokens as it has.  So rows, packing, micro-batches and workers
change nothing; the published sum over a micro-batch would differ with each division.  DeepSeek-V3 balances single
sequences as well (arXiv 2412.19437, section 2.1.2).

Legend: N tokens of a micro-batch, D documents, E experts, K chosen by a token, L layers.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class DocumentRows:
    """Whose each token of a micro-batch is."""

    member_DN: torch.Tensor  # 1 where the token is the document's; padding is nobody's; fp32
    weights_D: torch.Tensor  # what the document counts in the loss, summing to 1; fp32
    num_counted: int

    @classmethod
    def of(cls, batch: Any) -> DocumentRows:
        """Of a batch of supervised_logits.py, padded or packed.  Raises ValueError for a tree."""
        ids_BT, lengths = batch.input_ids_BT, batch.document_lengths
        if batch.shared is not None:
            raise ValueError("a token that several documents share has no document of its own")
        places = torch.arange(ids_BT.numel(), device=ids_BT.device)
        if lengths is None:
            rows, mask_BT = ids_BT.shape[0], batch.attention_mask_BT
            of_row = places // ids_BT.shape[1] == torch.arange(rows, device=ids_BT.device)[:, None]
            member_DN = of_row.float() * mask_BT.flatten().float()
        else:
            ends = torch.tensor(lengths).cumsum(0)
            starts = (ends - torch.tensor(lengths)).to(ids_BT.device)[:, None]
            member_DN = ((places >= starts) & (places < ends.to(ids_BT.device)[:, None])).float()
        if batch.documents is not None:  # the objective's loss is a mean over samples, all of as many documents
            counts_D = torch.ones(len(member_DN), device=ids_BT.device)
            return cls(member_DN, counts_D / len(counts_D), len(batch.sample_ids))
        counts_D = member_DN @ batch.supervised_BT.flatten().float()  # a document's first token is never supervised
        return cls(member_DN, counts_D / counts_D.sum().clamp(min=1), batch.targets_S.numel())


class LoadBalance:
    """The `ExtraLoss` of experts: their balance in the batch that passes the model, and what it was in a step."""

    def __init__(self, coefficient: float, num_experts: int, num_layers: int) -> None:
        self.coefficient, self.num_experts, self.num_layers = coefficient, num_experts, num_layers
        self._rows: DocumentRows | None = None  # of the batch that passes the model now
        self._passed: DocumentRows | None = None  # of the one that has
        self._routed: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # by layer: probabilities N x E, choices N x K
        self._counted = 0.0  # of all batches since `take`, and the loss times that
        self._loss: torch.Tensor | None = None
        self._uses_LE: dict[int, torch.Tensor] = {}

    @property
    def num_totals(self) -> int:
        return 2 + self.num_layers * self.num_experts

    @contextlib.contextmanager
    def over(self, batch: Any) -> Iterator[None]:
        """Inside the block the model computes this batch; what is computed again for gradients counts once."""
        self._rows, self._routed = DocumentRows.of(batch), {}
        try:
            yield
        finally:
            self._passed, self._rows = self._rows, None

    def note(self, layer: int, probabilities_NE: torch.Tensor, chosen_NK: torch.Tensor) -> None:
        """What a layer's router decided of the batch.  Raises RuntimeError where its gradients are lost.

        Nothing is computed of it here: a layer that is computed again would have to compute that again as well.
        """
        if self._rows is None:
            return
        if not torch.is_grad_enabled():
            raise RuntimeError(
                "the layers are computed without gradients first (reentrant checkpoints), where the balance of experts"
                " has none: set train.gradient_checkpointing: false"
            )
        self._routed[layer] = probabilities_NE, chosen_NK

    def __call__(self) -> torch.Tensor:
        """Of the batch that has passed: a mean over what its loss is a mean over, with gradients."""
        rows = self._passed
        if rows is None or len(self._routed) != self.num_layers:
            raise RuntimeError(f"{len(self._routed)} of {self.num_layers} layers have routed this batch")
        total = torch.zeros((), device=rows.member_DN.device)
        for layer in sorted(self._routed):
            total = total + (rows.weights_D * self._of_documents(layer, rows, *self._routed.pop(layer))).sum()
        loss = total * (self.coefficient / self.num_layers)
        self._counted += rows.num_counted
        own = rows.num_counted * loss.detach()
        self._loss = own if self._loss is None else self._loss + own
        return loss

    def _of_documents(
        self, layer: int, rows: DocumentRows, probabilities_NE: torch.Tensor, chosen_NK: torch.Tensor
    ) -> torch.Tensor:
        """E sum_e f_e P_e of each document (D,), and the layer's experts counted."""
        chosen_NE = torch.zeros_like(probabilities_NE).scatter_(1, chosen_NK, 1.0)
        tokens_D1 = rows.member_DN.sum(dim=1, keepdim=True).clamp(min=1)
        used_DE = rows.member_DN @ chosen_NE
        used_E = used_DE.sum(dim=0).double()
        self._uses_LE[layer] = self._uses_LE[layer] + used_E if layer in self._uses_LE else used_E
        probability_DE = rows.member_DN @ probabilities_NE / tokens_D1
        return self.num_experts * (used_DE / tokens_D1 * probability_DE).sum(dim=1)

    def take(self) -> list[float]:
        """Totals since it was last asked: what was counted, the loss times that, and each expert's tokens by layer."""
        uses_LE = [self._uses_LE.get(layer) for layer in range(self.num_layers)]
        nothing = [0.0] * self.num_experts
        uses = [number for one in uses_LE for number in (nothing if one is None else one.tolist())]
        totals = [float(self._counted), 0.0 if self._loss is None else float(self._loss), *uses]
        self._counted, self._loss, self._uses_LE = 0.0, None, {}
        return totals

    def metrics_of(self, totals: Sequence[float]) -> dict[str, float]:
        """The loss, and of all layers the mean entropy of their use over log E (1 = even) and the largest share."""
        counted, loss, *uses = totals
        layers = [uses[start : start + self.num_experts] for start in range(0, len(uses), self.num_experts)]
        shares = [[use / sum(layer) for use in layer] for layer in layers if sum(layer)]
        if not counted or not shares:
            return {}
        entropy = [-sum(part * math.log(part, self.num_experts) for part in layer if part) for layer in shares]
        return {
            "experts/aux_loss": loss / counted,
            "experts/evenness": sum(entropy) / len(entropy),
            "experts/largest_share": max(max(layer) for layer in shares),
        }
