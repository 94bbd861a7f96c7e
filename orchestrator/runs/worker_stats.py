"""Each worker's pace, waiting time, memory and traffic, read from a run's events."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from orchestrator.runs.events import Event, Member, StepReport, WorkerGroup

_LAST_STEPS = 10  # that the medians are of


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


def stats_of_step(members: Sequence[Member], step: StepReport) -> list[WorkerStats]:
    """The numbers of one step by rank; nothing where one worker did it all."""
    columns = (step.worker_tokens or [], step.worker_s or [], step.worker_peak_bytes or [])
    total = sum(columns[0])
    return [
        WorkerStats(
            node=member.node or f"worker {rank}",
            device=member.device,
            share=tokens / total if total else 0.0,
            tokens_per_s=tokens / seconds if seconds else 0.0,
            seconds=seconds,
            wait_s=max(0.0, step.seconds - seconds),
            peak_bytes=peak,
            bytes_sent=step.step_bytes_sent,
            is_slowest=rank == step.slowest,
        )
        for rank, (member, tokens, seconds, peak) in enumerate(zip(members, *columns, strict=bool(columns[1])))
    ]


def stats_of_run(events: Sequence[Event]) -> list[WorkerStats] | list[Member]:
    """Medians over the last steps of the group that runs or ran last; nothing where one worker did it all.

    The members themselves while they have made no step.
    """
    members, steps = _last_group(events)
    if not steps:
        return [Member(member.node or f"worker {rank}", member.device) for rank, member in enumerate(members)]
    latest = steps[-_LAST_STEPS:]
    tokens = [sum(one) for one in zip(*(step.worker_tokens or () for step in latest), strict=True)]
    by_worker = zip(*(stats_of_step(members, step) for step in latest), strict=True)
    return [_median(rows, own / (sum(tokens) or 1)) for rows, own in zip(by_worker, tokens, strict=True)]


def metrics(members: Sequence[Member], step: StepReport) -> dict[str, float]:
    """The numbers of one step as flat metrics, `worker.NODE.NAME`; a node's second device is NODE.1."""
    found: dict[str, float] = {}
    seen: Counter[str] = Counter()
    for row in stats_of_step(members, step):
        name = f"{row.node}.{seen[row.node]}" if seen[row.node] else row.node
        seen[row.node] += 1
        numbers = {key: getattr(row, key) for key in ("tokens_per_s", "wait_s", "peak_bytes", "bytes_sent")}
        found |= {f"worker.{name}.{key}": float(value) for key, value in numbers.items() if value is not None}
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
