"""What each worker of a run does, for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from clusters.units import format_bytes, format_s
from orchestrator.runs.events import Member
from orchestrator.runs.worker_stats import WorkerStats


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
