"""A frozen linear map and its low-rank correction as one differentiable function, in any of RunLoRA's orders.

Beside the order of the products it saves passes over inputs and outputs: the correction is added inside its product,
and neither is cast nor scaled apart.  `lora_forms.py` says what each order is and which is the cheapest.

Legend: T tokens, I inputs and O outputs of the map, R rank.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from strategies.techniques.lora_forms import Form, MapSizes, cheapest
from strategies.techniques.precision import draws


class CorrectedLinear(torch.autograd.Function):
    """x W^T + bias + s (x A^T) B^T with W and bias frozen; A and B are cast to x's precision, their gradients back.

    Kept for the backward pass: x, and x A^T where the forward pass has computed it, R numbers a token.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x_TI: torch.Tensor,
        frozen: tuple[torch.Tensor, torch.Tensor | None],
        a_RI: torch.Tensor,
        b_OR: torch.Tensor,
        scaled: tuple[float, Form],
    ) -> torch.Tensor:
        (weight_OI, bias_O), (scaling, form) = frozen, scaled
        ctx.scaling, ctx.form, ctx.dtypes = scaling, form, (a_RI.dtype, b_OR.dtype)
        a_RI, b_OR = a_RI.to(x_TI.dtype), b_OR.to(x_TI.dtype)
        hidden_TR = None
        if form.merges_forward:
            merged_OI = torch.addmm(weight_OI, b_OR, a_RI, alpha=scaling)
            y_TO = torch.nn.functional.linear(x_TI, merged_OI, bias_O)
        else:
            y_TO = torch.nn.functional.linear(x_TI, weight_OI, bias_O)
            hidden_TR = x_TI @ a_RI.t()
            y_TO.addmm_(hidden_TR, b_OR.t(), alpha=scaling)
        ctx.save_for_backward(x_TI, weight_OI, a_RI, b_OR, hidden_TR)
        return y_TO

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_TO: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        x_TI, weight_OI, a_RI, b_OR, hidden_TR = ctx.saved_tensors
        form, scaling, needs_x = ctx.form, ctx.scaling, ctx.needs_input_grad[0]
        grad_TR = grad_OI = grad_TI = None
        if not form.a_by_weight or (needs_x and not form.merges_backward):
            grad_TR = (grad_TO @ b_OR).mul_(scaling)
        if form.a_by_weight or form.b_by_weight:
            grad_OI = (grad_TO.t() @ x_TI).mul_(scaling)
        grad_a_RI = b_OR.t() @ grad_OI if form.a_by_weight else grad_TR.t() @ x_TI  # type: ignore[union-attr]
        if form.b_by_weight:
            grad_b_OR = grad_OI @ a_RI.t()  # type: ignore[operator]
        else:
            hidden_TR = x_TI @ a_RI.t() if hidden_TR is None else hidden_TR
            grad_b_OR = (grad_TO.t() @ hidden_TR).mul_(scaling)
        if needs_x and form.merges_backward:
            grad_TI = grad_TO @ torch.addmm(weight_OI, b_OR, a_RI, alpha=scaling)
        elif needs_x:
            grad_TI = (grad_TO @ weight_OI).addmm_(grad_TR, a_RI)
        return grad_TI, None, grad_a_RI.to(ctx.dtypes[0]), grad_b_OR.to(ctx.dtypes[1]), None


def fuse(model: torch.nn.Module, order: Callable[[MapSizes, int], Form] = cheapest) -> tuple[str, ...]:
    """Compute the corrected maps of a PEFT model so in training; a note of those that stay PEFT's.

    `order` chooses by a map's sizes and the bytes of an element.

    PEFT's layers remain, with all that they can do beside it: export, merging, evaluation.
    """
    layers = {name: layer for name, layer in model.named_modules() if hasattr(layer, "lora_A")}
    fused = {name: layer for name, layer in layers.items() if is_plain(layer)}
    for layer in fused.values():
        layer.forward = partial(_forward, layer, order)
    left = sorted(layers.keys() - fused.keys())
    if not left:
        return ()
    return (f"method.fused: {len(left)} of {len(layers)} corrections are not of plain linear maps, e.g. {left[0]}",)


def is_plain(layer: Any) -> bool:
    """Whether a layer of PEFT's is a plain linear map with one pair of matrices and nothing else."""
    from peft.tuners.lora.layer import Linear

    base = layer.base_layer if type(layer) is Linear else None
    if type(base) is not torch.nn.Linear or layer.lora_variant or draws(layer) or any(layer.lora_bias.values()):
        return False
    return list(layer.lora_A) == ["default"] and not any(p.requires_grad for p in base.parameters())


def _forward(
    layer: Any, order: Callable[[MapSizes, int], Form], x: torch.Tensor, *args: Any, **kwargs: Any
) -> torch.Tensor:
    weight_OI, a_RI = layer.base_layer.weight, layer.lora_A["default"].weight
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    trains = torch.is_grad_enabled() and not (layer.disable_adapters or layer.merged or args or kwargs)
    if not trains or weight_OI.dtype != dtype:
        return type(layer).forward(layer, x, *args, **kwargs)
    x_TI = x.reshape(-1, x.shape[-1]).to(dtype)
    outputs, inputs = weight_OI.shape
    form = order(MapSizes(len(x_TI), inputs, outputs, len(a_RI)), dtype.itemsize)
    frozen = weight_OI, layer.base_layer.bias
    b_OR = layer.lora_B["default"].weight
    y_TO = CorrectedLinear.apply(x_TI, frozen, a_RI, b_OR, (layer.scaling["default"], form))
    return y_TO.view(*x.shape[:-1], -1)  # type: ignore[union-attr]
