"""How LoRA begins: from an adapter, with directions of inputs (EVA), with parts of weights by their inputs (CorDA)."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from strategies.methods.kept_pairs import KeptPairs


def start_from(peft_model: Any, folder: Path) -> None:
    """Let a fresh LoRA model start from another adapter: truncated to its rank, or filled up with what is fresh.

    Raises ValueError where the adapter corrects maps that this LoRA leaves alone.
    """
    from strategies.adapter_bank.adapter import Adapter
    from strategies.adapter_bank.algebra import truncate

    if not folder.is_dir():
        raise ValueError(f"init_adapter {folder} is not a folder; give its absolute path")
    adapter = Adapter(folder)
    own = {name.removeprefix("base_model.model."): m for name, m in peft_model.named_modules() if hasattr(m, "lora_A")}
    if left_alone := sorted(set(adapter.targets) - set(own)):
        raise ValueError(
            f"init_adapter corrects {len(left_alone)} maps that this LoRA leaves alone, e.g. {left_alone[0]}: widen"
            " lora_target_modules or layers_to_transform"
        )
    with torch.no_grad():
        for name in adapter.targets:
            a_RI, b_OR = own[name].lora_A["default"].weight, own[name].lora_B["default"].weight
            start, _, _ = truncate(adapter.factors(name), a_RI.shape[0])
            a_RI[: start.rank] = start.a_RI.to(a_RI)
            b_OR[:, : start.rank] = (start.b_OR / own[name].scaling["default"]).to(b_OR)
            _renew_magnitudes(own[name])


def _renew_magnitudes(layer: Any) -> None:
    """Let a DoRA map begin as the sum of its frozen weights and its correction: PEFT took the norms of the first."""
    if "default" not in layer.lora_magnitude_vector or layer.lora_A["default"].weight.is_meta:
        return
    dora = layer.lora_magnitude_vector["default"]
    magnitudes = dora.weight  # the parameter stays
    dora.update_layer(
        base_layer=layer.base_layer,
        lora_A=layer.lora_A["default"].weight,
        lora_B=layer.lora_B["default"].weight,
        scaling=layer.scaling["default"],
    )
    magnitudes.copy_(dora.weight)
    dora.weight = magnitudes


class EvaStart:
    """Looks at what LoRA's maps read in a few passes before the first step, and lets A begin with it; B stays zero.

    EVA: A starts with the directions in which a map's inputs vary most (Paischer et al., arXiv 2410.07170), by PEFT's
    own incremental PCA over the inputs at supervised tokens of the first samples; every map keeps its rank.
    """

    num_looks = 0

    def __init__(self, peft_model: Any, rank: int, rows: int) -> None:
        self.rows, self._rank = rows, rank
        self._layers = {name: one for name, one in peft_model.named_modules() if hasattr(one, "lora_A")}
        self._parameters = [parameter for parameter in peft_model.parameters() if parameter.requires_grad]
        self._hooks: list[Any] = []

    def is_due(self, step: int) -> bool:
        return step == 0

    def begin_learning(self, num_passes: int) -> None:
        self._release()
        self._leaders: dict[str, str] = {}  # maps that read one tensor share the first one's directions
        self._seen: dict[str, list[torch.Tensor]] = {}  # tokens that wait until there are as many as directions
        self._found: dict[str, Any] = {}
        for name, layer in self._layers.items():
            self._hooks.append(layer.register_forward_pre_hook(self._reader(name)))

    def watch(self, batch: Any) -> None:
        """The next pass is of this batch."""
        self._mask_BT, self._passed, self._last = batch.supervised_BT, set[str](), ("", None)

    def next_learning(self) -> None: ...

    def end_learning(self) -> dict[str, Any]:
        """Give every A its directions."""
        self._release()
        short = 0
        with torch.no_grad():
            for name, layer in self._layers.items():
                found = self._found.get(self._leaders.get(name, ""))
                if found is None:
                    short += 1
                else:
                    weight = layer.lora_A["default"].weight
                    weight.copy_(found.components_[: self._rank].to(weight))
        for parameter in self._parameters:
            parameter.grad = None
        count = len(self._layers) - short
        text = f"eva: A of {count} maps begins with the directions in which its inputs vary most"
        if short:
            text += f"; {short} maps keep their random start, since fewer tokens than their rank were seen"
        self._found, self._seen = {}, {}
        return {"text": text, "maps": count, "short": short}

    def _reader(self, name: str) -> Any:
        def read(module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            if name in self._passed:  # a checkpointed layer is computed again
                return
            self._passed.add(name)
            leader, tensor = self._last
            if inputs[0] is tensor:
                self._leaders.setdefault(name, leader)
                return
            self._leaders.setdefault(name, name)
            self._last = (name, inputs[0])
            self._take(name, inputs[0].detach()[self._mask_BT.to(inputs[0].device)].float())

        return read

    @torch.no_grad()
    def _take(self, name: str, inputs_TI: torch.Tensor) -> None:
        from peft.utils.incremental_pca import IncrementalPCA

        waiting = [*self._seen.pop(name, []), inputs_TI]
        if sum(map(len, waiting)) < self._rank:
            self._seen[name] = waiting
            return
        if name not in self._found:
            self._found[name] = IncrementalPCA(n_components=self._rank, copy=True, lowrank=True, lowrank_seed=42)
        with torch.autocast(inputs_TI.device.type, enabled=False):
            self._found[name].partial_fit(torch.cat(waiting))

    def _release(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []


class CordaStart:
    """Looks at what LoRA's maps read before the first step, and lets A and B begin as a part of the weight by that.

    CorDA (Yang et al., arXiv 2406.05223): W C = U S V' with C the covariance of a map's inputs; B and A begin with the
    directions of the largest singular values (`ipm`) or of the smallest (`kpm`), and the rest of W stays frozen.  PEFT
    takes the part out of W; here its negative lies beside the pair (`KeptPairs`), so that W stays as it is: nothing
    is rounded, a checkpoint holds all of it, and what is handed back is an adapter of the base.  The decomposition is
    PEFT's own function, inputs are scaled and added up as it does, a document at a time.
    """

    def __init__(self, peft_model: Any, kept: KeptPairs, lora: Any) -> None:
        self.rows, self._kept, self._rank, self._method = lora.corda_rows, kept, lora.lora_r, lora.corda_method
        self._model = peft_model
        layers = [(name, one) for name, one in peft_model.named_modules() if hasattr(one, "lora_A")]
        self._looks = _by_decoder_layers(layers, lora.corda_layers)
        self.num_looks = len(self._looks)

    def is_due(self, step: int) -> bool:
        return step == 0

    def begin_learning(self, num_passes: int) -> None:
        self.release()
        self._was_training = self._model.training
        self._model.eval()  # no input is dropped
        self._passes_a_look, self._num_passes, self._look = num_passes // self.num_looks, 0, -1
        self._starts: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self._next_look()

    def watch(self, batch: Any) -> None:
        """The next pass is of this batch."""
        self._batch, self._passed, self._last = batch, set[str](), ("", None)

    def next_learning(self) -> None:
        self._num_passes += 1
        if self._num_passes == self._passes_a_look:
            self._decompose()
            self._num_passes = 0
            self._next_look()

    def end_learning(self) -> dict[str, Any]:
        """Give every pair its part of the weight, and take it away beside the pair."""
        from strategies.adapter_bank.algebra import Factors

        self._decompose()
        self.release()
        self._model.train(self._was_training)
        parts = {}
        with torch.no_grad():
            for layer_name, layer in self._model.named_modules():
                if layer_name not in self._starts:
                    continue
                a_RI, b_OR = self._starts[layer_name]
                scale = layer.scaling["default"]
                layer.lora_A["default"].weight.copy_(a_RI / scale**0.5)
                layer.lora_B["default"].weight.copy_(b_OR / scale**0.5)
                parts[layer_name] = Factors(a_RI.cpu(), -b_OR.cpu())
        self._kept.reset()
        self._kept.add(parts)
        which = {"ipm": "largest", "kpm": "smallest"}[self._method]
        text = f"corda: A and B of {len(parts)} maps begin with the {which} parts of the weight by its inputs"
        self._starts, self._sums = {}, {}
        return {"text": text, "maps": len(parts)}

    def _next_look(self) -> None:
        self._look += 1
        self._leaders: dict[str, str] = {}  # maps that read one tensor share its covariance
        self._sums: dict[str, tuple[torch.Tensor, int]] = {}  # of x x' over documents, and their number
        for name, layer in self._looks[self._look]:
            self._hooks.append(layer.register_forward_pre_hook(self._reader(name)))

    def _reader(self, name: str) -> Any:
        def read(module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            if name in self._passed:  # by the reference of an objective, say
                return
            self._passed.add(name)
            leader, tensor = self._last
            if inputs[0] is tensor:
                self._leaders.setdefault(name, leader)
                return
            self._leaders.setdefault(name, name)
            self._last = (name, inputs[0])
            self._add(name, inputs[0].detach())

        return read

    @torch.no_grad()
    def _add(self, name: str, inputs_BTI: torch.Tensor) -> None:
        total_II, count = self._sums.get(name, (None, 0))
        with torch.autocast(inputs_BTI.device.type, enabled=False):
            for document_TI in _documents(self._batch, inputs_BTI):
                scaled_TI = document_TI.float() / document_TI.float().max().abs()
                if not scaled_TI.isfinite().all():
                    continue  # nothing in it is above 0: it says nothing of what varies
                product_II = scaled_TI.T @ scaled_TI
                total_II = product_II if total_II is None else total_II.add_(product_II)
                count += 1
        if total_II is not None:
            self._sums[name] = (total_II, count)

    @torch.no_grad()
    def _decompose(self) -> None:
        """The parts of this look's weights; its covariances are let go of."""
        from peft.tuners.lora.corda import collect_eigens_for_layer

        self.release()
        for name, layer in self._looks[self._look]:
            leader = self._leaders.get(name, "")
            if leader not in self._sums:
                raise ValueError(f"init_lora_weights: corda saw no input of {name} in {self.rows} rows; use true")
            total_II, count = self._sums[leader]
            base = layer.get_base_layer()
            base.covariance_matrix = total_II / count
            try:
                found = collect_eigens_for_layer(base, None)  # type: ignore[arg-type]  # it reads no option
            finally:
                del base.covariance_matrix
            first = slice(self._rank) if self._method == "ipm" else slice(-self._rank, None)
            root_R = found.S_WC[first].sqrt().to(total_II.device)
            u_OR, v_IR = found.U_WC[:, first].to(root_R.device), found.V_WC[:, first].to(root_R.device)
            self._starts[name] = (v_IR.T * root_R[:, None], u_OR * root_R)
        self._sums = {}

    def release(self) -> None:
        """Take the hooks off."""
        for hook in getattr(self, "_hooks", ()):
            hook.remove()
        self._hooks: list[Any] = []


def _documents(batch: Any, inputs_BTI: torch.Tensor) -> Iterator[torch.Tensor]:
    """The inputs (T, I) of each document of a batch, packed or padded."""
    if batch.document_lengths is not None:
        yield from inputs_BTI[0].split(list(batch.document_lengths))
        return
    for row_TI, mask_T in zip(inputs_BTI, batch.attention_mask_BT, strict=True):
        yield row_TI[mask_T.bool()]


def _by_decoder_layers(layers: list[tuple[str, Any]], at_once: int | None) -> list[list[tuple[str, Any]]]:
    """Adapted maps in groups of so many decoder layers, one after the other; all together without a number."""
    if at_once is None:
        return [layers]
    groups: dict[str, list[tuple[str, Any]]] = {}
    for name, layer in layers:
        number = next((part for part in name.split(".") if part.isdecimal()), "")
        groups.setdefault(number, []).append((name, layer))
    each = list(groups.values())
    return [[*chain(*each[start : start + at_once])] for start in range(0, len(each), at_once)]
