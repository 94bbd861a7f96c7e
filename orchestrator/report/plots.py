"""Figures as SVG without fonts or colours of their own: text takes the page's, so they suit light and dark.

Series differ in mid-tone colours that keep a contrast of 3:1 on white and on near black, and by shape.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot
from matplotlib.ticker import LogFormatter

from clusters.safe.reading import printable

T = TypeVar("T")

_COLOURS = ("#2f7ed8", "#d9730d", "#2a9d6f", "#b4459c", "#8a7a00", "#d1495b", "#6c757d")
_INK = "#010203"  # stands for the page's text colour
_HATCHES = ("", "///", "...", "xxx", "\\\\\\", "++", "ooo")
_MARKS = ("o", "^", "s", "D", "v", "P", "X")
_STROKES = ("-", "--", "-.", ":")
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 11.0,
    "text.color": _INK,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#888888",
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "svg.hashsalt": "report",
    "text.parse_math": False,  # a name may hold a dollar sign
}


class _PlainLog(LogFormatter):
    """0.01, 0.1, 1 at the places that matplotlib labels."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        return f"{x:g}" if super().__call__(x, pos) else ""


def _escape_names(values: Mapping[str, T]) -> dict[str, T]:
    """The values by names that can be drawn: control characters, which no SVG may hold, as escapes."""
    return {printable(name): value for name, value in values.items()}


def _draw_svg(draw: Callable[[Any, Any], None], width: float = 7.2, height: float = 3.2) -> str:
    """The SVG of what `draw(figure, axes)` draws."""
    with pyplot.rc_context(_STYLE), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # glyphs that matplotlib's own font lacks: the browser has them
        figure, axes = pyplot.subplots(figsize=(width, height))
        draw(figure, axes)
        for drawn in figure.axes:
            drawn.set(xlabel=printable(drawn.get_xlabel()), ylabel=printable(drawn.get_ylabel()))
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, bbox_inches="tight", metadata={"Date": None})
        pyplot.close(figure)
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'<svg ([^>]*?)width="[^"]*" height="[^"]*"', r"<svg \1", svg, count=1)
    svg = re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', r'<svg xmlns="http://www.w3.org/2000/svg"'
                 r' xmlns:xlink="http://www.w3.org/1999/xlink" \1 role="img">', svg, count=1)  # fmt: skip
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"'DejaVu Sans'[^;\"]*", "inherit", svg)
    return svg.replace(_INK, "currentColor")


def curves(
    series: Mapping[str, Sequence[tuple[float, float]]], x: str, y: str, dots: Sequence[str] = (), log: bool = False
) -> str:
    """Lines of (x, y); those named in `dots` as dots."""
    series, dots = _escape_names(series), [printable(name) for name in dots]

    def draw(figure: Any, axes: Any) -> None:
        for (name, points), colour in zip(series.items(), _COLOURS * 3, strict=False):
            xs, ys = zip(*points, strict=True)
            if name in dots:
                axes.plot(xs, ys, "o", color=colour, label=name, markersize=6)
            else:
                axes.plot(xs, ys, "-", color=colour, label=name, linewidth=1.6)
        axes.set(xlabel=x, ylabel=y)
        if log:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(_PlainLog())  # matplotlib's own write formulas
            axes.yaxis.set_minor_formatter(_PlainLog(minor_thresholds=(1.5, 0.5)))
        if len(series) > 1:
            axes.legend()

    return _draw_svg(draw)


def rates(series: Mapping[str, Sequence[tuple[int, float, float, float]]], x: str, y: str) -> str:
    """Lines of (x, y, lowest y, highest y) over an axis of doublings; series differ by mark and stroke as well."""
    series = _escape_names(series)
    ticks = sorted({point[0] for points in series.values() for point in points})

    def draw(figure: Any, axes: Any) -> None:
        for place, (name, points) in enumerate(series.items()):
            xs, ys, lows, highs = zip(*sorted(points), strict=True)
            style = {"marker": _MARKS[place % len(_MARKS)], "linestyle": _STROKES[place % len(_STROKES)]}
            colour = _COLOURS[place % len(_COLOURS)]
            axes.plot(xs, ys, color=colour, label=name, linewidth=1.6, markersize=6, **style)
            axes.vlines(xs, lows, highs, color=colour, linewidth=1.0)
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [str(one) for one in ticks])
        axes.minorticks_off()
        axes.set_ylim(bottom=0)
        axes.set(xlabel=x, ylabel=y)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncol=3)

    return _draw_svg(draw)


