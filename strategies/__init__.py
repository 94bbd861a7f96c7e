"""What each way of training costs and how it changes a model.  Never imports ray.

Two registries: a new method is one line in `METHODS`, and its knobs appear in the job file by themselves; a new
technique is one line in `TECHNIQUES`, and appears in the catalogue and its measurement.
"""

from strategies.contract import Method
from strategies.lsp_offload.method import LspOffload
from strategies.methods.as_techniques import LORA, QLORA_INT8, QLORA_NF4
from strategies.methods.full import Full
from strategies.methods.lora import Lora
from strategies.methods.low_rank_gradients import Apollo, Galore
from strategies.methods.qlora import QLora
from strategies.methods.shira import Shira
from strategies.techniques.attention import EAGER, FLASH, FLEX, SDPA
from strategies.techniques.batching import ACCUMULATION, LENGTH_GROUPING, MICRO_BATCH
from strategies.techniques.checkpointing import CHECKPOINTING
from strategies.techniques.compiling import TORCH_COMPILE
from strategies.techniques.data_shape import LENGTH_LIMIT, PACKING
from strategies.techniques.loss import CHUNKED_LOSS
from strategies.techniques.offload import ACTIVATION_OFFLOAD, OPTIMIZER_OFFLOAD, PARAMETER_OFFLOAD
from strategies.techniques.optimizers import EIGHT_BIT_OPTIMIZER
from strategies.techniques.precision import BF16, FP16
from strategies.techniques.sharding import ZERO_1, ZERO_2, ZERO_3
from strategies.techniques.technique import Technique

METHODS: dict[str, type[Method]] = {
    "lora": Lora,
    "full": Full,
    "qlora": QLora,
    "experimental_lsp_offload": LspOffload,
    "experimental_galore": Galore,
    "experimental_apollo": Apollo,
    "experimental_shira": Shira,
}

TECHNIQUES: tuple[Technique, ...] = (
    LORA,
    QLORA_NF4,
    QLORA_INT8,
    CHECKPOINTING,
    BF16,
    FP16,
    MICRO_BATCH,
    ACCUMULATION,
    LENGTH_GROUPING,
    LENGTH_LIMIT,
    PACKING,
    EAGER,
    SDPA,
    FLASH,
    FLEX,
    ZERO_1,
    ZERO_2,
    ZERO_3,
    OPTIMIZER_OFFLOAD,
    PARAMETER_OFFLOAD,
    ACTIVATION_OFFLOAD,
    EIGHT_BIT_OPTIMIZER,
    CHUNKED_LOSS,
    TORCH_COMPILE,
)
