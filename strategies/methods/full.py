"""Full fine-tuning: every weight trains, with fp32 master weights and AdamW."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from strategies.cost.memory import Footprint
from strategies.cost.plan import Costs, PredictedMethod
from strategies.cost.work import Work
from strategies.export import WHOLE_MODEL, Export
from strategies.quality import QualityPrior
from strategies.shape import Linear, ModelShape
from strategies.train_setup import TrainSettings, TrainSetup
from strategies.workload import BYTES_PER_ELEMENT, Dtype, Techniques


@dataclass(frozen=True)
class Full(PredictedMethod):
    """Train all weights.  Cost: 16 bytes a parameter (fp32 weight, gradient, two Adam moments) and activations."""

    name: ClassVar[str] = "full"
    full_rank: ClassVar[bool] = True
    trains_score: ClassVar[bool] = True

    def costs(self, shape: ModelShape, techniques: Techniques) -> Costs:
        g = BYTES_PER_ELEMENT[techniques.dtype]
        num_parameters, output = shape.num_parameters, shape.has_output * shape.output_rows * shape.hidden_size
        engine = techniques.uses_engine  # weights in the compute precision, an fp32 copy beside the moments
        half = g < 4 and not engine  # autocast: each linear map keeps a copy of its input and of its weight in that
        inputs = sum(linear.inputs for linear in shape.linears) if half else shape.distinct_inputs(shape.linears)
        footprint = Footprint(
            weights_bytes=(g if engine else 4.0) * num_parameters,
            num_trainable=num_parameters,
            trained_bytes=g if engine else 4.0,
            master_bytes=4.0 if engine else 0.0,
            stream_bytes=g if engine else 4.0,
            inputs_per_token=g * inputs,
            output_is_kept=True,
            product_is_kept=True,
            norms_train=True,
            cast_bytes=g * (shape.num_linear_parameters + output) if half else 0.0,
            embeddings_train=True,
            num_outside=num_parameters - shape.num_linear_parameters,
        )
        num_tensors = shape.num_layers * (len(shape.linears) + shape.family.norms) + 3
        work = Work(
            trains_weights=True,
            trains_output=True,
            num_trainable=num_parameters,
            num_tensors=num_tensors,
            orthogonal_products=sum(map(_orthogonal, shape.linears)) * shape.num_layers,
            cast_parameters=shape.num_linear_parameters + output if half else 0,
        )
        return Costs(footprint, work)

    def trains_outside_layers(self, shape: ModelShape) -> bool:
        return True

    def quality_prior(self) -> QualityPrior | None:
        return QualityPrior(0.472, 0.014, "PEFT MetaMathQA: Llama-3.2-3B full fine-tuning, GSM8K accuracy, one seed")

    def exports(self, shape: ModelShape) -> Export:
        return WHOLE_MODEL

    def load_dtype(self, techniques: Techniques) -> Dtype:
        return "float32"  # master weights: autocast computes in the planned precision

    def setup(self, model: Any, settings: TrainSettings) -> TrainSetup:
        from strategies.model.heads import outside_layers, undecayed
        from strategies.step.optimizers import build_optimizer
        from strategies.step.state import save_model

        model.requires_grad_(True)
        parameters = dict(model.named_parameters())
        optimizer = build_optimizer(
            [{"params": list(parameters.values())}], settings, outside_layers(model), undecayed(model)
        )
        return TrainSetup(model, optimizer, parameters, partial(save_model, model), export_format="model")


def _orthogonal(linear: Linear) -> float:
    """FLOP of Muon's five Newton-Schulz steps on a map's gradient: each X X^T, its square, and that times X."""
    short, long = sorted((linear.inputs, linear.outputs))
    return 5 * (4.0 * short * short * long + 2.0 * short**3)
