"""Shares of each map tuned on labelled rows: gradients of the shares alone, no weight of model or adapters trains.

    y = W x + sum_p c_mp B_mp (A_mp x)        for every map m that one of the parts p corrects

In the space of LoraHub (arXiv 2307.13269), with shares of their own for each map and with gradients, which cost two or
three passes where a search without them needs a pass for every direction.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy
import torch

from strategies.adapter_bank.algebra import Factors

RATE = 0.03
_LOOK_EVERY = 5  # steps
_PATIENCE = 2  # looks without a gain
MOST_STEPS = 40


@dataclass(frozen=True)
class TunedShares:
    """Where the steps led: the shares at the look with the least loss."""

    shares: dict[str, numpy.ndarray]  # of each map: (P,), one for each part
    losses: tuple[float, ...]  # of rows that were held back, at the start and at each look
    num_steps: int

    @property
    def gained(self) -> bool:
        return min(self.losses) < self.losses[0]


class TunableSum:
    """Corrections of a model's maps whose shares take gradients; inside `added` the model computes with them."""

    def __init__(self, model: Any, parts: Sequence[Mapping[str, Factors]], start_P: Sequence[float]) -> None:
        self._model, self._parts = model, parts
        self.names = sorted({name for part in parts for name in part})
        self.shares_MP = torch.nn.Parameter(torch.tensor(start_P).float().repeat(len(self.names), 1))

    @contextmanager
    def added(self) -> Iterator[Any]:
        """The model with the corrections on top of its maps."""
        with ExitStack() as hooks:
            for row, name in enumerate(self.names):
                hook = self._hook(row, [part.get(name) for part in self._parts])
                hooks.callback(self._model.get_submodule(name).register_forward_hook(hook).remove)
            yield self._model

    def _hook(self, row: int, factors: Sequence[Factors | None]) -> Callable[..., torch.Tensor]:
        there = [(place, one) for place, one in enumerate(factors) if one is not None]
        a_RI = torch.cat([one.a_RI for _, one in there])
        b_OR = torch.cat([one.b_OR for _, one in there], dim=1)
        part_R = torch.cat([torch.full((one.rank,), place) for place, one in there])

        def corrected(_: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
            hidden_TR = (inputs[0].flatten(0, -2) @ a_RI.T) * self.shares_MP[row, part_R]
            return torch.addmm(output.flatten(0, -2), hidden_TR, b_OR.T).view_as(output)

        return corrected


def tune(
    parts: TunableSum, loss: Callable[[int], torch.Tensor], held_back: Callable[[], float], rate: float = RATE
) -> TunedShares:
    """Adam on the shares until the loss of rows held back has stopped falling.

    `loss` is the mean loss of a step's rows, with gradients; `held_back` that of rows which no step sees.
    """
    optimizer = torch.optim.Adam([parts.shares_MP], rate)
    losses, best, step = [held_back()], parts.shares_MP.detach().clone(), 0
    while step < MOST_STEPS and losses.index(min(losses)) >= len(losses) - _PATIENCE:
        for _ in range(_LOOK_EVERY):
            optimizer.zero_grad()
            loss(step).backward()
            optimizer.step()
            step += 1
        losses.append(held_back())
        if losses[-1] == min(losses):
            best = parts.shares_MP.detach().clone()
    return TunedShares(dict(zip(parts.names, best.numpy(), strict=True)), tuple(losses), step)
