"""The events of a run: every kind of line in events.jsonl as a dataclass.

A line is {"event": kind, "time": seconds since the epoch, ...fields}.  Fields and kinds that are not named here are
kept.  A line that a power cut left half written, or that was damaged later, is skipped; `parse_line` names it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import KW_ONLY, MISSING, asdict, dataclass, field, fields
from functools import cache
from typing import Any, ClassVar, Self

from clusters.safe.reading import BadInput, record
from orchestrator.runs.stage_spans import StageSpans


@dataclass(frozen=True)
class Event:
    """A line of events.jsonl.  A field without a default is always written, one that is None by default only if set."""

    kinds: ClassVar[dict[str, type[Event]]] = {}
    kind: ClassVar[str]
    whole: ClassVar[tuple[str, ...]] = ()  # optional fields that are written all or none; the first decides

    _: KW_ONLY
    time: float = 0.0  # seconds since the epoch, set when it is written
    extra: Mapping[str, Any] = field(default_factory=dict)  # fields that the class does not name

    def __init_subclass__(cls, kind: str = "") -> None:
        cls.kind = kind
        if kind:
            cls.kinds[kind] = cls

    def to_json(self) -> dict[str, Any]:
        """The line's values, in the order they are written."""
        has_whole = bool(self.whole) and getattr(self, self.whole[0]) is not None
        values: dict[str, Any] = {"event": self.kind, "time": self.time}
        for name, wanted in _fields(type(self)).items():
            value = getattr(self, name)
            if value is not None or wanted.is_required or (has_whole and name in self.whole):
                values[name] = value
        return {**values, **self.extra}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Raises BadInput naming a field of the wrong type."""
        whole = cls.whole if cls.whole and cls.whole[0] in values else ()
        found: dict[str, Any] = {}
        for name, wanted in _fields(cls).items():
            if name in values:
                value = values[name]
            elif name in whole:
                raise BadInput(f"{cls.kind}: {name} is missing")
            elif wanted.is_required:
                value = None
            else:
                continue
            if type(value) not in wanted.types or (wanted.inside and value and not wanted.holds(value)):
                raise BadInput(f"{cls.kind}: {name} is {json.dumps(value)[:40]}")
            found[name] = value
        found |= {"time": values["time"], "extra": _without(values, "event", "time", *found)}
        made = object.__new__(cls)  # not cls(...), with which a frozen dataclass sets field after field: half as fast
        vars(made).update(found)
        return made


@dataclass(frozen=True)
class StateChange(Event, kind="state"):
    """running | replanning | finished | stopped | failed."""

    state: str
    step: int | None = None
    pid: int | None = None
    text: str | None = None  # why it failed


@dataclass(frozen=True)
class Note(Event, kind="note"):
    """A decision and its reason, for the user."""

    text: str


@dataclass(frozen=True, kw_only=True)
class ErrorReport(Event, kind="error"):
    """An exception in a worker."""

    text: str
    traceback: str | None = None
    exit_code: int | None = None
    again: bool | None = None  # whether another try may succeed
    node: str | None = None


@dataclass(frozen=True)
class Failure(Event, kind="failure"):
    """A try that failed, to be continued from the last checkpoint."""

    text: str
    step: int | None = None
    failures: int | None = None


@dataclass(frozen=True)
class WorkerKilled(Event, kind="killed"):
    """A worker process that vanished."""

    rank: int
    node: str | None


@dataclass(frozen=True)
class Replan(Event, kind="replanned"):
    """Another plan, for the nodes that are there."""

    plan: str
    nodes: list[str]
    lost: list[str]
    joined: list[str]
    seconds: float


@dataclass(frozen=True)
class ModelReady(Event, kind="ready"):
    """The model is loaded and set up."""

    seconds: float
    trainable: int | None = None


@dataclass(frozen=True)
class PreflightReport(Event, kind="preflight"):
    """What the longest batch took before training began."""

    seconds: float | None
    longest_batch_s: float | None
    longest_batch_tokens: int | None
    peak_bytes: float | None
    reserved_bytes: float | None  # with what the allocator keeps between blocks; unknown on a CPU
    checkpoint_bytes: float | None
    text: str


@dataclass(frozen=True)
class Member:
    """A worker of a group."""

    node: str
    device: str
    extra: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {"node": self.node, "device": self.device, **self.extra}

    @classmethod
    def from_json(cls, values: Any) -> Member:
        """Raises BadInput."""
        if not isinstance(values, dict) or not isinstance(values.get("node"), str) or "device" not in values:
            raise BadInput("group: a member without node and device")
        return cls(values["node"], str(values["device"]), _without(values, "node", "device"))


@dataclass(frozen=True, kw_only=True)
class WorkerGroup(Event, kind="group"):
    """The workers that train together, by rank, and their shares of a step."""

    step: int | None = None
    plan: str | None = None
    members: list[Member]
    shares: list[float] | None = None

    def to_json(self) -> dict[str, Any]:
        return super().to_json() | {"members": [one.to_json() for one in self.members]}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        members = values.get("members")
        if isinstance(members, list):
            values = {**values, "members": [Member.from_json(one) for one in members]}
        return super().from_json(values)


@dataclass(frozen=True, kw_only=True)
class ShareChange(Event, kind="shares"):
    """The workers' shares from the next step on."""

    step: int | None = None
    shares: list[float]


