"""ZeRO: devices keep parts of what each would otherwise keep whole (Rajbhandari et al., arXiv 1910.02054)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from strategies.techniques.libraries import lacks
from strategies.techniques.technique import Choice, Technique

DECIDED = {  # what the plan decides, and where a job says it instead
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.per_device_train_batch_size",
    "gradient_accumulation_steps": "train.gradient_accumulation_steps",
    "gradient_clipping": "train.max_grad_norm",
    "optimizer": "train.optim",
    "scheduler": "train.lr_scheduler_type",
    "bf16": "model.dtype",
    "fp16": "model.dtype",
    "zero_optimization.stage": "strategy.mode",
    "zero_optimization.offload_optimizer": "strategy.offload",
    "zero_optimization.offload_param": "strategy.offload",
}


def _stage(stage: int) -> Callable[[Choice], Choice]:
    return lambda choice: choice.with_(zero_stage=stage, num_shards=max(2, choice.techniques.num_shards))


def _technique(stage: int, about: str) -> Technique:
    return Technique(
        name=f"ZeRO-{stage}",
        about=about,
        switch=f"strategy.mode: zero{stage}",
        on=_stage(stage),
        off=lambda choice: choice.with_(zero_stage=0),
        impossible=(lambda device, shape: lacks(device, "deepspeed")) if stage > 1 else (lambda device, shape: None),
        needs_devices=2,
        saves_first="memory",
    )


ZERO_1 = _technique(1, "the optimizer's state is divided among the devices, by their memory where they differ")
ZERO_2 = _technique(2, "gradients too")
ZERO_3 = _technique(3, "weights too: each layer is gathered when it is needed, over the network")


def refused_keys(overrides: Mapping[str, Any]) -> dict[str, str]:
    """Keys of `strategy.deepspeed` that the plan decides -> the job's key that says it."""
    flat = {f"{key}.{inner}" for key, value in overrides.items() if isinstance(value, Mapping) for inner in value}
    return {key: where for key, where in DECIDED.items() if key in overrides or key in flat}
