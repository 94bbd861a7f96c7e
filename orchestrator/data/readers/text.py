"""Rows of JSON lines, of JSON lists and of csv files, one at a time, whatever the file's size."""

from __future__ import annotations

import codecs
import csv
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from clusters.safe.reading import MAX_DEPTH, depth_of
from orchestrator.data.readers.encoding import conversion, guess
from orchestrator.data.rows.formats import detect
from orchestrator.data.rows.row import BadRow, Row
from orchestrator.errors import JobError

MAX_ROW_BYTES = 16 * 2**20  # 4 million tokens; the values of a longer line may take 100 times its size
_CHUNK = 2**20
_AS_OBJECT = 'Write it as {"prompt": "...", "completion": "..."}'
_SPACE = re.compile(r"[ \t\r\n]*")
_SURROGATE = re.compile("[\ud800-\udfff]")
_TOO_DEEP = f"is nested too deeply (more than {MAX_DEPTH} levels). Flatten or remove it"
_TOO_LONG = f"is longer than {MAX_ROW_BYTES // 2**20} MiB, too long for one sample. Split it into several rows"


def read_jsonl(stream: BinaryIO, file: str) -> Iterator[Row]:
    """The rows of a file with one JSON object a line; empty lines are counted and skipped."""
    number = 0
    while line := stream.readline(MAX_ROW_BYTES + 1):
        number += 1
        if len(line) > MAX_ROW_BYTES and not line.endswith(b"\n"):
            while line and not line.endswith(b"\n"):
                line = stream.readline(_CHUNK)
            yield Row({}, file, number, BadRow(f"the line {_TOO_LONG}"))
        elif line.strip(b" \t\r\n\xef\xbb\xbf"):
            yield _parse_line(line, file, number)


def read_json(stream: BinaryIO, file: str) -> Iterator[Row]:
    """The rows of a JSON list of objects, or of JSON objects one after the other.  Raises JobError."""
    values = _JsonValues(stream, file)
    for number, (line, value, text) in enumerate(values):
        row = checked(value, text, file, line)
        if number == 0 and not values.is_list and (refusal := _one_object(row, file)) and not values.has_more():
            raise refusal
        yield row


def read_csv(stream: BinaryIO, file: str, delimiter: str = ",") -> Iterator[Row]:
    """The rows of a csv file with a header.  Raises JobError for a header that cannot be used."""
    csv.field_size_limit(MAX_ROW_BYTES)
    reader = csv.reader(_lines(stream, file), delimiter=delimiter, strict=True)
    try:
        header = next(reader, None)
    except csv.Error as error:
        raise JobError(f"{file}:1: the header is not csv: {error}") from None
    if header is None:
        return
    names = _header(header, file, delimiter)
    hint = ""
    while True:
        line = reader.line_num + 1
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
            broken = BadRow(f"{fault}. Put texts with {delimiter!r} in quotes", "has not as many cells as the header")
        elif bad := next((name for name, cell in values.items() if _SURROGATE.search(cell)), None):
            hint = hint or _encoding_hint(values[bad].encode("utf-8", "surrogateescape"), file)
            broken = BadRow(f"field {bad!r} is not UTF-8 text{hint}")
        yield Row(values, file, line, broken)


def checked(values: Any, text: str, file: str, line: int) -> Row:
    """The row of a JSON value whose source is `text`."""
    if not isinstance(values, dict):
        fault = f"is a {type(values).__name__}, not an object with named fields. {_AS_OBJECT}"
        return Row({}, file, line, BadRow(fault))
    if text.count("[") + text.count("{") > MAX_DEPTH and depth_of(values) > MAX_DEPTH:
        return Row({}, file, line, BadRow(_TOO_DEEP))
    field = next((name for name in values if _has_surrogate([name, values[name]])), None) if "\\u" in text else None
    if field is not None:
        fault = "holds half a surrogate pair (text cut within an emoji), which cannot be tokenised"
        return Row(values, file, line, BadRow(f"field {field!r} {fault}. Fix or remove it"))
    return Row(values, file, line)


