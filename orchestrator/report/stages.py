"""The stages of a pipeline in a run's report: each one's numbers, and one step as a picture."""

from __future__ import annotations

from collections.abc import Sequence

from clusters.units import format_bytes, format_s
from orchestrator.planning.plan import Plan
from orchestrator.report import plots
from orchestrator.report.blocks import Block, Figure, Table
from orchestrator.report.translations import Word
from orchestrator.runs.events import Event
from orchestrator.runs.stage_spans import StageSpans
from orchestrator.runs.worker_stats import stages_of_run, timelines
from orchestrator.views.workers import stage_cells


def stage_blocks(w: Word, plan: Plan, events: Sequence[Event]) -> list[Block]:
    """Nothing where the plan has no stages."""
    rows = stages_of_run(plan, events)
    if not rows:
        return []
    head = (
        "stage",
        "node",
        "device",
        "layers",
        "computes",
        "busy",
        "waits",
        "memory",
        "sent a step",
        "received a step",
    )
    cells = [
        (
            row.place,
            row.node,
            row.device,
            row.layers,
            "-" if row.busy_s is None else format_s(row.busy_s),
            *stage_cells(row),
            "-" if row.bytes_received is None else format_bytes(row.bytes_received),
        )
        for row in rows
    ]
    slowest = max(range(len(rows)), key=lambda number: rows[number].busy_s or 0.0)
    table = Table([w(name) for name in head], cells, () if rows[slowest].busy_s is None else (slowest,))
    return [table, *_timeline(w, *timelines(plan, events))]


def _timeline(w: Word, predicted: list[StageSpans], measured: list[StageSpans]) -> list[Block]:
    """The picture of one step, the predicted above the measured."""
    pictures = {
        f"{w(name)}: {format_s(max(one.end_s for one in stages))}": _rows(w, stages)
        for name, stages in (("predicted", predicted), ("measured", measured))
        if stages
    }
    if not pictures:
        return []
    caption = w("One step, stage by stage, from its first pass to its last; sums and update follow.")
    return [Figure("stages", plots.stage_timelines(pictures, w("seconds")), caption)]


def _rows(w: Word, stages: list[StageSpans]) -> dict[str, dict[str, list[tuple[float, float]]]]:
    several = len({one.replica for one in stages}) > 1
    return {
        f"{w('stage')} {one.replica}.{one.stage}" if several else f"{w('stage')} {one.stage}": {
            w("forward"): [(begin, end - begin) for kind, _, begin, end in one.passes if kind],
            w("backward"): [(begin, end - begin) for kind, _, begin, end in one.passes if not kind],
            w("waits"): [(begin, end - begin) for begin, end in one.waits],
        }
        for one in sorted(stages, key=lambda one: (one.replica, one.stage))
    }
