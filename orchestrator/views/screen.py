"""The two consoles that everything is printed on.

A name, a path or a model's answer is text: `[red]` stays as it is written, control characters come out as escapes, and
what the terminal's encoding does not have does not end the program.  Nothing else in the project makes a Console.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from rich.cells import cell_len, set_cell_size
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.measure import Measurement
from rich.segment import Segment
from rich.table import Column, Table
from rich.text import Text

from clusters.safe.reading import printable, printable_lines
from orchestrator.language.catalogue import tr
from orchestrator.language.choice import language

_READER_GONE = (errno.EPIPE, errno.EIO)  # a closed pipe; a terminal that was closed


class Screen(Console):
    """A console without markup on which control characters are escaped.

    Where its reader is gone (`status | head -1`) the program ends quietly, unless it `outlives_reader`: a run does not
    end because nobody reads what it prints.
    """

    outlives_reader = False
    spelling: Callable[[str], str] = staticmethod(lambda text: text)  # of commands, as they are typed here

    def __init__(self, stderr: bool = False) -> None:
        super().__init__(stderr=stderr, markup=False, emoji=False, highlight=False)

    def print(self, *objects: Any, **options: Any) -> None:
        try:
            super().print(*objects, **options)
        except OSError as error:
            if error.errno not in _READER_GONE:
                raise
            self.on_broken_pipe()

    def render_str(self, text: str, **options: Any) -> Text:  # type: ignore[override]
        return super().render_str(printable_lines(Screen.spelling(text)), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            if segment.control or segment.text.isprintable():
                yield segment
            else:
                yield Segment(printable_lines(segment.text), segment.style)

    def on_broken_pipe(self) -> None:
        silence(self.file)
        if not Screen.outlives_reader:
            raise SystemExit(0)


out, err = Screen(), Screen(stderr=True)


class FittingTable(Table):
    """A table that leaves out columns where a narrow window would cut words, and names them below."""

    dispensable: tuple[str, ...] = ()  # the first goes first

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        columns, widths, dropped = self.columns, [one.width for one in self.columns], []
        sizes = {one.header: self._measure_column(console, options, one) for one in columns}
        names = sizes[columns[0].header]  # of what the rows are: whole, unless they are texts
        if names.maximum <= options.max_width // 3:
            sizes[columns[0].header] = Measurement(names.maximum, names.maximum)
        for name in self.dispensable:
            if sum(sizes[one.header].minimum for one in self.columns) <= options.max_width:
                break
            self.columns = [one for one in self.columns if one.header != name]
            dropped.append(name)
        shared = _shared_widths([sizes[one.header] for one in self.columns], options.max_width)
        for one, width in zip(self.columns, shared, strict=False):
            one.width = width - self._get_padding_width(one._index)
        try:
            yield from super().__rich_console__(console, options)
        finally:
            self.columns = columns
            for one, width in zip(columns, widths, strict=True):
                one.width = width
        if dropped:
            left_out = tr(f"not shown in so narrow a window: {', '.join(dropped)}")
            yield from console.render(Text(left_out, style="dim"), options)


def _shared_widths(sizes: Sequence[Measurement], width: int) -> list[int]:
    """Widths of columns in a window too narrow for all: no word is cut, the rest goes to the narrowest first.

    Empty where everything fits, or not even the longest words do.
    """
    spare = width - sum(size.minimum for size in sizes)
    if spare < 0 or sum(size.maximum for size in sizes) <= width:
        return []
    shared = [size.minimum for size in sizes]
    while spare and (growing := [at for at, size in enumerate(sizes) if shared[at] < size.maximum]):
        shared[min(growing, key=lambda at: shared[at])] += 1
        spare -= 1
    return shared


def new_table(*columns: str, fold: bool = False, dispensable: Sequence[str] = ()) -> Table:
    """An empty table without a frame; with `fold` a long cell gets more lines instead of an ellipsis.

    Of `dispensable` columns as many as needed, the first one first, are left out where words would be cut.
    """
    heads = [Column(tr(name), overflow="fold" if fold else "ellipsis") for name in columns]
    kind = FittingTable if dispensable else Table
    table = kind(*heads, box=None, pad_edge=False, header_style="bold")
    if isinstance(table, FittingTable):
        table.dispensable = tuple(map(tr, dispensable))
    return table


def label(word: str) -> str:
    """A word before a line, with spaces up to the column in which all such lines begin."""
    return set_cell_size(tr(word) if word else "", 8 if language() == "en" else 10)


def print_rows(head: Sequence[str], rows: Sequence[Sequence[str]], dispensable: Sequence[str] = ()) -> None:
    """Print `new_table` with cells of plain text, as rich would, but at once: rich takes 0.1 ms a cell."""
    cells = [[printable(cell) for cell in row] for row in rows]
    for name in dispensable:
        if sum(max(map(cell_len, column)) + 2 for column in zip(head, *cells, strict=True)) - 2 > out.width:
            at = head.index(name)
            head, cells = [*head[:at], *head[at + 1 :]], [[*row[:at], *row[at + 1 :]] for row in cells]
    table = new_table(*head)
    if not cells:
        out.print(table)
        return
    table.add_row(*(Text(max(column, key=cell_len)) for column in zip(map(tr, head), *cells, strict=True)))
    spaces = [1, *[2] * (len(head) - 2), 1]  # left and right of a cell; none at the edges
    widths = [
        width - space for width, space in zip(table._calculate_column_widths(out, out.options), spaces, strict=True)
    ]
    fitted = [[_fitted(cell, width) for cell, width in zip(row, widths, strict=True)] for row in cells]
    lines = ["  ".join(cell for cell in row if cell is not None) for row in fitted]
    heading = new_table(*head)
    if any(cell is None for row in fitted for cell in row):  # a cell of several lines
        for row in cells:
            heading.add_row(*map(Text, row))
        out.print(heading)
        return
    for column, width in zip(heading.columns, widths, strict=True):
        column.width = width
    out.print(heading)
    write("\n".join(lines))


def _fitted(cell: str, width: int) -> str | None:
    """A cell in exactly this width, None for one that has to be broken between words."""
    if len(cell) <= width and cell.isascii():
        return cell.ljust(width)
    if cell_len(cell) <= width:
        return set_cell_size(cell, width)
    return None if any(map(str.isspace, cell)) else f"{set_cell_size(cell, width - 1)}…"


def write(text: str) -> None:
    """Write a document (JSON, a recipe) unchanged."""
    try:
        sys.stdout.write(text if text.endswith("\n") else text + "\n")
        sys.stdout.flush()
    except OSError as error:
        if error.errno not in _READER_GONE:
            raise
        out.on_broken_pipe()


def silence(stream: Any) -> None:
    """Redirect a standard stream to /dev/null: flushing its buffer would fail again at exit."""
    with contextlib.suppress(OSError, ValueError):
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, stream.fileno())
        os.close(nothing)


def keep_standard_output() -> None:
    """Let standard output be ours alone: what is written to file descriptor 1 by others goes to standard error.

    Ray's C++ prints its warnings there, which would stand inside what `--json` prints.
    """
    before, errors = sys.stdout, sys.stderr
    if not isinstance(before, io.TextIOWrapper) or not isinstance(errors, io.TextIOWrapper):  # closed, or a test's
        return
    with contextlib.suppress(OSError, ValueError):
        own = os.dup(before.fileno())
        os.dup2(errors.fileno(), before.fileno())
        sys.stdout = os.fdopen(own, "w", encoding=before.encoding, errors=before.errors)  # until the process ends
        sys.stdout.reconfigure(write_through=before.write_through)


def accept_every_character() -> None:
    """Write characters that the terminal's encoding lacks as escapes."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