def _has_surrogate(value: Any) -> bool:
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, str) and _SURROGATE.search(value):
            return True
        if isinstance(value, dict):
            waiting += [*value, *value.values()]
        elif isinstance(value, list):
            waiting += value
    return False


def _parse_line(line: bytes, file: str, number: int) -> Row:
    try:
        text = line.decode("utf-8-sig")
    except UnicodeDecodeError:
        return Row({}, file, number, BadRow(f"is not UTF-8 text{_encoding_hint(line, file)}"))
    try:
        return checked(_DECODER.decode(text), text, file, number)
    except RecursionError:
        return Row({}, file, number, BadRow(_TOO_DEEP))
    except ValueError as error:
        return Row({}, file, number, BadRow(f"is not JSON: {_json_fault(error)}. Fix the line", "is not JSON"))


def _json_fault(error: ValueError) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at character {error.pos + 1}"
    return str(error)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"has the field {next(name for name in names if names.count(name) > 1)!r} twice")
    return values


_DECODER = json.JSONDecoder(object_pairs_hook=_unique)


def _encoding_hint(sample: bytes, file: str) -> str:
    return f"; {conversion(guess(sample), file)}"


class _JsonValues:
    """The values of a JSON list, or of objects one after the other, each with its line and its text.

    Raises JobError for text that is no such JSON.
    """

    def __init__(self, stream: BinaryIO, file: str) -> None:
        self.stream, self.file = stream, file
        self.is_list = False
        self._decode = codecs.getincrementaldecoder("utf-8-sig")().decode
        self._text, self._at, self._line, self._ended = "", 0, 1, False

    def __iter__(self) -> Iterator[tuple[int, Any, str]]:
        if not self.has_more():
            return
        self.is_list = self._text[self._at] == "["
        self._at += self.is_list
        while self.has_more() and not (self.is_list and self._text[self._at] == "]"):
            value, end = self._value()
            text = self._text[self._at : end]
            line, self._at = self._line, end
            self._line += text.count("\n")
            yield line, value, text
            if self.is_list and self.has_more() and self._text[self._at] != "]":
                if self._text[self._at] != ",":
                    raise self._fault("a comma is missing between two values")
                self._at += 1
        if self.is_list:
            if not self.has_more():
                raise self._fault("the list has no end; the file was cut")
            self._at += 1
            if self.has_more():
                raise self._fault("there is text after the end of the list")

    def has_more(self) -> bool:
        """Skip white space; whether anything follows."""
        while True:
            end = _SPACE.match(self._text, self._at).end()  # type: ignore[union-attr]
            self._line += self._text.count("\n", self._at, end)
            self._at = end
            if end < len(self._text):
                return True
            if self._ended:
                return False
            self._fill()

    def _value(self) -> tuple[Any, int]:
        """The value that begins here and where it ends."""
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._at)
                if self._ended or end < len(self._text):  # else a number may go on
                    return value, end
            except RecursionError:
                raise self._fault("it is nested too deeply") from None
            except ValueError as error:  # a mistake, or the rest was not read yet
                if self._ended:
                    raise self._fault(getattr(error, "msg", str(error)), getattr(error, "pos", self._at)) from None
            if len(self._text) - self._at > MAX_ROW_BYTES:
                raise self._fault(f"this object {_TOO_LONG}, or it is no JSON")
            self._fill()

    def _fill(self) -> None:
        read = self.stream.read(max(_CHUNK, len(self._text) - self._at))
        self._ended = not read
        try:
            self._text = self._text[self._at :] + self._decode(read, final=self._ended)
        except UnicodeDecodeError:
            raise JobError(f"{self.file}: is not UTF-8 text{_encoding_hint(read, self.file)}") from None
        self._at = 0

    def _fault(self, fault: str, at: int | None = None) -> JobError:
        line = self._line + self._text.count("\n", self._at, self._at if at is None else at)
        return JobError(f"{self.file}:{line}: is not JSON: {fault}. One object a line is a .jsonl file")


