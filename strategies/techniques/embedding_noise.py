"""NEFTune: uniform noise on the embeddings of training rows (Jain et al., arXiv 2310.05914), as transformers scales it.

A number of the noise follows from the seed, the step, the sample and its place there, by integer arithmetic that every
device does alike: whatever the layout and the worker, a sample has the same noise.

Legend: B rows, T tokens of a row, D documents, H hidden size.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

# splitmix64 (Steele et al., https://doi.org/10.1145/2660193.2660195) in signed 64 bits, which wrap around
_STEP, _FIRST, _SECOND = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15


class EmbeddingNoise:
    """Noise of `alpha` / sqrt(tokens x H) on the output of an embedding, inside `over` and in training mode alone."""

    def __init__(self, embedding: torch.nn.Module, alpha: float, seed: int) -> None:
        self._embedding, self._alpha, self._seed, self._step = embedding, alpha, seed, 0

    def begin(self, step: int) -> None:
        """The next passes are of this step."""
        self._step = step

    @contextlib.contextmanager
    def over(self, batch: Any) -> Iterator[None]:
        """Add a batch's noise inside the block."""
        hook = self._embedding.register_forward_hook(partial(self._add, batch))
        try:
            yield
        finally:
            hook.remove()

    def _add(self, batch: Any, module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        if not module.training:
            return output
        return output + self.of(batch, output.shape[-1]).to(output.dtype)

    def of(self, batch: Any, hidden_size: int) -> torch.Tensor:
        """The noise (B, T, H) of a batch without shared beginnings; padding has some, which nothing reads."""
        import torch

        device, (num_rows, width) = batch.input_ids_BT.device, batch.input_ids_BT.shape
        lengths = batch.document_lengths
        keys_D = torch.tensor(self._keys(batch.sample_ids, len(lengths) if lengths else num_rows), device=device)
        if lengths:
            sizes_D = torch.tensor(lengths, device=device)
            document_T = torch.repeat_interleave(sizes_D, output_size=width)
            keys_BT, sizes_BT, places_BT = keys_D[document_T][None], sizes_D[document_T][None], batch.positions_BT
        else:
            keys_BT, sizes_BT = keys_D[:, None], batch.attention_mask_BT.sum(dim=1, keepdim=True)
            places_BT = torch.arange(width, device=device)[None]
        counters_BTH = places_BT[..., None] * hidden_size + torch.arange(hidden_size, device=device)
        uniform_BTH = _uniform(keys_BT[..., None], counters_BTH)
        return uniform_BTH * (self._alpha / (sizes_BT.float() * hidden_size).sqrt())[..., None]

    def _keys(self, sample_ids: tuple[int, ...], num_documents: int) -> list[int]:
        """A number of 64 bits for each document."""
        each = num_documents // len(sample_ids)
        names = (f"{self._seed}/{self._step}/{sample}/{place}" for sample in sample_ids for place in range(each))
        digests = (hashlib.blake2b(name.encode(), digest_size=8).digest() for name in names)
        return [int.from_bytes(digest, "little", signed=True) for digest in digests]


def _uniform(keys: torch.Tensor, counters: torch.Tensor) -> torch.Tensor:
    """fp32 numbers in [-1, 1) of int64 keys and counters."""
    mixed = keys + (counters + 1) * _STEP
    mixed = (mixed ^ _shifted(mixed, 30)) * _FIRST
    mixed = (mixed ^ _shifted(mixed, 27)) * _SECOND
    mixed = mixed ^ _shifted(mixed, 31)
    return _shifted(mixed, 40).float() * 2**-23 - 1.0


def _shifted(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Shifted to the right without the sign."""
    return (values >> bits) & ((1 << (64 - bits)) - 1)
