"""Which keys of DeepSpeed's configuration the plan decides."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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


def refused_keys(overrides: Mapping[str, Any]) -> dict[str, str]:
    """Keys of `strategy.deepspeed` that the plan decides -> the job's key that says it."""
    flat = {f"{key}.{inner}" for key, value in overrides.items() if isinstance(value, Mapping) for inner in value}
    return {key: where for key, where in DECIDED.items() if key in overrides or key in flat}
