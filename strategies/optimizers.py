"""What each optimizer keeps and needs, by transformers' names.  Pure; step/optimizers.py builds them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

ADAM_NUMBERS = ("adam_beta1", "adam_beta2", "adam_epsilon")
_BETAS, _NONE = ADAM_NUMBERS[:2], ()
Sight = Literal["element", "matrix"]  # what one update looks at: each number alone, or a whole matrix


@dataclass(frozen=True)
class OptimizerFacts:
    """An optimizer as the planner sees it."""

    state_bytes: float  # of one trained parameter, from step to step
    sees: Sight = "element"
    library: str = ""  # that brings it, beside torch
    is_paged: bool = False  # its state lies in memory that a GPU's driver moves to the host and back
    outside_bytes: float | None = None  # of a parameter that is no matrix of a layer; None = the same
    copies: float = 0.0  # numbers beside each parameter while it is updated
    orthogonalises: bool = False  # products with each matrix at every update
    averages: bool = False  # trains between two points and hands back their average; its rate needs no schedule
    warms_up: bool = True  # its rate rises in so many first steps as the job says
    adam_numbers: tuple[str, ...] = ADAM_NUMBERS  # of a job that it reads

    @property
    def has_eight_bit_state(self) -> bool:
        """Whether its state is unpacked and packed again, block by block."""
        return self.library == "bitsandbytes" and self.state_bytes % 4 != 0

    def schedule_mistakes(self, name: str, stated: Mapping[str, Any]) -> list[str]:
        """What a job states of the learning rate that this optimizer does by itself, a sentence each."""
        if not self.averages:
            return []
        found, kind = [], stated.get("lr_scheduler_type", "constant")
        if kind not in _CONSTANT:
            found.append(
                f"train.lr_scheduler_type is {kind!r}, and {name} averages its way instead of lowering the rate: remove"
                " it, or set it to constant"
            )
        if not self.warms_up and (key := next((key for key in _WARM_UP if stated.get(key)), None)):
            found.append(f"train.{key}: {name} warms up by itself; remove it")
        if stated.get("adam_beta1") == 0:
            found.append(f"train.adam_beta1 is 0, and {name} averages by it: raise it (0.9)")
        return found

    @property
    def follows_entries(self) -> bool:
        """Whether each number of its state is one of a vector's entries in fp32, so that it can move with the entry.

        Not codes of 8 bits, AdEMAMix's two moments in one tensor, or averages of weights.
        """
        return not self.averages and self.state_bytes in (0.0, 4.0, 8.0)

    def bytes_of(self, num_trainable: int, num_outside: int) -> float:
        """State of so many trained parameters, some of which are no matrices of layers."""
        outside = self.state_bytes if self.outside_bytes is None else self.outside_bytes
        return self.state_bytes * (num_trainable - num_outside) + outside * num_outside


_CONSTANT, _WARM_UP = ("constant", "constant_with_warmup"), ("warmup_steps", "warmup_ratio")
_SCALE = 4.0 / 256  # an fp32 scale a block of 256 (Dettmers et al., arXiv 2110.02861)
_BNB, _SCHEDULE_FREE = "bitsandbytes", "schedulefree"
OPTIMIZERS: dict[str, OptimizerFacts] = {
    "adamw_torch": OptimizerFacts(8.0, copies=1.0),
    "adamw_torch_fused": OptimizerFacts(8.0),
    "adamw_bnb_8bit": OptimizerFacts(2.0 + 2 * _SCALE, library=_BNB),
    "adamw_8bit": OptimizerFacts(2.0 + 2 * _SCALE, library=_BNB),  # transformers' other name of it
    "paged_adamw_32bit": OptimizerFacts(8.0, library=_BNB, is_paged=True),
    "paged_adamw_8bit": OptimizerFacts(2.0 + 2 * _SCALE, library=_BNB, is_paged=True),
    "ademamix": OptimizerFacts(12.0, library=_BNB),  # two first moments and a second one (arXiv 2409.03137)
    "ademamix_8bit": OptimizerFacts(3.0 + 3 * _SCALE, library=_BNB),
    "paged_ademamix_32bit": OptimizerFacts(12.0, library=_BNB, is_paged=True),
    "paged_ademamix_8bit": OptimizerFacts(3.0 + 3 * _SCALE, library=_BNB, is_paged=True),
    "lion_32bit": OptimizerFacts(4.0, library=_BNB, adam_numbers=_BETAS),  # one moment (arXiv 2302.06675)
    "lion_8bit": OptimizerFacts(1.0 + _SCALE, library=_BNB, adam_numbers=_BETAS),
    "paged_lion_32bit": OptimizerFacts(4.0, library=_BNB, is_paged=True, adam_numbers=_BETAS),
    "paged_lion_8bit": OptimizerFacts(1.0 + _SCALE, library=_BNB, is_paged=True, adam_numbers=_BETAS),
    "adagrad": OptimizerFacts(4.0, copies=2.0, adam_numbers=_NONE),
    "rmsprop": OptimizerFacts(4.0, copies=2.0, adam_numbers=_NONE),
    "rmsprop_bnb": OptimizerFacts(4.0, library=_BNB, adam_numbers=_NONE),
    "rmsprop_bnb_32bit": OptimizerFacts(4.0, library=_BNB, adam_numbers=_NONE),
    "rmsprop_bnb_8bit": OptimizerFacts(1.0 + _SCALE, library=_BNB, adam_numbers=_NONE),
    "sgd": OptimizerFacts(0.0, adam_numbers=_NONE),
    # Rows and columns only (arXiv 1804.04235): below a thousandth.
    "adafactor": OptimizerFacts(0.0, "matrix", adam_numbers=_NONE),
    # Schedule-free: the point z beside the one whose gradients are taken, and a second moment (arXiv 2405.15682).
    "schedule_free_adamw": OptimizerFacts(8.0, library=_SCHEDULE_FREE, copies=1.0, averages=True),
    "schedule_free_radam": OptimizerFacts(8.0, library=_SCHEDULE_FREE, copies=1.0, averages=True, warms_up=False),
    "schedule_free_sgd": OptimizerFacts(4.0, library=_SCHEDULE_FREE, averages=True, adam_numbers=_NONE),
    "muon": OptimizerFacts(4.0, "matrix", outside_bytes=8.0, orthogonalises=True),  # a moment, orthogonalised
}


def _as_method(name: str) -> str:
    return f"it is a training method here, which the plan counts: method.type: {name}"


_NO_TENSORS = "what it keeps beside tensors would not be in a checkpoint, so that no resume would be exact"
REFUSED: dict[str, str] = {
    **dict.fromkeys(("galore_adamw", "galore_adamw_8bit", "galore_adafactor"), _as_method("experimental_galore")),
    **dict.fromkeys(
        ("galore_adamw_layerwise", "galore_adamw_8bit_layerwise", "galore_adafactor_layerwise"),
        _as_method("experimental_galore"),
    ),
    **dict.fromkeys(("apollo_adamw", "apollo_adamw_layerwise"), _as_method("experimental_apollo")),
    **dict.fromkeys(
        ("lomo", "adalomo"),
        "it updates weights inside the backward pass, before other workers' gradients are there; use adafactor or sgd",
    ),
    **dict.fromkeys(
        ("adamw_torch_4bit", "adamw_torch_8bit"),
        "torchao's packed states are no plain tensors, and checkpoints hold plain ones; use adamw_bnb_8bit",
    ),
    **dict.fromkeys(("adamw_torch_xla", "adamw_torch_npu_fused"), "there is no such device here; use adamw_torch"),
    "adamw_anyprecision": "its library (torchdistx) is no longer kept; use adamw_torch_fused, whose states are fp32",
    "grokadamw": f"{_NO_TENSORS}; use adamw_torch_fused",
    "stable_adamw": "its library (torch-optimi) was not tried here; use adamw_torch_fused with train.max_grad_norm",
}
