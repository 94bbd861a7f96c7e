"""A fresh LoRA model that starts from an adapter of another training."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def start_from(peft_model: Any, folder: Path) -> None:
    """Let a fresh LoRA model start from another adapter: truncated to its rank, or filled up with what is fresh.

    Raises ValueError where the adapter corrects maps that this LoRA leaves alone.
    """
    import torch

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
