"""Each worker's pace, waiting time, memory and traffic, read from a run's events; of a pipeline, each stage's."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from orchestrator.runs.events import Event, Member, StageTimeline, StepReport, WorkerGroup
from orchestrator.runs.stage_spans import StageSpans, spans_of_simulation

if TYPE_CHECKING:
    from orchestrator.planning.plan import NodePlan, Plan

LAST_STEPS = 10  # that the medians are of
_STAGE_METRICS = ("busy_s", "busy_share", "wait_s", "bytes_sent", "bytes_received", "peak_bytes")


@dataclass(frozen=True)
class WorkerStats:
    """A worker's numbers: of one step, or medians over several."""

    node: str
    device: str
    share: float  # of the tokens
    tokens_per_s: float
    seconds: float  # it computes
    wait_s: float  # it waits for the others
    bytes_sent: float | None
    peak_bytes: float
    is_slowest: bool

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class StageStats:
    """A stage's numbers beside the plan's: medians over several steps, None while there was none."""

    node: str
    device: str
    replica: int  # which pipeline
    num_replicas: int
    stage: int
    first_layer: int
    end_layer: int
    busy_s: float | None = None  # of a step, it computes
    busy_share: float | None = None  # of a step
    wait_s: float | None = None  # of a step, for a neighbour
    bytes_sent: float | None = None  # a step: hidden states and their gradients
    bytes_received: float | None = None
    peak_bytes: float | None = None
    predicted_busy_s: float | None = None
    predicted_busy_share: float | None = None
    predicted_wait_s: float | None = None
    predicted_bytes_sent: float | None = None
    predicted_peak_bytes: float | None = None

    @property
    def place(self) -> str:
        """Its number, that of its pipeline before it where there are several."""
        return f"{self.replica}.{self.stage}" if self.num_replicas > 1 else str(self.stage)

    @property
    def layers(self) -> str:
        """The first and the last, from 0."""
        return (
            f"{self.first_layer}-{self.end_layer - 1}"
            if self.end_layer - self.first_layer > 1
            else str(self.first_layer)
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def stats_of_step(members: Sequence[Member], step: StepReport) -> list[WorkerStats]:
    """The numbers of one step by rank; nothing where one worker did it all."""
    columns = (step.worker_tokens or [], step.worker_s or [], step.worker_peak_bytes or [])
    total, stages = (
        _all_tokens([step]),
        len(step.stage_busy_s or ()) == len(step.stage_bytes_sent or ()) == len(members),
    )
    computes = (step.stage_busy_s if stages else step.worker_s) or []
    sent = (step.stage_bytes_sent if stages else None) or [step.step_bytes_sent] * len(members)
    return [
        WorkerStats(
            node=member.node or f"worker {rank}",
            device=member.device,
            share=tokens / total if total else 0.0,
            tokens_per_s=tokens / seconds if seconds else 0.0,
            seconds=computes[rank],
            wait_s=max(0.0, step.seconds - computes[rank]),
            peak_bytes=peak,
            bytes_sent=sent[rank],
            is_slowest=rank == step.slowest,
        )
        for rank, (member, tokens, seconds, peak) in enumerate(zip(members, *columns, strict=bool(columns[1])))
    ]


def _all_tokens(steps: Sequence[StepReport]) -> float:
    """Of some steps; all stages of a pipeline work on the same ones."""
    return sum(step.tokens if step.stage_busy_s else sum(step.worker_tokens or ()) for step in steps)


def stats_of_run(events: Sequence[Event]) -> list[WorkerStats] | list[Member]:
    """Medians over the last steps of the group that runs or ran last; nothing where one worker did it all.

    The members themselves while they have made no step.
    """
    members, steps = _last_group(events)
    if not steps:
        return [Member(member.node or f"worker {rank}", member.device) for rank, member in enumerate(members)]
    latest = steps[-LAST_STEPS:]
    tokens = [sum(one) for one in zip(*(step.worker_tokens or () for step in latest), strict=True)]
    by_worker = zip(*(stats_of_step(members, step) for step in latest), strict=True)
    total = _all_tokens(latest) or 1
    return [_median(rows, own / total) for rows, own in zip(by_worker, tokens, strict=True)]


def stages_of_run(plan: Plan, events: Sequence[Event]) -> list[StageStats]:
    """Each stage, by rank: medians over the last steps of the group that runs or ran last.  Nothing without stages."""
    planned = [_planned_stage(plan, part) for part in plan.nodes if part.techniques.stage]
    steps = [step for step in _last_group(events)[1] if _has_stages(step, len(planned))][-LAST_STEPS:]
    return [_with_measured(one, rank, steps) if steps else one for rank, one in enumerate(planned)]


def _planned_stage(plan: Plan, part: NodePlan) -> StageStats:
    stage, replica = part.techniques.stage, part.replica or 0
    assert stage
    planned = StageStats(
        part.node or "this machine",
        part.device,
        replica,
        max(plan.replica_of) + 1,
        stage.index,
        stage.first_layer,
        stage.end_layer,
        predicted_peak_bytes=part.memory.total_bytes,
    )
    known = plan.pipelines[replica] if replica < len(plan.pipelines) else None
    if known is None or len(known.passes) != stage.count:
        return planned
    return replace(
        planned,
        predicted_busy_s=known.simulation.busy_s[stage.index],
        predicted_busy_share=known.simulation.busy_s[stage.index] / plan.step_s,
        predicted_wait_s=max(0.0, known.simulation.waiting_s[stage.index]),  # of sums that cancel
        predicted_bytes_sent=known.bytes_sent[stage.index],
    )


def stage_columns(step: StepReport) -> tuple[Sequence[float], ...]:
    """Busy and waiting seconds, bytes sent and received and at the peak, each by rank; empty where unknown."""
    found = (step.stage_busy_s, step.stage_wait_s, step.stage_bytes_sent, step.stage_bytes_received)
    return tuple(column or () for column in (*found, step.worker_peak_bytes))


def _has_stages(step: StepReport, count: int) -> bool:
    return count > 0 and all(len(column) == count for column in stage_columns(step))


def _with_measured(planned: StageStats, rank: int, steps: Sequence[StepReport]) -> StageStats:
    busy, waits, sent, received, peaks = zip(
        *([column[rank] for column in stage_columns(step)] for step in steps), strict=True
    )
    return replace(
        planned,
        busy_s=statistics.median(busy),
        busy_share=statistics.median(one / step.seconds for one, step in zip(busy, steps, strict=True)),
        wait_s=statistics.median(waits),
        bytes_sent=statistics.median(sent),
        bytes_received=statistics.median(received),
        peak_bytes=max(peaks),
    )


def timelines(plan: Plan, events: Sequence[Event]) -> tuple[list[StageSpans], list[StageSpans]]:
    """One step of the pipelines as simulated by the plan, and as measured of the last group; [] where unknown."""
    predicted, measured = list[StageSpans](), list[StageSpans]()
    for replica, pipeline in enumerate(plan.pipelines):
        predicted += spans_of_simulation(pipeline.simulation, replica)
    for event in events:
        if isinstance(event, WorkerGroup):
            measured = []
        elif isinstance(event, StageTimeline):
            measured = event.stages
    return predicted, measured


def stage_metrics(plan: Plan, step: StepReport | None = None) -> dict[str, float]:
    """What a step measured of each stage as flat metrics, `stage/NUMBER/NAME`; without a step what was predicted.

    Of several pipelines `pipeline/NUMBER/stage/NUMBER/NAME`.
    """
    found: dict[str, float] = {}
    for row in stages_of_run(plan, [] if step is None else [WorkerGroup(members=[Member("", "")]), step]):
        name = f"stage/{row.stage}" if row.num_replicas == 1 else f"pipeline/{row.replica}/stage/{row.stage}"
        for key, value in row.to_json().items():
            if (
                key.startswith("predicted_") == (step is None)
                and key.removeprefix("predicted_") in _STAGE_METRICS
                and value is not None
            ):
                found[f"{name}/{key}"] = float(value)
    return found


def metrics(members: Sequence[Member], step: StepReport) -> dict[str, float]:
    """The numbers of one step as flat metrics, `worker/NODE/NAME`; a node's second device is NODE.1."""
    found: dict[str, float] = {}
    seen: Counter[str] = Counter()
    for row in stats_of_step(members, step):
        name = f"{row.node}.{seen[row.node]}" if seen[row.node] else row.node
        seen[row.node] += 1
        numbers = {key: getattr(row, key) for key in ("tokens_per_s", "wait_s", "peak_bytes", "bytes_sent")}
        found |= {f"worker/{name}/{key}": float(value) for key, value in numbers.items() if value is not None}
    return found


def _last_group(events: Sequence[Event]) -> tuple[list[Member], list[StepReport]]:
    """The workers of the last group and its steps, as far as they have numbers by worker."""
    members: list[Member] = []
    steps: list[StepReport] = []
    for event in events:
        if isinstance(event, WorkerGroup):
            members, steps = event.members, []
        elif isinstance(event, StepReport) and event.worker_s is not None:
            steps.append(event)
    return members, steps if members else []


def _median(rows: Sequence[WorkerStats], share: float) -> WorkerStats:
    sent = [row.bytes_sent for row in rows if row.bytes_sent is not None]
    return WorkerStats(
        node=rows[0].node,
        device=rows[0].device,
        share=share,
        tokens_per_s=statistics.median(row.tokens_per_s for row in rows),
        seconds=statistics.median(row.seconds for row in rows),
        wait_s=statistics.median(row.wait_s for row in rows),
        peak_bytes=max(row.peak_bytes for row in rows),
        bytes_sent=statistics.median(sent) if sent else None,
        is_slowest=sum(row.is_slowest for row in rows) > len(rows) / 2,
    )
