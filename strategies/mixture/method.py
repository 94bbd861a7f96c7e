"""MixLoRA: each MLP's maps are corrected by pairs of A and B, of which a router chooses some for each token."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from strategies.contract import option
from strategies.cost.plan import Costs, PredictedMethod
from strategies.export import Export, Loader
from strategies.methods.fused_maps import OPERATIONS
from strategies.methods.lora import Lora
from strategies.mixture.folder import FORMAT, MixtureConfig, put_on, save
from strategies.shape import ModelShape
from strategies.train_setup import TrainSettings, TrainSetup
from strategies.workload import BYTES_PER_ELEMENT, Techniques

_MAPS, _ATTENTION = ("gate_proj", "up_proj", "down_proj"), ("q_proj", "k_proj", "v_proj", "o_proj")
_UNMERGED = "each token passes experts of its own choice, and no one set of weights computes the same"
# Operations of a layer's forward pass: of an expert's three pairs, and of choosing, sorting, copying and adding.
_OPERATIONS, _ROUTING = 9, 60


@dataclass(frozen=True)
class MixLora(PredictedMethod):
    """y = sum_k w_k FFN_k(x): of num_experts corrections of an MLP each token passes top_k (arXiv 2404.15159).

    Gate, up and down of the base are computed once for all tokens.  Memory: the frozen weights in the compute
    precision, 16 bytes a trained parameter, the MLP's activations top_k times.  A loss beside the tokens' keeps experts
    in use.
    """

    num_experts: int = option(8, "pairs of A and B beside each map of an MLP", tried=(4, 8), ge=2, le=256)
    top_k: int = option(2, "experts that a token passes; of one alone the router would have no gradient", ge=2)
    lora_r: int = option(8, "rank of an expert's pairs, and of attention's", tried=(4, 8, 16), ge=1)
    lora_alpha: float = option(16, "scale: corrections are multiplied by lora_alpha / lora_r", gt=0)
    adapt_attention: bool = option(True, "a pair of A and B beside each map of attention as well, for all tokens")
    router_aux_loss_coef: float = option(0.01, "weight of the loss that keeps experts in use; 0 = none", ge=0)
    router_init_range: float = option(0.02, "standard deviation of the router's weights at the start", gt=0)

    name: ClassVar[str] = "experimental_mixlora"
    full_rank: ClassVar[bool] = False
    keeps_base_frozen: ClassVar[bool] = True
    is_proposed: ClassVar[bool] = False
    own_format: ClassVar[str | None] = FORMAT

    @property
    def adds_loss(self) -> bool:
        return True

    def why_alone(self) -> str:
        return "its tokens choose their experts, which a row of several jobs is not divided by"

    def why_no_pairs(self) -> str:
        return f"the pairs of {self.name} belong to experts, which a router chooses"

    def refuses(self, techniques: Techniques, shape: ModelShape) -> str | None:
        if shape.num_experts or shape.family.mlp != _MAPS:
            return (
                f"MixLoRA corrects MLPs of gate_proj, up_proj and down_proj, and those of {shape.model_type} are"
                f" {'experts already' if shape.num_experts else ', '.join(shape.family.mlp)}: set method.type: lora"
            )
        if self.adapt_attention and shape.family.attention != _ATTENTION:
            names = ", ".join(shape.family.attention)
            return f"attention's maps of {shape.model_type} are {names}: set method.adapt_attention: false"
        if self.top_k > self.num_experts:
            return f"method.top_k is {self.top_k}, and there are {self.num_experts} experts: lower it"
        if techniques.streams_weights or techniques.torch_compile:
            return (
                "MixLoRA is untested with torch.compile and streamed weights: set train.torch_compile: false and"
                " strategy.offload: none"
            )
        if techniques.share_prefixes:
            return "a token that several rows share would count once in the balance: set data.share_prefixes: false"
        if techniques.zero_stage or techniques.offloads_optimizer:
            return "MixLoRA trains too little for ZeRO or offload to help: set strategy.offload: none and mode: ddp"
        return None

    def exports(self, shape: ModelShape) -> Export:
        """A folder of this program's own: no other one knows that tokens choose their corrections.

        Looked up in PEFT 0.21.2 (peft/utils/peft_types.py), transformers 5.23 (integrations/peft.py), vLLM
        (lora/peft_helper.py) and llama.cpp (convert_lora_to_gguf.py).
        """
        cannot: dict[Loader, str] = {
            "peft": f"it has no adapter of this type ({FORMAT})",
            "transformers": "its load_adapter puts on what PEFT knows, which this is not",
            "vllm": "it corrects a map by one pair of A and B a request, not by a choice for each token",
            "llama.cpp": "it corrects a map by one pair of A and B, not by a choice for each token",
        }
        return Export("own", cannot, _UNMERGED)

    def _config(self) -> MixtureConfig:
        return MixtureConfig(self.num_experts, self.top_k, self.lora_r, self.lora_alpha, self._attention)

    @property
    def _attention(self) -> list[str]:
        return list(_ATTENTION) if self.adapt_attention else []

    def costs(self, shape: ModelShape, techniques: Techniques) -> Costs:
        g, layers = BYTES_PER_ELEMENT[techniques.dtype], shape.num_layers
        h, f = shape.hidden_size, shape.intermediate_size
        sides, experts, chosen = 3 * self.lora_r * (h + f), self.num_experts, self.top_k
        numbers = layers * experts * (sides + h)
        plain = Lora(self.lora_r, self.lora_alpha, lora_target_modules=self._attention).costs(shape, techniques)
        footprint, work = plain.footprint, plain.work
        # Beside the MLP's own activations, top_k times: what the pairs read, twice what down reads (sorted by expert,
        # and by token for the mean, with the means of fewer on the way), and what the router reads in fp32.
        routed = (
            (chosen * (h + 2 * f + 3 * self.lora_r) + (chosen - 2) * f) * g + (4 * h if g < 4 else 0) + 16 * experts
        )
        return Costs(
            replace(
                footprint,
                weights_bytes=footprint.weights_bytes + 4.0 * numbers,
                num_trainable=footprint.num_trainable + numbers,
                inputs_per_token=footprint.inputs_per_token + routed,
                mlp_copies=chosen,
            ),
            replace(
                work,
                adapter_parameters=work.adapter_parameters + layers * chosen * sides,
                full_parameters=work.full_parameters + layers * experts * h,
                adapter_inputs=work.adapter_inputs + chosen * 3 * (h + f),
                num_adapters=work.num_adapters + (_OPERATIONS * experts + _ROUTING) // OPERATIONS[False],
                routed=chosen * (14 * f + 6 * h),
                num_trainable=work.num_trainable + numbers,
                num_tensors=work.num_tensors + 7 * layers,
                mlp_copies=chosen,
            ),
        )

    def setup(self, model: Any, settings: TrainSettings) -> TrainSetup:
        from strategies.mixture.balance import LoadBalance
        from strategies.mixture.experts import attach, drawn, fill
        from strategies.model.architecture import decoder_layers
        from strategies.model.heads import outside_layers
        from strategies.step.optimizers import build_optimizer

        model.requires_grad_(False)
        config = self._config()
        balance = LoadBalance(self.router_aux_loss_coef, self.num_experts, len(decoder_layers(model)))
        is_empty = all(parameter.is_meta for parameter in model.parameters())  # it gives names and sizes alone
        parameters = attach(model, config.sizes, balance)
        if not is_empty:
            parameters = fill(model, drawn(parameters, settings.seed, self.router_init_range), trains=True)
        optimizer = build_optimizer([{"params": list(parameters.values())}], settings, outside_layers(model))
        export = partial(save, parameters, config)
        return TrainSetup(model, optimizer, parameters, export, export_format="own", extra_loss=balance)

    @classmethod
    def load(cls, model: Any, folder: Path) -> Any:
        return put_on(model, folder)
