"""Full training whose optimizer sees gradients through a low-rank window: GaLore and APOLLO.

    GaLore   project G on its r largest singular vectors, Adam there, project back     (arXiv 2403.03507)
    APOLLO   project G at random, Adam there only says how far each channel of G goes  (arXiv 2412.05270)

Weights and gradients stay whole; the moments shrink from 8 m n to 8 r max(m, n) bytes.  Written from the papers: the
published packages keep objects in the optimizer's state, which no checkpoint of tensors can hold.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal

from strategies.contract import option
from strategies.cost.memory import Footprint
from strategies.cost.plan import Costs
from strategies.methods.full import Full
from strategies.shape import ModelShape
from strategies.train_setup import TrainSettings, TrainSetup
from strategies.workload import Techniques


@dataclass(frozen=True)
class Galore(Full):
    """Train all weights, AdamW's moments of the linear maps in a subspace of the gradient (arXiv 2403.03507)."""

    rank: int = option(128, "rank of the window on each gradient", tried=(64, 128), ge=1)
    update_proj_gap: int = option(200, "steps between new windows", ge=1)
    scale: float = option(0.25, "what is projected back is multiplied by this", gt=0)

    name: ClassVar[str] = "experimental_galore"
    kind: ClassVar[Literal["galore", "apollo"]] = "galore"

    def refuses(self, techniques: Techniques, shape: ModelShape) -> str | None:
        if techniques.zero_stage or techniques.offloads_optimizer:
            return f"{self.kind} needs whole matrices, which ZeRO and DeepSpeed's offload split: set mode: ddp"
        if not techniques.optim.startswith("adamw_torch"):
            return f"{self.kind} is an AdamW of its own: set train.optim: auto"
        return None

    def costs(self, shape: ModelShape, techniques: Techniques) -> Costs:
        """Full training's, with less state; products with the window cost less than the update's memory traffic."""
        costs = super().costs(shape, techniques)
        footprint = replace(costs.footprint, optimizer_bytes=self._state_bytes(shape, costs.footprint))
        return replace(costs, footprint=footprint)

    def _state_bytes(self, shape: ModelShape, footprint: Footprint) -> float:
        low, projected = 0.0, 0
        for linear in shape.linears:
            short, long = sorted((linear.inputs, linear.outputs))
            if self.rank < short:
                low += 8.0 * self.rank * long + (4.0 * self.rank * short if self.kind == "galore" else 0.0)
                projected += linear.inputs * linear.outputs
        layers = shape.num_layers
        return layers * low + 8.0 * (footprint.num_trainable - layers * projected)

    def quality_prior(self) -> None:
        return None  # full training's would promise too much

    def setup(self, model: Any, settings: TrainSettings) -> TrainSetup:
        from strategies.methods.low_rank_adamw import LowRankAdamW, Window
        from strategies.model.heads import undecayed
        from strategies.step.state import save_model

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
        optimizer = LowRankAdamW(seen, rest, window, settings, undecayed(model))
        return TrainSetup(model, optimizer, parameters, partial(save_model, model), export_format="model", notes=notes)


@dataclass(frozen=True)
class Apollo(Galore):
    """Train all weights; Adam in a random subspace says how far each channel's gradient goes (arXiv 2412.05270)."""

    rank: int = option(64, "rank of the window on each gradient", tried=(16, 64), ge=1)
    scale: float = option(1.0, "the step is multiplied by its square root", gt=0)

    name: ClassVar[str] = "experimental_apollo"
    kind: ClassVar[Literal["galore", "apollo"]] = "apollo"
