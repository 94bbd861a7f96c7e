"""Events of a run as the numbers that a tracker draws.  `GROUP/NAME`, since trackers fold names at the slash."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.planning.plan import Plan
from orchestrator.runs import worker_stats
from orchestrator.runs.events import (
    BetweenReport,
    Evaluation,
    Event,
    LearningReport,
    Member,
    PredictionReport,
    QualityReport,
    StepReport,
    WorkerGroup,
)
from orchestrator.runs.proofs.proof import NOT_RUN, PASSED, Proof
from orchestrator.runs.tasks.task_score import TaskScore

_FIELDS: dict[type[Event], tuple[str, ...]] = {
    PredictionReport: ("predicted_step_s", "measured_step_s", "predicted_bytes", "measured_peak_bytes"),
    StepReport: (
        "loss",
        "grad_norm",
        "learning_rate",
        "epoch",
        "tokens_per_s",
        "supervised_tokens",
        "tokens",
        "peak_bytes",
        "bus_down_bytes",
        "bus_up_bytes",
        "rows_moved",
    ),
    Evaluation: ("eval_loss",),
}


@dataclass(frozen=True)
class Number:
    """A point of a curve."""

    name: str
    value: float
    step: int
    time: float  # seconds since the epoch


def numbers_of(events: Iterable[Event], plan: Callable[[], Plan], members: list[dict[str, Any]]) -> Iterator[Number]:
    """Every number of some events.  `members` are the workers so far (fields of `Member`) and follow the events."""
    stages: Plan | None = None
    for event in events:
        if isinstance(event, WorkerGroup):
            members[:] = [{"node": member.node, "device": member.device} for member in event.members]
        found = _plain_numbers(event, [Member(**member) for member in members])
        if _is_about_stages(event):
            stages = stages or plan()
            if stages.techniques.stage:
                found |= worker_stats.stage_metrics(stages, event if isinstance(event, StepReport) else None)
        step = getattr(event, "step", None) or 0
        yield from (Number(name, float(value), step, event.time) for name, value in found.items())


def _is_about_stages(event: Event) -> bool:
    """Whether a plan with stages says more of it: of a step in stages, or of the end of any run."""
    return isinstance(event, PredictionReport) or (isinstance(event, StepReport) and event.stage_busy_s is not None)


def _plain_numbers(event: Event, members: Sequence[Member]) -> dict[str, float]:
    found = {name: getattr(event, name) for name in _FIELDS.get(type(event), ())}
    match event:
        case StepReport():
            busy = {f"lane/{lane}_s": seconds for lane, seconds in (event.lane_s or {}).items()}
            found |= worker_stats.metrics(members, event) | busy | (event.rewards or {})
            found |= event.extra_loss or {}
        case Evaluation():
            found |= {f"eval_{name}": value for name, value in _numeric(event.extra).items()}
        case LearningReport():
            found |= {f"learnt/{name}": value for name, value in _numeric(event.extra).items()}
        case BetweenReport():
            found |= {f"between/{name}": value for name, value in _numeric(event.extra).items()}
        case Proof():
            found |= {f"verify/{event.check}": event.difference}
            found |= {} if event.outcome == NOT_RUN else {f"verify/{event.check}_passed": event.outcome == PASSED}
        case TaskScore():
            for when in ("before", "after"):
                found[f"{when}/{event.task}/{event.metric.replace(',', '/')}"] = getattr(event, when)
        case QualityReport():
            values = {"eval_loss": event.eval_loss, **event.extra}
            found |= {f"{event.when}/{name}": value for name, value in _numeric(values).items()}
    return {name: value for name, value in found.items() if value is not None}


def _numeric(values: Mapping[str, Any]) -> dict[str, float]:
    return {key: value for key, value in values.items() if isinstance(value, int | float)}
