"""Rows that are computed together, with one cache of keys and values.

Rows are padded on the left, as generation pads them: a row that joins, and those it joins, get padding in front until
they are as wide; a row that leaves takes its padding along.  Padding is masked, so that a row's numbers are those of
the row alone up to rounding.  B rows, T columns, V tokens of the vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import pad
from transformers import DynamicCache

from orchestrator.serving.engines.adapters import Seat
from orchestrator.serving.engines.protocol import Query
from orchestrator.serving.engines.sampling import TokenSampler
from orchestrator.serving.engines.text import AnswerText
from strategies.model.heads import cache_keyword, inner_model

_STACKED = {"full_attention", "sliding_attention", "chunked_attention"}  # layers whose cache is keys and values alone


@dataclass
class AnswerRow:
    """One answer on its way."""

    number: int
    query: Query
    seat: Seat
    prompt: list[int]
    limit: int  # of new tokens
    sampler: TokenSampler
    text: AnswerText
    last: int = 0
    num_new: int = 0


class RowBatch:
    """Rows of one lane.  Each call computes one token of some rows and gives their logits, B x V in float32."""

    def __init__(self) -> None:
        self.rows: list[AnswerRow] = []
        self._cache = DynamicCache()  # all positions of every layer: a window of the model's is masked
        self._mask_BT = torch.empty(0, 0, dtype=torch.long)

    def join(self, rows: Sequence[AnswerRow]) -> torch.Tensor:
        """Compute prompts and take them in; the logits after them."""
        width = max(len(row.prompt) for row in rows)
        ids_BT = torch.zeros(len(rows), width, dtype=torch.long)
        mask_BT = torch.zeros_like(ids_BT)
        for place, row in enumerate(rows):
            ids_BT[place, width - len(row.prompt) :] = torch.tensor(row.prompt)
            mask_BT[place, width - len(row.prompt) :] = 1
        cache = DynamicCache()
        logits_BV = _forward(rows, ids_BT, mask_BT, (mask_BT.cumsum(1) - 1).clamp(min=0), cache)
        self._merge(cache, mask_BT)
        self.rows.extend(rows)
        return logits_BV

    def step(self) -> torch.Tensor:
        """Compute the last token of every row; the logits after it."""
        self._mask_BT = pad(self._mask_BT, (0, 1), value=1)
        ids_B1 = torch.tensor([[row.last] for row in self.rows])
        positions_B1 = self._mask_BT.sum(1, keepdim=True) - 1
        return _forward(self.rows, ids_B1, self._mask_BT, positions_B1, self._cache)

    def keep(self, rows: Sequence[AnswerRow]) -> None:
        """Let the other rows leave."""
        places = torch.tensor([self.rows.index(row) for row in rows], dtype=torch.long)
        self.rows = list(rows)
        self._mask_BT = self._mask_BT[places]
        unused = int((self._mask_BT.sum(0) == 0).long().cumprod(0).sum()) if self.rows else 0
        self._mask_BT = self._mask_BT[:, unused:]
        if not self.rows:
            self._cache = DynamicCache()
        for layer in _filled(self._cache):
            on_device = places.to(layer.keys.device)
            layer.keys, layer.values = (one[on_device, :, unused:] for one in (layer.keys, layer.values))

    def _merge(self, cache: DynamicCache, mask_BT: torch.Tensor) -> None:
        if not self.rows:
            self._cache, self._mask_BT = cache, mask_BT
            return
        wider = mask_BT.shape[1] - self._mask_BT.shape[1]
        own, new = max(wider, 0), max(-wider, 0)
        self._mask_BT = torch.cat([pad(self._mask_BT, (own, 0)), pad(mask_BT, (new, 0))])
        for layer, other in zip(_filled(self._cache), _filled(cache), strict=True):
            for name in ("keys", "values"):
                parts = pad(getattr(layer, name), (0, 0, own, 0)), pad(getattr(other, name), (0, 0, new, 0))
                setattr(layer, name, torch.cat(parts))


def can_stack(model: Any) -> bool:
    """Whether rows may be added to a running batch: every layer keeps keys and values and nothing else."""
    kinds = getattr(inner_model(model).config.get_text_config(), "layer_types", None) or ()
    return set(kinds) <= _STACKED


def _forward(
    rows: Sequence[AnswerRow], ids_BT: torch.Tensor, mask_BT: torch.Tensor, positions_BT: torch.Tensor, cache: Any
) -> torch.Tensor:
    lane = rows[0].seat.lane
    inner = inner_model(lane.model)
    known = inspect.signature(inner.forward).parameters
    device = inner.device
    more: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in known else {}
    more[cache_keyword(inner)] = cache
    if "position_ids" in known:
        more["position_ids"] = positions_BT.to(device)
    with torch.no_grad(), lane.computing([row.seat.adapter for row in rows]):
        output = inner(
            input_ids=ids_BT.to(device),
            attention_mask=mask_BT.to(device),
            use_cache=True,
            **more,
        )
    return output.logits[:, -1].float()


def _filled(cache: Any) -> list[Any]:
    """The layers that keep something: some models share those of others."""
    return [layer for layer in cache.layers if layer.is_initialized]