def stacked(rows: Mapping[str, Mapping[str, float]], x: str, mark: Mapping[str, float] | None = None) -> str:
    """A horizontal bar a row, of its parts; `mark` draws a line across a row, e.g. what was measured."""
    rows, mark = {name: _escape_names(own) for name, own in _escape_names(rows).items()}, _escape_names(mark or {})
    parts = list(dict.fromkeys(part for values in rows.values() for part in values))

    def draw(figure: Any, axes: Any) -> None:
        names = list(rows)
        left = [0.0] * len(names)
        for index, part in enumerate(parts):
            widths = [rows[name].get(part, 0.0) for name in names]
            if not any(widths):
                continue
            colour, hatch = _COLOURS[index % len(_COLOURS)], _HATCHES[index % len(_HATCHES)]
            axes.barh(
                names, widths, left=left, color=colour, hatch=hatch, edgecolor="#ffffff", linewidth=0.6, label=part
            )
            left = [a + b for a, b in zip(left, widths, strict=True)]
        for place, name in enumerate(names):
            if mark and name in mark:
                axes.plot([mark[name]] * 2, [place - 0.45, place + 0.45], color=_INK, linewidth=2.4)
        axes.set(xlabel=x)
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.22 if len(rows) > 2 else -0.3), ncol=4)

    return _draw_svg(draw, height=1.5 + 0.5 * len(rows))


def bars(groups: Mapping[str, Mapping[str, float]], y: str, percent: bool = False) -> str:
    """A group of bars for each name, e.g. a metric before and after."""
    groups = {name: _escape_names(own) for name, own in _escape_names(groups).items()}
    series = list(dict.fromkeys(name for values in groups.values() for name in values))

    def draw(figure: Any, axes: Any) -> None:
        width = 0.8 / len(series)
        for index, name in enumerate(series):
            places = [place + (index - (len(series) - 1) / 2) * width for place in range(len(groups))]
            heights = [values.get(name, 0.0) for values in groups.values()]
            drawn = axes.bar(
                places,
                heights,
                width * 0.92,
                color=_COLOURS[index],
                hatch=_HATCHES[index],
                edgecolor="#ffffff",
                label=name,
            )
            axes.bar_label(drawn, [f"{height:.1%}" if percent else f"{height:.3g}" for height in heights], padding=2)
        axes.set_xticks(range(len(groups)), list(groups))
        axes.set(ylabel=y)
        axes.grid(axis="x", visible=False)
        axes.margins(y=0.15)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncol=4)

    return _draw_svg(draw, width=6.0)


def scatter(
    points: Mapping[str, Sequence[tuple[float, float, str]]],
    x: str,
    y: str,
    line: Sequence[tuple[float, float]] = (),
    diagonal: bool = False,
) -> str:
    """Points (x, y, label) by series; `line` joins some, e.g. a Pareto front; `diagonal` is where x equals y."""
    marks = ("o", "^", "s", "D", "x")
    points = {name: [(px, py, printable(text)) for px, py, text in own] for name, own in _escape_names(points).items()}

    def draw(figure: Any, axes: Any) -> None:
        for (name, series), colour, mark in zip(points.items(), _COLOURS, marks, strict=False):
            if not series:
                continue
            axes.plot([p[0] for p in series], [p[1] for p in series], mark, color=colour, label=name, markersize=7)
            for px, py, text in series:
                if text:
                    axes.annotate(text, (px, py), xytext=(6, 4), textcoords="offset points", fontsize=9)
        if line:
            xs, ys = zip(*sorted(line), strict=True)
            axes.step(xs, ys, where="post", color="#888888", linewidth=1.2, linestyle="--")
        if diagonal:
            low = min(min(p[0], p[1]) for series in points.values() for p in series)
            high = max(max(p[0], p[1]) for series in points.values() for p in series)
            axes.plot([low, high], [low, high], color="#888888", linewidth=1.2, linestyle="--")
        axes.set(xlabel=x, ylabel=y)
        axes.margins(0.12)
        if len(points) > 1:
            axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), ncol=4)

    return _draw_svg(draw, height=3.8)


def heat_map(rows: Mapping[str, Mapping[str, float]], label: str, low: float, high: float) -> str:
    """A value for each row and column, coloured between two limits; beyond them the colour stays."""
    rows = {name: _escape_names(own) for name, own in _escape_names(rows).items()}
    columns = list(next(iter(rows.values())))

    def draw(figure: Any, axes: Any) -> None:
        values = [[row[column] for column in columns] for row in rows.values()]
        image = axes.imshow(values, aspect="auto", cmap="cividis", vmin=low, vmax=high)
        axes.set_xticks(range(len(columns)), columns, rotation=90, fontsize=6)
        axes.set_yticks(range(len(rows)), list(rows), fontsize=6)
        axes.grid(visible=False)
        figure.colorbar(image, ax=axes, label=label, extend="both")

    return _draw_svg(draw, width=9.0, height=1.5 + 0.12 * len(rows))


