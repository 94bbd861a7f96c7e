"""What looks at the tokens that memories read, before training: routers are calibrated, a background is counted.

Padding is not looked at: a batch says which of its tokens are any.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from strategies.sparse_memory.layer import RowMemory
from strategies.sparse_memory.optimizer import RowAdamW
from strategies.sparse_memory.router import InputStatistics
from strategies.sparse_memory.slots import BackgroundCounts


class RouterCalibration:
    """The contract's `Learner`: mean and spread of what each memory reads of the first step's samples."""

    num_looks = 0

    def __init__(self, memories: Sequence[RowMemory], optimizer: RowAdamW, rows: int) -> None:
        self.rows = rows
        self._memories, self._optimizer = list(memories), optimizer
        self._seen: dict[int, InputStatistics] = {}

    def is_due(self, step: int) -> bool:
        return step == 0

    def begin_learning(self, num_passes: int) -> None:
        self._optimizer.drops_gradients = True
        self._seen = {one.layer: InputStatistics(one.router.mean) for one in self._memories}

    def watch(self, batch: Any) -> None:
        tokens = tokens_of(batch)
        for one in self._memories:
            one.observer = _adder(self._seen[one.layer], tokens)

    def next_learning(self) -> None: ...

    def end_learning(self) -> dict[str, Any]:
        self._optimizer.drops_gradients = False
        for one in self._memories:
            one.observer = None
            self._seen[one.layer].tell(one.router)
        num_tokens = min((seen.num_tokens for seen in self._seen.values()), default=0)
        text = f"memory: routers take off what {num_tokens} tokens of the first step have in common"
        return {"text": text, "num_tokens": num_tokens}


def _adder(seen: InputStatistics, tokens: torch.Tensor | None) -> Callable[[torch.Tensor, torch.Tensor], None]:
    return lambda x_TD, rows_TK: seen.add(x_TD if tokens is None else x_TD[tokens])


class BackgroundReads:
    """The contract's `HeldOutObserver`: which rows the tokens of held-out rows read."""

    def __init__(self, memories: Sequence[RowMemory], counts: dict[int, BackgroundCounts]) -> None:
        self._memories, self._counts = list(memories), counts

    def is_due(self, step: int) -> bool:
        return step == 0

    @contextlib.contextmanager
    def over(self, batch: Any) -> Iterator[None]:
        """Count what this batch reads, once it has been computed."""
        tokens, read = tokens_of(batch), dict[int, list[torch.Tensor]]()
        for one in self._memories:
            one.observer = _keeper(read.setdefault(one.layer, []), tokens)
        try:
            yield
        finally:
            for one in self._memories:
                one.observer = None
        for layer, parts in read.items():
            for rows_TK in parts:
                self._counts[layer].add(rows_TK)

    def end(self) -> dict[str, Any]:
        counts = list(self._counts.values())
        num_tokens, num_rows = int(counts[0].num_tokens), sum(len(one.readers_M) for one in counts)
        read = sum(int((one.readers_M > 0).sum()) for one in counts)
        text = f"memory: {num_tokens} tokens of held-out rows read {read} of {num_rows} rows, which move last"
        return {"text": text, "num_tokens": num_tokens, "rows_read": read, "rows": num_rows}


def _keeper(kept: list[torch.Tensor], tokens: torch.Tensor | None) -> Callable[[torch.Tensor, torch.Tensor], None]:
    return lambda x_TD, rows_TK: kept.append(rows_TK if tokens is None else rows_TK[tokens])


def tokens_of(batch: Any) -> torch.Tensor | None:
    """Which of a batch's tokens, row by row, are no padding; None = all."""
    mask_BT = batch.attention_mask_BT
    return None if mask_BT is None or bool(mask_BT.all()) else mask_BT.flatten().bool()