def _one_object(row: Row, file: str) -> JobError | None:
    """What is wrong with a file that is one JSON object around its rows; None for an object that may be a row."""
    if row.broken or detect(row.values) is not None:
        return None
    lists = [name for name, value in row.values.items() if isinstance(value, list) and value]
    if not lists:
        return JobError(f"{file}: holds one object; a .json data file is a list of objects")
    target = shlex.quote(str(Path(file).with_suffix(".jsonl")))
    return JobError(
        f"{file}: holds one object, with rows perhaps in {', '.join(map(repr, lists))}; a .json data file is a list of"
        f" objects. Take them out: jq -c {shlex.quote(f'.[{json.dumps(lists[0])}][]')} {shlex.quote(file)} > {target}"
    )


def _lines(stream: BinaryIO, file: str) -> Iterator[str]:
    """Lines of a text, its bytes that are no UTF-8 as surrogates, without a byte-order mark."""
    number = 0
    while piece := stream.readline(MAX_ROW_BYTES + 1):
        if len(piece) > MAX_ROW_BYTES and not piece.endswith(b"\n"):
            raise JobError(f"{file}:{number + 1}: the line {_TOO_LONG}")
        for line in piece.splitlines(keepends=True):
            number += 1
            text = line.decode("utf-8", "surrogateescape")
            yield text.removeprefix("\ufeff") if number == 1 else text


def _csv_fault(error: csv.Error) -> BadRow:
    if "field larger" in str(error):
        return BadRow(f"has a cell that {_TOO_LONG}, or a quote that is never closed")
    if "unexpected end" in str(error):
        return BadRow("begins a quote that is never closed, and the rest of the file would be lost. Close the quote")
    return BadRow(f"is not csv: {error}. Write a quote within a cell twice")


def _header(cells: list[str], file: str, delimiter: str) -> list[str]:
    """The names of the columns.  Raises JobError for another separator and for names that occur twice."""
    if cells and re.fullmatch("sep=.?", cells[0].lower()):
        source, target = shlex.quote(file), shlex.quote(str(Path(file).with_name(f"{Path(file).stem}-plain.csv")))
        raise JobError(f"{file}:1: is Excel's line 'sep='. Remove it: tail -n +2 {source} > {target}")
    if detect(dict.fromkeys(cells)) is None:
        for other, shown in ((";", "semicolons"), ("\t", "tabs"), ("|", "bars"), (",", "commas")):
            names = delimiter.join(cells).split(other)
            if other != delimiter and len(names) > 1 and (len(cells) == 1 or detect(dict.fromkeys(names))):
                raise JobError(f"{file}: its cells are separated by {shown}. {_suggest_commas(file, other)}")
    if any(_SURROGATE.search(cell) for cell in cells):
        raw = delimiter.join(cells).encode("utf-8", "surrogateescape")
        raise JobError(f"{file}:1: the header is not UTF-8 text{_encoding_hint(raw, file)}")
    repeated = sorted({cell for cell in cells if cell and cells.count(cell) > 1})
    if repeated:
        raise JobError(f"{file}:1: the header names {', '.join(map(repr, repeated))} twice. Rename or remove a column")
    return [cell or f"column {number} (no name)" for number, cell in enumerate(cells, start=1)]


def _suggest_commas(file: str, delimiter: str) -> str:
    path = Path(file)
    code = f"import csv, sys; csv.writer(sys.stdout).writerows(csv.reader(sys.stdin, delimiter={delimiter!r}))"
    target = path.with_name(f"{path.stem}-commas.csv")
    return f"Convert it: python -c {shlex.quote(code)} < {shlex.quote(file)} > {shlex.quote(str(target))}"
