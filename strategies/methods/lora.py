"""LoRA: the weights stay frozen, each linear map gets a trained low-rank correction (Hu et al., arXiv 2106.09685)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

from clusters.safe.reading import BadInput
from strategies.adapter_bank.adapter import changes_base
from strategies.contract import option
from strategies.cost.memory import Footprint
from strategies.cost.plan import Costs, PredictedMethod
from strategies.cost.work import Work
from strategies.export import VLLM_RANKS, Export, Loader
from strategies.methods.fused_maps import MORE_BYTES, OPERATIONS, why_not_fused
from strategies.methods.kept_pairs import keep_pairs, kept_costs, kept_rank, pairs_of, with_averaged_pairs
from strategies.methods.lora_config import build_lora_config, look_of, why_not_start
from strategies.model import targets
from strategies.model.architecture import Architecture
from strategies.quality import QualityPrior
from strategies.shape import ModelShape
from strategies.train_setup import TrainSettings, TrainSetup
from strategies.workload import BYTES_PER_ELEMENT, Techniques

_INIT = Literal["gaussian", "eva", "olora", "pissa", "corda", "loftq", "orthogonal"]
_PLAIN_STARTS = (True, False, "gaussian", "orthogonal")  # that leave the base as it is and look at no data


@dataclass(frozen=True)
class _Trained:
    """Counts of what trains: parameters of corrections that each token is multiplied with, and all together."""

    multiplied: int
    total: int


@dataclass(frozen=True)
class Lora(PredictedMethod):
    """y = W x + (alpha / r) B A x with W frozen, A (r, in) and B (out, r) trained; B starts at zero.

    The options mean what PEFT's do.  Memory: the frozen weights in the compute precision, 16 bytes a trained parameter.
    """

    lora_r: int = option(16, "rank of the correction", tried=(8, 16, 64), ge=1)
    lora_alpha: float = option(32, "scale: the correction is multiplied by lora_alpha / lora_r", gt=0)
    lora_dropout: float = option(0.0, "dropout on the adapter's input", ge=0, lt=1)
    lora_target_modules: str | list[str] = option(
        "all-linear", "which linear maps: all-linear, a regex, or module names"
    )
    layers_to_transform: list[int] | None = option(
        None, "only these decoder layers (0 = first); below them nothing trains"
    )
    modules_to_save: list[str] | None = option(None, "modules trained in full beside the adapters")
    trainable_token_indices: list[int] | None = option(
        None, "numbers of tokens whose embeddings train, e.g. new special ones; with tied embeddings their logits too"
    )
    target_parameters: list[str] | None = option(
        None, "stacked tensors of experts that get a correction an expert, e.g. mlp.experts.gate_up_proj"
    )
    bias: Literal["none", "all", "lora_only"] = option(
        "none", "which biases train: all of the model's or those of adapted maps"
    )
    use_dora: bool = option(False, "DoRA: train magnitude and direction apart (arXiv 2402.09353)")
    use_rslora: bool = option(False, "rsLoRA: scale by alpha / sqrt(r) (arXiv 2312.03732)")
    init_lora_weights: bool | _INIT | str = option(True, "how A and B start: true, gaussian, pissa, olora, ...")
    init_adapter: str | None = option(
        None, "a folder with an adapter of this model to start from, e.g. what `adapt` made"
    )
    fused: bool = option(
        False, "each map and its correction as one function in the cheapest order (RunLoRA, arXiv 2312.03415)"
    )
    eva_rows: int = option(32, "eva: samples of the first step, at most, whose inputs A starts from", ge=1)
    corda_method: Literal["ipm", "kpm"] = option(
        "ipm", "corda: begin with what the inputs say most of (ipm), or least, so that what is known stays (kpm)"
    )
    corda_rows: int = option(256, "corda: training rows that are looked at before the first step", ge=1)
    corda_layers: int | None = option(
        None, "corda: decoder layers looked at together; fewer take less memory and more passes over the rows", ge=1
    )
    loraplus_lr_ratio: float | None = option(None, "LoRA+: learning rate of B over that of A (arXiv 2402.12354)", gt=0)

    name: ClassVar[str] = "lora"
    full_rank: ClassVar[bool] = False
    keeps_base_frozen: ClassVar[bool] = True
    trains_score: ClassVar[bool] = True

    @property
    def layers_are_alike(self) -> bool:
        return self.layers_to_transform is None

    @property
    def has_dropout(self) -> bool:
        return self.lora_dropout > 0

    @property
    def adapter_rank(self) -> int:
        return self.lora_r

    @property
    def adapter_folder(self) -> str | None:
        return self.init_adapter

    @property
    def starts_as_base(self) -> bool:
        plain = self.init_lora_weights in _PLAIN_STARTS and self.bias == "none"
        return plain and self.init_adapter is None

    def why_alone(self) -> str | None:
        if self.fused:
            return "fused maps are computed for all tokens of a row at once"
        return self.why_no_pairs()

    def why_no_pairs(self) -> str | None:
        others = {
            "use_dora": self.use_dora,
            "modules_to_save": bool(self.modules_to_save),
            "trainable_token_indices": bool(self.trainable_token_indices),
            "target_parameters": bool(self.target_parameters),
            f"bias: {self.bias}": self.bias != "none",
            f"init_lora_weights: {self.init_lora_weights}": self.init_lora_weights not in _PLAIN_STARTS,
        }
        named = [name for name, is_set in others.items() if is_set]
        return f"{' and '.join(named)} is more than pairs of A and B over a base that stays as it is" if named else None

    def refuses(self, techniques: Techniques, shape: ModelShape) -> str | None:
        return (
            why_not_start(self, techniques, shape)
            or self._refuse_expert_corrections(shape)
            or self._refuse_streaming(shape, techniques)
            or self._refuse_rows(shape)
            or (self._refuse_products(shape) if techniques.averages_products else None)
            or (why_not_fused(self, techniques, shape) if self.fused else None)
        )

    def _refuse_products(self, shape: ModelShape) -> str | None:
        """Corrections that are no pair of matrices of a layer's map."""
        if self.trains_outside_layers(shape) or targets.adapted_maps(shape, self._choice).stacks:
            return (
                "strategy.local_steps_merge: product averages corrections of linear maps in layers: leave embedding,"
                " output matrix and stacked experts out of lora_target_modules, or set it to factors"
            )
        return None

    def _refuse_rows(self, shape: ModelShape) -> str | None:
        """Rows of a tied matrix beside all of it: PEFT's layers for the two do not fit into each other."""
        is_whole = shape.tied_embeddings and targets.adapted_maps(shape, self._choice).saves("last")
        if not (self.trainable_token_indices and is_whole):
            return None
        output = shape.family.output
        return (
            f"trainable_token_indices: of this model {output} is the embedding's own matrix, which modules_to_save"
            f" trains as a whole: leave trainable_token_indices out, or take {output} out of modules_to_save, since the"
            " rows of single tokens train in both"
        )

    def _refuse_streaming(self, shape: ModelShape, techniques: Techniques) -> str | None:
        """What trains beside the layers' maps while the base's weights stay on the host."""
        if not techniques.streams_weights:
            return None
        chosen = targets.adapted_maps(shape, self._choice)
        outside = any(linear.reads in ("tokens", "last") for _, linear in chosen.maps)
        if outside or chosen.saved or self.trainable_token_indices or chosen.stacks:
            return (
                "strategy.offload: weights keeps embedding and output matrix on the host and corrects linear maps of"
                " layers alone: leave out modules_to_save, trainable_token_indices, target_parameters, and targets"
                " outside the layers"
            )
        return None

    def _refuse_expert_corrections(self, shape: ModelShape) -> str | None:
        """What PEFT cannot combine with corrections of stacked tensors."""
        try:
            chosen = targets.adapted_maps(shape, self._choice)
        except BadInput as error:
            return f"lora_target_modules: {error}"
        if not chosen.stacks:
            return None
        others = {
            "lora_dropout": self.lora_dropout > 0,
            "use_dora": self.use_dora,
            "init_adapter": self.init_adapter is not None,
            "init_lora_weights": self.init_lora_weights not in (True, "gaussian"),
        }
        if named := [name for name, is_set in others.items() if is_set]:
            return (
                f"lora_target_modules and target_parameters correct stacked tensors of experts, which"
                f" {' and '.join(named)} cannot be combined with: leave that out, or name attention's maps alone"
            )
        if self.target_parameters and any(ranks > 1 for _, _, ranks in chosen.stacks):
            return "lora_target_modules corrects the experts already: leave target_parameters out"
        return None

    def trains_outside_layers(self, shape: ModelShape) -> bool:
        chosen = targets.adapted_maps(shape, self._choice)
        corrected = any(linear.reads in ("tokens", "last") for _, linear in chosen.maps)
        saved = chosen.saves("tokens") or chosen.saves("last")
        return corrected or saved or bool(self.trainable_token_indices)

    def exports(self, shape: ModelShape) -> Export:
        """A LoRA adapter of PEFT's; which engines take it follows from the options.

        vLLM refuses DoRA, biases, whole modules and ranks beyond its limit (vllm/lora/peft_helper.py, validate_legal;
        MaxLoRARanks in vllm/config/lora.py: up to 512) and names of other tensors than A and B (vllm/lora/utils.py).
        llama.cpp's convert_lora_to_gguf.py takes A and B alone, and writes alpha as it stands, which is divided by r.
        transformers' `load_adapter` (5.23) leaves DoRA's magnitudes as they begin (LOG.md, 2026-11-29).
        """
        chosen, rank = targets.adapted_maps(shape, self._choice), (1 + self._takes_apart) * self.lora_r
        beside = {
            "magnitudes (use_dora)": self.use_dora,
            "modules trained in full (modules_to_save)": bool(self.modules_to_save or shape.num_scores),
            "biases": self.bias != "none",
            "rows of single tokens (trainable_token_indices)": bool(self.trainable_token_indices),
        }
        others = {  # true of engines that read the files by themselves
            f"it takes pairs of A and B alone, no {' and no '.join(name for name in beside if beside[name])}": any(
                beside.values()
            ),
            f"PEFT takes a part of the base's weights away first (init_lora_weights: {self.init_lora_weights}), and it"
            " does not": changes_base(self.init_lora_weights) and not self._takes_apart,
            "corrections of stacked experts were not tried with it": bool(chosen.stacks),
            "corrections of embedding or output matrix were not tried with it": any(
                linear.reads in ("tokens", "last") for _, linear in chosen.maps
            ),
        }
        own: dict[Loader, dict[str, bool]] = {
            "transformers": {"its load_adapter leaves DoRA's magnitudes out, and does not say so": self.use_dora},
            "vllm": {**others, f"its ranks end at {VLLM_RANKS}, this is {rank}": rank > VLLM_RANKS},
            "llama.cpp": {
                **others,
                "they scale by alpha / r, not by alpha / sqrt(r) (use_rslora); `export --gguf` does": self.use_rslora,
            },
        }
        cannot: dict[Loader, str] = {
            engine: "; ".join(why for why, holds in reasons.items() if holds)
            for engine, reasons in own.items()
            if any(reasons.values())
        }
        return Export("peft-lora", cannot)

    def find_misfits(self, architecture: Architecture) -> list[str]:
        found = targets.mistakes(architecture, "lora_target_modules", self._choice)
        return found + targets.wrong_tokens(architecture, self.trainable_token_indices, self._choice)

    @property
    def _choice(self) -> targets.AdapterChoice:
        named = self.lora_target_modules
        return targets.AdapterChoice(
            named if isinstance(named, str) else tuple(named),
            None if self.layers_to_transform is None else tuple(self.layers_to_transform),
            tuple(self.modules_to_save or ()),
            tuple(self.target_parameters or ()),
            takes_earlier_names=True,
        )

    def costs(self, shape: ModelShape, techniques: Techniques) -> Costs:
        g = BYTES_PER_ELEMENT[techniques.dtype]
        chosen = targets.adapted_maps(shape, self._choice)
        trained = self._count(shape, chosen)
        # Under dropout and DoRA each target's input is cast to the adapter's fp32 and back: a copy a target.  Else maps
        # that read one tensor share it (`keep_input_dtype`).
        engine = techniques.uses_engine  # adapters in the compute precision, an fp32 copy beside the moments
        cast = g < 4 and not engine
        casts_inputs = cast and (self.use_dora or self.has_dropout)
        inputs = chosen.inputs if casts_inputs else chosen.distinct_inputs
        trained_bytes = g if engine else 4.0
        scaled = 2 * chosen.outputs if self.use_dora else 0  # the magnitude's gradient asks for both summands
        # Rows of tied embeddings are put into a copy of the matrix, which the output's product keeps; so are
        # corrections of experts into a copy of their tensors, and the gradients of both are whole matrices.
        trains_rows = bool(self.trainable_token_indices) and shape.has_embedding
        rows = shape.vocab_size * shape.embedding_width if trains_rows else 0
        copied = chosen.stacked_elements + (rows if shape.tied_embeddings else 0)
        footprint = Footprint(
            weights_bytes=g * shape.num_parameters + trained_bytes * trained.total,
            num_trainable=trained.total,
            trained_bytes=trained_bytes,
            master_bytes=4.0 if engine else 0.0,
            stream_bytes=trained_bytes if chosen.saves("tokens") else g,
            inputs_per_token=g * (inputs + self.lora_r * len(chosen.maps) + scaled) / shape.num_layers,
            output_is_kept=chosen.reads("attended"),
            product_is_kept=chosen.reads("product"),
            norms_train=chosen.saves_norms,
            keeps_dtype=cast and not casts_inputs and not (self.is_quantised or chosen.stacks),
            cast_bytes=(g * chosen.num_cast if cast else 0.0) + g * copied,
            dequantised_bytes=g * chosen.stacked_elements / chosen.layers,
            num_outside=trained.total - trained.multiplied,
            first_layer=0 if self.trainable_token_indices or self.bias == "all" else chosen.first_layer,
            scattered_bytes=g * rows,
        )
        work = Work(
            trains_weights=False,
            trains_output=chosen.saves("last") or bool(rows and shape.tied_embeddings),
            adapter_parameters=trained.multiplied,
            full_parameters=chosen.num_saved_in_layers + shape.active_part(chosen.stacked_elements),
            adapter_inputs=chosen.sides // chosen.layers,
            adapter_bytes=None if casts_inputs else g + MORE_BYTES[self.fused],
            adapter_operations=OPERATIONS[self.fused],
            dropped_inputs=chosen.inputs // chosen.layers if self.lora_dropout else 0,
            num_adapters=len(chosen.maps) // chosen.layers,
            num_trainable=trained.total,
            num_tensors=2 * (len(chosen.maps) + len(chosen.stacks)) + len(chosen.saved),
            first_layer=footprint.first_layer,
            cast_parameters=(chosen.num_cast if cast else 0) + copied,
        )
        look = look_of(self, chosen)
        footprint = replace(footprint, look_bytes=look.held_bytes if look else 0.0)
        kept = kept_rank(self.lora_r) if techniques.local_merge == "reset" else self._takes_apart * self.lora_r
        return kept_costs(Costs(footprint, work, look), kept, chosen, techniques)

    @property
    def _takes_apart(self) -> bool:
        """Whether a part of the weight is trained, and its negative lies beside it."""
        return self.init_lora_weights == "corda"

    def _count(self, shape: ModelShape, chosen: targets.AdaptedMaps) -> _Trained:
        """Parameters that PEFT trains under these options, copies of modules_to_save included."""
        multiplied = self.lora_r * chosen.sides
        biases = {"none": 0, "lora_only": chosen.biases, "all": shape.num_bias_parameters - chosen.num_saved_biases}
        beside = self.lora_r * chosen.stacked_sides + chosen.num_saved + biases[self.bias]
        beside += chosen.outputs if self.use_dora else 0
        beside += shape.has_embedding * len(self.trainable_token_indices or ()) * shape.embedding_width
        return _Trained(multiplied, multiplied + beside)

    def quality_prior(self) -> QualityPrior:
        return QualityPrior(0.478, 0.014, "PEFT MetaMathQA: Llama-3.2-3B LoRA r32, GSM8K accuracy, one seed")

    def setup(self, model: Any, settings: TrainSettings) -> TrainSetup:
        import torch
        from peft import get_peft_model

        from strategies.methods.lora_start import CordaStart, EvaStart, start_from
        from strategies.model.heads import outside_layers, undecayed
        from strategies.step.optimizers import build_optimizer
        from strategies.step.state import save_adapter
        from strategies.techniques.lora_algebra import fuse
        from strategies.techniques.precision import keep_input_dtype, train_in_fp32

        model.requires_grad_(False)
        if self.init_adapter and self.init_lora_weights not in (True, "gaussian"):
            raise ValueError(
                f"init_adapter takes the place of init_lora_weights: {self.init_lora_weights}, which may change the"
                " base it belongs to; leave that one out"
            )
        torch.manual_seed(settings.seed)  # A is random: every worker must draw the same
        is_empty = all(parameter.is_meta for parameter in model.parameters())  # it gives names alone: nothing is drawn
        peft_model = get_peft_model(model, build_lora_config(self, model), low_cpu_mem_usage=is_empty)
        if not settings.techniques.uses_engine:
            train_in_fp32(peft_model)
        keep_input_dtype(peft_model)
        notes = fuse(peft_model) if self.fused else ()
        if self.init_adapter:
            start_from(peft_model, Path(self.init_adapter))
        parameters = {name: p for name, p in peft_model.named_parameters() if p.requires_grad}
        fast = [p for name, p in parameters.items() if "lora_B" in name]
        slow = [p for name, p in parameters.items() if "lora_B" not in name]
        ratio = self.loraplus_lr_ratio or 1.0
        optimizer = build_optimizer(
            [{"params": slow}, {"params": fast, "lr_factor": ratio}],
            settings,
            outside_layers(peft_model),
            undecayed(peft_model),
        )

        learner = EvaStart(peft_model, self.lora_r, self.eva_rows) if self.init_lora_weights == "eva" else None
        setup = TrainSetup(
            peft_model,
            optimizer,
            parameters,
            partial(save_adapter, peft_model),
            export_format="peft-lora",
            learner=learner,
            notes=notes,
        )
        if self._takes_apart:
            setup.pairs = pairs_of(peft_model, parameters)
            setup.learner = CordaStart(peft_model, keep_pairs(setup, self.lora_r), self)
            return setup
        return with_averaged_pairs(setup, settings.techniques, self.lora_r)
