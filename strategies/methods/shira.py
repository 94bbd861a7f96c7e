"""SHiRA: chosen entries of each linear map train, the others stay as they are (arXiv 2406.13175 and 2507.07140)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from clusters.capability import DeviceCapability, NodeCapability
from strategies.contract import MethodDefaults, StrategyPlan, option
from strategies.cost.memory import Footprint
from strategies.cost.plan import Costs, predict
from strategies.cost.work import Work
from strategies.export import Export
from strategies.model import targets
from strategies.model.architecture import Architecture
from strategies.model.targets import resolve_targets
from strategies.optimizers import OPTIMIZERS
from strategies.shape import ModelShape
from strategies.stage_shape import workload_of_stage
from strategies.train_setup import TrainSettings, TrainSetup
from strategies.workload import BYTES_PER_ELEMENT, Techniques, Workload


@dataclass(frozen=True)
class Shira(MethodDefaults):
    """y = (W + S) x with S zero but for r (in + out) entries, as many numbers as LoRA of rank r trains.

    The entries are those that the loss depends on most, |W dL/dW| on a few samples before the first step (SNIP, arXiv
    1810.02340), and with `reselect_every` anew on others; what no longer trains is parked, and comes back with its
    value where it is chosen again (2507.07140).  S is of any rank, and experts on different data merge entry by entry
    (`bank merge`).  Memory: the frozen weights in the compute precision, 20 bytes a trained entry.  Time: the
    arithmetic of full training, since a map's gradient is computed whole before its entries are taken.
    """

    shira_r: int = option(16, "r (in + out) entries of each map train", tried=(8, 16, 64), ge=1)
    shira_target_modules: str | list[str] = option(
        "all-linear", "which linear maps: all-linear, a regex, or module names"
    )
    layers_to_transform: list[int] | None = option(
        None, "only these decoder layers (0 = first); below them nothing trains"
    )
    mask: Literal["sensitivity", "random"] = option(
        "sensitivity", "sensitivity = the entries that the loss depends on most; random = any"
    )
    block_size: int = option(
        1, "entries are chosen in squares of this side; must divide shira_r and the weights' sides", ge=1
    )
    calibration_rows: int = option(16, "samples whose gradients choose the entries", ge=1)
    reselect_every: int | None = option(
        None, "steps after which the entries are chosen anew; null = once, before the first step", ge=1
    )
    reselections: int = option(3, "times that they are chosen anew, with reselect_every", ge=1, le=64)

    name: ClassVar[str] = "experimental_shira"
    full_rank: ClassVar[bool] = True
    keeps_base_frozen: ClassVar[bool] = True

    @property
    def layers_are_alike(self) -> bool:
        return self.layers_to_transform is None

    def refuses(self, techniques: Techniques, shape: ModelShape) -> str | None:
        if techniques.zero_stage or techniques.offloads_optimizer:
            return "SHiRA trains too little for ZeRO or offload to help: set strategy.offload: none and mode: ddp"
        if techniques.dtype == "float16" and self.mask == "sensitivity":
            return "gradients of whole weights leave fp16's range: set model.dtype, or method.mask: random"
        if self.reselect_every and not OPTIMIZERS[techniques.optim].follows_entries:
            return (
                f"entries chosen anew take their optimizer state along, which {techniques.optim} keeps in another form:"
                " set train.optim: auto, or remove method.reselect_every"
            )
        if self.reselect_every and self.mask == "random":
            return "random entries are not chosen anew: remove method.reselect_every, or set method.mask: sensitivity"
        if techniques.stage and self.mask == "sensitivity":
            return "entries are chosen over the gradients of all layers at once: set method.mask: random, or mode: auto"
        if techniques.streams_weights and self.mask == "sensitivity":
            return "entries are chosen over all weights at once, which stay on the host: set method.mask: random"
        if shape.model_type == "gpt2":
            return "PEFT's SHiRA knows no Conv1D, which GPT-2's linear maps are"
        chosen = targets.adapted_maps(shape, self._choice)
        if not chosen.maps:
            return f"shira_target_modules {self.shira_target_modules!r} is no linear map of this model"
        for linear in dict.fromkeys(linear for _, linear in chosen.maps):
            inputs, outputs = linear.inputs, linear.outputs
            if self.shira_r * (inputs + outputs) > inputs * outputs:
                most = inputs * outputs // (inputs + outputs)
                return f"{linear.name} has fewer than r (in + out) entries: set method.shira_r to {most} or less"
            if any(number % self.block_size for number in (self.shira_r, inputs, outputs)):
                return f"blocks of {self.block_size} do not divide shira_r or {linear.name} ({outputs} x {inputs})"
        return None

    def find_misfits(self, architecture: Architecture) -> list[str]:
        return targets.mistakes(architecture, "shira_target_modules", self._choice)

    @property
    def _choice(self) -> targets.AdapterChoice:
        named = self.shira_target_modules
        layers = self.layers_to_transform
        return targets.AdapterChoice(
            named if isinstance(named, str) else tuple(named), None if layers is None else tuple(layers)
        )

    def exports(self, shape: ModelShape) -> Export:
        """PEFT's alone.  transformers' `load_adapter` (5.23) gave other logits without a word (LOG.md, 2026-11-29);
        vLLM's and llama.cpp's loaders know the tensors of LoRA and no others (see `Lora.exports`).
        """
        unknown = "it knows LoRA's pairs of A and B, and no entries of weights (SHiRA)"
        silent = "its load_adapter puts the entries in other places, and does not say so"
        return Export("peft-other", {"transformers": silent, "vllm": unknown, "llama.cpp": unknown})

    def estimate(
        self, workload: Workload, device: DeviceCapability, node: NodeCapability, techniques: Techniques
    ) -> StrategyPlan:
        workload = workload_of_stage(workload, techniques.stage)
        shape, g = workload.shape, BYTES_PER_ELEMENT[techniques.dtype]
        chosen = targets.adapted_maps(shape, self._choice)
        num_trainable, num_adapted = self.shira_r * chosen.sides, chosen.elements
        sums_bytes = float(g * num_adapted) if self.mask == "sensitivity" else 0.0  # lie in host memory
        footprint = Footprint(
            weights_bytes=g * shape.num_parameters + 8.0 * num_trainable,  # values and places
            num_trainable=num_trainable,
            stream_bytes=g,
            inputs_per_token=g * chosen.distinct_inputs / shape.num_layers,
            output_is_kept=chosen.reads("attended"),
            product_is_kept=chosen.reads("product"),
            dequantised_bytes=float(g * chosen.largest),
            first_layer=chosen.first_layer,
        )
        work = Work(
            trains_weights=True,
            num_trainable=num_trainable,
            num_tensors=len(chosen.maps),
            first_layer=chosen.first_layer,
            # The corrected weight is written twice a micro-batch and read from the frozen one, its gradient once.
            cast_parameters=round(num_adapted * 5 * g / (4 + g)),
        )
        if device.kind == "cpu":
            footprint = replace(footprint, weights_bytes=footprint.weights_bytes + sums_bytes)
            sums_bytes = 0.0
        plan = predict(self.name, workload, device, node, techniques, Costs(footprint, work))
        return replace(plan, memory=replace(plan.memory, host_bytes=plan.memory.host_bytes + sums_bytes))

    def setup(self, model: Any, settings: TrainSettings) -> TrainSetup:
        from peft import ShiraConfig, get_peft_model

        from strategies.methods.sparse_entries import Selection, Sensitivity, entries_of
        from strategies.step.optimizers import build_optimizer
        from strategies.step.state import save_adapter

        model.requires_grad_(False)
        config = ShiraConfig(r=self.shira_r, target_modules=self._names(model), task_type="CAUSAL_LM")
        config.mask_fn = None  # entries are placed below, also on a model without weights
        peft_model = get_peft_model(model, config)
        entries = entries_of(peft_model, settings.seed)
        parameters = {name: p for name, p in peft_model.named_parameters() if p.requires_grad}
        optimizer = build_optimizer([{"params": list(parameters.values())}], settings)
        learner = None
        if self.mask == "sensitivity":
            selection = Selection(self.calibration_rows, self.block_size, self.reselect_every, self.reselections)
            learner = Sensitivity(entries, selection, optimizer)

        def export(folder: Path, weights: Mapping[str, Any] | None = None) -> None:
            for one in entries:
                one.tell_peft()
            save_adapter(peft_model, folder)

        places = {f"{one.name}.places": one.places for one in entries}
        return TrainSetup(
            peft_model,
            optimizer,
            parameters,
            export,
            export_format="peft-other",
            buffers=places | (learner.buffers if learner else {}),
            learner=learner,
        )

    def _names(self, model: Any) -> list[str]:
        """The maps by their whole names: PEFT's SHiRA cannot choose layers."""
        from strategies.lsp_offload.method import linear_maps

        found = linear_maps(model)
        maps = [
            weight.removesuffix(".weight")
            for weight, (layer, _) in found.items()
            if self.layers_to_transform is None or layer in self.layers_to_transform
        ]
        return list(resolve_targets(self.shira_target_modules, maps, maps))
