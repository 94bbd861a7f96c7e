"""What boosted LoRA does between steps: rounds end, their pairs are kept, others begin; samples are weighed.

Everything is a function of the step, the seed and what lies in the setup's buffers: a resumed run continues alike.

Legend: I inputs, O outputs of a map, R rank, N samples of the training data.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from strategies.adapter_bank.algebra import Factors
from strategies.methods.kept_pairs import KeptPairs, start_again
from strategies.train_setup import AdapterPair, TrainSetup

_PASSES, _MORE = 4, 8  # of the range finder: power iterations, and columns beyond those that are asked for


@dataclass(frozen=True)
class RoundSchedule:
    """When a round ends, and what takes part in it."""

    num_steps: int
    layers_per_round: int | None  # None = all
    warmup_steps: int
    seed: int

    def of(self, step: int) -> tuple[int, int]:
        """The round of a step and its place in it, both from 0."""
        return divmod(step, self.num_steps)

    def layers(self, number: int, all_layers: list[int]) -> set[int]:
        """The layers that train in a round."""
        if self.layers_per_round is None:
            return set(all_layers)
        draw = random.Random(f"{self.seed}/{number}")
        return set(draw.sample(all_layers, self.layers_per_round))


class BoostedRounds:
    """The `Between` of boosted LoRA: a pair trains for a round, is added to the kept ones, and another begins."""

    def __init__(
        self,
        setup: TrainSetup,
        kept: KeptPairs,
        rounds: RoundSchedule,
        layer_of: Mapping[str, int],
        directions: Mapping[str, torch.Tensor],
    ) -> None:
        """`layer_of` a pair's name; `directions` to begin with by the same, none = random ones."""
        self._setup, self._kept, self._rounds = setup, kept, rounds
        self._layer_of, self._directions = layer_of, directions
        self._layers = sorted(set(layer_of.values()))
        self._begin(0)

    def gradients_ready(self, step: int) -> None:
        """Only the round's layers move, at a rate that rises anew."""
        number, place = self._rounds.of(step)
        chosen = self._rounds.layers(number, self._layers)
        for pair in self._setup.pairs:
            if self._layer_of[pair.name] not in chosen:
                pair.a_RI.grad = pair.b_OR.grad = None
        factor = min(1.0, (place + 1) / (self._rounds.warmup_steps + 1))
        for group in self._setup.optimizer.param_groups:
            group["lr"] *= factor

    @torch.no_grad()
    def step_done(self, step: int) -> dict[str, Any] | None:
        number, place = self._rounds.of(step)
        if place + 1 < self._rounds.num_steps:
            return None
        chosen = self._rounds.layers(number, self._layers)
        parts = {
            pair.name: Factors(pair.a_RI.detach().cpu(), pair.scale * pair.b_OR.detach().cpu())
            for pair in self._setup.pairs
            if self._layer_of[pair.name] in chosen
        }
        left, whole = self._kept.add(parts)
        self._begin(number + 1)
        error = (left / whole) ** 0.5 if whole else 0.0
        cut = f"; {error:.2%} of what is kept had no room" if error else ""
        return {
            "text": f"round {number + 1} ended: {len(parts)} corrections are kept, of {self._kept.used} ranks{cut}",
            "round": number + 1,
            "kept_rank": self._kept.used,
            "truncation_error": error,
        }

    def _begin(self, number: int) -> None:
        start_again(self._setup.pairs, self._setup.optimizer, f"{self._rounds.seed}/{number}")
        with torch.no_grad():
            for pair in self._setup.pairs if self._directions else ():
                self._turn(pair, number)

    def _turn(self, pair: AdapterPair, number: int) -> None:
        """Let A begin with the round's slice of the weight's right singular vectors, as long as random rows are."""
        directions_KI, rank = self._directions[pair.name], pair.a_RI.shape[0]
        start = number * rank % (len(directions_KI) - rank + 1)
        pair.a_RI.copy_(directions_KI[start : start + rank] * 3**-0.5)


def right_directions(weight_OI: torch.Tensor, count: int, seed: int) -> torch.Tensor:
    """The largest right singular vectors, (count or fewer, I) on the CPU, each with its largest entry positive.

    By a random range finder with power iterations (Halko et al., arXiv 0909.4061): a whole SVD of a large weight takes
    seconds.
    """
    weight_OI = weight_OI.detach().float().cpu()
    count = min(count, *weight_OI.shape)
    draw = torch.Generator().manual_seed(seed)
    width = min(count + _MORE, *weight_OI.shape)
    basis_IK = torch.linalg.qr(weight_OI.T @ torch.randn(weight_OI.shape[0], width, generator=draw)).Q
    for _ in range(_PASSES):
        basis_IK = torch.linalg.qr(weight_OI.T @ (weight_OI @ basis_IK)).Q
    _, _, vh = torch.linalg.svd(weight_OI @ basis_IK, full_matrices=False)
    found_KI = (vh @ basis_IK.T)[:count]
    largest = found_KI.gather(1, found_KI.abs().argmax(dim=1, keepdim=True))
    return found_KI * largest.sign()


class HardSamples:
    """Weights of samples in the loss, 1 - p with p the mean probability of a token: what is right counts 0.

    Decided before the first step of each round but the first, by all training rows; on average a token counts 1.
    """

    def __init__(self, rounds: RoundSchedule, num_samples: int, device: torch.device) -> None:
        self._rounds = rounds
        self.weights_N = torch.ones(num_samples, device=device)

    def is_due(self, step: int) -> bool:
        number, place = self._rounds.of(step)
        return number > 0 and place == 0

    def weigh(self, losses_N: torch.Tensor, num_supervised_N: torch.Tensor) -> dict[str, Any]:
        counts_N = num_supervised_N.double().clamp(min=1)
        wrong_N = -torch.expm1(-losses_N.double() / counts_N)
        mean = float((wrong_N * counts_N).sum() / counts_N.sum())
        weights_N = wrong_N / mean if mean > 0 else torch.ones_like(wrong_N)
        self.weights_N.copy_(weights_N)
        half = int((weights_N < 0.5).sum())
        return {
            "text": f"samples weighed by what is still wrong of them: from {float(weights_N.min()):.2f} to"
            f" {float(weights_N.max()):.2f}, {half} of {len(weights_N)} count less than half",
            "mean_wrong": mean,
            "num_below_half": half,
        }
