"""How much the loss depends on each group.

`lora`       |(gB A + B gA) * (W + s B A)|, summed over a group's rows and columns: what the gradients of A and B say of
             the weight's own gradient, which is never computed (LoRAPrune, arXiv 2305.18403).  The paper's third term,
             - gB gA, belongs to a step of rate 1 and depends on the loss's scale; it is not used.
`magnitude`  |W + s B A|, summed alike
`layer`      the sum of the first over all maps of a layer (Shortened LLaMA's Taylor score, arXiv 2402.02834)
`gate`       gates that learn with the straight-through gradient of the masks (GRASPrune, arXiv 2604.19398), by
             gradients of unit length; one budget a layer in place of one for all
`random`     any

Each map's sums are divided by their length before they are added, so that none of them counts more for its scale.

Legend: I inputs, O outputs of a map, R rank, N groups of a kind, K rows that are chosen from apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from strategies.pruning.groups import MapPart, PrunedGroups
from strategies.train_setup import AdapterPair

KEEPS = 0.9  # of the average so far, a step
_CHUNK = 2**19  # elements of a weight at a time: what is computed of it stays in a CPU's cache


class GroupScores(Protocol):
    """Scores of every group, (K, N) by kind."""

    may_return: bool  # a masked group may come back

    @property
    def buffers(self) -> dict[str, torch.Tensor]:
        """What a checkpoint must hold, by name."""
        ...

    def observe(self, is_pruning: bool) -> None:
        """The gradients of a step are there; without `is_pruning` masks do not move any more."""
        ...

    def of(self, name: str) -> torch.Tensor: ...


@dataclass(frozen=True)
class MapSums:
    """Sums of a map's scores over its rows and over its columns."""

    rows_O: torch.Tensor
    columns_I: torch.Tensor

    def of_groups(self, part: MapPart, count: int) -> torch.Tensor:
        """Of each group, (N)."""
        sums = self.columns_I if part.is_input else self.rows_O
        return sums[part.offset : part.offset + count * part.width].view(count, part.width).sum(dim=1)


@torch.no_grad()
def sum_map(pair: AdapterPair, with_gradient: bool) -> MapSums:
    """|g * W'| of a map, or |W'|: W' = W + s B A, g = gB A + B gA; a piece of the weight at a time."""
    layer: torch.nn.Module = pair.layer
    weight_OI = layer.get_submodule("base_layer").weight
    assert isinstance(weight_OI, torch.Tensor)
    outputs, inputs = weight_OI.shape
    a_RI, b_OR, device = pair.a_RI.float(), pair.b_OR.float(), weight_OI.device
    rows_O, columns_I = torch.empty(outputs, device=device), torch.zeros(inputs, device=device)
    if with_gradient:
        assert pair.a_RI.grad is not None and pair.b_OR.grad is not None
        left_O2R = torch.cat([pair.b_OR.grad.float(), b_OR], dim=1)
        right_2RI = torch.cat([a_RI, pair.a_RI.grad.float()])
    step = max(1, _CHUNK // inputs)
    for start in range(0, outputs, step):
        rows = slice(start, start + step)
        corrected = torch.addmm(weight_OI[rows].float(), b_OR[rows], a_RI, alpha=pair.scale)
        if with_gradient:
            corrected = corrected.mul_(left_O2R[rows] @ right_2RI)
        corrected.abs_()
        torch.sum(corrected, dim=1, out=rows_O[rows])
        columns_I += corrected.sum(dim=0)
    return MapSums(rows_O, columns_I)


class MapScores:
    """Scores by the maps' numbers: `lora`, averaged over steps, and `magnitude`, of the moment."""

    may_return = False

    def __init__(
        self,
        groups: Sequence[PrunedGroups],
        pairs: Sequence[Mapping[str, AdapterPair]],
        device: torch.device,
        with_gradient: bool,
    ) -> None:
        """`pairs` by the path of their map, a mapping a layer."""
        self._groups = {one.name: one for one in groups}
        self._pairs, self._with_gradient = pairs, with_gradient
        self._averages = (
            {one.name: torch.zeros(one.rows, one.count, device=device) for one in groups} if with_gradient else {}
        )

    @property
    def buffers(self) -> dict[str, torch.Tensor]:
        return {f"pruning.{name}.score": average for name, average in self._averages.items()}

    def observe(self, is_pruning: bool) -> None:
        if not is_pruning:
            return
        for name, average_KN in self._averages.items():
            average_KN.mul_(KEEPS).add_(self._now(name).to(average_KN), alpha=1 - KEEPS)

    def of(self, name: str) -> torch.Tensor:
        return self._averages[name] if self._with_gradient else self._now(name)

    def _now(self, name: str) -> torch.Tensor:
        one = self._groups[name]
        if name == "layers":
            return torch.stack([self._sum_layer(pairs) for pairs in self._pairs])[None]
        return torch.stack([self._score_layer(one, pairs) for pairs in self._pairs])

    def _score_layer(self, one: PrunedGroups, pairs: Mapping[str, AdapterPair]) -> torch.Tensor:
        sums = {path: sum_map(pairs[path], self._with_gradient) for path in {part.path for part in one.parts}}
        total_N = 0
        for part in one.parts:
            score_N = sums[part.path].of_groups(part, one.count)
            total_N = total_N + score_N / score_N.norm().clamp(min=torch.finfo(score_N.dtype).tiny)
        assert isinstance(total_N, torch.Tensor)
        return total_N

    def _sum_layer(self, pairs: Mapping[str, AdapterPair]) -> torch.Tensor:
        return torch.stack([sum_map(pair, self._with_gradient).rows_O.sum() for pair in pairs.values()]).sum()


class GateScores:
    """Gates that learn: s moves against its gradient, by a step of unit length in each layer."""

    may_return = True

    def __init__(self, gates: Mapping[str, Sequence[torch.nn.Parameter]]) -> None:
        self._gates = gates

    @property
    def buffers(self) -> dict[str, torch.Tensor]:
        return {}  # gates are trained weights

    @torch.no_grad()
    def observe(self, is_pruning: bool) -> None:
        """Moves them here and takes their gradients away, so that they do not count when LoRA's are clipped."""
        for gates in self._gates.values():
            for gate in gates:
                if is_pruning and gate.grad is not None:
                    gate.sub_(gate.grad / gate.grad.norm().clamp(min=torch.finfo(gate.dtype).tiny))
                gate.grad = None

    def of(self, name: str) -> torch.Tensor:
        return torch.stack(list(self._gates[name]))


class RandomScores:
    """Any scores, the same for one seed on every worker."""

    may_return = False

    def __init__(self, groups: Sequence[PrunedGroups], seed: int) -> None:
        draw = torch.Generator().manual_seed(seed)
        self._scores = {one.name: torch.rand(one.rows, one.count, generator=draw) for one in groups}

    @property
    def buffers(self) -> dict[str, torch.Tensor]:
        return {}

    def observe(self, is_pruning: bool) -> None:
        pass

    def of(self, name: str) -> torch.Tensor:
        return self._scores[name]
