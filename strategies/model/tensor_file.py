"""The header of a safetensors file (https://huggingface.co/docs/safetensors), checked whole and read without torch."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path

from clusters.safe.reading import MAX_BYTES, BadInput, load_json, open_regular, printable, record

# Bits of an element; of newer types only the spans are checked.
_BITS = {"BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8}
_BITS |= {"I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32}
_BITS |= {"F64": 64, "I64": 64, "U64": 64, "C64": 64}
_MOST_DIMENSIONS = 16


@dataclass(frozen=True)
class TensorEntry:
    """One tensor's entry in the header; offsets are bytes after the header."""

    dtype: str
    shape: list[int]
    data_offsets: list[int]


def read_header(file: Path) -> dict[str, TensorEntry]:
    """Names, types and shapes of a file's tensors.

    Raises BadInput where the file is no regular one, its header is longer than the file, or its tensors overlap, leave
    gaps, lie beyond its end or are not as many bytes as their shape.
    """
    with open_regular(file) as stream:
        size = stream.seek(0, 2)
        stream.seek(0)
        first = stream.read(8)
        if len(first) < 8:
            raise BadInput(f"{file}: has {size} bytes; a safetensors file begins with the length of its header")
        (length,) = struct.unpack("<Q", first)
        if length > size - 8:
            raise BadInput(f"{file}: is cut: its header is of {length} bytes, the whole file of {size}")
        if length > MAX_BYTES:
            raise BadInput(f"{file}: its header is larger than {MAX_BYTES >> 20} MiB")
        values = load_json(stream.read(length), str(file))
    if not isinstance(values, dict):
        raise BadInput(f"{file}: its header is a {type(values).__name__}, not an object with named tensors")
    values.pop("__metadata__", None)
    found = {name: record(TensorEntry, entry, f"{file}: tensor {_short(name)}") for name, entry in values.items()}
    _check_spans(found, size - 8 - length, str(file))
    return found


def _check_spans(tensors: dict[str, TensorEntry], data_bytes: int, label: str) -> None:
    """Every byte belongs to one tensor."""
    spans = []
    for name, one in tensors.items():
        if len(one.shape) > _MOST_DIMENSIONS or not all(0 <= side < 2**48 for side in one.shape):
            raise BadInput(f"{label}: tensor {_short(name)} has the shape {_short(str(one.shape))}")
        if len(one.data_offsets) != 2:
            raise BadInput(f"{label}: tensor {_short(name)} has {len(one.data_offsets)} data_offsets, not 2")
        begin, end = one.data_offsets
        needed = math.prod(one.shape) * _BITS.get(one.dtype, 0) // 8
        if end < begin or (one.dtype in _BITS and end - begin != needed):
            raise BadInput(f"{label}: tensor {_short(name)} has {end - begin} bytes; its shape needs {needed}")
        spans.append((begin, end, name))
    place = 0
    for begin, end, name in sorted(spans):
        if begin != place:
            raise BadInput(f"{label}: tensor {_short(name)} overlaps another or leaves a gap")
        place = end
    if place != data_bytes:
        raise BadInput(f"{label}: is cut or too long: its tensors have {place} bytes, the file {data_bytes}")


def _short(text: str) -> str:
    return printable(text[:120])
