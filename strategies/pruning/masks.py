"""Masks over a model's groups: 1 where a group is kept, 0 where it is as if it were not there.

Channels and heads are masked where the last map of their block reads them, which then sees zeros; a masked layer hands
on what it received.  Gates, where there are some, stand on the masks with a straight-through gradient:

    y = W (x * (m + (p - p))),  p = sigmoid(s)        the number m, with the gradient of p

Legend: N groups of a kind, K rows that are chosen from apart (the layers; 1 where layers themselves are the groups).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from strategies.pruning.groups import PrunedGroups

_KEPT, GATE = "pruning_kept", "pruning_gate"


class GroupMasks:
    """The masks of a model, in place: a checkpoint writes into the very tensors that the hooks read."""

    def __init__(self, groups: Sequence[PrunedGroups], layers: Any, device: torch.device, gated: bool = False) -> None:
        """`layers` are the decoder layers; `gated` = with a trained gate on each group."""
        self.groups = {one.name: one for one in groups}
        self.kept_KN = {one.name: torch.ones(one.rows, one.count, device=device) for one in groups}
        self.gates: dict[str, list[torch.nn.Parameter]] = {}
        for one in groups:
            if gated:
                zeros = [torch.nn.Parameter(torch.zeros(one.count, device=device)) for _ in range(one.rows)]
                self.gates[one.name] = zeros
            for number, layer in enumerate(layers):
                self._hook(one, number, layer)

    @property
    def buffers(self) -> dict[str, torch.Tensor]:
        """What a checkpoint must hold, by name."""
        return {f"pruning.{name}.kept": kept for name, kept in self.kept_KN.items()}

    def _hook(self, one: PrunedGroups, number: int, layer: Any) -> None:
        """Give a module its part of the mask as a buffer, and a gate, where its hook finds what is in their place."""
        if one.name == "layers":
            layer.register_buffer(_KEPT, self.kept_KN[one.name][0, number], persistent=False)
            layer.register_forward_hook(_pass_on, with_kwargs=True)
            return
        masked = layer.get_submodule(one.masked.path)
        masked.register_buffer(_KEPT, self.kept_KN[one.name][number], persistent=False)
        if gates := self.gates.get(one.name):
            masked.register_parameter(GATE, gates[number])
        masked.register_forward_pre_hook(partial(_mask_input, one.masked.width))

    def num_removed(self, name: str) -> int:
        """How many groups of a kind are masked, in each row alike."""
        return int((self.kept_KN[name][0] == 0).sum())

    @torch.no_grad()
    def remove(self, name: str, scores_KN: torch.Tensor, count: int, may_return: bool = False) -> None:
        """Mask the `count` groups of the lowest scores in every row; without `may_return` masked ones stay masked."""
        one, kept_KN = self.groups[name], self.kept_KN[name]
        scores_KN = scores_KN.detach().double().cpu().clone()
        if not may_return:
            scores_KN[kept_KN.cpu() == 0] = -torch.inf
        scores_KN[:, list(one.protected)] = torch.inf
        lowest = scores_KN.argsort(dim=1, stable=True)[:, :count]
        mask_KN = torch.ones_like(scores_KN).scatter_(1, lowest, 0.0)
        kept_KN.copy_(mask_KN)


def _mask_input(width: int, module: Any, inputs: tuple[torch.Tensor, ...]) -> Any:
    mask_N = getattr(module, _KEPT)
    if (gate_N := getattr(module, GATE, None)) is not None:
        soft_N = torch.sigmoid(gate_N)
        mask_N = mask_N + (soft_N - soft_N.detach())  # exactly the mask
    if width > 1:
        mask_N = mask_N.repeat_interleave(width)
    return inputs[0] * mask_N.to(inputs[0].dtype), *inputs[1:]


def _pass_on(layer: Any, inputs: tuple[Any, ...], named: dict[str, Any], output: Any) -> Any:
    received, is_kept = inputs[0] if inputs else named["hidden_states"], getattr(layer, _KEPT) > 0
    if isinstance(output, tuple):
        return (torch.where(is_kept, output[0], received), *output[1:])
    return torch.where(is_kept, output, received)
