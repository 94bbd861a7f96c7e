"""Low-rank corrections that no longer train, beside the pair of A and B that does: restarts add to them.

    y = (W + B_K A_K + s B A) x        A_K (K, in) and B_K (out, K) frozen, in fp32, with room for K ranks

Nothing is merged into the weights, so a base in 4 or 8 bits loses nothing, and what is handed back is one LoRA adapter
of PEFT's with the ranks of both.  Beyond K ranks the sum is cut to its largest ones.

Legend: I inputs, O outputs of a map, R rank of the trained pair, K of the kept ones.
"""

from __future__ import annotations

import copy
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from strategies.cost.plan import Costs
from strategies.export import VLLM_RANKS
from strategies.model.targets import AdaptedMaps
from strategies.train_setup import AdapterPair, TrainSetup
from strategies.workload import BYTES_PER_ELEMENT, Techniques

if TYPE_CHECKING:  # planning must not load torch
    import torch

    from strategies.adapter_bank.algebra import Factors

_USED, _SIDES = "kept_rank", ("kept_A", "kept_B")
_TIMES = 8  # the trained rank
_PASSES = 2 / 3  # of a trained correction's products: its weights have no gradients


def kept_rank(rank: int) -> int:
    """What local steps keep of pairs of a rank; vLLM takes it wherever it takes the pair."""
    return max(rank, min(_TIMES * rank, VLLM_RANKS))


def kept_costs(costs: Costs, rank: int, chosen: AdaptedMaps, techniques: Techniques) -> Costs:
    """Costs with kept corrections of so many ranks, 0 = none, beside each adapted map."""
    if not rank:
        return costs
    numbers, layers = rank * chosen.sides, chosen.layers
    kept = BYTES_PER_ELEMENT[techniques.dtype] * rank * len(chosen.maps) / layers
    footprint, work = costs.footprint, costs.work
    return replace(
        costs,
        footprint=replace(
            footprint,
            weights_bytes=footprint.weights_bytes + 4.0 * numbers,
            inputs_per_token=footprint.inputs_per_token + kept,
        ),
        work=replace(
            work,
            adapter_parameters=work.adapter_parameters + round(_PASSES * numbers),
            num_adapters=work.num_adapters + len(chosen.maps) // layers,
        ),
    )


def pairs_of(peft_model: Any, parameters: Mapping[str, Any]) -> tuple[AdapterPair, ...]:
    """The pairs of a LoRA model of PEFT's; none where something else trains as well."""
    found = [
        AdapterPair(name, layer, layer.lora_A["default"].weight, layer.lora_B["default"].weight, scale)
        for name, layer in peft_model.named_modules()
        if "default" in getattr(layer, "lora_A", ()) and (scale := layer.scaling["default"])
    ]
    known = {id(weight) for pair in found for weight in (pair.a_RI, pair.b_OR)}
    return tuple(found) if known == {id(parameter) for parameter in parameters.values()} else ()


