"""Rows of JSON lines and of JSON lists, one at a time, whatever the file's size."""

from __future__ import annotations

import codecs
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
SURROGATE = re.compile("[\ud800-\udfff]")
_TOO_DEEP = f"is nested too deeply (more than {MAX_DEPTH} levels). Flatten or remove it"
TOO_LONG = f"is longer than {MAX_ROW_BYTES // 2**20} MiB, too long for one sample. Split it into several rows"


def read_jsonl(stream: BinaryIO, file: str) -> Iterator[Row]:
    """The rows of a file with one JSON object a line; empty lines are counted and skipped."""
    number = 0
    while line := stream.readline(MAX_ROW_BYTES + 1):
        number += 1
        if len(line) > MAX_ROW_BYTES and not line.endswith(b"\n"):
            while line and not line.endswith(b"\n"):
                line = stream.readline(_CHUNK)
            yield Row({}, file, number, BadRow(f"the line {TOO_LONG}"))
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
        if isinstance(value, str) and SURROGATE.search(value):
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
        return Row({}, file, number, BadRow(f"is not UTF-8 text{encoding_hint(line, file)}"))
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


def encoding_hint(sample: bytes, file: str) -> str:
    """What to do about bytes that are no UTF-8, for the end of a sentence."""
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
                raise self._fault(f"this object {TOO_LONG}, or it is no JSON")
            self._fill()

    def _fill(self) -> None:
        read = self.stream.read(max(_CHUNK, len(self._text) - self._at))
        self._ended = not read
        try:
            self._text = self._text[self._at :] + self._decode(read, final=self._ended)
        except UnicodeDecodeError:
            raise JobError(f"{self.file}: is not UTF-8 text{encoding_hint(read, self.file)}") from None
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
