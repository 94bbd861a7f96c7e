"""AdamW whose moments of some weights live in a low-rank window on the gradient: GaLore's and APOLLO's update.

All state is tensors by weight, so a checkpoint holds it.  Shapes: M N sides of a weight, R rank, L its longer side.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from strategies.train_setup import TrainSettings

_GROWTH = 1.01  # of an update's norm from one step to the next (Fira, arXiv 2410.01623, as APOLLO limits it)


@dataclass(frozen=True)
class Window:
    """How gradients are seen."""

    kind: Literal["galore", "apollo"]
    rank: int
    update_proj_gap: int
    scale: float
    seed: int


class LowRankAdamW(torch.optim.Optimizer):
    """`seen` through the window, `rest` by plain AdamW."""

    def __init__(
        self,
        seen: Sequence[torch.nn.Parameter],
        rest: Sequence[torch.nn.Parameter],
        window: Window,
        settings: TrainSettings,
        undecayed: Collection[torch.nn.Parameter] = (),
    ) -> None:
        rates = {"lr": settings.learning_rate, "base_lr": settings.learning_rate}
        self.window, self._settings = window, settings
        self._undecayed = {id(parameter) for parameter in undecayed}
        self._place = {parameter: place for place, parameter in enumerate(seen)}
        super().__init__([{"params": list(part), **rates} for part in (seen, rest) if part], {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, parameter.grad.float(), group["lr"])

    def _move(self, parameter: torch.nn.Parameter, gradient_MN: torch.Tensor, rate: float) -> None:
        state, place = self.state[parameter], self._place.get(parameter)
        if not state:
            state["step"] = torch.zeros(())
        number = int(state["step"])
        if place is None:
            change = self._adam(state, gradient_MN)
        else:
            # The longer side is kept: a wide weight is looked at as its transpose.
            is_wide = gradient_MN.shape[0] < gradient_MN.shape[1]
            gradient_LS = gradient_MN.T if is_wide else gradient_MN
            window_SR = self._window(state, gradient_LS, place, number)
            change_LS = self._galore(state, gradient_LS, window_SR)
            change = change_LS.T if is_wide else change_LS
        if id(parameter) not in self._undecayed:
            parameter.mul_(1 - rate * self._settings.weight_decay)
        parameter.sub_((rate * change).to(parameter.dtype))

    def _galore(
        self, state: dict[str, torch.Tensor], gradient_LS: torch.Tensor, window_SR: torch.Tensor
    ) -> torch.Tensor:
        low_LR = gradient_LS @ window_SR
        direction_LR = self._adam(state, low_LR)
        if self.window.kind == "galore":
            return self.window.scale * (direction_LR @ window_SR.T)
        # Each channel's gradient goes as far as Adam would go in the window.
        factor_L = direction_LR.norm(dim=1) / (low_LR.norm(dim=1) + 1e-8)
        change_LS = gradient_LS * factor_L[:, None] * self.window.scale**0.5
        norm = change_LS.norm()
        if "change_norm" in state:
            limit = _GROWTH * state["change_norm"].to(norm.device)
            is_over = norm > limit  # stays on the device: asking would wait for it, once a weight
            change_LS *= torch.where(is_over, limit / norm, 1.0)
            norm = torch.where(is_over, limit, norm)
        state["change_norm"] = norm
        return change_LS

    def _window(
        self, state: dict[str, torch.Tensor], gradient_LS: torch.Tensor, place: int, number: int
    ) -> torch.Tensor:
        rank, epoch = self.window.rank, number // self.window.update_proj_gap
        if self.window.kind == "apollo":  # drawn anew in each step from its seed: no memory
            seed = (self.window.seed * 1_000_003 + place) * 1_000_003 + epoch
            generator = torch.Generator(gradient_LS.device).manual_seed(seed % 2**63)
            shape = (gradient_LS.shape[1], rank)
            return torch.randn(*shape, generator=generator, device=gradient_LS.device) / rank**0.5
        if "window" not in state or number % self.window.update_proj_gap == 0:
            state["window"] = torch.linalg.svd(gradient_LS, full_matrices=False).Vh[:rank].T.contiguous()
        return state["window"]

    def _adam(self, state: dict[str, torch.Tensor], gradient: torch.Tensor) -> torch.Tensor:
        s = self._settings
        if "exp_avg" not in state:
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(gradient), torch.zeros_like(gradient)
        state["step"] = state["step"] + 1
        number = int(state["step"])
        state["exp_avg"].lerp_(gradient, 1 - s.adam_beta1)
        state["exp_avg_sq"].mul_(s.adam_beta2).addcmul_(gradient, gradient, value=1 - s.adam_beta2)
        first, second = 1 - s.adam_beta1**number, (1 - s.adam_beta2**number) ** 0.5
        return state["exp_avg"] / ((state["exp_avg_sq"].sqrt() / second).add_(s.adam_epsilon)) / first
