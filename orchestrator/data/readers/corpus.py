"""Rows of a txt file: its lines, its paragraphs, or the whole of it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import BinaryIO

from orchestrator.data.readers.text import MAX_ROW_BYTES, TOO_LONG, encoding_hint
from orchestrator.data.rows.row import BadRow, Row


def way_of(head: str) -> str:
    """paragraph where the beginning of a file has blank lines between others, else line."""
    return "paragraph" if re.search(r"\S[^\n]*\n[ \t\r]*\n\s*\S", head) else "line"


def read_txt(stream: BinaryIO, file: str, sample_by: str) -> Iterator[Row]:
    """The rows of a txt file, each with its text and the line where it begins; blank ones are none."""
    begin, number, size = 1, 0, 0
    held: list[bytes] = []
    while line := stream.readline(MAX_ROW_BYTES + 1):
        number += 1
        is_blank = not line.strip(b" \t\r\n\xef\xbb\xbf")
        if held and (sample_by == "line" or (sample_by == "paragraph" and is_blank)):
            yield _row(held, file, begin)
            held, size = [], 0
        if not held:
            begin = number
        if not is_blank or (held and sample_by == "document"):
            held.append(line)
            size += len(line)
        if size > MAX_ROW_BYTES:
            yield Row({}, file, begin, BadRow(f"the {sample_by} {TOO_LONG}, or state sample_by: paragraph or line"))
            held, size = [], 0
    if held:
        yield _row(held, file, begin)


def _row(lines: list[bytes], file: str, begin: int) -> Row:
    whole = b"".join(lines)
    try:
        text = whole.decode("utf-8-sig" if begin == 1 else "utf-8")
    except UnicodeDecodeError:
        return Row({}, file, begin, BadRow(f"is not UTF-8 text{encoding_hint(whole, file)}"))
    return Row({"text": text.replace("\r\n", "\n").strip("\n")}, file, begin)