@dataclass(frozen=True, kw_only=True)
class StepReport(Event, kind="step"):
    """An optimizer step."""

    whole: ClassVar[tuple[str, ...]] = ("worker_s", "worker_tokens", "worker_peak_bytes", "step_bytes_sent", "slowest")
    step: int
    epoch: float
    loss: float
    grad_norm: float
    learning_rate: float
    tokens: float
    supervised_tokens: float
    seconds: float
    tokens_per_s: float
    peak_bytes: float
    samples: str | None = None  # a digest of their ids
    known_tokens: float | None = None  # where results of frozen lower layers are kept: those that did not pass them
    computed_tokens: float | None = None  # where common beginnings are computed once: those that were computed
    loss_scale: float | None = None  # of fp16
    rewards: dict[str, float] | None = None  # of an objective over documents, by TRL's names
    extra_loss: dict[str, float] | None = None  # of a method's loss beside the tokens', and what that says of it
    worker_tokens: list[float] | None = None  # of several workers, by rank
    worker_s: list[float] | None = None
    worker_peak_bytes: list[float] | None = None
    step_bytes_sent: float | None = None  # None as well where an engine counts none
    slowest: int | None = None
    stage_busy_s: list[float] | None = None  # of stages of a pipeline, by rank: seconds in passes
    stage_wait_s: list[float] | None = None  # for a neighbour
    stage_bytes_sent: list[float] | None = None  # hidden states and their gradients
    stage_bytes_received: list[float] | None = None
    bus_down_bytes: float | None = None  # of an optimizer that streams
    bus_up_bytes: float | None = None
    lane_s: dict[str, float] | None = None
    rows_moved: float | None = None  # of one that moves single rows


@dataclass(frozen=True)
class StageTimeline(Event, kind="timeline"):
    """When each stage of a pipeline computed and waited in one step, by rank."""

    step: int
    stages: list[StageSpans]

    def to_json(self) -> dict[str, Any]:
        return super().to_json() | {"stages": [asdict(one) for one in self.stages]}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        if isinstance(stages := values.get("stages"), list):
            values = {**values, "stages": [record(StageSpans, one, "timeline: stages") for one in stages]}
        return super().from_json(values)


@dataclass(frozen=True)
class _MethodReport(Event):
    """What a method says of itself: what it learned, or what it did after an update; its numbers are extra."""

    step: int
    text: str

    @classmethod
    def of(cls, step: int, values: Mapping[str, Any]) -> Self:  # its sentence `text` is among the values
        return cls(step, values["text"], extra=_without(values, "text"))


class LearningReport(_MethodReport, kind="learnt"): ...  # from gradients between two steps


class BetweenReport(_MethodReport, kind="between"): ...  # after an update; `step` counts steps done


@dataclass(frozen=True)
class Evaluation(Event, kind="eval"):
    """The held-out loss after a step."""

    step: int
    eval_loss: float


