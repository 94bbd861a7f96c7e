"""Which samples share a micro-batch: pure integer arithmetic, the same on every worker."""

from __future__ import annotations

import bisect
from collections.abc import Sequence


def best_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of `lengths` grouped into bins of at most `capacity`, longest first, each into the fullest bin that fits.

    Cost O(n log n + n b) for b bins.  At most 11/9 of the least number of bins plus 1 (Johnson 1974).  An item longer
    than `capacity` gets a bin of its own.
    """
    bins: list[list[int]] = []
    open_bins: list[tuple[int, int]] = []  # (free, bin), sorted
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        at = bisect.bisect_left(open_bins, (lengths[index], -1))
        if at == len(open_bins):
            bins.append([index])
            free, chosen = capacity - lengths[index], len(bins) - 1
        else:
            free, chosen = open_bins.pop(at)
            bins[chosen].append(index)
            free -= lengths[index]
        if free > 0:
            bisect.insort(open_bins, (free, chosen))
    return bins


def split_by_share(lengths: Sequence[int], shares: Sequence[float]) -> list[list[int]]:
    """Indices of `lengths` dealt to workers so that tokens are in proportion to `shares`.

    Longest first, each to the worker that would finish it earliest (LPT, Graham 1969).  Equal for every caller.
    """
    finished = [(0.0, worker) for worker, share in enumerate(shares) if share > 0]
    dealt: list[list[int]] = [[] for _ in shares]
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        candidates = [(load + lengths[index] / shares[worker], worker) for load, worker in finished]
        load, worker = min(candidates)
        dealt[worker].append(index)
        finished = [(load if w == worker else old, w) for old, w in finished]
    return dealt


def micro_batches(lengths: Sequence[int], rows: int, max_length: int, packing: bool) -> list[list[int]]:
    """Groups of indices that go through the model together.

    Packed: documents end to end, up to `rows * max_length` tokens.  Padded: up to `rows` samples of similar length.
    """
    if packing:
        return best_fit_decreasing(lengths, rows * max_length)
    by_length = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    return [by_length[start : start + rows] for start in range(0, len(by_length), rows)]


def padded_tokens(lengths: Sequence[int], groups: Sequence[Sequence[int]], packing: bool) -> int:
    """Tokens that go through the model, padding counted."""
    if packing:
        return sum(lengths)
    return sum(max(lengths[i] for i in group) * len(group) for group in groups)
