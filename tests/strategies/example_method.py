"""A training method in one file, step by step in CONTRIBUTING.md: only the norms train (Zhao, arXiv 2312.11420)."""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from strategies.contract import MethodDefaults, option
from strategies.cost.memory import Footprint
from strategies.cost.plan import Costs, predict
from strategies.cost.work import Work
from strategies.export import WHOLE_MODEL
from strategies.train_setup import TrainSetup
from strategies.workload import BYTES_PER_ELEMENT


@dataclass(frozen=True)
class NormTuning(MethodDefaults):
    """Train the norms' weights, freeze all others."""

    lr_factor: float = option(10.0, "learning rate of the norms over train.learning_rate", tried=(1.0, 10.0), gt=0)

    name: ClassVar[str] = "example_norms"
    full_rank: ClassVar[bool] = False

    def estimate(self, workload, device, node, techniques):
        shape, element_bytes = workload.shape, BYTES_PER_ELEMENT[techniques.dtype]
        num_trainable = shape.num_norm_parameters
        weights_bytes = element_bytes * shape.num_parameters
        footprint = Footprint(weights_bytes, num_trainable, stream_bytes=element_bytes, norms_train=True)
        work = Work(trains_weights=False, num_trainable=num_trainable)
        return predict(self.name, workload, device, node, techniques, Costs(footprint, work))

    def exports(self, shape):
        return WHOLE_MODEL

    def setup(self, model, settings):
        from strategies.step.optimizers import build_optimizer
        from strategies.step.state import save_model
        from strategies.techniques.precision import train_in_fp32

        for name, parameter in model.named_parameters():
            parameter.requires_grad_("norm" in name)
        train_in_fp32(model)
        norms = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        optimizer = build_optimizer([{"params": list(norms.values()), "lr_factor": self.lr_factor}], settings)
        return TrainSetup(model, optimizer, norms, partial(save_model, model), export_format="model")
