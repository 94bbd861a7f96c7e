"""The JSON files of a run folder, each parsed in one place: of the right types, or a sentence with file and fault.

Numbers that are no numbers (a loss of NaN) are read as not measured.  Fields that are not named here are kept.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, TypeVar

from clusters.capability import ClusterCapability
from clusters.safe.reading import load_json, record
from orchestrator.errors import bad_input_as_job_error
from orchestrator.runs.digests import FileDigest

T = TypeVar("T")
Values = dict[str, Any]


@dataclass(frozen=True)
class Origin:
    """origin.json: the folder that the job's relative paths start from."""

    folder: str


@dataclass(frozen=True)
class DataFiles:
    """data.json: where model and tokenised samples lie, and digests of the files they were made of."""

    model: str
    train: str
    eval: str | None = None
    split: float | None = None
    seed: int | None = None
    train_digest: str | None = None
    eval_digest: str | None = None
    statistics: Values | None = None


@dataclass(frozen=True)
class Sample:
    """A generated answer beside the wanted one."""

    prompt: str
    generated: str
    reference: str


@dataclass(frozen=True)
class Quality:
    """What was measured on held-out rows; metrics are fields of their own names."""

    eval_loss: float | None
    rows: int | None = None
    seconds: float | None = None
    samples: list[Sample] = field(default_factory=list)


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak, as predicted and as measured."""

    predicted_bytes: float
    measured_peak_bytes: float


@dataclass(frozen=True)
class StepTimes:
    """Seconds of a step, as predicted and as measured."""

    predicted_step_s: float | None = None
    formula_step_s: float | None = None
    measured_step_s: float | None = None
    device: str | None = None
    uuid: str | None = None  # of a GPU
    dtype: str | None = None


@dataclass(frozen=True)
class Energy:
    """What counters saw of the training."""

    wh: float
    source: str


@dataclass(frozen=True)
class HandedBack:
    """Which step's weights were handed back, and why not those of the lowest held-out loss."""

    folder: str  # adapter or model
    step: int
    eval_loss: float | None = None
    instead_of: str | None = None  # the checkpoint that was best
    reason: str | None = None  # why it could not be used
    files: dict[str, FileDigest] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """result.json: what a run came to."""

    steps: int
    tokens: int
    train_seconds: float
    memory: Memory
    supervised_tokens: int | None = None
    data_digest: str | None = None
    plan_hash: str | None = None
    stopped_early: bool = False
    best_checkpoint: str | None = None
    before: Quality | None = None
    after: Quality | None = None
    time: StepTimes | None = None
    energy: Energy | None = None
    versions: dict[str, str] | None = None
    handed_back: HandedBack | None = None


def parse(kind: Any, text: str, label: str) -> Any:
    """The fields of a JSON text after each that `kind` names has its type, or its default where it is not there.

    Raises JobError with file and fault.
    """
    with bad_input_as_job_error():
        values = finite(load_json(text, label, allow_nan=True))
        found = record(kind, values, label)
    absent = [one.name for one in fields(kind) if one.name not in values] if is_dataclass(kind) else []
    return values | {name: getattr(found, name) for name in absent}


def parse_capability(text: str, label: str) -> ClusterCapability:
    """capability.json.  Raises JobError."""
    with bad_input_as_job_error():
        return record(ClusterCapability, load_json(text, label), label)


def scores(quality: Values) -> dict[str, float]:
    """The metrics of a quality: every number beside its counts and seconds."""
    return {key: value for key, value in quality.items() if isinstance(value, float) and key != "seconds"}


def finite(values: Any) -> Any:
    """The same with null in place of what is no finite number."""
    if isinstance(values, dict):
        return {key: finite(value) for key, value in values.items()}
    if isinstance(values, list):
        return [finite(value) for value in values]
    return None if isinstance(values, float) and not math.isfinite(values) else values
