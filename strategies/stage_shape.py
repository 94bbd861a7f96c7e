"""The sizes of one stage of a pipeline: those of a model that has the stage's layers alone.  No torch.

Every formula that reads a `ModelShape` so gives the stage's part: its layers' weights, the embedding on the first
stage only, the last norm and the output matrix on the last only, which holds a copy where both are one matrix.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import cached_property, lru_cache

from strategies.shape import Linear, ModelShape, Part
from strategies.workload import StagePart, Workload


@dataclass(frozen=True)
class StageShape(ModelShape):
    """A stage's sizes.  Layers count from 0 in `num_layers` and `dense_layers`, from the model's start in `of`."""

    whole: ModelShape | None = None
    of: StagePart | None = None

    def __hash__(self) -> int:  # of few fields: caches look shapes up often
        return hash((self.num_layers, self.of, self.hidden_size))

    @property
    def has_embedding(self) -> bool:
        return self._part.is_first

    @property
    def has_output(self) -> bool:
        return self._part.is_last

    @property
    def _part(self) -> StagePart:
        assert self.of is not None
        return self.of

    @property
    def outside(self) -> dict[str, Linear]:
        has = {"tokens": self.has_embedding, "last": self.has_output}
        return {name: linear for name, linear in super().outside.items() if has[linear.reads]}

    @cached_property
    def named_parts(self) -> dict[str, tuple[int | None, Part]]:
        has = {"tokens": self.has_embedding, "last": self.has_output}
        every = super().named_parts
        return {name: (at, part) for name, (at, part) in every.items() if at is not None or has[part.reads]}

    @cached_property
    def num_bias_parameters(self) -> int:
        missing = 0 if self.has_output else self.vocab_size * self.family.head_bias
        missing += 0 if self.has_output else self.family.final_norm * self.family.norm_bias * self.hidden_size
        return super().num_bias_parameters - missing

    @property
    def num_embedding_parameters(self) -> int:
        """Of the embedding or the output matrix, or of both where it is the only stage."""
        if self.has_embedding and self.has_output:
            return super().num_embedding_parameters
        width, matrix = self.embedding_width, self.vocab_size * self.embedding_width
        projection = width * self.hidden_size if self.embedding_size else 0
        if self.has_embedding:
            types = 2 * self.hidden_size if self.family.encoder else 0
            return matrix + projection + types + self.num_positions * self.hidden_size
        return (matrix + projection + self.vocab_size * self.family.head_bias) if self.has_output else 0

    @property
    def num_norm_parameters(self) -> int:
        width = self.hidden_size * (1 + self.family.norm_bias)
        missing = 0 if self.has_output else int(self.family.final_norm)
        missing += 0 if self.has_embedding else int(self.family.encoder)
        return super().num_norm_parameters - width * missing


@lru_cache(1024)
def shape_of_stage(shape: ModelShape, stage: StagePart | None) -> ModelShape:
    """The sizes of a stage; those of the whole model without one."""
    if stage is None or isinstance(shape, StageShape):
        return shape
    values = {one.name: getattr(shape, one.name) for one in fields(shape)}
    layers = range(stage.first_layer, stage.end_layer)
    dense = tuple(layer - stage.first_layer for layer in shape.dense_layers if layer in layers)
    return StageShape(**values | {"num_layers": stage.num_layers, "dense_layers": dense}, whole=shape, of=stage)


def workload_of_stage(workload: Workload, stage: StagePart | None) -> Workload:
    """What a stage computes: all samples, its own layers, and losses on the last alone; all without a stage."""
    if stage is None:
        return workload
    supervised = workload.num_supervised_tokens if stage.is_last else 0
    return replace(workload, shape=shape_of_stage(workload.shape, stage), num_supervised_tokens=supervised)
