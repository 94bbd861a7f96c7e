"""Any of PEFT's methods that trains without a look at data, by its own configuration (https://huggingface.co/docs/peft).

What trains is counted by PEFT itself, on a skeleton of the model without weights.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any, ClassVar

from clusters.safe.reading import first_line
from strategies.cost.memory import Footprint
from strategies.cost.plan import Costs, PredictedMethod
from strategies.cost.work import Work
from strategies.export import Export, Loader
from strategies.methods import peft_fields
from strategies.model import targets
from strategies.model.architecture import Architecture
from strategies.shape import ModelShape
from strategies.train_setup import TrainSettings, TrainSetup
from strategies.workload import BYTES_PER_ELEMENT, Techniques

# Types that tests/strategies/test_peft_config.py trains, hands back and loads again.
KNOWN = (
    *("BOFT", "C3A", "DELORA", "FOURIERFT", "HIRA", "HRA", "IA3", "LN_TUNING", "LOHA", "LOKR"),
    *("MISS", "OFT", "RANDLORA", "ROAD", "VBLORA", "VERA", "WAVEFT"),
)
# Those that build a whole correction or weight for every map in every pass, and keep it for the backward pass.
_WHOLE_MAPS = ("BOFT", "C3A", "FOURIERFT", "HIRA", "LOHA", "LOKR", "RANDLORA", "WAVEFT")
_SHARED = ("VBLORA", "VERA")  # weights of all layers, which PEFT puts in with the whole model alone
_OTHERS = {
    "LORA": "set method.type: lora, which the plan counts exactly",
    "SHIRA": "set method.type: experimental_shira",
    "TRAINABLE_TOKENS": "set method.type: lora with trainable_token_indices",
    "ADALORA": "it moves its ranks after every step, which nothing here tells it to do; use lora",
    "XLORA": "it mixes adapters that are trained already; see the bank",
    "POLY": "it asks each row for a task, and rows have none",
    **dict.fromkeys(
        ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT", "CARTRIDGE"),
        "it puts virtual tokens before each row, and rows are packed here; use lora",
    ),
}


@dataclass(frozen=True)
class PeftMethod(PredictedMethod):
    """One of PEFT's methods by its configuration: {peft_type: OFT, oft_block_size: 32, target_modules: all-linear}.

    Memory: the frozen weights in the compute precision, 16 bytes a trained parameter; of methods that build whole
    corrections an upper bound, all of them in fp32 at once.
    """

    config: dict[str, Any] = field(
        default_factory=lambda: {"peft_type": "OFT", "oft_block_size": 32, "target_modules": targets.ALL},
        metadata={"doc": "fields of PEFT's configuration class and peft_type, e.g. OFT, BOFT, VERA, LOHA, LOKR, IA3"},
    )

    name: ClassVar[str] = "experimental_peft"
    full_rank: ClassVar[bool] = False
    keeps_base_frozen: ClassVar[bool] = True
    is_proposed: ClassVar[bool] = False

    @property
    def kind(self) -> str:
        """The `peft_type` in capitals."""
        return str(self.config.get("peft_type", "")).upper()

    @property
    def layers_are_alike(self) -> bool:
        return self.config.get("layers_to_transform") is None

    @property
    def has_dropout(self) -> bool:
        return any("dropout" in name and value for name, value in self.config.items())

    @property
    def _options(self) -> dict[str, Any]:
        return {name: value for name, value in self.config.items() if name != "peft_type"}

    def why_alone(self) -> str | None:
        return f"{self.kind} is more than pairs of A and B over a base that stays as it is"

    def refuses(self, techniques: Techniques, shape: ModelShape) -> str | None:
        if self.kind not in KNOWN:
            return self._why_unknown()
        if peft_fields.known_fields() is None:
            return "PEFT counts what it trains, and is not installed here: pip install peft"
        if found := peft_fields.mistakes(self.kind, self._options):
            return found[0].removeprefix("method.")
        if techniques.uses_engine or techniques.streams_weights or techniques.stage:
            return f"{self.kind} is untested with DeepSpeed, streamed weights and stages: set strategy.mode: ddp"
        if shape.model_type == "gpt2" or shape.num_experts:
            return f"{self.kind} is untested on GPT-2's Conv1D and on stacked experts: set method.type: lora"
        try:
            self._count(shape)
        except Exception as error:  # PEFT's classes raise whatever they like
            text = str(error).strip().splitlines() or [type(error).__name__]
            return f"config: PEFT's {self.kind} refuses these options: {text[0][:200]}"
        return None

    def _why_unknown(self) -> str:
        known = f"known: {', '.join(KNOWN)}"
        if not self.kind:
            return f"config names no peft_type; {known}"
        return f"config.peft_type {self.kind}: {_OTHERS.get(self.kind, f'it is not among those tried here; {known}')}"

    def find_misfits(self, architecture: Architecture) -> list[str]:
        return peft_fields.mistakes(self.kind, self._options)

    def exports(self, shape: ModelShape) -> Export:
        """PEFT's; vLLM's and llama.cpp's loaders know LoRA's tensors and no others."""
        unknown = f"it knows LoRA's pairs of A and B, and no {self.kind}"
        cannot: dict[Loader, str] = {"vllm": unknown, "llama.cpp": unknown}
        if self.kind in _SHARED:
            cannot["transformers"] = "its load_adapter refuses methods whose layers share weights"
        return Export("peft-other", cannot)

    def trains_outside_layers(self, shape: ModelShape) -> bool:
        return bool(self.config.get("modules_to_save"))

    def costs(self, shape: ModelShape, techniques: Techniques) -> Costs:
        g, num_trainable = BYTES_PER_ELEMENT[techniques.dtype], self._count(shape)
        inside = [linear for name, (_, linear) in shape.named_maps.items() if name not in shape.outside]
        elements = sum(linear.inputs * linear.outputs for linear in inside)
        builds = self.kind in _WHOLE_MAPS
        footprint = Footprint(
            weights_bytes=g * shape.num_parameters + 4.0 * num_trainable,
            num_trainable=num_trainable,
            stream_bytes=g,
            inputs_per_token=4.0 * sum(linear.inputs for linear in inside) / shape.num_layers,
            output_is_kept=True,
            product_is_kept=True,
            norms_train=self.kind == "LN_TUNING",
            cast_bytes=4.0 * elements if builds else 0.0,
            num_outside=num_trainable,
        )
        work = Work(
            trains_weights=builds,  # a whole correction has a gradient as whole as the weight's
            adapter_parameters=0 if builds else num_trainable,
            num_adapters=len(inside) // shape.num_layers,
            num_trainable=num_trainable,
            num_tensors=2 * len(inside),
            cast_parameters=elements if builds else 0,
        )
        return Costs(footprint, work)

    def _count(self, shape: ModelShape) -> int:
        return _count_on_skeleton(shape, self.kind, json.dumps(self._options, sort_keys=True, default=str))

    def setup(self, model: Any, settings: TrainSettings) -> TrainSetup:
        import torch
        from peft import get_peft_model

        from strategies.model.heads import outside_layers, undecayed
        from strategies.step.optimizers import build_optimizer
        from strategies.step.state import save_adapter
        from strategies.techniques.precision import train_in_fp32

        model.requires_grad_(False)
        torch.manual_seed(settings.seed)  # what is random every worker must draw alike
        config = build_config(self.kind, self._options, task_type="CAUSAL_LM")
        with warnings.catch_warnings(record=True) as messages:
            warnings.simplefilter("always")
            peft_model = get_peft_model(model, config)
        notes = dict.fromkeys(f"PEFT: {first_line(str(one.message))}" for one in messages)
        train_in_fp32(peft_model)
        parameters = {name: p for name, p in peft_model.named_parameters() if p.requires_grad}
        optimizer = build_optimizer(
            [{"params": list(parameters.values())}], settings, outside_layers(peft_model), undecayed(peft_model)
        )

        export = partial(save_adapter, peft_model)
        return TrainSetup(peft_model, optimizer, parameters, export, export_format="peft-other", notes=tuple(notes))


def build_config(kind: str, options: Mapping[str, Any], **more: Any) -> Any:
    """PEFT's configuration object.  Raises what its class raises."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    classes = {str(getattr(name, "value", name)): found for name, found in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    return classes[kind](**json.loads(json.dumps(dict(options))), **more)  # PEFT changes lists that it is given


