"""What the page shows of one run: as a whole, and what changes while it is at work."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clusters.safe.masking import masked, masked_values
from clusters.safe.reading import printable_lines
from clusters.units import format_bytes, format_count, format_s
from orchestrator.dashboard.board import finite
from orchestrator.language.catalogue import Translator
from orchestrator.planning.plan import Plan, settings_of
from orchestrator.runs.events import (
    Evaluation,
    Event,
    OtherEvent,
    PhaseProgress,
    QualityReport,
    StageTimeline,
    StepReport,
)
from orchestrator.runs.run_folder import RunFolder
from orchestrator.runs.summary.event_summary import EventSummary
from orchestrator.runs.worker_stats import StageStats, WorkerStats, stages_of_run, stats_of_run
from orchestrator.views.plan import shown
from orchestrator.views.result import event_line
from orchestrator.views.workers import slowest_stages, stage_cells

Values = dict[str, Any]
_TAIL_BYTES = (2**16, 2**20, 2**22)  # of the events, in which the page's last lines are looked for
_ENOUGH_LINES = 20
_MOST_LINES = 300
LOG_TAIL_BYTES = 2**14  # of each of the workers' log files
_UNSPOKEN = (StepReport, StageTimeline, PhaseProgress)  # events that are drawn, or come too often to be read


def whole(run: RunFolder, summary: EventSummary, plan: Plan | None, w: Translator) -> Values:
    """Everything that is drawn when the page opens, beside `now`."""
    return {
        "losses": _points(summary.losses.points()),
        "width": summary.losses.width,
        "held_out": _points(summary.held_out_losses()),
        "lines": last_lines(run),
        **({"plan": _plan(plan, w)} if plan else {}),
    }


def now(summary: EventSummary, plan: Plan | None, w: Translator) -> Values:
    """What changes with each step: the last one's numbers, the machines, the stages."""
    last, events = summary.last_step, summary.group_events
    found: Values = {"phases": _phases(summary, plan, w)}
    if last:
        found["facts"] = [
            (w("tokens/s"), f"{last.tokens_per_s:,.0f}"),
            (w("learning rate"), f"{last.learning_rate:.3g}"),
            (w("gradient norm"), f"{last.grad_norm:.3g}"),
            (w("epoch"), f"{last.epoch:.2f}"),
            (w("step time"), _beside(w, format_s(last.seconds), plan and format_s(plan.step_s))),
            (w("peak memory"), _beside(w, format_bytes(last.peak_bytes), plan and _planned_memory(plan))),
        ]
    stages = stages_of_run(plan, events) if plan else []
    found["stages"] = _stages(stages)
    found["machines"] = _machines(stats_of_run(events), plan, last)
    return found


def since(events: Sequence[Event], last_step: int) -> Values:
    """What some events add to the page."""
    found: Values = {"losses": [], "held_out": [], "lines": []}
    for event in events:
        if isinstance(event, StepReport):
            found["losses"].append((event.step, finite(event.loss)))
        elif isinstance(event, Evaluation):
            found["held_out"].append((event.step, finite(event.eval_loss)))
        elif isinstance(event, QualityReport) and event.eval_loss is not None:
            found["held_out"].append((0 if event.when == "before" else last_step, finite(event.eval_loss)))
    found["lines"] = _lines(events)
    return found


def last_lines(run: RunFolder) -> list[str]:
    """The last events in a line each, without steps; of a long run those that are found near its end."""
    end, lines = run.end_of_events(), list[str]()
    for size in _TAIL_BYTES:
        begin = max(0, end - size)
        events, _ = run.events(begin, end - begin) if end else ([], 0)  # a line that is cut in front is passed over
        lines = _lines(events)
        if begin == 0 or len(lines) >= _ENOUGH_LINES:
            break
    return lines


def log_files(run: RunFolder) -> list[Path]:
    """The workers' own log files."""
    return sorted(run.logs.glob("*.log")) if run.logs.is_dir() else []


