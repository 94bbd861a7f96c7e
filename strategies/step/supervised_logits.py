"""The loss at supervised positions only.

The output matrix is a fifth of a small model's weights and its fp32 logits are the largest tensor of a step, yet prompt
tokens need none of it: hidden states are selected before the output matrix is applied.

Legend: B rows, T tokens, C columns, S supervised tokens, P of them, H hidden size, V vocabulary.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from strategies.model.heads import inner_model
from strategies.reuse.lower_layers import DocumentParts
from strategies.reuse.row import SharedRow
from strategies.step.document_attention import borders, packed_arguments, tree_arguments, tree_positions
from strategies.workload import LossType

CHUNK = 256  # positions


@dataclass(frozen=True)
class DocumentTargets:
    """Which supervised tokens are whose, under an objective over whole documents.

    Legend: D documents, in the order of their samples.
    """

    document_S: torch.Tensor  # of each supervised token
    is_answer_S: torch.Tensor | None  # supervised tokens of answers; None = all of them
    tokens_D: torch.Tensor  # of the answers
    reference_D: torch.Tensor | None = None  # log-probabilities of the answers under the reference, where known
    is_good_D: torch.Tensor | None = None  # of labelled rows
    margins_N: torch.Tensor | None = None  # of pairs that say how much better the chosen answer is

    def to(self, move: Callable[[torch.Tensor], torch.Tensor]) -> DocumentTargets:
        """The same, each tensor moved."""
        return replace(self, **{key: move(one) for key, one in vars(self).items() if one is not None})


@dataclass
class Batch:
    """Token ids with, for each, whether predicting it is trained.

    One row when `document_lengths` is set (documents end to end, no padding), else B rows padded on the right.  The row
    of a tree (`shared`) holds what documents share once, and `document_lengths` are those of its nodes.  Where the
    losses are is worked out when the batch is made, on the CPU: the step itself then never waits for a GPU to say how
    many there are, and its shapes are known in advance.
    """

    input_ids_BT: torch.Tensor
    supervised_BT: torch.Tensor  # bool; a document's first token is never supervised
    document_lengths: tuple[int, ...] | None
    attention_mask_BT: torch.Tensor | None
    sample_ids: tuple[int, ...]
    shared: SharedRow | None = None
    documents: DocumentTargets | None = None  # under an objective over whole documents
    targets_S: torch.Tensor = field(init=False)  # the supervised tokens
    columns_C: torch.Tensor = field(init=False)  # positions that predict one of them in any row
    picked_S: torch.Tensor | None = field(init=False)  # their places among B x C; None = all, in order
    positions_BT: torch.Tensor | None = field(init=False, default=None)  # in the document, of a packed row
    borders_D: torch.Tensor | None = field(init=False, default=None)  # where its documents begin, and the end; int32
    num_filler: int = field(init=False, default=0)  # tokens behind the documents that are none of theirs

    @classmethod
    def of_tree(cls, row: SharedRow, sample_ids: tuple[int, ...]) -> Batch:
        """The batch of a row in which documents share their beginnings."""
        return cls(row.input_ids_1T, row.supervised_1T, row.lengths, None, sample_ids, row)

    def __post_init__(self) -> None:
        if self.shared is not None:
            self.targets_S = self.shared.targets_S
            self.columns_C, picked_S = self.shared.columns_S.unique(return_inverse=True)
            self.picked_S = picked_S if len(self.columns_C) < len(picked_S) else None
            self.positions_BT = tree_positions(self.shared.lengths, self.shared.parents)
            return
        predicted_BT = self.supervised_BT[:, 1:]  # position t predicts token t + 1
        self.targets_S = self.input_ids_BT[:, 1:][predicted_BT]
        self.columns_C = predicted_BT.any(dim=0).nonzero()[:, 0]
        one_row = predicted_BT.shape[0] == 1
        self.picked_S = None if one_row else predicted_BT[:, self.columns_C].flatten().nonzero()[:, 0]
        if self.document_lengths is not None:
            self.positions_BT, self.borders_D = borders(self.document_lengths)

    @property
    def parts(self) -> DocumentParts | None:
        """Where the tokens of its documents stand in its row; None of padded rows."""
        if self.document_lengths is None:
            return None
        return DocumentParts(self.document_lengths, self.shared.tree if self.shared else None)

    def filled(self, multiple: int) -> Batch:
        """The packed row with tokens of no sample behind it, up to a multiple of so many; they see and teach nothing.

        Kernels that work in tiles are slow on a rest, and oneDNN prepares a product for each number of rows.
        """
        missing = -self.input_ids_BT.shape[1] % multiple
        if missing == 0 or self.positions_BT is None:
            return self
        row = copy.copy(self)
        row.num_filler = missing
        row.input_ids_BT = F.pad(self.input_ids_BT, (0, missing))
        own = torch.arange(missing, device=self.positions_BT.device)[None]
        row.positions_BT = torch.cat([self.positions_BT, own], 1)
        if self.borders_D is not None:
            row.borders_D = torch.cat([self.borders_D, self.borders_D[-1:] + missing])
        return row

    def to(self, device: torch.device) -> Batch:
        """The same on `device`; to a GPU it travels from pinned memory while the one before is computed."""
        moved, is_sent = copy.copy(self), device.type == "cuda"

        def move(value: torch.Tensor) -> torch.Tensor:
            held = value.pin_memory() if is_sent and value.device.type == "cpu" else value
            return held.to(device, non_blocking=is_sent)

        for name, value in vars(self).items():
            if isinstance(value, torch.Tensor):
                setattr(moved, name, move(value))
        moved.documents = self.documents and self.documents.to(move)
        return moved


def loss_sum(model: Any, batch: Batch, loss_type: LossType = "nll", smoothing: float = 0.0) -> torch.Tensor:
    """Sum over supervised tokens of -log p(token | the document so far), a scalar in fp32.

    `smoothing` is the part of each label that is spread over the vocabulary, as transformers' LabelSmoother does it:
    (1 - s) * -log p(token) + s * the mean of -log p over all tokens.

    `chunked_nll` computes the same without ever holding all logits: a few positions at a time, again in the backward
    pass (as TRL's loss of that name; Wijmans et al., arXiv 2411.09009, fuse it further).
    """
    return loss_sums(model, batch, [batch.targets_S.numel()], loss_type, smoothing)[0]


def loss_sums(
    model: Any, batch: Batch, sizes: Sequence[int], loss_type: LossType = "nll", smoothing: float = 0.0
) -> list[torch.Tensor]:
    """`loss_sum` of consecutive parts of the supervised tokens, `sizes` of each, by one pass of the model."""
    if loss_type == "chunked_nll":
        return _chunked(model, batch, sizes, smoothing)
    logits_SV = supervised_logits(model, batch)
    parts = [logits_SV] if len(sizes) == 1 else logits_SV.split(list(sizes))  # a split of one would copy the gradient
    targets = batch.targets_S.split(list(sizes))
    return [
        F.cross_entropy(own.float(), wanted, reduction="sum", label_smoothing=smoothing)
        for own, wanted in zip(parts, targets, strict=True)
    ]


def supervised_logits(model: Any, batch: Batch) -> torch.Tensor:
    """Logits (S, V) that predict `batch.targets_S`."""
    arguments = arguments_of(batch)
    if _can_select(model):
        logits_BCV = model(batch.input_ids_BT, logits_to_keep=batch.columns_C, **arguments).logits
    else:
        logits_BCV = model(batch.input_ids_BT, **arguments).logits[:, batch.columns_C]
    if batch.picked_S is None:
        return logits_BCV[0]
    return logits_BCV.flatten(0, 1)[batch.picked_S]


def arguments_of(batch: Batch) -> dict[str, Any]:
    """What a model needs beside token ids: borders and positions of documents, or the mask of padding."""
    if batch.document_lengths is None:
        return {"use_cache": False, "attention_mask": batch.attention_mask_BT}
    filler = (batch.num_filler,) if batch.num_filler else ()  # one more document
    if (row := batch.shared) is not None:
        nodes = (*row.lengths, *filler), (*row.parents, *[-1] * len(filler))
        return {"use_cache": False, **tree_arguments(*nodes, batch.input_ids_BT.device, batch.positions_BT)}
    assert batch.positions_BT is not None and batch.borders_D is not None
    at, lengths = (batch.positions_BT, batch.borders_D), (*batch.document_lengths, *filler)
    return {"use_cache": False, **packed_arguments(lengths, batch.input_ids_BT.device, at)}


def token_losses(model: Any, batch: Batch, loss_type: LossType = "nll", smoothing: float = 0.0) -> torch.Tensor:
    """-log p(token | the document so far) of each supervised token (S,) in fp32."""
    if loss_type != "chunked_nll":
        logits_SV = supervised_logits(model, batch).float()
        return F.cross_entropy(logits_SV, batch.targets_S, reduction="none", label_smoothing=smoothing)
    head, hidden_SH = _hidden_states(model, batch)

    def part(hidden_PH: torch.Tensor, targets_P: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(head(hidden_PH).float(), targets_P, reduction="none", label_smoothing=smoothing)

    parts = zip(hidden_SH.split(CHUNK), batch.targets_S.split(CHUNK), strict=True)
    return torch.cat([checkpoint(part, *one, use_reentrant=False) for one in parts])


def places_of_samples(batch: Batch) -> torch.Tensor:
    """Of each supervised token (S,) the place of its sample in the batch; rows without shared beginnings."""
    predicted_BT = batch.supervised_BT[:, 1:]
    if batch.borders_D is None:
        return predicted_BT.nonzero()[:, 0]
    return torch.bucketize(predicted_BT[0].nonzero()[:, 0] + 1, batch.borders_D[1:].long(), right=True)


def _hidden_states(model: Any, batch: Batch) -> tuple[Any, torch.Tensor]:
    """The output matrix, and what the model would multiply with it at the positions that predict (S, H)."""
    head = inner_model(model).get_output_embeddings()
    streamed = getattr(head, "streamed", None)  # a `streamed_output.OutputMatrix`
    head.forward = lambda hidden: hidden
    try:
        return head, supervised_logits(model, batch)
    finally:
        del head.forward
        if streamed is not None:
            head.forward = streamed.multiply


def _chunked(model: Any, batch: Batch, sizes: Sequence[int], smoothing: float) -> list[torch.Tensor]:
    """The loss with the output matrix applied to CHUNK positions at a time, and again for the gradient."""
    head, hidden_SH = _hidden_states(model, batch)
    streamed = getattr(head, "streamed", None)
    if streamed is not None:  # all positions at each visit of a slice: chunk by chunk it would be sent again and again
        parts = zip(hidden_SH.split(list(sizes)), batch.targets_S.split(list(sizes)), strict=True)
        return [streamed.loss_sum(own_SH, targets_S) for own_SH, targets_S in parts]

    def part(hidden_PH: torch.Tensor, targets_P: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(head(hidden_PH).float(), targets_P, reduction="sum", label_smoothing=smoothing)

    totals = []
    for own_SH, targets_S in zip(hidden_SH.split(list(sizes)), batch.targets_S.split(list(sizes)), strict=True):
        total = hidden_SH.new_zeros((), dtype=torch.float32)
        for hidden_PH, targets_P in zip(own_SH.split(CHUNK), targets_S.split(CHUNK), strict=True):
            total = total + checkpoint(part, hidden_PH, targets_P, use_reentrant=False)
        totals.append(total)
    return totals


def can_chunk(model: Any) -> bool:
    """Whether the logits are the output matrix times the hidden states and nothing more (Gemma 2 caps them)."""
    config = inner_model(model).config
    plain = not any(getattr(config, key, None) for key in ("final_logit_softcapping", "logits_scaling", "logit_scale"))
    return plain and inner_model(model).get_output_embeddings() is not None


def _can_select(model: Any) -> bool:
    """Whether the model computes logits only where asked (transformers' `logits_to_keep`)."""
    return "logits_to_keep" in inspect.signature(inner_model(model).forward).parameters
