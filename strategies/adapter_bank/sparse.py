"""Adapters that are some entries of the weights (SHiRA, arXiv 2406.13175), and their merge (arXiv 2507.07140).

Entries are chosen by connection sensitivity, |W dL/dW| on a batch (SNIP, arXiv 1810.02340): what the loss would lose
with a weight.  Experts merge entry by entry: where several have one, its mean, or as TIES and the others have it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from clusters.safe.reading import printable
from clusters.safe.writing import new_folder
from strategies.adapter_bank.adapter import CONFIG, WEIGHTS, Unusable, config_of, header_of
from strategies.adapter_bank.algebra import Merge, by_entries

_PREFIX, _VALUES, _PLACES = "base_model.model.", ".shira_weight", ".shira_indices"


@dataclass(frozen=True)
class Sparse:
    """dW_OI as values at distinct, ascending places of the flattened weight."""

    places: torch.Tensor  # int64
    values: torch.Tensor
    shape: tuple[int, int]

    @property
    def density(self) -> float:
        return len(self.places) / (self.shape[0] * self.shape[1])

    def delta(self) -> torch.Tensor:
        flat = torch.zeros(self.shape[0] * self.shape[1], dtype=self.values.dtype)
        flat[self.places] = self.values
        return flat.view(self.shape)

    @classmethod
    def of(cls, delta_OI: torch.Tensor, mask_OI: torch.Tensor) -> Sparse:
        """What a mask keeps of a correction."""
        places = mask_OI.flatten().nonzero()[:, 0]
        return cls(places, delta_OI.flatten()[places], (delta_OI.shape[0], delta_OI.shape[1]))


def select_sensitive(weight_OI: torch.Tensor, grad_OI: torch.Tensor, num_entries: int, block: int = 1) -> torch.Tensor:
    """A mask of the entries that the loss depends on most; of whole block x block squares where `block` is above 1.

    `num_entries` is met exactly, or to the next block.  Raises ValueError where blocks do not divide the weight.
    """
    scores_OI = (weight_OI * grad_OI).abs()
    outputs, inputs = scores_OI.shape
    if outputs % block or inputs % block:
        raise ValueError(f"blocks of {block} do not divide a weight of {outputs} x {inputs}; use 1")
    squares = scores_OI.reshape(outputs // block, block, inputs // block, block).sum((1, 3))
    chosen = torch.zeros(squares.numel(), dtype=torch.bool)
    chosen[squares.flatten().topk(min(squares.numel(), -(-num_entries // block**2))).indices] = True
    mask = chosen.view(squares.shape)
    return mask.repeat_interleave(block, 0).repeat_interleave(block, 1)


def average_shared_entries(experts: Sequence[Sparse]) -> Sparse:
    """dW = sum_k S_k / max(1, how many experts have the entry): disjoint experts add up, each as it was."""
    places, which = _join_places(experts)
    values = torch.cat([expert.values for expert in experts])
    sums = torch.zeros(len(places), dtype=values.dtype).index_add_(0, which, values)
    return Sparse(places, sums / which.bincount(minlength=len(places)).to(values.dtype), experts[0].shape)


def merge_by(experts: Sequence[Sparse], weights: Sequence[float], how: Merge, density: float = 0.5) -> Sparse:
    """As algebra.py merges whole corrections, on the entries that any expert has; `density` is of those."""
    places, which = _join_places(experts)
    at = which.split([len(expert.places) for expert in experts])
    filled = [torch.zeros(len(places)).index_copy_(0, own, one.values) for own, one in zip(at, experts, strict=True)]
    return Sparse(places, by_entries(filled, weights, how, density), experts[0].shape)


def _join_places(experts: Sequence[Sparse]) -> tuple[torch.Tensor, torch.Tensor]:
    """The places that any of them has, ascending, and which of these each expert's entries are, one after the other."""
    if len(shapes := {expert.shape for expert in experts}) > 1:
        raise Unusable(f"corrections of {sorted(shapes)} are of different models")
    places, which = torch.cat([expert.places for expert in experts]).unique(return_inverse=True)
    return places, which


