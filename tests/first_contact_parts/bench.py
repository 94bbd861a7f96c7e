"""The card that is looked at, and small models that are trained on it by the product's own set-up and step."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from clusters.capability import DeviceCapability, NodeCapability
from orchestrator.lifecycle.technique_report import REFERENCES
from strategies.contract import Method
from strategies.measure.techniques import Side
from strategies.shape import ModelShape
from strategies.techniques.technique import Choice
from strategies.workload import Techniques
from tests.benchmarks.predictions import workload_of

TINY: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "intermediate_size": 512,
    "vocab_size": 2048,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "pad_token_id": 2047,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA_1B: dict[str, Any] = {**TINY, **REFERENCES["Llama-3.2-1B"]}
_OF_SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}


@dataclass(frozen=True)
class Bench:
    """A device as PyTorch and as the planner know it."""

    device: torch.device
    node: NodeCapability
    capability: DeviceCapability
    is_small: bool = False  # a dry run: sizes from which nothing can be concluded about cost

    @property
    def is_gpu(self) -> bool:
        return self.device.type == "cuda"

    @cached_property
    def half(self) -> Any:
        """The 16-bit format that the card multiplies in hardware."""
        old = self.is_gpu and torch.cuda.get_device_capability(self.device) < (8, 0)
        return "float16" if old else "bfloat16"

    @property
    def tiny(self) -> dict[str, Any]:
        return {**TINY, **_OF_SMALL} if self.is_small else TINY

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of the documents of a step: unlike, and none a round number."""
        return (50, 22, 37, 15) if self.is_small else (200, 90, 150, 60)

    @property
    def long(self) -> int:
        """Tokens of a document where memory and time are measured."""
        return 64 if self.is_small else 1024

    @property
    def large(self) -> dict[str, Any]:
        return self.tiny if self.is_small else LLAMA_1B

    def side(
        self,
        method: Method,
        techniques: Techniques,
        lengths: Sequence[int],
        config: dict[str, Any],
        on_cpu: bool = False,
    ) -> Side:
        """A model of random weights ready to be trained on samples of `lengths` tokens, all of them one step."""
        work = workload_of(lengths, ModelShape.from_config(config))
        where = self.cpu if on_cpu else self.capability
        return Side(Choice(work, method, techniques), where, config, lengths)

    @property
    def cpu(self) -> DeviceCapability:
        assert self.node.cpu is not None  # every probed node has one
        return self.node.cpu

    def wait(self) -> None:
        """Until the card has done all it was given."""
        if self.is_gpu:
            torch.cuda.synchronize(self.device)

    def clear(self) -> None:
        """Give back what nobody refers to any more, and count peaks from here."""
        gc.collect()
        if self.is_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)


def weights_of(side: Side) -> list[torch.Tensor]:
    """The trained weights as they are now, on the CPU."""
    return [parameter.detach().float().cpu() for parameter in side.setup.parameters.values()]


def largest_difference(first: Sequence[torch.Tensor], second: Sequence[torch.Tensor]) -> float:
    """Of two sets of weights; 0 where they are bit-equal."""
    return max((a - b).abs().max().item() for a, b in zip(first, second, strict=True))
