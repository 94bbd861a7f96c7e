"""Liger's kernels in a model that is loaded: norms, rotary positions and gated MLPs in one kernel each.

Hsu et al., arXiv 2410.10989; Triton, for NVIDIA's GPUs.  Its loss is not taken: here logits exist at supervised
positions alone already (supervised_logits.py), in chunks where memory is short.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

_ROTARY = "apply_rotary_pos_emb"  # a function of the family's module, not of a model
_KERNELS = {"rope": True, "rms_norm": True, "swiglu": True, "geglu": True}
_LOSSES = {"cross_entropy": False, "fused_linear_cross_entropy": False}


def use_liger(model: Any) -> None:
    """Let this model's norms and gated MLPs, and its family's rotary positions on GPUs, be computed by Liger's kernels.

    Liger also replaces the family's classes, so that any model that is loaded later computes with them, on a CPU too:
    that is taken back.  Raises ValueError for a model that is not transformers' own.
    """
    from liger_kernel.transformers.monkey_patch import _apply_liger_kernel_to_instance

    family = sys.modules[type(model).__module__]
    if not family.__name__.startswith("transformers.models."):
        raise ValueError(f"use_liger_kernel: {type(model).__name__} is not transformers' own model: set it to false")
    before = dict(vars(family))
    _apply_liger_kernel_to_instance(model, **_KERNELS, **_LOSSES)
    _restore(family, before)


def _restore(family: ModuleType, before: dict[str, Any]) -> None:
    """The module's names as they were; rotary positions by where the tensors lie."""
    for name, value in before.items():
        now = getattr(family, name)
        if now is value:
            continue
        takes_both = name == _ROTARY and not hasattr(value, "by_device")
        setattr(family, name, _by_device(value, now) if takes_both else value)


def _by_device(plain: Callable[..., Any], fused: Callable[..., Any]) -> Callable[..., Any]:
    def apply_rotary_pos_emb(q: Any, *arguments: Any, **named: Any) -> Any:
        return (fused if q.is_cuda else plain)(q, *arguments, **named)

    apply_rotary_pos_emb.by_device = True  # type: ignore[attr-defined]
    return apply_rotary_pos_emb
