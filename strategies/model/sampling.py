"""Tokens drawn from the model's distribution instead of the likeliest ones.

The largest of logits / temperature + Gumbel noise is a draw from their softmax (the Gumbel-max trick: Maddison et al.,
arXiv 1411.0030).  The noise depends on the seed, the prompt and the position alone, so an answer does not depend on the
prompts beside it, on how they are divided over workers, or on how layers are divided over stages.

Legend: B prompts, T tokens so far, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Sampling:
    """The distribution that tokens are drawn from."""

    temperature: float  # above 0
    top_p: float = 1.0  # the likeliest tokens that have this probability together; others are never drawn
    seed: int = 0

    def processor(self, prompts: Sequence[int], width: int) -> SampledLogits:
        """Of prompts, by their numbers in the data, that are `width` tokens wide with their padding."""
        return SampledLogits(self, prompts, width)


class SampledLogits:
    """A logits processor of transformers' after which the largest logit is a drawn token."""

    def __init__(self, sampling: Sampling, prompts: Sequence[int], width: int) -> None:
        from transformers import TemperatureLogitsWarper, TopPLogitsWarper

        self._warpers: list[Any] = [TemperatureLogitsWarper(sampling.temperature)]
        if sampling.top_p < 1:
            self._warpers.append(TopPLogitsWarper(sampling.top_p))
        self._seed, self._prompts, self._width = sampling.seed, list(prompts), width

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Of ids (B, T) and their last logits (B, V), such logits (B, V) in fp32."""
        scores = scores.float()
        for warper in self._warpers:
            scores = warper(input_ids, scores)
        position = input_ids.shape[1] - self._width
        noise_BV = torch.stack([self._noise(prompt, position, scores.shape[1]) for prompt in self._prompts])
        return scores + noise_BV.to(scores.device)

    def _noise(self, prompt: int, position: int, size: int) -> torch.Tensor:
        digest = hashlib.blake2b(f"{self._seed}/{prompt}/{position}".encode(), digest_size=7).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest))
        return -torch.empty(size).exponential_(generator=generator).log()
