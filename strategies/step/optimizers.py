"""The optimizers a method may ask for by their Hugging Face names."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch

from strategies.train_setup import TrainSettings

OptimName = Literal["adamw_torch", "adamw_torch_fused", "adamw_bnb_8bit", "sgd", "adafactor"]


def build_optimizer(groups: list[dict[str, Any]], settings: TrainSettings) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter, arXiv 1711.05101), SGD or Adafactor over `groups`.

    A group may carry its own `lr_factor` (LoRA+ trains B faster than A); its `base_lr` is what schedules scale.
    """
    for group in groups:
        group["base_lr"] = group["lr"] = settings.learning_rate * group.pop("lr_factor", 1.0)
    decay = settings.weight_decay
    if settings.optim in ("adamw_torch", "adamw_torch_fused"):
        betas = (settings.adam_beta1, settings.adam_beta2)
        fused = settings.optim == "adamw_torch_fused"
        return torch.optim.AdamW(groups, betas=betas, eps=settings.adam_epsilon, weight_decay=decay, fused=fused)
    if settings.optim == "adamw_bnb_8bit":
        from bitsandbytes.optim.adamw import AdamW8bit

        betas = (settings.adam_beta1, settings.adam_beta2)
        return AdamW8bit(groups, betas=betas, eps=settings.adam_epsilon, weight_decay=decay)
    if settings.optim == "sgd":
        return torch.optim.SGD(groups, weight_decay=decay)
    if settings.optim == "adafactor":
        return torch.optim.Adafactor(groups, weight_decay=decay)
    raise ValueError(f"optim {settings.optim!r} is not one of {', '.join(get_args(OptimName))}")
