"""The JSON files of a run folder, each parsed in one place: of the right types, or a sentence with file and fault.

Numbers that are no numbers (a loss of NaN) are read as not measured.  Fields that are not named here are kept.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar

from clusters.safe.reading import load_json, record
from orchestrator.errors import bad_input_as_job_error
from orchestrator.runs.comparison.gains import Gain, gains
from orchestrator.runs.digests import FileDigest

if TYPE_CHECKING:
    from clusters.capability import ClusterCapability

T = TypeVar("T")
Values = dict[str, Any]


@dataclass(frozen=True)
class Origin:
    """origin.json: the folder that the job's relative paths start from."""

    folder: str


@dataclass(frozen=True)
class Sample:
    """A generated answer beside the wanted one."""

    prompt: str
    generated: str
    reference: str


@dataclass(frozen=True)
class Quality:
    """What was measured on held-out rows; in the file each score has a field of its own name."""

    eval_loss: float | None
    rows: int | None = None
    answers: int | None = None  # of `rows`, those whose prompt was answered
    without_room: int | None = None  # prompts that fill the model's context
    out_of_memory: int | None = None  # prompts whose answer did not fit
    no_answer: int | None = None  # generated texts in which eval.answer_pattern finds none
    seconds: float | None = None
    compared: dict[str, str] = field(default_factory=dict)  # score -> the unit of text it compares
    samples: list[Sample] = field(default_factory=list)
    by_answer: dict[str, list[float]] = field(default_factory=dict)  # of metrics that are means over the answers
    scores: dict[str, float] = field(default_factory=dict)  # eval_loss and every metric
    values: Values = field(default_factory=dict)  # as in the file


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
    runs_together: int | None = None  # in one process, over one base model; then nothing is predicted


@dataclass(frozen=True)
class EnergyRecord:
    """What counters saw of the training."""

    wh: float
    source: str


@dataclass(frozen=True)
class Check:
    """How what was handed back compares with what was trained."""

    text: str


@dataclass(frozen=True)
class HandedBack:
    """Which step's weights were handed back, and why not those of the lowest held-out loss."""

    folder: str  # adapter or model
    step: int
    eval_loss: float | None = None
    instead_of: str | None = None  # the checkpoint that was best
    reason: str | None = None  # why it could not be used
    files: dict[str, FileDigest] = field(default_factory=dict)
    check: Check | None = None


@dataclass(frozen=True)
class RunResult:
    """result.json: what a run came to."""

    steps: int
    tokens: int
    train_seconds: float
    memory: Memory
    supervised_tokens: int | None = None
    computed_tokens: int | None = None  # where common beginnings were computed once: fewer than `tokens`
    data_digest: str | None = None
    plan_hash: str | None = None
    stopped_early: bool = False
    best_checkpoint: str | None = None
    before: Quality | None = None
    after: Quality | None = None
    time: StepTimes | None = None
    energy: EnergyRecord | None = None
    versions: dict[str, str] | None = None
    handed_back: HandedBack | None = None
    values: Values = field(default_factory=dict)  # as in the file, where a later version may have more

    @property
    def check(self) -> str | None:
        """How what was handed back compares with what was trained."""
        return self.handed_back.check.text if self.handed_back and self.handed_back.check else None

    @property
    def gains(self) -> dict[str, Gain]:
        """What was gained by each metric that is a mean over answers, and how sure that is."""
        return gains(self.before.by_answer if self.before else {}, self.after.by_answer if self.after else {})

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / max(self.train_seconds, 1e-9)

    @property
    def measured_step_s(self) -> float | None:
        return self.time.measured_step_s if self.time else None


def parse_result(text: str, label: str) -> RunResult:
    """result.json.  Raises JobError with file and fault."""
    values, found = parse_values(RunResult, text, label)
    before, after = (values.get(when) and quality_of(values[when]) for when in ("before", "after"))
    return replace(found, before=before, after=after, values=values)


def quality_of(values: Values) -> Quality:
    """What an evaluation measured.  Raises BadInput."""
    return replace(record(Quality, values, "quality"), scores=scores(values), values=values)


def parse_quality(text: str, label: str) -> Quality:
    """before.json.  Raises JobError with file and fault."""
    return quality_of(parse_values(Quality, text, label)[0])


def parse_record(kind: type[T], text: str, label: str) -> T:
    """A JSON text as a record of this kind.  Raises JobError with file and fault."""
    return parse_values(kind, text, label)[1]


def parse_values(kind: type[T], text: str, label: str) -> tuple[Values, T]:
    """A JSON text as it is, and as a record of this kind.  Raises JobError with file and fault."""
    with bad_input_as_job_error():
        values = finite(load_json(text, label, allow_nan=True))
        return values, record(kind, values, label)


def parse_capability(text: str, label: str) -> ClusterCapability:
    """capability.json.  Raises JobError."""
    from clusters.capability import ClusterCapability

    with bad_input_as_job_error():
        return record(ClusterCapability, load_json(text, label), label)


def scores(quality: Values) -> dict[str, float]:
    """The metrics of a quality: every number beside its counts and seconds."""
    return {key: value for key, value in quality.items() if isinstance(value, float) and key != "seconds"}


def is_share(key: str) -> bool:
    """Whether a score is a share of 1, which is told in percent: a loss and the size of a reward are none."""
    return key != "eval_loss" and (not key.startswith("rewards/") or key == "rewards/accuracies")


def finite(values: Any) -> Any:
    """The same with null in place of what is no finite number."""
    if isinstance(values, dict):
        return {key: finite(value) for key, value in values.items()}
    if isinstance(values, list):
        return [finite(value) for value in values]
    return None if isinstance(values, float) and not math.isfinite(values) else values
