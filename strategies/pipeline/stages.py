"""Makes one stage of a prepared training: what it trains, its passes, its checkpoints, its export."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from strategies.contract import Method
from strategies.model.architecture import build
from strategies.pipeline.cut import CannotCut, keep_own
from strategies.pipeline.passes import StagePasses, StagePlace
from strategies.pipeline.sharding import StageSharding
from strategies.step.supervised_logits import inner_model
from strategies.train_setup import TrainSettings, TrainSetup


@dataclasses.dataclass(frozen=True)
class WholeExport:
    """Writes what all stages trained: a model in one piece, on `meta`, gives names and configuration."""

    folder: Path  # of the base model
    method: Method
    settings: TrainSettings

    def __call__(self, folder: Path, weights: Mapping[str, torch.Tensor] | None) -> None:
        assert weights is not None
        model = build(self.folder)
        model.is_quantized = self.method.is_quantised  # what is written is not
        whole = self.method.setup(model, self.settings)
        if absent := whole.parameters.keys() - weights.keys():
            raise CannotCut(f"{len(absent)} trained weights are missing in the result, e.g. {min(absent)}")
        whole.export(folder, weights)


def make_stage(
    setup: TrainSetup, settings: TrainSettings, pipelines: Sequence[Sequence[int]], export: WholeExport
) -> TrainSetup:
    """`setup` of a model from `cut.load_stage`, reduced to its stage; `pipelines` are the ranks of each one's stages.

    Needs the default process group, and makes one for each pipeline: collective.  Raises CannotCut.
    """
    stage = settings.techniques.stage
    assert stage is not None
    if setup.streaming or setup.learner:
        raise CannotCut("this method's optimizer works beside the computation, over all layers of the model")
    refuse_tied(inner_model(setup.model), setup.parameters)
    names, rank = list(setup.parameters), dist.get_rank()
    groups = {tuple(ranks): dist.new_group(list(ranks)) for ranks in pipelines}  # all of them, in one order, everywhere
    ranks = next(own for own in groups if rank in own)
    keep_own(setup, stage)
    setup.passes = StagePasses(setup, StagePlace(stage, ranks, groups[ranks]), names)
    setup.sharding = StageSharding(setup, pipelines[0], [*names, *(name for name in sorted(setup.names - set(names)))])
    setup.export = export
    return setup


def refuse_tied(model: Any, parameters: Mapping[str, torch.nn.Parameter]) -> None:
    """Raises CannotCut where embedding and output matrix are one tensor that trains: two stages would hold it."""
    embedding, output = model.get_input_embeddings(), model.get_output_embeddings()
    tied = model.config.get_text_config().tie_word_embeddings
    trained = {id(p) for p in parameters.values()}
    held = [p for module in (embedding, output) if module is not None for p in module.parameters()]
    if tied and any(id(p) in trained for p in held):
        raise CannotCut(
            "embedding and output matrix are one tensor here, and it trains: the first stage and the last would each"
            " have a copy. Train neither of them (method.modules_to_save), or use another method than full"
        )
