"""The method of the registry: which weights are projected, what that costs, and how a model is set up for it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from clusters.capability import DeviceCapability, NodeCapability
from strategies.contract import (
    BYTES_PER_ELEMENT,
    Dtype,
    QualityPrior,
    StrategyPlan,
    Techniques,
    TrainSettings,
    TrainSetup,
    Workload,
)
from strategies.cost.memory import Footprint, Streamed
from strategies.cost.plan import plan_of
from strategies.cost.time import Work, bus_rate, host_update_rate, memory_rate
from strategies.knobs import knob
from strategies.lsp_offload.sizing import LayerTimes, Rates, Sized, largest_that_hides, seconds_by_lane, step_s
from strategies.shape import ModelShape

_NETWORK_BYTES_PER_S = 118e6  # a gigabit, assumed of the way to another node's CPU
_BAG_OF_MEMORY = 0.35  # of the memory's rate that sums of rows reach on a CPU (LOG.md)


@dataclass(frozen=True)
class LspOffload:
    """Train the layers' linear maps beyond low rank, the optimizer in host memory (LSP-Offload, arXiv 2406.10181).

    The device holds weights in the compute precision, two sparse projectors a weight and d x d images; the host holds
    two fp32 moments of each image, 8 d^2 bytes.  Not for ZeRO, other offload, fp16, or optimizers other than AdamW.
    """

    subspace_size: Literal["auto"] | int = knob(
        "auto", "d, side of an image; auto = the largest whose way over the bus hides behind the computation", ge=8
    )
    nonzeros_per_row: int = knob(8, "non-zeros in a row of a projector; 4 to 16", tried=(4, 8), ge=1)
    projection: Literal["learned", "random", "none"] = knob(
        "learned", "random = never fitted; none = whole gradients travel, as in ZeRO-Offload"
    )
    schedule: Literal["layerwise", "sequential"] = knob(
        "layerwise", "sequential = all of it after the backward pass, as ZeRO-Offload's first version"
    )
    check_every: int = knob(1000, "steps between looks at the projectors' bias", ge=1)
    bias_threshold: float = knob(0.3, "relative bias above which projectors are learnt anew", gt=0)
    fit_steps: int = knob(100, "Adam steps of a fit", ge=1)
    calibration_rows: int = knob(16, "samples whose gradients are fitted", ge=1)
    moments: Literal["reset", "project"] = knob("reset", "what becomes of Adam's moments when projectors change")
    other_weights: Literal["freeze", "train"] = knob(
        "freeze", "embeddings, norms and biases: frozen, or trained by AdamW on the device"
    )

    cpu_side: str | None = knob(
        None, "another node of the cluster whose memory and cores keep the optimizer; null = this machine's own"
    )

    name: ClassVar[str] = "experimental_lsp_offload"
    full_rank: ClassVar[bool] = True

    def refuses(self, techniques: Techniques, shape: ModelShape) -> str | None:
        """Why it cannot be combined so; None where it can."""
        if techniques.zero_stage or techniques.offload != "none":
            return "LSP-Offload keeps its optimizer on the host itself: set strategy.offload: none and mode: ddp"
        if techniques.dtype == "float16":
            return "LSP-Offload takes gradients one by one, before fp16's scale could be undone: set model.dtype"
        if not techniques.optim.startswith("adamw_torch"):
            return "LSP-Offload is AdamW on images: set train.optim: auto"
        if shape.num_experts:
            return "experts are stacked tensors, which LSP-Offload does not project"
        return None

    def estimate(
        self, workload: Workload, device: DeviceCapability, node: NodeCapability, techniques: Techniques
    ) -> StrategyPlan:
        """C5 of the schedule: a step waits for the slowest of computation and lanes, and for one layer's own way."""
        shape, g = workload.shape, BYTES_PER_ELEMENT[techniques.dtype]
        plain = self._plan(workload, device, node, techniques, 64)
        compute_s = plain.time.compute_s + plain.time.memory_s + plain.time.overhead_s
        passes = 4 if techniques.gradient_checkpointing else 3
        layer_s = compute_s / shape.num_layers
        times = LayerTimes(layer_s / passes, layer_s * (passes - 1) / passes)
        bus = math.inf if device.kind == "cpu" else bus_rate(device)
        if self.cpu_side:
            bus = min(bus, _NETWORK_BYTES_PER_S)
        rates = Rates(bus, bus, host_update_rate(node))
        sized = self._sized(shape, times, rates)
        plan = self._plan(workload, device, node, techniques, sized.size)
        lanes = seconds_by_lane(self._image_elements(shape, sized.size), rates)
        if device.kind == "cpu" and not self.cpu_side:  # the lanes' cores are the computation's own
            waits_s, transfer_s = shape.num_layers * lanes["update"], 0.0
        else:
            overlapped = self.schedule == "layerwise"
            waits_s, transfer_s = 0.0, step_s(shape.num_layers, times, lanes, overlapped, workload.clips) - compute_s
        bag_s = self._bag_s(workload, device, plan.num_micro_batches)
        time = replace(
            plan.time,
            memory_s=plan.time.memory_s + bag_s,
            update_s=waits_s,
            transfer_s=max(0.0, transfer_s),
            is_guess=plan.time.is_guess or bool(self.cpu_side),
        )
        images = shape.num_layers * self._image_elements(shape, sized.size)
        resolved = {"subspace_size": (sized.size, sized.text)} if self.subspace_size == "auto" else {}
        return replace(
            plan,
            time=time,
            gradient_bytes=4.0 * images,
            checkpoint_bytes=g * plan.num_trainable_parameters + 8.0 * images,
            resolved=resolved,
        )

    def _plan(
        self,
        workload: Workload,
        device: DeviceCapability,
        node: NodeCapability,
        techniques: Techniques,
        size: int,
    ) -> StrategyPlan:
        shape, g = workload.shape, BYTES_PER_ELEMENT[techniques.dtype]
        weights = shape.num_layers * sum(linear.inputs * linear.outputs for linear in shape.linears)
        others = shape.num_parameters - weights if self.other_weights == "train" else 0
        projectors = shape.num_layers * sum(
            8 * self.nonzeros_per_row * (linear.inputs + linear.outputs)
            for linear in shape.linears
            if self._is_projected(linear.inputs, linear.outputs, size)
        )
        images = shape.num_layers * self._image_elements(shape, size)
        largest = max(linear.inputs * linear.outputs for linear in shape.linears)
        footprint = Footprint(
            weights_bytes=g * shape.num_parameters,
            num_trainable=weights + others,
            trained_bytes=g,
            stream_bytes=g,
            inputs_per_token=g * shape.distinct_inputs(shape.linears),
            output_is_kept=True,
            product_is_kept=True,
            norms_train=bool(others),
            embeddings_train=bool(others),
            streamed=Streamed(
                state_bytes=projectors + 8.0 * others,
                gradient_bytes=4.0 * images + (g + 12.0) * largest + g * others,
                host_bytes=(0.0 if self.cpu_side else 8.0 * images) + 8.0 * images / shape.num_layers,
            ),
        )
        work = Work(trains_weights=True, trains_output=bool(others), num_trainable=others)
        return plan_of(self.name, workload, device, node, techniques, footprint, work)

    def _is_projected(self, rows: int, columns: int, size: int) -> bool:
        return self.projection != "none" and min(rows, columns) > size

    def _image_elements(self, shape: ModelShape, size: int) -> float:
        """What of one layer's gradients travels."""
        sides = ((linear.inputs, linear.outputs) for linear in shape.linears)
        return sum(size * size if self._is_projected(*side, size) else side[0] * side[1] for side in sides)

    def _sized(self, shape: ModelShape, times: LayerTimes, rates: Rates) -> Sized:
        if self.subspace_size != "auto":
            return Sized(self.subspace_size, "asked", "as the job says")
        shapes = [(linear.outputs, linear.inputs) for linear in shape.linears]
        return largest_that_hides(shapes, times, rates, default_size(shape.hidden_size))

    def _bag_s(self, workload: Workload, device: DeviceCapability, num_micro: int) -> float:
        """Seconds of a step's images and ways back: each reads a gradient's rows r times; fits share their steps."""
        if self.projection == "none":
            return 0.0
        shape, rate = workload.shape, memory_rate(device)[0] * (_BAG_OF_MEMORY if device.kind == "cpu" else 1.0)
        read = 4.0 * self.nonzeros_per_row * sum(linear.inputs * linear.outputs for linear in shape.linears)
        once_s = shape.num_layers * read / rate
        fits = math.ceil(workload.num_steps / self.check_every) if self.projection == "learned" else 0
        return once_s * (num_micro + 1 + 2 * fits * self.fit_steps / workload.num_steps)

    def quality_prior(self) -> QualityPrior | None:
        return None  # published on other benchmarks only

    def load_dtype(self, techniques: Techniques) -> Dtype:
        return techniques.dtype  # no master copy: a bf16 weight is rounded at random

    def load_arguments(self, techniques: Techniques) -> dict[str, Any]:
        return {}

    def setup(self, model: Any, settings: TrainSettings) -> TrainSetup:
        """Raises ValueError where no weight has both sides longer than an image's."""
        from strategies.lsp_offload.adam import AdamNumbers
        from strategies.lsp_offload.optimizer import Learning, LspAdamW, Projected
        from strategies.lsp_offload.remote_update import Adam
        from strategies.lsp_offload.schedule import Lanes
        from strategies.lsp_offload.transport import bus_of
        from strategies.measure.timeline import LAYER

        model.requires_grad_(False)
        layers = linear_maps(model)
        size = self.subspace_size
        if size == "auto":
            size = default_size(model.config.hidden_size)
        projected = []
        for layer, weight in layers.values():
            rows, columns = weight.shape
            own = size if self._is_projected(rows, columns, size) else None
            projected.append(Projected(layer, weight, own, self.nonzeros_per_row))
        if self.projection != "none" and not any(one.size for one in projected):
            longest = max(min(one.weight.shape) for one in projected)
            raise ValueError(
                f"subspace_size {size} is not smaller than both sides of any linear map (of this model at most"
                f" {longest}); half of that, {longest // 2}, is sensible. projection: none sends whole gradients"
            )
        if self.nonzeros_per_row > size:
            raise ValueError(f"nonzeros_per_row {self.nonzeros_per_row} must not exceed subspace_size {size}")
        for one in projected:
            one.weight.requires_grad_(True)
        names = {name: weight for name, (_, weight) in layers.items()}
        others = {}
        if self.other_weights == "train":
            others = {name: p for name, p in model.named_parameters() if name not in names}
            for parameter in others.values():
                parameter.requires_grad_(True)
        depth = 1 + max(one.layer for one in projected)
        learning = None
        if self.projection == "learned":
            asked = (self.check_every, self.bias_threshold, self.fit_steps, self.calibration_rows, self.moments)
            learning = Learning(*asked)
        numbers = AdamNumbers(
            settings.learning_rate,
            settings.adam_beta1,
            settings.adam_beta2,
            settings.adam_epsilon,
            settings.weight_decay,
        )
        if self.cpu_side and settings.elsewhere is None:
            raise ValueError(f"cpu_side {self.cpu_side} is a node of a cluster, and this process is in none")
        optimizer = LspAdamW(
            projected,
            bus_of(projected[0].weight.device),
            Lanes(transition=depth // 4, overlapped=self.schedule == "layerwise"),
            numbers,
            learning,
            list(others.values()),
            settings.seed,
            settings.elsewhere(self.cpu_side, Adam, numbers) if self.cpu_side and settings.elsewhere else None,
        )
        for name, module in model.named_modules():
            if found := LAYER.fullmatch(name):
                module.register_forward_pre_hook(optimizer.waiter(int(found[1])))

        def export(folder: Path, weights: Mapping[str, Any] | None = None) -> None:
            optimizer.settle()
            model.save_pretrained(folder, safe_serialization=True, state_dict=dict(weights) if weights else None)

        return TrainSetup(
            model,
            optimizer,
            {**names, **others},
            export,
            export_name="model",
            streaming=optimizer,
            learner=optimizer,
            notes=self._notes(model, projected, names, others),
        )

    def _notes(self, model: Any, projected: list[Any], names: Mapping[str, Any], others: Mapping[str, Any]) -> Any:
        """What is not projected, and what happens to it."""
        whole = [name for name, one in zip(names, projected, strict=True) if one.size is None]
        told = []
        if whole and self.projection != "none":
            kinds = sorted({name.split(".")[-2] for name in whole})
            told.append(f"{len(whole)} weights are no longer than an image and travel whole: {', '.join(kinds)}")
        if not others:
            rest = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in names.values())
            told.append(f"{rest / 1e6:.1f} million weights of embeddings, norms and biases stay frozen")
        return tuple(told)


def linear_maps(model: Any) -> dict[str, tuple[int, Any]]:
    """The weights of the decoder layers' linear maps by name, with the depth of their layer."""
    import torch

    from strategies.measure.timeline import LAYER

    found = {}
    for name, module in model.named_modules():
        inside = re.fullmatch(rf"({LAYER.pattern})\..+", name)
        if inside and (isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D"):
            found[f"{name}.weight"] = int(inside[2]), module.weight
    if not found:
        raise ValueError(f"{type(model).__name__} has no decoder layers with linear maps that could be projected")
    return found


def default_size(hidden_size: int) -> int:
    """Half of the model's width, the paper's advice for the least bias."""
    return max(8, hidden_size // 2 // 8 * 8)
