"""Pruned LoRA: groups of the weights leave while LoRA trains, and a smaller plain model is handed back (LoRAPrune)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, Literal

from clusters.capability import DeviceCapability, NodeCapability
from strategies.contract import StrategyPlan, option
from strategies.cost import time
from strategies.cost.plan import Costs, PredictedMethod
from strategies.export import Export, Loader
from strategies.methods.lora import Lora
from strategies.model.architecture import Architecture
from strategies.pruning.groups import (
    PrunedGroups,
    channels_of,
    describe,
    heads_of,
    layers_of,
    smaller_shape,
    why_no_config,
    why_unknown,
)
from strategies.pruning.schedule import SparsitySchedule
from strategies.shape import ModelShape
from strategies.train_setup import TrainSettings, TrainSetup
from strategies.workload import BYTES_PER_ELEMENT, Techniques, Workload

_SCORED_BYTES = 4.0  # read for each weight whose norm is asked, beside what stays in caches


@dataclass(frozen=True)
class PrunedLora(PredictedMethod):
    """y = (W + s B A) (m * x): masks m close over groups of channels while A and B train, and then A and B recover.

    What is handed back is base + correction without the masked groups: a plain model with fewer parameters, as many
    groups less in every layer (LoRAPrune, arXiv 2305.18403).  Training takes the memory and time of the whole model
    with LoRA on all of its layers' linear maps; what is smaller and faster is the result.
    """

    lora_r: int = option(8, "rank of the correction", tried=(8, 16), ge=1)
    lora_alpha: float = option(16.0, "scale: the correction is multiplied by lora_alpha / lora_r", gt=0)
    ratio: float = option(
        0.3,
        "part of the groups that is removed, in each layer; of score: layer, of the layers",
        tried=(0.2, 0.3),
        gt=0,
        lt=1,
    )
    groups: Literal["mlp", "mlp+attention"] = option(
        "mlp", "what is removed: channels of the MLPs, or whole key-value groups with their query heads too"
    )
    score: Literal["lora", "magnitude", "gate", "layer", "random"] = option(
        "lora",
        "which groups leave: those that matter least by LoRA's gradients, of the smallest weights, by learned gates,"
        " whole layers by LoRA's gradients, or any",
    )
    multiple_of: int = option(32, "as many channels remain as are a multiple of this, which kernels prefer", ge=1)
    prune_from: float = option(0.1, "part of the run after which masks begin to close", ge=0, lt=1)
    prune_until: float = option(
        0.5, "part of the run after which masks stay, and the rest of the run recovers", gt=0, le=1
    )
    mask_every: int = option(10, "steps between two moves of the masks", ge=1)

    name: ClassVar[str] = "experimental_pruned_lora"
    full_rank: ClassVar[bool] = False
    keeps_base_frozen: ClassVar[bool] = True
    is_proposed: ClassVar[bool] = False

    @cached_property
    def _lora(self) -> Lora:
        return Lora(self.lora_r, self.lora_alpha)

    @property
    def acts_between(self) -> bool:
        return True

    def why_alone(self) -> str:
        return "its masks close over the base model's own weights"

    def why_no_pairs(self) -> str:
        return f"{self.name} masks groups of the base beside its pairs"

    def pruned(self, shape: ModelShape) -> tuple[PrunedGroups, ...]:
        """What is removed of a model."""
        if self.score == "layer":
            return (layers_of(shape, self.ratio),)
        channels = channels_of(shape, self.ratio, self.multiple_of)
        return (channels, heads_of(shape, self.ratio)) if self.groups == "mlp+attention" else (channels,)

    def smaller(self, shape: ModelShape) -> ModelShape:
        """The sizes of what is handed back."""
        return smaller_shape(shape, self.pruned(shape))

    def refuses(self, techniques: Techniques, shape: ModelShape) -> str | None:
        with_heads = self.groups == "mlp+attention"
        if why := why_unknown(shape, with_heads):
            return why
        if self.score == "layer" and with_heads:
            return "method.score: layer drops whole layers, of which method.groups chooses no part: set groups: mlp"
        if self.prune_from >= self.prune_until:
            return (
                f"method.prune_from is {self.prune_from:g} and prune_until {self.prune_until:g} of the run: masks begin"
                " to close before they stay, lower prune_from"
            )
        if why := self._refuse_counts(shape):
            return why
        if techniques.torch_compile or techniques.streams_weights:
            return (
                "pruning reads whole weights between steps and is untested with torch.compile: set"
                " train.torch_compile: false and strategy.offload: none"
            )
        if self.score == "gate" and techniques.optim == "muon":
            return "gates are vectors beside Muon's matrices, which is untested: set train.optim: adamw_torch_fused"
        return self._lora.refuses(techniques, shape)

    def _refuse_counts(self, shape: ModelShape) -> str | None:
        for one in self.pruned(shape):
            if not one.removed and one.name == "channels":
                return (
                    f"method.ratio {self.ratio:g} of {one.count} channels removes none of them: raise it, or lower"
                    f" method.multiple_of, which is {self.multiple_of}"
                )
            if not one.removed and one.name == "heads":
                return (
                    f"method.ratio {self.ratio:g} of {one.count} key-value groups removes none of them: raise it, or"
                    " set groups: mlp"
                )
            if one.name == "heads" and (why := why_no_config(shape, one)):
                return why
            if not one.removed:
                return f"method.ratio {self.ratio:g} of {one.count} layers removes none of them: raise it"
            if one.removed > one.count - len(one.protected):
                most = one.count - len(one.protected)
                return (
                    f"method.ratio {self.ratio:g} of {one.count} layers is {one.removed}, and the first layers and the"
                    f" last stay: {most} can be dropped, lower it"
                )
        return None

    def find_misfits(self, architecture: Architecture) -> list[str]:
        return self._lora.find_misfits(architecture)

    def exports(self, shape: ModelShape) -> Export:
        """A plain model of the base's family.

        llama.cpp was tried with a Llama, also with fewer heads (tests/orchestrator/export/test_llama_cpp.py), vLLM not.
        """
        cannot: dict[Loader, str] = {"peft": "it is a whole model, and PEFT puts adapters onto one"}
        if self.groups == "mlp+attention":
            narrow = "a model whose heads together are narrower than its hidden state was not tried with it"
            cannot |= {"vllm": narrow}
        return Export("model", cannot, sizes=describe(shape, self.pruned(shape)))

    def costs(self, shape: ModelShape, techniques: Techniques) -> Costs:
        found, g = self._lora.costs(shape, techniques), BYTES_PER_ELEMENT[techniques.dtype]
        groups = self.pruned(shape)
        numbers = sum(one.rows * one.count for one in groups)
        gates = numbers if self.score == "gate" else 0
        widths = {
            one.name: shape.hidden_size if one.name == "layers" else one.count * one.masked.width for one in groups
        }
        kept = g * sum(widths.values()) if gates else 0.0  # what a gate's gradient asks for: the input before it
        footprint, work = found.footprint, found.work
        return Costs(
            replace(
                footprint,
                weights_bytes=footprint.weights_bytes + 8.0 * numbers + 4.0 * gates,
                num_trainable=footprint.num_trainable + gates,
                inputs_per_token=footprint.inputs_per_token + kept,
            ),
            replace(
                work,
                num_trainable=work.num_trainable + gates,
                adapter_inputs=work.adapter_inputs + sum(widths.values()),
            ),
        )

    def estimate(
        self, workload: Workload, device: DeviceCapability, node: NodeCapability, techniques: Techniques
    ) -> StrategyPlan:
        """With a part of what a move of the masks takes, on average over all steps."""
        plan = super().estimate(workload, device, node, techniques)
        weights = self._num_scored(workload.shape)
        rate, _ = time.product_rate(device, node, "float32")
        bandwidth, _ = time.memory_rate(device)
        a_move_s = weights * (2.0 * self.lora_r / rate + _SCORED_BYTES / bandwidth)
        moves = (self.prune_until - self.prune_from) / self.mask_every
        update_s = plan.time.update_s + moves * a_move_s
        return replace(plan, time=replace(plan.time, update_s=update_s))

    def _num_scored(self, shape: ModelShape) -> int:
        """Weights whose norms a move of the masks asks."""
        if self.score in ("gate", "random"):
            return 0
        paths = {part.path for one in self.pruned(shape) for part in one.parts}
        maps = [one for one in shape.linears if one.path in paths]
        return shape.num_layers * sum(one.inputs * one.outputs for one in maps)

    def setup(self, model: Any, settings: TrainSettings) -> TrainSetup:
        from strategies.methods.kept_pairs import pairs_of
        from strategies.model.architecture import architecture_of, decoder_layers
        from strategies.pruning.between import PruningSteps
        from strategies.pruning.masks import GATE, GroupMasks
        from strategies.pruning.scores import GateScores, MapScores, RandomScores
        from strategies.pruning.slicing import SmallerModel

        shape = ModelShape.from_config(model.config.to_dict())
        layer_of, prefix = architecture_of(model).layer_of, architecture_of(model).layers
        setup = self._lora.setup(model, settings)
        pairs, groups = pairs_of(setup.model, setup.parameters), self.pruned(shape)
        masks = GroupMasks(groups, decoder_layers(setup.model), setup.device, self.score == "gate")
        by_layer: list[dict[str, Any]] = [{} for _ in range(shape.num_layers)]
        for pair in pairs:
            name = pair.name.removeprefix("base_model.model.")
            if (layer := layer_of(name)) is not None:
                by_layer[layer][name.removeprefix(f"{prefix}.{layer}.")] = pair
        if self.score == "gate":
            scores = GateScores(masks.gates)
            gates = {name: gate for name, gate in setup.model.named_parameters() if name.endswith(GATE)}
            setup.optimizer.add_param_group({"params": list(gates.values()), "lr": 0.0, "base_lr": 0.0})
            setup.parameters |= gates
        elif self.score == "random":
            scores = RandomScores(groups, settings.seed)
        else:
            scores = MapScores(groups, by_layer, setup.device, with_gradient=self.score != "magnitude")
        schedule = SparsitySchedule.of_run(settings.num_steps, self.prune_from, self.prune_until, self.mask_every)

        def count_parameters(removed: dict[str, int]) -> int:
            left = [replace(one, kept=one.count - removed[one.name]) for one in groups]
            return smaller_shape(shape, left).num_parameters

        smaller = SmallerModel(setup.model, masks, pairs, shape)
        setup.between = PruningSteps(masks, scores, schedule, count_parameters)
        setup.buffers |= {**masks.buffers, **scores.buffers}
        setup.decided = tuple(masks.buffers)
        setup.export, setup.export_format, setup.export_is_rounded = smaller.save, "model", True
        setup.written = lambda: smaller.weights(only_changed=True)
        setup.settled_after = schedule.end
        setup.notes += (describe(shape, groups),)
        return setup
