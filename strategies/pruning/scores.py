"""How much the loss depends on each group.

`lora`       |dL/dB| |W'| of a group's rows and |dL/dA| |W'| of its columns, W' = W + s B A, by Frobenius norms.  Since
             dL/dB = s G A^T and dL/dA = s B^T G with G = dL/dW', which is never computed, a row of the one and a column
             of the other are those of G seen in R directions, and the product bounds what the loss changes in first
             order, |sum G * W'|, when the group leaves.
             LoRAPrune (arXiv 2305.18403) takes |(dL/dB A + B dL/dA) * W'|, element by element.  dL/dB A = s G A^T A
             mixes the columns of G: of a trained model that score ranked an MLP's channels less like the full gradient
             does (0.63 to 0.72 for 0.72 to 0.92, tests/benchmarks/pruning.py scores), its columns not at all.
`magnitude`  |W'| alone
`layer`      as `lora`, of all maps of a layer together
`gate`       gates that learn with the straight-through gradient of the masks (GRASPrune, arXiv 2604.19398), by
             gradients of unit length; one budget a layer in place of one for all
`random`     any

The scores of each map are divided by their length before they are added, so that no map counts more for its scale.

Legend: I inputs, O outputs of a map, R rank, N groups of a kind, K rows that are chosen from apart, P parts of a group.
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
class SquareSums:
    """Sums of the squares of a matrix over its rows and over its columns."""

    rows_O: torch.Tensor
    columns_I: torch.Tensor

    def norms(self, part: MapPart) -> torch.Tensor:
        """Of each group's rows or columns together, (N in this map)."""
        sums = self.columns_I if part.is_input else self.rows_O
        return sums[part.offset : part.offset + part.count * part.width].view(part.count, part.width).sum(1).sqrt()


@torch.no_grad()
def corrected_squares(pair: AdapterPair) -> SquareSums:
    """Of W + s B A, a piece of the weight at a time."""
    layer: torch.nn.Module = pair.layer
    weight_OI = layer.get_submodule("base_layer").weight
    assert isinstance(weight_OI, torch.Tensor)
    outputs, inputs = weight_OI.shape
    a_RI, b_OR, device = pair.a_RI.float(), pair.b_OR.float(), weight_OI.device
    rows_O, columns_I = torch.empty(outputs, device=device), torch.zeros(inputs, device=device)
    step = max(1, _CHUNK // inputs)
    for start in range(0, outputs, step):
        rows = slice(start, start + step)
        squares = torch.addmm(weight_OI[rows].float(), b_OR[rows], a_RI, alpha=pair.scale).square_()
        torch.sum(squares, dim=1, out=rows_O[rows])
        columns_I += squares.sum(dim=0)
    return SquareSums(rows_O, columns_I)


def gradient_squares(pair: AdapterPair) -> SquareSums:
    """Of dL/dB over its rows, and of dL/dA over its columns."""
    assert pair.a_RI.grad is not None and pair.b_OR.grad is not None
    return SquareSums(pair.b_OR.grad.float().square().sum(dim=1), pair.a_RI.grad.float().square().sum(dim=0))


class MapScores:
    """Scores by the maps' numbers: `lora`, whose gradients are averaged over steps, and `magnitude`, of the moment."""

    may_return = False

    def __init__(
        self,
        groups: Sequence[PrunedGroups],
        pairs: Sequence[Mapping[str, AdapterPair]],
        device: torch.device,
        with_gradient: bool,
    ) -> None:
        """`pairs` by the path of their map, a mapping a layer."""
        self._groups, self._pairs = {one.name: one for one in groups}, pairs
        sizes = {one.name: (len(one.parts), one.rows, one.count) for one in groups} if with_gradient else {}
        self._averages_PKN = {name: torch.zeros(size, device=device) for name, size in sizes.items()}

    @property
    def buffers(self) -> dict[str, torch.Tensor]:
        return {f"pruning.{name}.gradient": average for name, average in self._averages_PKN.items()}

    def observe(self, is_pruning: bool) -> None:
        for name, average_PKN in self._averages_PKN.items() if is_pruning else ():
            sums = [{path: gradient_squares(pair) for path, pair in pairs.items()} for pairs in self._pairs]
            average_PKN.mul_(KEEPS).add_(self._norms(name, sums), alpha=1 - KEEPS)

    def of(self, name: str) -> torch.Tensor:
        paths = {part.path for part in self._groups[name].parts}
        sums = [{path: corrected_squares(pairs[path]) for path in paths} for pairs in self._pairs]
        norms_PKN = self._norms(name, sums)
        if name in self._averages_PKN:
            norms_PKN = norms_PKN * self._averages_PKN[name]
        lengths_PK1 = norms_PKN.norm(dim=2, keepdim=True).clamp(min=torch.finfo(norms_PKN.dtype).tiny)
        return (norms_PKN / lengths_PK1).sum(dim=0)

    def _norms(self, name: str, sums: Sequence[Mapping[str, SquareSums]]) -> torch.Tensor:
        """(P, K, N) of sums by the path of their map, a mapping a layer."""
        one = self._groups[name]
        by_part = [torch.stack([layer[part.path].norms(part) for layer in sums]) for part in one.parts]
        return torch.stack(by_part).view(len(by_part), one.rows, one.count)


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
