"""Samples -> the tensors of a micro-batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from orchestrator.data.dataset import Dataset
from strategies.reuse.row import lay_out
from strategies.step.supervised_logits import Batch, DocumentTargets


def collate(dataset: Dataset, sample_ids: Sequence[int], packing: bool, share_prefixes: bool = False) -> Batch:
    """Documents end to end in one row (`packing`), or one a row padded on the right with token 0, which is masked.

    `share_prefixes` lays what documents of a packed row begin with alike once.
    """
    samples = [document for index in sample_ids for document in dataset.documents_of(index)]
    ids = [torch.tensor(tokens, dtype=torch.long) for tokens, _ in samples]
    masks = [torch.tensor(mask, dtype=torch.bool) for _, mask in samples]
    batch = _lay_out(ids, masks, sample_ids, packing, share_prefixes)
    if dataset.documents is not None:
        batch.documents = _targets_of(dataset, sample_ids, batch)
    return batch


def collate_mismatched(dataset: Dataset, sample_ids: Sequence[int], packing: bool) -> Batch:
    """As `collate`, of labelled rows' questions with other rows' answers; their reference is the second one."""
    samples = [dataset.mismatched(index) for index in sample_ids]
    ids = [torch.tensor(tokens, dtype=torch.long) for tokens, _ in samples]
    masks = [torch.tensor(mask, dtype=torch.bool) for _, mask in samples]
    batch = _lay_out(ids, masks, sample_ids, packing, share_prefixes=False)
    counts_D = torch.tensor([int(mask.sum()) for mask in masks])
    known = dataset.references
    reference_D = None if known is None else torch.tensor(known[list(sample_ids), 1])
    batch.documents = DocumentTargets(
        torch.repeat_interleave(torch.arange(len(masks)), counts_D), None, counts_D, reference_D
    )
    return batch


def _lay_out(
    ids: Sequence[torch.Tensor],
    masks: Sequence[torch.Tensor],
    sample_ids: Sequence[int],
    packing: bool,
    share_prefixes: bool,
) -> Batch:
    lengths = tuple(len(tokens) for tokens in ids)
    if packing and share_prefixes:
        return Batch.of_tree(lay_out(ids, masks), tuple(sample_ids))
    if packing:
        return Batch(torch.cat(list(ids))[None], torch.cat(list(masks))[None], lengths, None, tuple(sample_ids))
    shape = (len(ids), max(lengths))
    input_ids_BT = torch.zeros(shape, dtype=torch.long)
    supervised_BT = torch.zeros(shape, dtype=torch.bool)
    attention_mask_BT = torch.zeros(shape, dtype=torch.long)
    for row, (tokens, mask) in enumerate(zip(ids, masks, strict=True)):
        input_ids_BT[row, : len(tokens)] = tokens
        supervised_BT[row, : len(tokens)] = mask
        attention_mask_BT[row, : len(tokens)] = 1
    return Batch(input_ids_BT, supervised_BT, None, attention_mask_BT, tuple(sample_ids))


def _targets_of(dataset: Dataset, sample_ids: Sequence[int], batch: Batch) -> DocumentTargets:
    """Which of a batch's targets, in their order, are whose."""
    assert dataset.documents
    chosen = list(sample_ids)
    counts_D = torch.tensor(dataset.documents.supervised[chosen], dtype=torch.long).flatten()
    answers_D = torch.tensor(dataset.documents.answers[chosen], dtype=torch.long).flatten()
    document_S = torch.repeat_interleave(torch.arange(len(counts_D)), counts_D)
    is_answer_S = None
    if not torch.equal(counts_D, answers_D):
        is_answer_S = torch.cat([torch.tensor(dataset.answers(index)) for index in chosen])
    if batch.shared is not None:
        order_S = batch.shared.order_S
        assert order_S is not None
        document_S = document_S[order_S]
        is_answer_S = None if is_answer_S is None else is_answer_S[order_S]
    margins_N = None if dataset.margins is None else torch.tensor(dataset.margins[chosen])
    known, labels, width = dataset.references, dataset.labels, dataset.documents.lengths.shape[1]
    reference_D = None if known is None else torch.tensor(known[chosen, :width]).flatten()
    is_good_D = None if labels is None else torch.tensor(labels[chosen])
    return DocumentTargets(document_S, is_answer_S, answers_D, reference_D, is_good_D, margins_N)
