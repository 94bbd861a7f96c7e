"""How LoRA begins: from an adapter of another training, or with directions of its inputs (EVA)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


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


class EvaStart:
    """Looks at what LoRA's maps read in a few passes before the first step, and lets A begin with it; B stays zero.

    EVA: A starts with the directions in which a map's inputs vary most (Paischer et al., arXiv 2410.07170), by PEFT's
    own incremental PCA over the inputs at supervised tokens of the first samples; every map keeps its rank.
    """

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
