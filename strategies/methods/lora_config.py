"""LoRA's options as PEFT's configuration."""

from __future__ import annotations

from typing import Any

from strategies.cost.work import Look
from strategies.model import targets
from strategies.model.architecture import architecture_of
from strategies.shape import ModelShape
from strategies.workload import Techniques

# FLOP of LAPACK's singular values with vectors, of m x n^2, and of an inverse, of n^3, at the speed of products: 11 to
# 19 and 2.9 to 3.8 on one core (LOG.md, CorDA).
_SVD, _INVERSE = 16, 5.4


LOOK_FIRST = ("eva", "corda")  # ways to begin that look at inputs before the first step


def why_not_start(lora: Any, techniques: Techniques, shape: ModelShape) -> str | None:
    """Why A and B cannot begin as `init_lora_weights` says; None where they can."""
    start = str(lora.init_lora_weights)
    if start.startswith("pissa_niter"):
        return (
            f"init_lora_weights: {start} changes the base by random numbers that nobody who loads the adapter draws"
            " again: it would not be what was trained. Use pissa"
        )
    if start == "loftq":
        return f"init_lora_weights: {start} needs a preparation that is not made here. Use true or pissa"
    together = techniques.uses_engine or techniques.streams_weights or techniques.stage or techniques.torch_compile
    if start in LOOK_FIRST and (together or shape.num_experts):
        return (
            f"init_lora_weights: {start} looks at every map's inputs before the first step, which is untested with"
            " DeepSpeed, streamed weights, stages, torch.compile and experts: use true"
        )
    return _why_no_corda(lora, techniques, shape) if start == "corda" else None


def _why_no_corda(lora: Any, techniques: Techniques, shape: ModelShape) -> str | None:
    what = "init_lora_weights: corda"
    if lora.is_quantised:
        return f"{what} takes weights apart, of which a quantised base has rounded ones: use method.type lora, or true"
    if techniques.averages_products or lora.fused:
        return f"{what} keeps a correction beside the pair, as strategy.local_steps_merge and fused do: set one aside"
    others = {
        "use_dora": lora.use_dora,
        "modules_to_save": bool(lora.modules_to_save or shape.num_scores),
        "trainable_token_indices": bool(lora.trainable_token_indices),
        "target_parameters": bool(lora.target_parameters),
        f"bias: {lora.bias}": lora.bias != "none",
    }
    if named := [name for name, is_set in others.items() if is_set]:
        return f"{what} hands back pairs of A and B alone, and {' and '.join(named)} trains more: leave it out"
    outside = {linear.name for layer, linear in targets.adapted_maps(shape, lora._choice).maps if layer is None}
    if outside:
        return f"{what} is of linear maps in layers: leave {' and '.join(sorted(outside))} out of lora_target_modules"
    return None


def look_of(lora: Any, chosen: targets.AdaptedMaps) -> Look | None:
    """What `corda` looks at and computes before the first step; None where nothing is."""
    if lora.init_lora_weights != "corda" or not chosen.maps:
        return None
    layers, at_once = chosen.layers, lora.corda_layers or chosen.layers
    looks = -(-layers // at_once)
    squares = {(layer, linear.reads): linear.inputs**2 for layer, linear in chosen.maps}
    sides = [(linear.outputs, linear.inputs, min(linear.outputs, linear.inputs)) for _, linear in chosen.maps]
    flops = sum(
        _SVD * max(o, i) * least**2 + _INVERSE * i**3 + 2 * o * i**2 + 2 * least * i**2 for o, i, least in sides
    )
    # Covariances of a look, and of the map that is taken apart: W C, U, V and V C^-1, C, its inverse, a test of it.
    largest = max(4 * i**2 + 2 * o * i + 2 * least * (o + i) for o, i, least in sides)
    return Look(lora.corda_rows, looks, 4.0 * (sum(squares.values()) * at_once / layers + largest), float(flops))


def build_lora_config(lora: Any, model: Any) -> Any:
    """PEFT's configuration of a `Lora`'s options for this model."""
    from peft import LoraConfig

    from strategies.model.heads import has_score

    # `EvaStart` gives A its directions, `CordaStart` A and B.
    start = True if lora.init_lora_weights in LOOK_FIRST else lora.init_lora_weights
    is_transposed = any(type(module).__name__ == "Conv1D" for module in model.modules())  # GPT-2's linear maps
    return LoraConfig(
        fan_in_fan_out=is_transposed,
        r=lora.lora_r,
        lora_alpha=whole_if_possible(lora.lora_alpha),  # type: ignore[arg-type]  # PEFT computes with any number
        lora_dropout=lora.lora_dropout,
        target_modules=_targets(lora, model),
        layers_to_transform=lora.layers_to_transform,
        modules_to_save=list(lora.modules_to_save) if lora.modules_to_save else None,  # PEFT adds the score to it
        trainable_token_indices=lora.trainable_token_indices,
        target_parameters=lora.target_parameters,
        bias=lora.bias,
        use_dora=lora.use_dora,
        use_rslora=lora.use_rslora,
        init_lora_weights=start,  # type: ignore[arg-type]
        task_type="SEQ_CLS" if has_score(model) else "CAUSAL_LM",
    )


def _targets(lora: Any, model: Any) -> str | list[str]:
    """The targets in a form that PEFT accepts together with a choice of layers: names, no expression."""
    if lora.layers_to_transform is None or isinstance(lora.lora_target_modules, list):
        return lora.lora_target_modules
    built = architecture_of(model)
    if lora.lora_target_modules == targets.ALL:
        return sorted(built.last_names(built.linear_maps))
    found = targets.resolve_targets(lora.lora_target_modules, tuple(built.modules), built.linear_maps)
    return [name for name in found if built.layer_of(name) in lora.layers_to_transform]


def whole_if_possible(value: float) -> float:
    """32 for 32.0: other readers of adapter_config.json, e.g. Ollama's, take whole numbers alone."""
    return int(value) if float(value).is_integer() else value