Spans = Sequence[tuple[float, float, str]]  # begin, length, what is written into it


def stage_timelines(pictures: Mapping[str, Mapping[str, Mapping[str, Spans]]], x: str) -> str:
    """Pictures one below the other with one axis: in each a row a stage, of spans by kind; the last kind is waiting."""
    named = {
        title: {name: _escape_names(kinds) for name, kinds in _escape_names(rows).items()}
        for title, rows in _escape_names(pictures).items()
    }
    kinds = list(dict.fromkeys(kind for rows in named.values() for own in rows.values() for kind in own))
    heights = [len(rows) for rows in named.values()]
    every = [span for rows in named.values() for own in rows.values() for spans in own.values() for span in spans]
    end = max((begin + length for begin, length, _ in every), default=0.0)

    def draw(figure: Any, axes: Any) -> None:
        axes.remove()
        drawn = figure.subplots(len(named), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
        figure.subplots_adjust(hspace=0.9 * len(heights) / sum(heights))
        for one, (title, rows) in zip(drawn, named.items(), strict=True):
            for place, own in enumerate(rows.values()):
                for kind, spans in own.items():
                    _draw_spans(one, spans, place, (kinds.index(kind), len(kinds)), end)
            one.set_title(title, loc="left", fontsize=11)
            one.set_yticks(range(len(rows)), list(rows))
            one.set_ylim(len(rows) - 0.5, -0.5)
            one.grid(axis="y", visible=False)
            one.set_axisbelow(True)
            one.spines["left"].set_visible(False)
            one.tick_params(axis="y", length=0)
        drawn[-1].set(xlabel=x, xlim=(0, 1.01 * end))
        marks = [_draw_spans(drawn[-1], (), 0, (number, len(kinds)), end) for number in range(len(kinds))]
        drawn[-1].legend(marks, kinds, loc="upper center", bbox_to_anchor=(0.5, -1.0 / heights[-1]), ncol=4)

    return _draw_svg(draw, width=9.6, height=1.3 + 0.7 * len(named) + 0.42 * sum(heights))


def _draw_spans(axes: Any, spans: Spans, place: int, kind: tuple[int, int], end: float) -> Any:
    """Spans of one kind, of so many, in a row; what is written where it has room; the patches, for a legend."""
    is_waiting = kind[0] == kind[1] - 1
    colour = "#88888844" if is_waiting else _COLOURS[kind[0]]
    for begin, length, text in spans:
        if text and length > 0.011 * end * (1 + len(text)):
            box = {"facecolor": colour, "edgecolor": "none", "pad": 1.8}
            centre = begin + length / 2, place
            axes.text(*centre, text, color="#ffffff", fontsize=8, ha="center", va="center_baseline", bbox=box)
    return axes.broken_barh(
        [(begin, length) for begin, length, _ in spans],
        (place - 0.36, 0.72),
        facecolors=colour,
        hatch="" if is_waiting else _HATCHES[kind[0]],
        edgecolor="#ffffff",
        linewidth=0.0 if is_waiting else 0.4,
    )


def timeline(rows: Mapping[str, Mapping[str, Sequence[tuple[float, float, int]]]], x: str, depth: str) -> str:
    """A row a lane, of spans (start, seconds, layer) by kind; darker is deeper, kinds differ by hatch."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    rows = _escape_names(rows)

    def draw(figure: Any, axes: Any) -> None:
        layers = [layer for kinds in rows.values() for spans in kinds.values() for *_, layer in spans]
        most = max(layers, default=0) or 1
        shades = colormaps["viridis_r"]
        for place, kinds in enumerate(rows.values()):
            for hatch, spans in zip(_HATCHES, kinds.values(), strict=False):
                axes.broken_barh(
                    [(start, seconds) for start, seconds, _ in spans],
                    (place - 0.36, 0.72),
                    facecolors=[shades(layer / most) for *_, layer in spans],
                    hatch=hatch,
                    edgecolor="#ffffff",
                    linewidth=0.3,
                )
        axes.set_yticks(range(len(rows)), list(rows))
        axes.set(xlabel=x)
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        scale = ScalarMappable(Normalize(0, most), shades)
        figure.colorbar(scale, ax=axes, label=depth, fraction=0.03, pad=0.02)

    return _draw_svg(draw, width=9.6, height=1.2 + 0.5 * len(rows))
