"""Attention over documents laid end to end in one row, each seeing only itself.

Padding costs as much as real tokens; a row without padding needs an attention that stops at document borders.  Here the
borders arrive as `document_lengths` and every document runs through a causal kernel of its own; short ones in bf16 on a
CPU share one batched product, because there the kernel's backward pass takes 2 ms for 70 tokens (a step of SmolLM2-135M
falls to 0.78 of its time; in fp32 it would grow to 1.04).  Nothing of quadratic size in the row is ever built, and no
document can see another: their keys are never in the same product.

Legend: B documents, H query heads, K key-value heads, G = H / K, T tokens of the row, L longest document, D head width.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

NAME = "document"
_SHORT = 128  # tokens; longer documents would save more scores for the backward pass than they win


def document_attention(
    module: torch.nn.Module,
    query_1HTD: torch.Tensor,
    key_1KTD: torch.Tensor,
    value_1KTD: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    document_lengths: Sequence[int] | None = None,
    sliding_window: int | None = None,
    **unused: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention inside each document; returns (1, T, H, D), None.

    Cost: sum over documents of length^2 instead of T^2.  Raises ValueError where it could not be exact (no borders
    given, or a score function this kernel does not compute): a wrong border is a leak, never a slow path.
    """
    if document_lengths is None:
        raise ValueError("document attention needs document_lengths; this model does not pass them on")
    if unused.get("softcap") is not None or unused.get("s_aux") is not None or unused.get("position_bias") is not None:
        raise ValueError("document attention does not compute soft-capped, biased or sink scores; use eager")
    together = _short(document_lengths, query_1HTD)
    short: dict[int, torch.Tensor] = {}
    if together:
        batch_BLHD = _batched(query_1HTD, key_1KTD, value_1KTD, together, scaling, dropout, sliding_window)
        short = {document: batch_BLHD[row, :length] for row, (document, _, length) in enumerate(together)}
    outputs_tHD, start = [], 0
    for document, length in enumerate(document_lengths):
        stop = start + length
        if document in short:
            outputs_tHD.append(short[document])
        else:
            part = (query_1HTD[:, :, start:stop], key_1KTD[:, :, start:stop], value_1KTD[:, :, start:stop])
            outputs_tHD.append(_alone(*part, scaling, dropout, sliding_window))
        start = stop
    return torch.cat(outputs_tHD)[None], None


def _alone(
    query_1HLD: torch.Tensor,
    key_1KLD: torch.Tensor,
    value_1KLD: torch.Tensor,
    scaling: float | None,
    dropout: float,
    sliding_window: int | None,
) -> torch.Tensor:
    """Causal attention of one document, (L, H, D)."""
    length = query_1HLD.shape[2]
    windowed = sliding_window is not None and length > sliding_window
    mask_LL = _visible(length, sliding_window, query_1HLD.device) if windowed else None
    output_1HLD = F.scaled_dot_product_attention(
        query_1HLD,
        key_1KLD,
        value_1KLD,
        attn_mask=mask_LL,
        dropout_p=dropout,
        is_causal=mask_LL is None,
        scale=scaling,
        enable_gqa=query_1HLD.shape[1] != key_1KLD.shape[1],
    )
    return output_1HLD[0].transpose(0, 1)


def _short(lengths: Sequence[int], query: torch.Tensor) -> list[tuple[int, int, int]]:
    """(document, start, length) of those that are worth one product together."""
    if query.device.type != "cpu" or query.dtype == torch.float32:
        return []
    starts = itertools.accumulate(lengths, initial=0)
    every = enumerate(zip(starts, lengths, strict=False))
    short = [(document, start, length) for document, (start, length) in every if length <= _SHORT]
    return short if len(short) > 1 else []


@functools.lru_cache(maxsize=4)  # every layer asks for the same; numbers, since a tensor may be a fake one
def _gather_index(together: tuple[tuple[int, int, int], ...], longest: int) -> list[list[int]]:
    """(B, L) positions in the row; beyond a document's end its last one again."""
    return [[start + min(i, length - 1) for i in range(longest)] for _, start, length in together]


def _batched(
    query_1HTD: torch.Tensor,
    key_1KTD: torch.Tensor,
    value_1KTD: torch.Tensor,
    together: list[tuple[int, int, int]],
    scaling: float | None,
    dropout: float,
    sliding_window: int | None,
) -> torch.Tensor:
    """Causal attention of short documents, padded at their ends to (B, L, H, D); what stands beyond an end is void.

    A causal mask keeps every real token from the padding behind it.  Saves B H L^2 scores for the backward pass.
    """
    longest = max(length for _, _, length in together)
    index_BL = torch.tensor(_gather_index(tuple(together), longest))

    def gather(x_1HTD: torch.Tensor) -> torch.Tensor:
        return x_1HTD[0].transpose(0, 1)[index_BL].transpose(1, 2)  # (B, heads, L, D)

    query, key, value = gather(query_1HTD), gather(key_1KTD), gather(value_1KTD)
    num_documents, num_heads, _, width = query.shape
    num_keys = key.shape[1]
    query = (query * (width**-0.5 if scaling is None else scaling)).reshape(num_documents * num_keys, -1, width)
    key, value = key.reshape(-1, longest, width), value.reshape(-1, longest, width)
    scores = torch.bmm(query, key.transpose(1, 2)).view(-1, num_heads // num_keys, longest, longest).float()
    hidden_LL = ~_visible(longest, sliding_window, query.device)
    weights = F.dropout(scores.masked_fill(hidden_LL, -torch.inf).softmax(-1).to(query.dtype), dropout)
    output = torch.bmm(weights.view(num_documents * num_keys, -1, longest), value)
    return output.view(num_documents, num_heads, longest, width).transpose(1, 2)


def _visible(length: int, sliding_window: int | None, device: torch.device) -> torch.Tensor:
    """(length, length) bool: which keys (columns) a query (row) may look at."""
    causal = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    return causal if sliding_window is None else causal.triu(1 - sliding_window)


def register() -> None:
    """Make `document` known to transformers; without a mask function of its own it is handed no mask."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, document_attention)


def packing_error(model: Any) -> float:
    """How much three short documents packed in one row differ from the same run one by one.

    The logits' root mean square difference over their spread: rounding (1e-6 in fp32, up to 0.05 in bf16) where nothing
    leaks, half or more where the model sees across a border.  Costs four forward passes of 3 to 12 tokens.  Raises
    whatever the model raises for arguments it does not know.
    """
    lengths = (5, 4, 3)
    ids_1T = (torch.arange(sum(lengths), device=model.device) * 7 + 3).remainder(model.config.vocab_size)[None]
    with torch.no_grad():
        packed = model(ids_1T, **packed_arguments(lengths, model.device), use_cache=False).logits[0]
        alone = [
            model(part, **packed_arguments([part.shape[1]], model.device), use_cache=False).logits[0]
            for part in ids_1T.split(lengths, dim=1)
        ]
    return ((packed - torch.cat(alone)).float().square().mean().sqrt() / packed.float().std()).item()


def packed_arguments(lengths: Sequence[int], device: torch.device) -> dict[str, Any]:
    """The forward arguments that tell a model where documents of `lengths` begin in one row."""
    positions = torch.cat([torch.arange(length, device=device) for length in lengths])
    return {"position_ids": positions[None], "document_lengths": tuple(lengths)}