def is_sparse(folder: Path) -> bool:
    """Whether it holds a SHiRA adapter as PEFT writes it."""
    return config_of(folder).get("peft_type") == "SHIRA"


def read(folder: Path) -> dict[str, Sparse]:
    """A SHiRA adapter by map.  Raises Unusable.

    The file tells r (I + O) values and their places, not the sides: shapes here are (I + O, I + O), which is enough.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    rank = config_of(folder).get("r")
    if type(rank) is not int or not 0 < rank < 2**31:
        raise Unusable(f"{folder}: r is {printable(str(rank)[:80])}; a SHiRA adapter has a whole number of at least 1")
    try:
        header_of(folder)
        tensors = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise Unusable(f"{folder} is no readable SHiRA adapter: {error}") from None
    found = {}
    for key in sorted(key for key in tensors if key.endswith(_VALUES)):
        name = key.removeprefix(_PREFIX).removesuffix(_VALUES)
        places = tensors.get(key.removesuffix(_VALUES) + _PLACES)
        try:
            found[name] = _entries(tensors[key], places, rank)
        except ValueError as error:
            raise Unusable(f"{folder}: {printable(name[:120])}: {error}") from None
    if not found:
        raise Unusable(f"{folder} holds no entries of a SHiRA adapter")
    return found


def _entries(values: torch.Tensor, places: torch.Tensor | None, rank: int) -> Sparse:
    """Values and their rows and columns, 2 x N, by place.  Raises ValueError for what cannot be that."""
    if values.ndim != 1 or not values.is_floating_point() or not torch.isfinite(values).all():
        raise ValueError("its values are not a list of finite numbers")
    if places is None or places.shape != (2, len(values)) or places.is_floating_point() or places.is_complex():
        raise ValueError("its values have no indices")
    side = len(values) // rank
    if not side or side * rank != len(values) or not (int(places.min()) >= 0 and int(places.max()) < side):
        raise ValueError(f"{len(values)} values at rank {rank} lie elsewhere than its places say")
    flat = places[0].long() * side + places[1].long()
    order = flat.argsort()
    return Sparse(flat[order], values.float()[order], (side, side))


def merge(
    folders: Sequence[Path], output: Path, how: Merge | None = None, weights: Sequence[float] = (), density: float = 0.5
) -> tuple[int, int]:
    """Write SHiRA adapters of one model as one; its number of entries, and how many fewer those are than all of theirs.

    Without `how`, entries that several have are averaged and others stay; with it, `weights` has one for each folder.
    PEFT wants the same multiple of I + O of every map: the first place is repeated, with zeros, which add nothing.
    Raises Unusable, for those of different models too, and FileExistsError.
    """
    from safetensors.torch import save_file

    experts = [read(folder) for folder in folders]
    shares = list(weights) or [1 / len(folders)] * len(folders)

    def of_map(name: str) -> Sparse:
        there = [(expert[name], share) for expert, share in zip(experts, shares, strict=True) if name in expert]
        if how is None:
            return average_shared_entries([one for one, _ in there])
        return merge_by([one for one, _ in there], [share for _, share in there], how, density)

    merged = {name: of_map(name) for name in sorted({name for expert in experts for name in expert})}
    rank = max(-(-len(one.places) // one.shape[0]) for one in merged.values())
    tensors = {}
    for name, one in merged.items():
        missing = rank * one.shape[0] - len(one.places)
        flat = torch.cat([one.places, one.places[:1].expand(missing)])
        tensors[f"{_PREFIX}{name}{_VALUES}"] = torch.nn.functional.pad(one.values, (0, missing))
        tensors[f"{_PREFIX}{name}{_PLACES}"] = torch.stack([flat // one.shape[0], flat % one.shape[0]]).int()

    with new_folder(output) as folder:
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        config = config_of(folders[0]) | {"r": rank, "target_modules": sorted(merged), "inference_mode": True}
        (folder / CONFIG).write_text(json.dumps(config, indent=1), encoding="utf-8")

    entries = sum(len(one.places) for one in merged.values())
    return entries, sum(len(one.places) for expert in experts for one in expert.values()) - entries