@dataclass(frozen=True)
class CheckpointReport(Event, kind="checkpoint"):
    """A checkpoint was saved."""

    step: int
    name: str | None


@dataclass(frozen=True)
class PhaseProgress(Event, kind="progress"):
    """How far an evaluation or what is saved has come, every few seconds at most."""

    phase: str  # evaluation | answers | saving
    done: float  # rows, prompts
    total: float | None


@dataclass(frozen=True)
class FinalEvaluation(Event, kind="last_evaluation"):
    """The last evaluation begins; a process that ends in it may come back with fewer rows."""

    rows: int


@dataclass(frozen=True)
class QualityReport(Event, kind="quality"):
    """The metrics of the held-out rows before or after training; all but the loss are extra."""

    when: str  # before | after
    eval_loss: float | None = None

    @classmethod
    def of(cls, when: str, quality: Mapping[str, Any]) -> QualityReport:
        """A quality's numbers, without its texts."""
        numbers = {name: value for name, value in quality.items() if isinstance(value, int | float)}
        return cls(when, numbers.pop("eval_loss", None), extra=numbers)


@dataclass(frozen=True)
class HandBack(Event, kind="handed_back"):
    """How the exported files compare with the trained model."""

    text: str


@dataclass(frozen=True)
class PredictionReport(Event, kind="prediction"):
    """The plan's predictions beside what was measured."""

    predicted_step_s: float
    measured_step_s: float
    predicted_bytes: float
    measured_peak_bytes: float


@dataclass(frozen=True)
class TrackingReport(Event, kind="tracking"):
    """Where MLflow has the run (ok), or why it has not."""

    ok: bool
    text: str


@dataclass(frozen=True)
class OtherEvent(Event):
    """A kind of another version."""

    kind: str  # type: ignore[misc]

    def to_json(self) -> dict[str, Any]:
        return {"event": self.kind, "time": self.time, **self.extra}


def read_event(values: Any) -> Event:
    """An event from a line's values.  Raises BadInput."""
    if not isinstance(values, dict) or not isinstance(values.get("event"), str):
        raise BadInput("is no event")
    if type(values.get("time")) not in _TYPES["float"]:
        raise BadInput("its time is not a number")
    if kind := Event.kinds.get(values["event"]):
        return kind.from_json(values)
    return OtherEvent(values["event"], time=values["time"], extra=_without(values, "event", "time"))


def parse_lines(content: bytes) -> list[Event]:
    """The events of complete lines; damaged ones are skipped."""
    complete = content.rpartition(b"\n")[0].split(b"\n")  # what follows is being written
    return [event for event, _ in map(parse_line, complete) if event is not None]


def parse_line(line: bytes) -> tuple[Event | None, str]:
    """The event of a line, or None and what is wrong with it."""
    try:
        return read_event(json.loads(line)), ""
    except (BadInput, ValueError, RecursionError) as error:
        return None, str(error) if isinstance(error, BadInput) else "is not JSON"


def _without(values: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in names} if len(values) > len(names) else {}


_TYPES: dict[str, tuple[type, ...]] = {one.__name__: (one,) for one in (str, int, bool, list, dict, Member, StageSpans)}
_TYPES |= {"float": (int, float), "None": (type(None),)}


@dataclass(frozen=True)
class _Field:
    """A field's JSON types, from an annotation such as `list[float] | None`."""

    is_required: bool
    types: tuple[type, ...]
    inside: tuple[type, ...]  # of a list's items or a dict's values

    def holds(self, value: Any) -> bool:
        return all(type(one) in self.inside for one in (value.values() if type(value) is dict else value))


@cache
def _fields(kind: type[Event]) -> dict[str, _Field]:
    found = {}
    for one in fields(kind):
        if one.name not in ("time", "extra"):
            names = re.findall(r"(\w+)(?:\[(?:str, )?(\w+)\])?", str(one.type))
            types = tuple(kind for name, _ in names for kind in _TYPES[name])
            inside = tuple(kind for _, name in names if name for kind in _TYPES[name])
            found[one.name] = _Field(one.default is MISSING, types, inside)
    return found
