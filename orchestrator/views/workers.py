"""What each worker of a run does, or each stage of its pipeline, for a terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.table import Table

from clusters.units import format_bytes, format_s
from orchestrator.runs.events import Member
from orchestrator.runs.worker_stats import StageStats, WorkerStats


def workers_view(rows: Sequence[WorkerStats] | Sequence[Member]) -> Table:
    """A row a worker."""
    table = Table(box=None, pad_edge=False)
    table.add_column("worker")
    for name in ("share", "tokens/s", "computes", "waits", "memory", "sent a step"):
        table.add_column(name, justify="right")
    table.add_column("")
    for row in rows:
        table.add_row(f"{row.node} ({row.device})", *_cells(row))
    return table


def stages_view(rows: Sequence[StageStats]) -> Table:
    """A row a stage, what was predicted in brackets."""
    table = Table(box=None, pad_edge=False)
    table.add_column("stage" if rows[0].num_replicas == 1 else "pipeline.stage")
    table.add_column("worker")
    for name in ("layers", "computes", "busy", "waits", "memory", "sent a step"):
        table.add_column(name, justify="right")
    table.add_column("")
    slowest = max((row.busy_s or 0.0 for row in rows), default=0.0)
    for row in rows:
        table.add_row(
            row.place,
            f"{row.node} ({row.device})",
            row.layers,
            "-" if row.busy_s is None else format_s(row.busy_s),
            *stage_cells(row),
            "the slowest" if row.busy_s and row.busy_s == slowest else "",
        )
    return table


def stage_cells(row: StageStats) -> tuple[str, str, str, str]:
    """Busy share, waiting time, memory and traffic, each as `measured (predicted)`."""
    return (
        _beside(row.busy_share, row.predicted_busy_share, "{:.0%}".format),
        _beside(row.wait_s, row.predicted_wait_s, format_s),
        _beside(row.peak_bytes, row.predicted_peak_bytes, format_bytes),
        _beside(row.bytes_sent, row.predicted_bytes_sent, format_bytes),
    )


def _beside(measured: float | None, predicted: float | None, shown: Callable[[float], str]) -> str:
    return ("-" if measured is None else shown(measured)) + ("" if predicted is None else f" ({shown(predicted)})")


def _cells(row: WorkerStats | Member) -> list[str]:
    if isinstance(row, Member):
        return [*["-"] * 6, "has made no step yet"]
    return [
        f"{row.share:.0%}",
        f"{row.tokens_per_s:.0f}",
        format_s(row.seconds),
        format_s(row.wait_s),
        format_bytes(row.peak_bytes),
        "-" if row.bytes_sent is None else format_bytes(row.bytes_sent),
        "the others wait for it" if row.is_slowest else "",
    ]
