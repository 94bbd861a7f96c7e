"""Updating images on another machine: moments stay there, images go there, directions come back."""

from __future__ import annotations

import torch

from strategies.lsp_offload.adam import AdamNumbers, direction


class CpuSide:
    """Holds the moments of images and updates them: as a remote object it needs nothing but memory and cores."""

    def __init__(self, numbers: AdamNumbers) -> None:
        self._numbers = numbers
        self._moments: dict[int, dict[str, torch.Tensor]] = {}

    def update(self, place: int, image: torch.Tensor, moments: dict[str, torch.Tensor] | None) -> torch.Tensor:
        """AdamW's direction for an image; given moments replace those held."""
        if moments is not None:  # what another process sent may lie in memory that is not to be written
            self._moments[place] = {name: tensor.clone() for name, tensor in moments.items()}
        return direction(self._moments[place], image, self._numbers, torch.empty_like(image))

    def give_moments(self, places: list[int]) -> list[dict[str, torch.Tensor]]:
        """Give the moments of some images away."""
        return [self._moments.pop(place) for place in places]


def take_moments(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor] | None:
    """The moments out of a weight's state, which keeps the number of steps; None where they are on the remote side."""
    if "exp_avg" not in state:
        return None
    return {"step": state["step"].clone()} | {name: state.pop(name) for name in ("exp_avg", "exp_avg_sq")}
