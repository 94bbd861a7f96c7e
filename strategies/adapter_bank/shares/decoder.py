"""Drag-and-Drop's decoder (arXiv 2506.16406), scaled down: prompts' embeddings -> coordinates of an adapter.

Published: 128 prompts as a sentence encoder's states, 3-D feature maps up to (4296, 10, 130), LoRA in chunks; 4,000
steps on eight GPUs and 50 checkpoints a data set.  Here: random batches of rows of what the bank keeps of a data set
(means of the base's token embeddings), three blocks that convolve along rows and along features, and as the target the
standardised coordinates on each map's principal directions.  One adapter a data set.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy
import torch
from torch import nn

from strategies.adapter_bank.evidence import Evidence
from strategies.adapter_bank.shares.generator import principal

ROWS = 16  # of a batch of prompts
_CHANNELS = (1, 8, 16, 16)
_KERNEL, _STEPS, _RATE, _DECAY, _NOISE = 9, 200, 3e-3, 0.1, 1e-4
_DRAWS = 8  # batches of prompts whose predictions are averaged


class HyperConv(nn.Module):
    """One block: convolved along features, and along rows through a tanh, both added, over 3, as published."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        half = _KERNEL // 2
        self.norm = nn.GroupNorm(1, inputs)
        self.along_features = nn.Conv2d(inputs, outputs, (1, _KERNEL), padding=(0, half))
        self.along_rows = nn.Conv2d(inputs, outputs, (_KERNEL, 1), padding=(half, 0))
        self.bias = nn.Parameter(torch.zeros(outputs, 1, 1))
        self.mix = nn.Conv2d(outputs, outputs, 1)

    def forward(self, states_BCRD: torch.Tensor) -> torch.Tensor:
        normed = self.norm(states_BCRD)
        made = (self.along_features(normed) + torch.tanh(self.along_rows(normed)) + self.bias) / 3
        return self.mix(nn.functional.silu(made))


@dataclass(frozen=True)
class Decoder:
    """A trained decoder, and what turns its outputs into shares."""

    network: nn.Module
    mean_F: torch.Tensor
    scale_F: torch.Tensor
    to_shares: Mapping[str, numpy.ndarray]  # of each map: (N, K), coordinates -> shares
    seed: int

    def shares(self, query: Evidence) -> dict[str, numpy.ndarray]:
        """(N,) for each map, for what is known of a data set."""
        draw = numpy.random.default_rng(self.seed)
        batch = torch.stack([prompts(query, draw) for _ in range(_DRAWS)])
        with torch.no_grad():
            coordinates = (self.network(batch).mean(0) * self.scale_F + self.mean_F).double().numpy()
        found, at = {}, 0
        for name, matrix_NK in self.to_shares.items():
            width = matrix_NK.shape[1]
            found[name] = matrix_NK @ coordinates[at : at + width]
            at += width
        return found


def prompts(evidence: Evidence, draw: numpy.random.Generator) -> torch.Tensor:
    """(1, ROWS, D) of a data set's sketch, rows drawn at random."""
    rows = draw.integers(0, len(evidence.sketch_KD), ROWS)
    return torch.from_numpy(evidence.sketch_KD[rows].astype(numpy.float32))[None]


def fit_decoder(
    evidence: Sequence[Evidence], grams: Mapping[str, numpy.ndarray], directions: int, seed: int = 0
) -> Decoder:
    """Trained on data sets and the inner products (N, N) of their adapters by map; the same seed, the same decoder."""
    targets, to_shares = [], {}
    for name, gram in grams.items():
        u_NK = principal(gram, directions)
        sizes_K = numpy.sqrt(numpy.maximum(numpy.einsum("nk,nm,mk->k", u_NK, gram, u_NK), 1e-30))
        targets.append(u_NK * sizes_K)  # coordinates on directions of length 1
        to_shares[name] = u_NK / sizes_K
    target_NF = torch.from_numpy(numpy.concatenate(targets, axis=1)).float()
    mean_F, scale_F = target_NF.mean(0), target_NF.std(0).clamp(min=1e-12)
    wanted_NF = (target_NF - mean_F) / scale_F
    weight_F = scale_F.square() / scale_F.square().mean()  # errors count as they do in the corrections
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        blocks = [HyperConv(one, other) for one, other in pairwise(_CHANNELS)]
        size = _CHANNELS[-1] * evidence[0].sketch_KD.shape[1]
        network = nn.Sequential(*blocks, _MeanOverRows(), nn.Linear(size, target_NF.shape[1]))
        optimizer = torch.optim.AdamW(network.parameters(), _RATE, weight_decay=_DECAY)
        draw = numpy.random.default_rng(seed)
        for _ in range(_STEPS):
            batch = torch.stack([prompts(one, draw) for one in evidence])
            batch = batch + _NOISE * torch.randn(batch.shape)
            loss = ((network(batch) - wanted_NF).square() * weight_F).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return Decoder(network.eval(), mean_F, scale_F, to_shares, seed)


class _MeanOverRows(nn.Module):
    """The order of prompts says nothing."""

    def forward(self, states_BCRD: torch.Tensor) -> torch.Tensor:
        return states_BCRD.mean(2).flatten(1)
