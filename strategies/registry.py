"""The registries: methods, objectives and techniques by name.  Loads every method; others import it by `strategies`."""

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