def log_tail(file: Path, offset: int | None) -> tuple[str, int]:
    """What was appended to a log since `offset`, or its end, and the offset after it."""
    try:
        with file.open("rb") as stream:
            size = stream.seek(0, os.SEEK_END)
            if offset == size:
                return "", size
            begin = max(0 if offset is None or offset > size else offset, size - LOG_TAIL_BYTES)
            stream.seek(begin)
            content = stream.read(size - begin)
    except OSError:
        return "", offset or 0
    if begin and begin != offset:
        content = content.partition(b"\n")[2]
    return printable_lines(masked(content.decode("utf-8", "replace"))), size


def _lines(events: Sequence[Event]) -> list[str]:
    return [masked(event_line(one)) for one in events if not isinstance(one, (*_UNSPOKEN, OtherEvent))][-_MOST_LINES:]


def _points(points: Sequence[tuple[int, float]]) -> list[tuple[int, float | None]]:
    return [(step, finite(value)) for step, value in points]


def _beside(w: Translator, measured: str, planned: str | None) -> str:
    return f"{measured} ({w('predicted')} {planned})" if planned else measured


def _planned_memory(plan: Plan) -> str:
    return format_bytes(plan.memory.total_bytes)


def _phases(summary: EventSummary, plan: Plan | None, w: Translator) -> list[tuple[str, str, str]]:
    """Name, seconds so far, seconds planned; those that nothing is known of are omitted."""
    planned = plan.phases.parts if plan else {}
    return [
        (w(name), format_s(seconds) if seconds else "-", format_s(planned[name]) if planned.get(name) else "-")
        for name, seconds in summary.phases.parts.items()
        if name != "preparation" and (seconds or planned.get(name))
    ]


def _machines(rows: Sequence[Any], plan: Plan | None, last: StepReport | None) -> list[Values]:
    """A row a worker: its share, pace, busy part of a step, memory and traffic."""
    measured = [row for row in rows if isinstance(row, WorkerStats)]
    if measured:
        return [
            {
                "node": row.node,
                "device": row.device,
                "share": f"{row.share:.0%}",
                "tokens_per_s": f"{row.tokens_per_s:,.0f}",
                "busy": _share(row.seconds, row.seconds + row.wait_s),
                "computes": format_s(row.seconds),
                "waits": format_s(row.wait_s),
                "memory": format_bytes(row.peak_bytes),
                "sent": "-" if row.bytes_sent is None else format_bytes(row.bytes_sent),
                "is_slowest": row.is_slowest and len(measured) > 1,
            }
            for row in measured
        ]
    parts = plan.nodes if plan else ()
    alone = last if len(parts) == 1 else None
    return [
        {
            "node": part.node,
            "device": part.device,
            "share": part.share_text,
            **(
                {
                    "tokens_per_s": f"{alone.tokens_per_s:,.0f}",
                    "computes": format_s(alone.seconds),
                    "memory": format_bytes(alone.peak_bytes),
                }
                if alone
                else {}
            ),
        }
        for part in parts
    ]


def _stages(rows: Sequence[StageStats]) -> list[Values]:
    if not rows:
        return []
    names = ("computes", "busy_text", "waits", "memory", "sent")
    found = []
    for row, is_slowest in zip(rows, slowest_stages(list(rows)), strict=True):
        measured, predicted = (dict(zip(names, cells, strict=True)) for cells in stage_cells(row))
        place = {"stage": row.place, "node": row.node, "device": row.device, "layers": row.layers}
        busy = None if row.busy_share is None else finite(round(row.busy_share, 3))
        found.append({**place, **measured, "predicted": predicted, "busy": busy, "is_slowest": is_slowest})
    return found


def _share(part: float, all_: float) -> float | None:
    return round(part / all_, 3) if all_ > 0 else None


def _plan(plan: Plan, w: Translator) -> Values:
    settings = [
        (key, shown(value), w(plan.reasons.get(key) or "as the job says")) for key, value in settings_of(plan).items()
    ]
    ways = [
        (one.what, format_s(one.total_s), format_bytes(one.peak_bytes), w(one.why_not)) for one in plan.alternatives
    ]
    left_out = [(node, w(why)) for node, why in plan.left_out.items()]
    trained = format_count(plan.num_trainable_parameters)
    return masked_values({"settings": settings, "ways": ways, "left_out": left_out, "trained": trained})
