"""Which combinations are rehearsed: few rows in which every pair of choices meets that the product's rules allow."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

from clusters.capability import DeviceCapability
from strategies import compatibility
from strategies.contract import Method
from strategies.methods.full import Full
from strategies.methods.lora import Lora
from strategies.methods.low_rank_gradients import Apollo, Galore
from strategies.methods.shira import Shira
from strategies.shape import ModelShape
from strategies.workload import Techniques

CONFIG: dict[str, Any] = {
    "model_type": "qwen2",  # its biases make `bias: all` train something
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "vocab_size": 256,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CARDS = {
    "cuda:0": DeviceCapability("cuda", "RTX 3090", 24 * 2**30, compute_capability=(8, 6)),
    "cuda:1": DeviceCapability("cuda", "RTX 2080 Ti", 11 * 2**30, compute_capability=(7, 5)),
}
METHODS: dict[str, Method] = {
    "lora": Lora(lora_r=4, lora_dropout=0.1),
    "dora with biases and a saved module": Lora(lora_r=4, bias="all", use_dora=True, modules_to_save=["lm_head"]),
    "full": Full(),
    "galore": Galore(rank=8),
    "apollo": Apollo(rank=8),
    "shira": Shira(shira_r=4, mask="random"),
}
TECHNIQUES: dict[str, dict[str, Any]] = {
    "plain": {},
    "checkpointing": {"gradient_checkpointing": True},
    "activation offload": {"offload": "activations"},
    "chunked loss, foreach AdamW": {"loss_type": "chunked_nll", "optim": "adamw_torch"},
}
ATTENTION = {"document": True, "sdpa": False, "eager": False}  # kernel -> whether rows are packed


@dataclass(frozen=True)
class Case:
    """One combination, by the names of its parts."""

    method: str
    technique: str
    dtype: str
    attention: str
    device: str

    def __str__(self) -> str:
        return ", ".join((self.method, self.technique, self.dtype, self.attention, self.device))

    def techniques(self) -> Techniques:
        chosen = {"gradient_checkpointing": False, **TECHNIQUES[self.technique]}
        return Techniques(
            dtype=self.dtype,  # type: ignore[arg-type]
            attn_implementation=self.attention,
            packing=ATTENTION[self.attention],
            per_device_train_batch_size=2,
            max_length=9,
            **chosen,
        )

    @property
    def is_fused(self) -> bool:
        """Whether the update's kernel reads off the card itself that a scaled gradient has overflowed."""
        return self.techniques().optim == "adamw_torch_fused" and self.method not in ("galore", "apollo")

    def is_possible(self) -> bool:
        shape = ModelShape.from_config(CONFIG)
        return compatibility.conflict(METHODS[self.method], self.techniques(), CARDS[self.device], shape) is None


def possible() -> list[Case]:
    axes = (METHODS, TECHNIQUES, ("bfloat16", "float16", "float32"), ATTENTION, CARDS)
    return [case for row in itertools.product(*axes) if (case := Case(*row)).is_possible()]


def pairs(case: Case) -> set[tuple[tuple[str, str], ...]]:
    """Every pair of choices of two different axes."""
    return set(itertools.combinations(vars(case).items(), 2))


def pairwise(cases: list[Case]) -> list[Case]:
    """Few of `cases` with every pair that any of them has: again and again the one with most new pairs."""
    missing = set().union(*map(pairs, cases))
    chosen = []
    while missing:
        best = max(cases, key=lambda case: len(pairs(case) & missing))
        chosen.append(best)
        missing -= pairs(best)
    return chosen


CASES = pairwise(possible())
