"""Every technique on every device: the verdict, and what was measured beside it."""

from __future__ import annotations

from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from orchestrator.language.catalogue import tr
from orchestrator.views.screen import new_table

_COLOURS = {
    "effective": "green",
    "works": "cyan",
    "little gain": "white",
    "harmful": "yellow",
    "not installed": "magenta",
    "impossible": "red",
}


_WITH_REASON = ("not installed", "impossible")  # of the others the ratios have columns of their own


def catalogue_view(rows: list[dict[str, Any]]) -> RenderableType:
    """One table a device."""
    parts: list[RenderableType] = []
    for device in dict.fromkeys(row["device"] for row in rows):
        mine = [row for row in rows if row["device"] == device]
        names = ("technique", "verdict", "memory", "time", "why", "not with", "switched on by")
        table = new_table(*names, fold=True, dispensable=("not with", "switched on by", "why"))
        for row in mine:
            level = Text(tr(row["level"]), style=_COLOURS[row["level"]])
            why = row["reason"] if row["level"] in _WITH_REASON else row["reason"].split("; ", 1)[-1]
            table.add_row(
                row["technique"],
                level,
                _ratio(row["memory_ratio"]),
                _ratio(row["time_ratio"]),
                tr(why),
                ", ".join(row["not_with"]),
                row["switch"],
            )
        parts += [Text(tr(f"{device}, judged with {mine[0]['model']}"), style="bold"), table, Text()]
    legend = tr("memory and time: with it over without it, predicted from this device's figures")
    parts.append(Text(legend, style="dim"))
    return Group(*parts)


def measured_view(rows: list[dict[str, Any]]) -> RenderableType:
    """Expected beside measured, on the small model."""
    names = ("device", "technique", "time expected", "measured", "memory expected", "measured", "note")
    table = new_table(*names, fold=True)
    ratios = ("expected_small_time", "measured_time", "expected_small_memory", "measured_memory")
    for row in rows:
        shown = (_ratio(row.get(key)) for key in ratios)
        table.add_row(row["device"], row["technique"], *shown, tr(row.get("problem") or ""))
    return table


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"x{value:.2f}"
