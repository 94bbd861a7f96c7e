"""The registries: methods, objectives and techniques by name.  Loads every method; others import it by `strategies`.

Also whose an adapter's folder is: PEFT's, or that of a method with a format of its own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from clusters.safe.reading import BadInput, read_json
from strategies.adapter_bank.adapter import CONFIG
from strategies.contract import Method
from strategies.lsp_offload.method import LspOffload
from strategies.methods.boosted_lora import BoostedLora
from strategies.methods.full import Full
from strategies.methods.lora import Lora
from strategies.methods.low_rank_gradients import Apollo, Galore
from strategies.methods.peft_config import PeftMethod
from strategies.methods.qlora import QLora
from strategies.methods.shira import Shira
from strategies.mixture.method import MixLora
from strategies.objectives.contract import Objective
from strategies.objectives.dpo import Dpo
from strategies.objectives.ipo import Ipo
from strategies.objectives.kto import Kto
from strategies.objectives.orpo import Orpo
from strategies.objectives.reward import Reward
from strategies.objectives.sft import Sft
from strategies.objectives.simpo import SimPo
from strategies.pruning.method import PrunedLora
from strategies.sparse_memory.method import SparseMemory
from strategies.techniques.catalogue import read_catalogue
from strategies.techniques.technique import Technique

METHODS: dict[str, type[Method]] = {
    "lora": Lora,
    "full": Full,
    "qlora": QLora,
    "experimental_lsp_offload": LspOffload,
    "experimental_galore": Galore,
    "experimental_apollo": Apollo,
    "experimental_shira": Shira,
    "experimental_boosted_lora": BoostedLora,
    "experimental_mixlora": MixLora,
    "experimental_pruned_lora": PrunedLora,
    "experimental_memory": SparseMemory,
    "experimental_peft": PeftMethod,
}
OBJECTIVES: dict[str, type[Objective]] = {  # the default first
    "sft": Sft,
    "dpo": Dpo,
    "ipo": Ipo,
    "simpo": SimPo,
    "orpo": Orpo,
    "kto": Kto,
    "reward": Reward,
}
TECHNIQUES: tuple[Technique, ...] = read_catalogue(METHODS)


def owner_of(folder: Path) -> type[Method] | None:
    """The method whose own format an adapter's folder has; None where PEFT or another program knows it."""
    try:
        settings = read_json(folder / CONFIG) if (folder / CONFIG).is_file() else None
    except BadInput:
        return None
    kind = settings.get("peft_type") if isinstance(settings, dict) else None
    return next((method for method in METHODS.values() if kind and method.own_format == kind), None)


def load_adapter(base: Any, folder: Path) -> Any:
    """The base model with an adapter of a folder: by the method whose format it has, else by PEFT.

    Raises ValueError and what PEFT raises.
    """
    if owner := owner_of(folder):
        return owner.load(base, folder)
    from peft import PeftModel

    return PeftModel.from_pretrained(base, str(folder))
