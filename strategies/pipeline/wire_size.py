"""Bytes of a hidden state on the wire.  Pure arithmetic; `wire` packs what this counts."""

from __future__ import annotations

from strategies.workload import BYTES_PER_ELEMENT, Wire

BLOCK, OUTLIERS = 64, 8  # of int8: values with one scale; of each row, exact
_SCALE_BYTES, _OUTLIER_BYTES = 4, 4 + 4  # fp32; its place and its value


def message_bytes(num_tokens: float, width: int, wire: Wire) -> float:
    """What the hidden state (num_tokens, width) takes, or its gradient."""
    if wire != "int8":
        return num_tokens * width * BYTES_PER_ELEMENT[wire]
    return num_tokens * (-(-width // BLOCK) * (BLOCK + _SCALE_BYTES) + OUTLIERS * _OUTLIER_BYTES)
