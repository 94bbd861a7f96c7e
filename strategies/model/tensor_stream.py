"""Reads and writes the tensors of safetensors files one at a time: memory holds one tensor, whatever the model's size.

Read by offset and not by memory map: pages of a map count as the process's own until the kernel wants them back.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from strategies.model.tensor_file import TensorEntry, read_header

SHARD_BYTES = 5 * 10**9  # as transformers cuts them on the hub
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class TensorPlan:
    """A tensor to be written."""

    name: str
    dtype: str  # as safetensors spells it
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


class TensorFiles:
    """The tensors of a folder's safetensors files, by name."""

    def __init__(self, folder: Path) -> None:
        """Raises BadInput for a damaged file."""
        self.entries: dict[str, TensorEntry] = {}
        self._places: dict[str, tuple[Path, int]] = {}
        for file in sorted(folder.glob("*.safetensors")):
            with file.open("rb") as stream:
                begin = 8 + struct.unpack("<Q", stream.read(8).ljust(8, b"\0"))[0]
            for name, entry in read_header(file).items():
                self.entries[name] = entry
                self._places[name] = file, begin + entry.data_offsets[0]

    def plan(self, name: str) -> TensorPlan:
        """The tensor as it is stored."""
        return TensorPlan(name, self.entries[name].dtype, tuple(self.entries[name].shape))

    def read(self, name: str) -> torch.Tensor:
        """One tensor, in memory of its own."""
        (file, begin), entry = self._places[name], self.entries[name]
        content = bytearray(entry.data_offsets[1] - entry.data_offsets[0])
        with file.open("rb", buffering=0) as stream:
            stream.seek(begin)
            view, done = memoryview(content), 0
            while done < len(content):
                count = stream.readinto(view[done:])
                if not count:
                    raise OSError(f"{file} ends early")
                done += count
        if not content:
            return torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
        return torch.frombuffer(content, dtype=DTYPES[entry.dtype]).view(entry.shape)


def write_shards(
    folder: Path, plans: Sequence[TensorPlan], make: Callable[[str], torch.Tensor], shard_bytes: int = SHARD_BYTES
) -> None:
    """Write tensors as transformers names its files: one, or shards with their index; `make` gives each in turn.

    Raises ValueError where `make` gives another type or shape than planned.
    """
    shards = list(_shards(plans, shard_bytes))
    names = (
        [SINGLE]
        if len(shards) == 1
        else [f"model-{n + 1:05d}-of-{len(shards):05d}.safetensors" for n in range(len(shards))]
    )
    for name, shard in zip(names, shards, strict=True):
        _write_file(folder / name, shard, make)
    if len(shards) > 1:
        weight_map = {plan.name: name for name, shard in zip(names, shards, strict=True) for plan in shard}
        metadata = {"total_size": sum(plan.bytes for plan in plans)}
        text = json.dumps({"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}, indent=2)
        (folder / INDEX).write_text(text + "\n", encoding="utf-8")


def _shards(plans: Sequence[TensorPlan], shard_bytes: int) -> Iterator[list[TensorPlan]]:
    """Tensors in their order, as many as a shard may hold; a larger one is alone."""
    shard: list[TensorPlan] = []
    for plan in plans:
        if shard and sum(one.bytes for one in shard) + plan.bytes > shard_bytes:
            yield shard
            shard = []
        shard.append(plan)
    yield shard


def _write_file(file: Path, plans: Sequence[TensorPlan], make: Callable[[str], torch.Tensor]) -> None:
    ordered = sorted(plans, key=lambda plan: -DTYPES[plan.dtype].itemsize)  # each begins at a multiple of its own size
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    place = 0
    for plan in ordered:
        header[plan.name] = {
            "dtype": plan.dtype,
            "shape": list(plan.shape),
            "data_offsets": [place, place + plan.bytes],
        }
        place += plan.bytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for plan in ordered:
            tensor = make(plan.name)
            if (tensor.dtype, tuple(tensor.shape)) != (DTYPES[plan.dtype], plan.shape):
                raise ValueError(f"{plan.name} is {tensor.dtype} {tuple(tensor.shape)}, planned as {plan}")
            stream.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def unknown_dtype(entries: Mapping[str, TensorEntry]) -> str | None:
    """The first type of element that cannot be read; None where all can."""
    return next((entry.dtype for entry in entries.values() if entry.dtype not in DTYPES), None)
