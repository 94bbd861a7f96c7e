"""The stages of a pipeline in a run's report: each one's numbers, and one step as a picture."""

from __future__ import annotations

from collections.abc import Sequence

from clusters.units import format_s
from orchestrator.language.catalogue import Translator
from orchestrator.planning.plan import Plan
from orchestrator.report import plots
from orchestrator.report.blocks import Block, Figure, Table
from orchestrator.runs.events import Event
from orchestrator.runs.stage_spans import StageSpans
from orchestrator.runs.worker_stats import stages_of_run, timelines
from orchestrator.views.workers import slowest_stages, stage_cells


def stage_blocks(w: Translator, plan: Plan, events: Sequence[Event]) -> list[Block]:
    """The table of the stages and the timeline of a step; none where the plan has no stages."""
    rows = stages_of_run(plan, events)
    if not rows:
        return []
    head = ("stage", "node", "device", "layers", "computes", "busy", "waits", "memory", "sent a step")
    cells: list[tuple[str, ...]] = []
    for row in rows:
        measured, predicted = stage_cells(row)
        cells.append((row.place, row.node, row.device, row.layers, *measured))
        cells.append(("", w("predicted"), "", "", *predicted))
    slowest = [2 * number for number, is_slowest in enumerate(slowest_stages(rows)) if is_slowest]
    return [Table([w(name) for name in head], cells, slowest), *_timeline(w, *timelines(plan, events))]


def _timeline(w: Translator, predicted: list[StageSpans], measured: list[StageSpans]) -> list[Block]:
    """The picture of one step, the predicted above the measured."""
    pictures: dict[str, dict[str, dict[str, plots.Spans]]] = {}
    for name, stages in (("predicted", predicted), ("measured", measured)):
        if end_s := max((one.end_s for one in stages), default=0.0):
            pictures[f"{w(name)}: {format_s(end_s)}"] = _rows(w, stages, end_s)
    if not pictures:
        return []
    caption = w("One step from its first pass to its last; numbers are micro-batches, sums and update come after it.")
    return [Figure("stages", plots.stage_timelines(pictures, w("seconds")), caption)]


def _rows(w: Translator, stages: list[StageSpans], end_s: float) -> dict[str, dict[str, plots.Spans]]:
    several = len({one.replica for one in stages}) > 1
    found: dict[str, dict[str, plots.Spans]] = {}
    for one in sorted(stages, key=lambda one: (one.replica, one.stage)):
        place = f"{one.replica}.{one.stage}" if several else str(one.stage)
        # A stage that has done its passes waits for those of the others.
        waits = [(begin, end) for begin, end in one.waits if begin < one.end_s] + [(one.end_s, end_s)]
        found[f"{w('stage')} {place}"] = {
            w("forward"): [(begin, end - begin, str(number)) for kind, number, begin, end in one.passes if kind],
            w("backward"): [(begin, end - begin, str(number)) for kind, number, begin, end in one.passes if not kind],
            w("waits"): [(begin, end - begin, "") for begin, end in waits],
        }
    return found
