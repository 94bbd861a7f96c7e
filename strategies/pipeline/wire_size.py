"""Bytes of a hidden state on the wire.  Pure arithmetic; `wire` packs what this counts."""

from __future__ import annotations

from typing import NamedTuple

from strategies.workload import BYTES_PER_ELEMENT, Wire

BLOCK = 64  # values of int8 with one scale
_OUTLIERS = 8  # values of each row that stay exact
_FP32_BYTES = _INT32_BYTES = 4


class Int8Parts(NamedTuple):
    """Bytes of a token in int8, part by part in the order of a message."""

    codes: int
    scales: int
    places: int  # of the outliers in their row
    outliers: int


def num_outliers(width: int) -> int:
    """Values of a row that stay exact: all of a row that has no more."""
    return min(_OUTLIERS, width)


def num_blocks(width: int) -> int:
    """Blocks of a row, the last one filled up."""
    return -(-width // BLOCK)


def int8_parts(width: int) -> Int8Parts:
    """Bytes of one token of a hidden state of this width."""
    blocks, outliers = num_blocks(width), num_outliers(width)
    return Int8Parts(blocks * BLOCK, blocks * _FP32_BYTES, outliers * _INT32_BYTES, outliers * _FP32_BYTES)


def message_bytes(num_tokens: float, width: int, wire: Wire) -> float:
    """Bytes of the hidden state (num_tokens, width), or of its gradient."""
    return num_tokens * (sum(int8_parts(width)) if wire == "int8" else width * BYTES_PER_ELEMENT[wire])
