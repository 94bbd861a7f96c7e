"""Full training whose optimizer sees gradients through a low-rank window: GaLore and APOLLO.

    GaLore   project G on its r largest singular vectors, Adam there, project back     (arXiv 2403.03507)
    APOLLO   project G at random, Adam there only says how far each channel of G goes  (arXiv 2412.05270)

Weights and gradients stay whole; the moments shrink from 8 m n to 8 r max(m, n) bytes.  Written from the papers: the
published packages keep objects in the optimizer's state, which no checkpoint of tensors can hold.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from clusters.capability import DeviceCapability, NodeCapability
from strategies.contract import QualityPrior, StrategyPlan, Techniques, TrainSettings, TrainSetup, Workload
from strategies.cost.memory import Footprint
from strategies.cost.plan import plan_of
from strategies.knobs import knob
from strategies.methods.full import Full
from strategies.shape import ModelShape


@dataclass(frozen=True)
class Galore(Full):
    """Train all weights, AdamW's moments of the linear maps in a subspace of the gradient (arXiv 2403.03507)."""

    rank: int = knob(128, "rank of the window on each gradient", tried=(64, 128), ge=1)
    update_proj_gap: int = knob(200, "steps between new windows", ge=1)
    scale: float = knob(0.25, "what is projected back is multiplied by this", gt=0)

    name: ClassVar[str] = "experimental_galore"
    kind: ClassVar[Literal["galore", "apollo"]] = "galore"

    def refuses(self, techniques: Techniques, shape: ModelShape) -> str | None:
        """Why it cannot be combined so; None where it can."""
        if techniques.zero_stage or techniques.offload in ("optimizer", "parameters"):
            return f"{self.kind} looks at whole matrices, which ZeRO and DeepSpeed's offload take apart: set mode: ddp"
        if not techniques.optim.startswith("adamw_torch"):
            return f"{self.kind} is an AdamW of its own: set train.optim: auto"
        return None

    def estimate(
        self, workload: Workload, device: DeviceCapability, node: NodeCapability, techniques: Techniques
    ) -> StrategyPlan:
        footprint, work = self.costs(workload, techniques)
        # Two products with the window a step: below what the update's memory traffic costs.
        footprint = replace(footprint, optimizer_bytes=self._state_bytes(workload.shape, footprint))
        return plan_of(self.name, workload, device, node, techniques, footprint, work)

    def _state_bytes(self, shape: ModelShape, footprint: Footprint) -> float:
        low, projected = 0.0, 0
        for linear in shape.linears:
            short, long = sorted((linear.inputs, linear.outputs))
            if self.rank < short:
                low += 8.0 * self.rank * long + (4.0 * self.rank * short if self.kind == "galore" else 0.0)
                projected += linear.inputs * linear.outputs
        layers = shape.num_layers
        return layers * low + 8.0 * (footprint.num_trainable - layers * projected)

    def quality_prior(self) -> QualityPrior | None:
        return None

    def setup(self, model: Any, settings: TrainSettings) -> TrainSetup:
        from strategies.methods.low_rank_adamw import LowRankAdamW, Window

        model.requires_grad_(True)
        parameters = dict(model.named_parameters())
        window = Window(self.kind, self.rank, self.update_proj_gap, self.scale, settings.seed)
        embeddings = {id(part.weight) for part in (model.get_input_embeddings(), model.get_output_embeddings()) if part}
        seen = [p for p in parameters.values() if p.dim() == 2 and id(p) not in embeddings and self.rank < min(p.shape)]
        notes = ()
        if not seen:
            longest = max(min(p.shape) for p in parameters.values() if p.dim() == 2 and id(p) not in embeddings)
            notes = (
                f"rank {self.rank} is not below the sides of any weight (at most {longest}): plain AdamW trains all",
            )
        taken = {id(p) for p in seen}
        rest = [p for p in parameters.values() if id(p) not in taken]
        optimizer = LowRankAdamW(seen, rest, window, settings)

        def export(folder: Path, weights: Mapping[str, Any] | None = None) -> None:
            model.save_pretrained(folder, safe_serialization=True, state_dict=dict(weights) if weights else None)

        return TrainSetup(model, optimizer, parameters, export, export_name="model", notes=notes)


@dataclass(frozen=True)
class Apollo(Galore):
    """Train all weights; Adam in a random subspace says how far each channel's gradient goes (arXiv 2412.05270)."""

    rank: int = knob(64, "rank of the window on each gradient", tried=(16, 64), ge=1)
    scale: float = knob(1.0, "the step is multiplied by its square root", gt=0)

    name: ClassVar[str] = "experimental_apollo"
    kind: ClassVar[Literal["galore", "apollo"]] = "apollo"
