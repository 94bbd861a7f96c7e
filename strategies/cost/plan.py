"""What a method costs on one device: its footprint and its work -> its StrategyPlan."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from clusters.capability import DeviceCapability, NodeCapability
from strategies.contract import MethodDefaults, StrategyPlan
from strategies.cost import memory, micro_batches, time
from strategies.cost.memory import Footprint
from strategies.cost.phases import forward_share
from strategies.cost.reuse import computed_part, stores_reference, with_kept_layers, workload_of_trees
from strategies.cost.work import Look, Work
from strategies.shape import ModelShape
from strategies.stage_shape import workload_of_stage
from strategies.workload import BYTES_PER_ELEMENT, Techniques, Workload


@dataclass(frozen=True)
class Costs:
    """What a method keeps on a device and what it computes there."""

    footprint: Footprint
    work: Work
    look: Look | None = None


def predict(
    method: str,
    workload: Workload,
    device: DeviceCapability,
    node: NodeCapability,
    techniques: Techniques,
    costs: Costs,
) -> StrategyPlan:
    """Memory and time of a step, and the bytes that cross the network and the disk.

    Of a stage, `workload` and `costs` are those of its part (`workload_of_stage`).
    """
    footprint, work = with_kept_layers(workload, techniques, costs.footprint, costs.work)
    part = computed_part(workload, techniques)
    workload = workload_of_trees(workload, techniques)
    gathers = techniques.zero_stage >= 3
    element_bytes = BYTES_PER_ELEMENT[techniques.dtype]
    return StrategyPlan(
        method=method,
        techniques=techniques,
        memory=memory.estimate(workload, device, techniques, footprint),
        time=time.estimate(workload, device, node, techniques, work),
        num_trainable_parameters=footprint.num_trainable,
        flops_per_token=sum(time.flops_per_token(workload, techniques, work)),
        checkpoint_bytes=12.0 * footprint.num_trainable,
        gradient_bytes=footprint.trained_bytes * footprint.num_trainable,
        gathered_bytes=min(footprint.weights_bytes, element_bytes * workload.shape.num_parameters) if gathers else 0.0,
        streamed_bytes=time.streamed_bytes(workload.shape, techniques, work),
        num_micro_batches=micro_batches.num_micro_batches(workload, techniques),
        tokens_per_micro_batch=micro_batches.tokens_per_micro_batch(workload, techniques),
        computed_part=part,
        disk_bytes=footprint.disk_bytes,
        look_s=_look_s(workload, device, node, techniques, costs) if costs.look else 0.0,
    )


def _look_s(
    workload: Workload, device: DeviceCapability, node: NodeCapability, techniques: Techniques, costs: Costs
) -> float:
    """Seconds of what is looked at before the first step: forward passes, and what is computed of them."""
    look = costs.look
    assert look
    step = time.estimate(workload, device, node, techniques, costs.work)
    per_token = (step.step_s - step.update_s - step.sync_s) / (workload.share * workload.tokens_per_step)
    tokens = look.times * min(look.rows, workload.num_samples) * workload.mean_length
    rate, _ = time.product_rate(device, node, "float32")
    return forward_share(techniques) * per_token * tokens + look.flops / rate


class PredictedMethod(MethodDefaults):
    """A method whose costs follow from the model's sizes and the techniques, whatever the device."""

    name: ClassVar[str]

    def costs(self, shape: ModelShape, techniques: Techniques) -> Costs:
        """What it keeps on a device and computes there."""
        raise NotImplementedError

    def estimate(
        self, workload: Workload, device: DeviceCapability, node: NodeCapability, techniques: Techniques
    ) -> StrategyPlan:
        part = workload_of_stage(workload, techniques.stage)
        costs = self.costs(part.shape, techniques)
        if part.needs_reference:
            others = int(part.needs_divergence)  # of the model, and of the reference where that is not stored
            passes = others if stores_reference(part, self.starts_as_base) else 1 + 2 * others
            costs = replace(costs, work=replace(costs.work, reference_passes=passes))
        plan = predict(self.name, part, device, node, techniques, costs)
        rank = self.adapter_rank if techniques.averages_products else None
        return replace(plan, averaged_rank=rank or 0)
