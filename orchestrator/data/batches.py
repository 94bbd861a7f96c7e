"""Samples -> the tensors of a micro-batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from orchestrator.data.dataset import Dataset
from strategies.reuse.row import lay_out
from strategies.step.supervised_logits import Batch


def collate(dataset: Dataset, sample_ids: Sequence[int], packing: bool, share_prefixes: bool = False) -> Batch:
    """Documents end to end in one row (`packing`), or one a row padded on the right with token 0, which is masked.

    `share_prefixes` lays what documents of a packed row begin with alike once.
    """
    samples = [dataset.tokens(index) for index in sample_ids]
    ids = [torch.tensor(tokens, dtype=torch.long) for tokens, _ in samples]
    masks = [torch.tensor(mask, dtype=torch.bool) for _, mask in samples]
    lengths = tuple(len(tokens) for tokens in ids)
    if packing and share_prefixes:
        return Batch.of_tree(lay_out(ids, masks), tuple(sample_ids))
    if packing:
        return Batch(torch.cat(ids)[None], torch.cat(masks)[None], lengths, None, tuple(sample_ids))
    shape = (len(ids), max(lengths))
    input_ids_BT = torch.zeros(shape, dtype=torch.long)
    supervised_BT = torch.zeros(shape, dtype=torch.bool)
    attention_mask_BT = torch.zeros(shape, dtype=torch.long)
    for row, (tokens, mask) in enumerate(zip(ids, masks, strict=True)):
        input_ids_BT[row, : len(tokens)] = tokens
        supervised_BT[row, : len(tokens)] = mask
        attention_mask_BT[row, : len(tokens)] = 1
    return Batch(input_ids_BT, supervised_BT, None, attention_mask_BT, tuple(sample_ids))
