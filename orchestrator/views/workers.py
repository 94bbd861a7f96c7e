"""What each worker of a run does, or each stage of its pipeline, for a terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.table import Table

from clusters.units import format_bytes, format_s
from orchestrator.language.catalogue import tr
from orchestrator.runs.events import Member
from orchestrator.runs.worker_stats import StageStats, WorkerStats


def workers_view(rows: Sequence[WorkerStats] | Sequence[Member]) -> Table:
    """A row a worker."""
    table = Table(box=None, pad_edge=False)
    table.add_column(tr("worker"))
    for name in (tr("share"), tr("tokens/s"), tr("computes"), tr("waits"), tr("memory"), tr("sent a step")):
        table.add_column(name, justify="right")
    table.add_column("")
    for row in rows:
        table.add_row(f"{row.node} ({row.device})", *_cells(row))
    return table


def stages_view(rows: Sequence[StageStats]) -> Table:
    """Two rows a stage: what was measured, and under it what was predicted."""
    table = Table(box=None, pad_edge=False)
    table.add_column(tr("stage") if rows[0].num_replicas == 1 else tr("pipeline.stage"))
    table.add_column(tr("worker"), min_width=len("predicted"))
    heads = tr("layers"), tr("computes"), tr("busy"), tr("waits"), tr("memory"), tr("sent"), ""
    for name in heads:
        table.add_column(name, justify="right", no_wrap=True)
    for row, is_slowest in zip(rows, slowest_stages(rows), strict=True):
        measured, predicted = stage_cells(row)
        last = tr("slowest") if is_slowest else ""
        table.add_row(row.place, f"{row.node} ({row.device})", row.layers, *measured, last)
        table.add_row("", tr("predicted"), "", *predicted, style="dim")
    return table


def stage_cells(row: StageStats) -> tuple[list[str], list[str]]:
    """What a stage computes, its busy share, waiting time, memory and traffic: as measured, and as predicted."""
    shown: dict[str, Callable[[float], str]] = {
        "busy_s": format_s,
        "busy_share": "{:.0%}".format,
        "wait_s": format_s,
        "peak_bytes": format_bytes,
        "bytes_sent": format_bytes,
    }

    def cells(prefix: str) -> list[str]:
        values = row.to_json()
        found = ((values[prefix + name], show) for name, show in shown.items())
        return ["-" if value is None else show(value) for value, show in found]

    return cells(""), cells("predicted_")


def slowest_stages(rows: Sequence[StageStats]) -> list[bool]:
    """Of each stage, whether it computes the longest; none while nothing was measured."""
    most = max((row.busy_s or 0.0 for row in rows), default=0.0)
    return [most > 0 and row.busy_s == most for row in rows]


def _cells(row: WorkerStats | Member) -> list[str]:
    if isinstance(row, Member):
        return [*["-"] * 6, tr("has made no step yet")]
    return [
        f"{row.share:.0%}",
        f"{row.tokens_per_s:.0f}",
        format_s(row.seconds),
        format_s(row.wait_s),
        format_bytes(row.peak_bytes),
        "-" if row.bytes_sent is None else format_bytes(row.bytes_sent),
        tr("the others wait for it") if row.is_slowest else "",
    ]