class KeptPairs:
    """The kept corrections of a model's adapted maps, all with as many ranks in use."""

    def __init__(self, pairs: Sequence[AdapterPair], rank: int) -> None:
        import torch

        self._layers: dict[str, Any] = {pair.name: pair.layer for pair in pairs}
        self.rank = rank
        self._used = torch.zeros(1, dtype=torch.int64)  # on the host, where each forward pass reads it
        for pair in pairs:
            layer: Any = pair.layer
            device = pair.a_RI.device
            layer.register_buffer("kept_A", torch.zeros(rank, pair.a_RI.shape[1], device=device), persistent=False)
            layer.register_buffer("kept_B", torch.zeros(pair.b_OR.shape[0], rank, device=device), persistent=False)
            layer.register_forward_hook(self._add_to_output)

    @property
    def used(self) -> int:
        """Ranks in use."""
        return int(self._used)

    @property
    def buffers(self) -> dict[str, torch.Tensor]:
        """What a checkpoint must hold, by name."""
        named = {f"{name}.{side}": getattr(layer, side) for name, layer in self._layers.items() for side in _SIDES}
        return {**named, _USED: self._used}

    def _add_to_output(self, layer: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> Any:
        from torch.nn.functional import linear

        used = self.used
        if not used or layer.disable_adapters:
            return output
        a_KI, b_OK = layer.kept_A[:used], layer.kept_B[:, :used]
        return output + linear(linear(inputs[0].to(a_KI.dtype), a_KI), b_OK).to(output.dtype)

    def reset(self) -> None:
        """Let go of all that is kept."""
        self._used.zero_()

    def correction(self, name: str) -> Factors:
        """What is kept of a map, on the CPU."""
        from strategies.adapter_bank.algebra import Factors

        layer, used = self._layers[name], self.used
        return Factors(layer.kept_A[:used].cpu(), layer.kept_B[:, :used].cpu())

    def add(self, parts: Mapping[str, Factors]) -> tuple[float, float]:
        """Add corrections by map, the same rank for each: the squares of what was cut off for lack of room, of all."""
        import torch

        from strategies.adapter_bank.algebra import Factors, add, truncate

        used, more = self.used, max(part.rank for part in parts.values())
        fits, left, whole = used + more <= self.rank, 0.0, 0.0
        with torch.no_grad():
            for name, layer in self._layers.items():
                known = self.correction(name)
                part = parts.get(name, Factors(known.a_RI[:0], known.b_OR[:, :0]))
                total, start = part, used
                if not fits:
                    total, cut, square = truncate(add([known, part], [1.0, 1.0]), self.rank)
                    left, whole, start = left + cut, whole + square, 0
                end = start + total.rank
                layer.kept_A[start:end].copy_(total.a_RI)
                layer.kept_B[:, start:end].copy_(total.b_OR)
                layer.kept_A[end:].zero_()
                layer.kept_B[:, end:].zero_()
            self._used.fill_(used + more if fits else self.rank)
        return left, whole


def with_averaged_pairs(setup: TrainSetup, techniques: Techniques, rank: int) -> TrainSetup:
    """A LoRA training with what local steps need of it that average products of pairs of a rank."""
    if techniques.averages_products:
        setup.pairs = pairs_of(setup.model, setup.parameters)
    if techniques.local_merge == "reset":
        keep_pairs(setup, kept_rank(rank))
    return setup


def keep_pairs(setup: TrainSetup, rank: int) -> KeptPairs:
    """Let a LoRA training keep corrections of so many ranks, and hand them back with the trained pair.

    Raises ValueError where it trains more than pairs.
    """
    if not setup.pairs:
        raise ValueError("something beside pairs of A and B trains, which cannot be started again")
    kept, peft_model, parameters = KeptPairs(setup.pairs, rank), setup.model, setup.parameters

    def written() -> dict[str, torch.Tensor]:
        return _with_kept(kept, setup.pairs, parameters)

    def export(folder: Path, weights: Mapping[str, Any] | None = None) -> None:
        from strategies.step.state import save_adapter

        configs: Any = peft_model.peft_config
        whole, trained = written(), configs["default"]
        rank = next(tensor.shape[0] for name, tensor in whole.items() if ".lora_A." in name)
        configs["default"] = config = copy.copy(trained)
        config.r = config.lora_alpha = rank  # a scale of 1: each pair's own is in its B
        config.use_rslora = False
        try:
            save_adapter(peft_model, folder, whole)
        finally:
            configs["default"] = trained

    setup.buffers |= kept.buffers
    setup.export, setup.written, setup.kept = export, written, kept
    return kept


def _with_kept(
    kept: KeptPairs, pairs: Iterable[AdapterPair], parameters: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """A and B of each map with kept and trained ranks, by the trained weights' names; no rank is zero everywhere."""
    import torch

    names, found = {id(parameter): name for name, parameter in parameters.items()}, {}
    with torch.no_grad():
        for pair in pairs:
            known = kept.correction(pair.name)
            a = torch.cat([known.a_RI, pair.a_RI.detach().float().cpu()])
            b = torch.cat([known.b_OR, pair.scale * pair.b_OR.detach().float().cpu()], dim=1)
            counts = b.any(dim=0)
            found[names[id(pair.a_RI)], names[id(pair.b_OR)]] = a[counts], b[:, counts]
        rank = max(1, *(a.shape[0] for a, _ in found.values()))  # all maps as the fullest one
        whole = {}
        for (name_a, name_b), (a, b) in found.items():
            whole[name_a] = torch.cat([a, a.new_zeros(rank - a.shape[0], a.shape[1])])
            whole[name_b] = torch.cat([b, b.new_zeros(b.shape[0], rank - b.shape[1])], dim=1)
    return whole


def start_again(pairs: Iterable[AdapterPair], optimizer: torch.optim.Optimizer, key: str) -> None:
    """B = 0, A drawn anew as PEFT draws it, the same for the same key and map everywhere; no moments."""
    import torch

    with torch.no_grad():
        for pair in pairs:
            draw = torch.Generator().manual_seed(zlib.crc32(f"{key}/{pair.name}".encode()))
            bound = pair.a_RI.shape[1] ** -0.5  # kaiming_uniform_(a=sqrt(5))
            pair.a_RI.copy_(torch.empty(pair.a_RI.shape).uniform_(-bound, bound, generator=draw))
            pair.b_OR.zero_()
            for weight in (pair.a_RI, pair.b_OR):
                optimizer.state.pop(weight, None)
                weight.grad = None
