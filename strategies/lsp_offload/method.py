"""The method of the registry: which weights are projected, what that costs, and how a model is set up for it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from clusters.capability import DeviceCapability, NodeCapability
from strategies.contract import MethodDefaults, StrategyPlan, option
from strategies.cost.memory import Footprint, Streamed
from strategies.cost.plan import Costs, predict
from strategies.cost.time import Work, bus_rate, host_update_rate, memory_rate
from strategies.export import WHOLE_MODEL, Export
from strategies.lsp_offload.sizing import LayerTimes, Rates, Sized, largest_that_hides, seconds_by_lane, step_s
from strategies.shape import ModelShape
from strategies.train_setup import TrainSettings, TrainSetup
from strategies.workload import BYTES_PER_ELEMENT, Techniques, Workload

if TYPE_CHECKING:
    from strategies.lsp_offload.adam import AdamNumbers
    from strategies.lsp_offload.optimizer import Route
    from strategies.lsp_offload.weights import Projected

_NETWORK_BYTES_PER_S = 118e6  # a gigabit, assumed of the way to another node's CPU
_BAG_OF_MEMORY = 0.35  # of the memory's rate that sums of rows reach on a CPU (LOG.md)


@dataclass(frozen=True)
class LspOffload(MethodDefaults):
    """Train the layers' linear maps beyond low rank, the optimizer in host memory (LSP-Offload, arXiv 2406.10181).

    The device holds weights in the compute precision, two sparse projectors a weight and d x d images; the host holds
    two fp32 moments of each image, 8 d^2 bytes.  Not for ZeRO, other offload, fp16, or optimizers other than AdamW.
    """

    subspace_size: Literal["auto"] | int = option(
        "auto", "d, side of an image; auto = the largest whose transfer hides behind the computation", ge=8
    )
    nonzeros_per_row: int = option(8, "non-zeros in a row of a projector; 4 to 16", tried=(4, 8), ge=1)
    projection: Literal["learned", "random", "none"] = option(
        "learned", "random = never fitted; none = whole gradients are sent, as in ZeRO-Offload"
    )
    schedule: Literal["layerwise", "sequential"] = option(
        "layerwise", "sequential = all of it after the backward pass, as ZeRO-Offload's first version"
    )
    check_every: int = option(1000, "steps between checks of the projectors' bias", ge=1)
    bias_threshold: float = option(0.3, "relative bias above which projectors are fitted again", gt=0)
    fit_steps: int = option(100, "Adam steps of a fit", ge=1)
    calibration_rows: int = option(16, "samples whose gradients are fitted", ge=1)
    moments: Literal["reset", "project"] = option("reset", "what happens to Adam's moments when projectors change")
    other_weights: Literal["freeze", "train"] = option(
        "freeze", "embeddings, norms and biases: frozen, or trained by AdamW on the device"
    )

    cpu_side: str | None = option(
        None, "another node of the cluster whose memory and cores keep the optimizer; null = this machine's own"
    )

    name: ClassVar[str] = "experimental_lsp_offload"
    full_rank: ClassVar[bool] = True
    streams: ClassVar[bool] = True

    def refuses(self, techniques: Techniques, shape: ModelShape) -> str | None:
        if techniques.zero_stage or techniques.offload != "none":
            return "LSP-Offload keeps its optimizer on the host itself: set strategy.offload: none and mode: ddp"
        if techniques.dtype == "float16":
            return "LSP-Offload takes gradients one by one, before fp16's scale could be undone: set model.dtype"
        if not techniques.optim.startswith("adamw_torch"):
            return "LSP-Offload is an AdamW of its own: set train.optim: auto"
        if shape.num_experts:
            return "experts are stacked tensors, which LSP-Offload does not project"
        return None

    def exports(self, shape: ModelShape) -> Export:
        return WHOLE_MODEL

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
        self, workload: Workload, device: DeviceCapability, node: NodeCapability, techniques: Techniques, size: int
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
        return predict(self.name, workload, device, node, techniques, Costs(footprint, work))

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
        return largest_that_hides(shapes, times, rates, shape.num_layers, default_size(shape.hidden_size))

    def _bag_s(self, workload: Workload, device: DeviceCapability, num_micro: int) -> float:
        """Seconds of a step's images and ways back: each reads a gradient's rows r times; fits share their steps."""
        if self.projection == "none":
            return 0.0
        shape, rate = workload.shape, memory_rate(device)[0] * (_BAG_OF_MEMORY if device.kind == "cpu" else 1.0)
        read = 4.0 * self.nonzeros_per_row * sum(linear.inputs * linear.outputs for linear in shape.linears)
        once_s = shape.num_layers * read / rate
        fits = math.ceil(workload.num_steps / self.check_every) if self.projection == "learned" else 0
        return once_s * (num_micro + 1 + 2 * fits * self.fit_steps / workload.num_steps)

    def setup(self, model: Any, settings: TrainSettings) -> TrainSetup:
        """Raises ValueError where no weight has both sides longer than an image's."""
        from strategies.lsp_offload.adam import AdamNumbers
        from strategies.lsp_offload.optimizer import LspAdamW
        from strategies.lsp_offload.weights import Learning
        from strategies.measure.timeline import LAYER
        from strategies.step.state import save_model

        model.requires_grad_(False)
        layers = linear_maps(model)
        projected = self._project(layers, model.config.hidden_size)
        names = {name: weight for name, (_, weight) in layers.items()}
        others = {}
        if self.other_weights == "train":
            others = {name: p for name, p in model.named_parameters() if name not in names}
        for parameter in (*names.values(), *others.values()):
            parameter.requires_grad_(True)
        fit = (self.check_every, self.bias_threshold, self.fit_steps, self.calibration_rows, self.moments)
        learning = Learning(*fit) if self.projection == "learned" else None
        betas = (settings.adam_beta1, settings.adam_beta2)
        numbers = AdamNumbers(settings.learning_rate, *betas, settings.adam_epsilon, settings.weight_decay)
        route = self._route(projected, numbers, settings)
        optimizer = LspAdamW(projected, route, numbers, learning, list(others.values()), settings.seed)
        for name, module in model.named_modules():
            if found := LAYER.fullmatch(name):
                module.register_forward_pre_hook(optimizer.waiter(int(found[1])))

        def export(folder: Path, weights: Mapping[str, Any] | None = None) -> None:
            optimizer.settle()
            save_model(model, folder, weights)

        return TrainSetup(
            model,
            optimizer,
            {**names, **others},
            export,
            export_format="model",
            streaming=optimizer,
            learner=optimizer,
            notes=self._notes(model, projected, names, others),
        )

    def _project(self, layers: Mapping[str, tuple[int, Any]], hidden_size: int) -> list[Projected]:
        """The linear maps' weights with the size of their images.  Raises ValueError where none is projected."""
        from strategies.lsp_offload.weights import Projected

        size = default_size(hidden_size) if self.subspace_size == "auto" else self.subspace_size
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
        return projected

    def _route(self, projected: list[Projected], numbers: AdamNumbers, settings: TrainSettings) -> Route:
        from strategies.lsp_offload.optimizer import Route
        from strategies.lsp_offload.remote_update import CpuSide
        from strategies.lsp_offload.schedule import Lanes
        from strategies.lsp_offload.transport import bus_of

        remote = None
        if self.cpu_side:
            if settings.start_remote is None:
                raise ValueError(f"cpu_side {self.cpu_side} is a node of a cluster, and this process is in none")
            remote = settings.start_remote(self.cpu_side, CpuSide, numbers)
        depth = 1 + max(one.layer for one in projected)
        lanes = Lanes(transition=depth // 4, overlapped=self.schedule == "layerwise")
        return Route(bus_of(projected[0].weight.device), lanes, remote)

    def _notes(
        self, model: Any, projected: list[Projected], names: Mapping[str, Any], others: Mapping[str, Any]
    ) -> tuple[str, ...]:
        """What is not projected, and what happens to it."""
        whole = [name for name, one in zip(names, projected, strict=True) if one.size is None]
        notes = []
        if whole and self.projection != "none":
            kinds = sorted({name.split(".")[-2] for name in whole})
            notes.append(f"{len(whole)} weights are not larger than an image and are sent whole: {', '.join(kinds)}")
        if not others:
            rest = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in names.values())
            notes.append(f"{rest / 1e6:.1f} million weights of embeddings, norms and biases stay frozen")
        return tuple(notes)


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
