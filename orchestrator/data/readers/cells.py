"""Rows of csv files, one at a time: the separator by the header, Excel's line `sep=` and quotes as they come."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import BinaryIO

from orchestrator.data.readers.text import MAX_ROW_BYTES, SURROGATE, TOO_LONG, encoding_hint
from orchestrator.data.rows.formats import detect
from orchestrator.data.rows.mapping import plain_names
from orchestrator.data.rows.row import BadRow, Row
from orchestrator.errors import JobError

DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}


@dataclass(frozen=True)
class Delimiter:
    """What separates cells, and whether Excel's line `sep=` stands before the header."""

    sign: str
    skips_line: bool = False


def find_delimiter(head: str, usual: str, stated: Iterable[str] = ()) -> Delimiter:
    """The separator of a csv file that begins with `head`: the one with which the header names known columns.

    Else the one that cuts the first lines into the same number of cells, the most of them; `usual` where none does.
    `stated` are columns that the job names.
    """
    first, _, rest = head.partition("\n")
    if first.strip().lower().startswith("sep=") and len(first.strip()) == 5:
        return Delimiter(first.strip()[4], True)
    if first.strip().lower() == "sep=":  # a tab, stripped
        return Delimiter("\t", True)
    if plain := first.strip().replace('"', ""):
        signs = [usual, *(sign for sign in DELIMITERS if sign != usual)]
        for sign in signs:
            names = [name.strip() for name in plain.split(sign)]
            if len(names) > 1 and (set(stated) & set(names) or _is_known(names)):
                return Delimiter(sign)
        counted = {sign: _cells(head if rest else first, sign) for sign in signs}
        best = max(signs, key=lambda sign: counted[sign])
        return Delimiter(best if counted[best] > 1 else usual)
    return Delimiter(usual)


def read_csv(stream: BinaryIO, file: str, delimiter: Delimiter = Delimiter(",")) -> Iterator[Row]:
    """The rows of a csv file with a header.  Raises JobError for a header that cannot be used."""
    csv.field_size_limit(MAX_ROW_BYTES)
    lines = _lines(stream, file)
    skipped = int(delimiter.skips_line and next(lines, None) is not None)
    reader = csv.reader(lines, delimiter=delimiter.sign, strict=True)
    try:
        header = next((cells for cells in reader if cells), None)  # empty lines may come first
    except csv.Error as error:
        raise JobError(f"{file}:{1 + skipped}: the header is not csv: {error}") from None
    if header is None:
        return
    names = _header(header, file, delimiter.sign)
    hint = ""
    while True:
        line = reader.line_num + 1 + skipped
        try:
            cells = next(reader, None)
        except csv.Error as error:
            yield Row({}, file, line, _csv_fault(error))
            continue
        if cells is None:
            return
        if not cells:
            continue
        values = dict(zip(names, cells, strict=False))
        broken = None
        if len(cells) != len(names):
            fault = f"has {len(cells)} cells, but the header has {len(names)}"
            way = f"Put texts with {delimiter.sign!r} in quotes, or state the separator: data.train: {{path: ...,"
            broken = BadRow(f'{fault}. {way} delimiter: ";"}}', "has not as many cells as the header")
        elif bad := next((name for name, cell in values.items() if SURROGATE.search(cell)), None):
            hint = hint or encoding_hint(values[bad].encode("utf-8", "surrogateescape"), file)
            broken = BadRow(f"field {bad!r} is not UTF-8 text{hint}")
        yield Row(values, file, line, broken)


def _is_known(names: list[str]) -> bool:
    values = dict.fromkeys(names)
    return bool(detect(values) or detect({plain_names(tuple(names)).get(name, name): None for name in names}))


def _cells(head: str, sign: str) -> int:
    """Cells of the first lines, where all have the same number; the last line of `head` may be cut."""
    rows = list(csv.reader(head.splitlines()[:20], delimiter=sign))
    counts = {len(row) for row in (rows[:-1] or rows) if row}
    return counts.pop() if len(counts) == 1 else 0


def _lines(stream: BinaryIO, file: str) -> Iterator[str]:
    """Lines of a text, its bytes that are no UTF-8 as surrogates, without a byte-order mark."""
    number = 0
    while piece := stream.readline(MAX_ROW_BYTES + 1):
        if len(piece) > MAX_ROW_BYTES and not piece.endswith(b"\n"):
            raise JobError(f"{file}:{number + 1}: the line {TOO_LONG}")
        for line in piece.splitlines(keepends=True):
            number += 1
            text = line.decode("utf-8", "surrogateescape")
            yield text.removeprefix("\ufeff") if number == 1 else text


def _csv_fault(error: csv.Error) -> BadRow:
    if "field larger" in str(error):
        return BadRow(f"has a cell that {TOO_LONG}, or a quote that is never closed")
    if "unexpected end" in str(error):
        return BadRow("begins a quote that is never closed, and the rest of the file would be lost. Close the quote")
    return BadRow(f"is not csv: {error}. Write a quote within a cell twice")


def _header(cells: list[str], file: str, delimiter: str) -> list[str]:
    """The names of the columns.  Raises JobError for names that occur twice."""
    if any(SURROGATE.search(cell) for cell in cells):
        raw = delimiter.join(cells).encode("utf-8", "surrogateescape")
        raise JobError(f"{file}:1: the header is not UTF-8 text{encoding_hint(raw, file)}")
    repeated = sorted({cell for cell in cells if cell and cells.count(cell) > 1})
    if repeated:
        raise JobError(f"{file}:1: the header names {', '.join(map(repr, repeated))} twice. Rename or remove a column")
    return [cell or f"column {number} (no name)" for number, cell in enumerate(cells, start=1)]