@lru_cache(256)
def _count_on_skeleton(shape: ModelShape, kind: str, options: str) -> int:
    """Parameters that PEFT trains: its layers put into modules of the model's names and sizes, without memory."""
    import torch
    from peft import get_peft_model

    with torch.device("meta"):
        skeleton = _skeleton(shape)
    skeleton.requires_grad_(False)
    values = json.loads(options)
    if values.get("target_modules") == targets.ALL:
        inside = [name for name in shape.named_maps if name not in shape.outside]
        values["target_modules"] = sorted({name.rsplit(".", 1)[-1] for name in inside})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of kinds of modules, which are none here
        filled: Any = get_peft_model(skeleton, build_config(kind, values), low_cpu_mem_usage=True)
    return sum(parameter.numel() for parameter in filled.parameters() if parameter.requires_grad)


def _skeleton(shape: ModelShape) -> Any:
    """Modules with the names and sizes of a model's maps and norms."""
    import torch
    from torch.nn import Embedding, Linear, Module, Parameter

    root = Module()

    def put(name: str, module: Any) -> None:
        *above, last = name.split(".")
        at = root
        for part in above:
            if not hasattr(at, part):
                at.add_module(part, Module())
            at = getattr(at, part)
        at.add_module(last, module)

    for name, (_, linear) in shape.named_maps.items():
        if linear.reads == "tokens":
            put(name, Embedding(linear.inputs, linear.outputs))
        else:
            put(name, Linear(linear.inputs, linear.outputs, bias=linear.bias))
    for name, (_, part) in shape.named_parts.items():
        module = Module()
        module.weight = Parameter(torch.empty(part.num_parameters))
        put(name, module)
    return root
