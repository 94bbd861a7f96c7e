"""A benchmark's timeline as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from orchestrator.report.plots import timeline

_LANES = {
    "computation": ("forward", "backward"),
    "device to host": ("down",),
    "host's update": ("update",),
    "host to device": ("up",),
}


def timeline_picture(result: dict[str, Any], beside: Path) -> Path:
    """Draw a result's timeline into an SVG file beside its JSON."""

    def spans(lane: str) -> list[tuple[float, float, int]]:
        found = (span for span in result["timeline"] if span["lane"] == lane)
        return [(span["start_s"], span["end_s"] - span["start_s"], span["layer"]) for span in found]

    rows = {row: {lane: spans(lane) for lane in lanes} for row, lanes in _LANES.items()}
    rows = {row: kinds for row, kinds in rows.items() if any(kinds.values())}
    file = beside.with_suffix(".svg")
    file.write_text(timeline(rows, "seconds; the computation's backward passes are hatched", "layer"), encoding="utf-8")
    return file
