"""Rows of one data file: JSON lines, JSON, csv, txt, parquet or Arrow, plain or packed, by its name or its content."""

from __future__ import annotations

import bz2
import codecs
import gzip
import hashlib
import io
import lzma
import re
import shlex
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, cast

from clusters.safe.reading import open_regular
from orchestrator.data.readers.cells import DELIMITERS, find_delimiter, read_csv
from orchestrator.data.readers.columnar import read_arrow, read_parquet
from orchestrator.data.readers.corpus import read_txt, way_of
from orchestrator.data.readers.encoding import Recoded, describe, find_encoding
from orchestrator.data.readers.text import read_json, read_jsonl
from orchestrator.data.rows.formats import detect
from orchestrator.data.rows.row import Row
from orchestrator.errors import JobError, bad_input_as_job_error

_KINDS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".txt": "txt",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
SUFFIXES = tuple(_KINDS)
_TEXT = ("jsonl", "json", "csv", "tsv", "txt")
_PACKINGS = {b"\x1f\x8b": "gzip", b"BZh": "bz2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_PACKED = {".gz": "gunzip -k", ".bz2": "bunzip2 -k", ".xz": "unxz -k", ".zst": "unzstd"}  # what unpacks it
_ARCHIVES = {  # what unpacks an archive, which is not read as it is
    ".zip": "unzip",
    ".7z": "7z x",
    ".tar": "tar -xf",
    ".tgz": "tar -xzf",
    ".lz4": "lz4 -d",
}
_NO_TEXT = ("idna", "punycode", "undefined", "unicode_escape", "raw_unicode_escape")
_HEAD_BYTES = 2**16


@dataclass(frozen=True)
class ReadOptions:
    """How text files are read, where it is stated; `columns` are those that the job names."""

    encoding: str = "auto"
    delimiter: str = "auto"
    sample_by: str = "auto"
    columns: tuple[str, ...] = ()


def kind_of_name(name: str) -> str | None:
    """jsonl, json, csv, tsv, txt, parquet or arrow by the ending of a file's name; behind a text's, .gz or the like."""
    name = name.lower()
    packed = _suffix(name) in _PACKED
    kind = _KINDS.get(_suffix(name[: name.rfind(".")] if packed else name))
    return None if packed and kind not in _TEXT else kind


def kind_of_content(file: Path) -> str | None:
    """The kind of a file by its first bytes, whatever its name; None where they are ambiguous.  Raises JobError."""
    head = _head(file)
    if head.startswith(b"PAR1"):
        return "parquet"
    if head.startswith((b"ARROW1", b"\xff\xff\xff\xff")):
        return "arrow"
    text = head.decode("utf-8-sig", "replace").lstrip()
    if text.startswith("{"):
        return "jsonl"
    if text.startswith("["):
        return "json"
    first_line = text.partition("\n")[0].strip()
    for kind, delimiter in (("csv", ","), ("tsv", "\t")):
        if detect(dict.fromkeys(first_line.split(delimiter))):
            return kind
    return None


def check_kind(file: Path, key: str) -> None:
    """Raise JobError, with what to do, for a file that is of no kind that is read."""
    if kind_of_name(file.name) or (not file.suffix and kind_of_content(file)):
        return
    name, suffix = shlex.quote(file.name), _suffix(file.name)
    if suffix in _ARCHIVES or suffix in _PACKED:
        command = _ARCHIVES.get(suffix, "tar -xf" if ".tar" in file.suffixes else _PACKED[suffix])
        raise JobError(f"{key}: {file.name} is packed. Unpack it: {command} {name}")
    hint = ". Save the sheet as csv (UTF-8)" if suffix in (".xlsx", ".xls", ".ods") else ""
    raise JobError(f"{key}: {file.name}: a data file ends in {', '.join(SUFFIXES)}{hint}")


def read_rows(file: Path, options: ReadOptions = ReadOptions()) -> Iterator[Row]:
    """The rows of one file.  A row that cannot be parsed comes with the reason; a file that cannot raises JobError."""
    kind = kind_of_name(file.name) or kind_of_content(file)
    if kind is None:
        raise JobError(f"{file}: is of no known kind; a data file ends in {', '.join(SUFFIXES)}")
    if kind in ("parquet", "arrow"):
        with _open(file) as stream:
            yield from (read_parquet if kind == "parquet" else read_arrow)(stream, str(file))
        return
    head = _head(file)
    _check_text(head, file)
    encoding = find_encoding(head) if options.encoding == "auto" else checked_encoding(options.encoding)
    text = head.decode(encoding or "utf-8-sig", "replace").removeprefix("\ufeff")
    notes = [describe(encoding)] if encoding and options.encoding == "auto" else []
    with _open(file) as packed:
        stream = packed if encoding is None else cast(BinaryIO, io.BufferedReader(Recoded(packed, encoding, str(file))))
        rows = _text_rows(kind, stream, file, text, options, notes)
        if text.count("\r\n") * 2 > text.count("\n"):
            notes.append("lines end with CRLF")
        if head.startswith(codecs.BOM_UTF8):
            notes.append("begins with a byte-order mark")
        said = (f"text file: {', '.join(notes)}",) if notes else ()
        for row in rows:
            yield replace(row, notes=said) if said else row


def _text_rows(
    kind: str, stream: BinaryIO, file: Path, head: str, options: ReadOptions, notes: list[str]
) -> Iterator[Row]:
    """The rows of a text in UTF-8 whose beginning is `head`; adds to `notes` how it is read."""
    begins = head.lstrip()[:1]
    if kind == "txt":
        way = way_of(head) if options.sample_by == "auto" else options.sample_by
        notes.append(f"each {way} of a txt file is a row (`sample_by`)")
        return read_txt(stream, str(file), way)
    if kind in ("csv", "tsv"):
        usual = "," if kind == "csv" else "\t"
        found = find_delimiter(head, usual, options.columns)
        if options.delimiter != "auto":
            found = replace(found, sign=_sign(options.delimiter))
        elif found.sign != usual:
            notes.append(f"cells are separated by {DELIMITERS.get(found.sign, repr(found.sign))} (`delimiter`)")
        return read_csv(stream, str(file), found)
    if begins == "[" or (kind == "json" and not (begins == "{" and _is_lines(head))):
        return read_json(stream, str(file))
    return read_jsonl(stream, str(file))


def _sign(stated: str) -> str:
    sign = {"tab": "\t", "\\t": "\t"}.get(stated, stated)
    if len(sign) != 1:
        raise JobError(f"delimiter: {stated!r} is no single character. Write one, for example ';' or tab")
    return sign


def checked_encoding(name: str) -> str | None:
    """A stated encoding; None for UTF-8.  Raises JobError for one that Python does not know."""
    try:
        found = codecs.lookup(name)
        if found.name in _NO_TEXT:
            raise LookupError(name)
        with suppress(UnicodeDecodeError):
            b"a".decode(name)  # hex, zlib and the like are codecs too
    except (LookupError, ValueError):
        raise JobError(
            f"encoding: {name!r:.60} is no encoding that is known. Write for example cp932, utf-16, cp1252 or gb18030"
        ) from None
    return None if found.name in ("utf-8", "utf-8-sig", "ascii") else found.name


def digest(file: Path) -> str:
    """SHA-256 of a file's bytes.  Raises JobError."""
    with _readable(file), open_regular(file) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def num_lines(file: Path) -> int | None:
    """Lines of a text file, nearly its rows; None where it is packed or has other rows.  Raises JobError."""
    if kind_of_name(file.name) not in ("jsonl", "csv", "tsv") or _suffix(file.name) in _PACKED:
        return None
    count, last = 0, b"\n"
    with _open(file) as stream:
        while chunk := stream.read(2**20):
            count, last = count + chunk.count(b"\n"), chunk[-1:]
    return count + (last != b"\n")


def _suffix(name: str) -> str:
    dot = name.rfind(".")
    return name[dot:].lower() if dot > 0 else ""


@contextmanager
def _open(file: Path) -> Iterator[BinaryIO]:
    """The bytes of a file, unpacked where they are packed.  Raises JobError, also for what is met while reading."""
    with _readable(file), open_regular(file) as stream:
        head = stream.read(8) or b""  # None where nothing can be read yet, as in /proc
        stream.seek(0)
        yield _unpacked(stream, next((name for start, name in _PACKINGS.items() if head.startswith(start)), None))


def _unpacked(stream: BinaryIO, packing: str | None) -> BinaryIO:
    if packing is None:
        return stream
    if packing == "gzip":
        return cast(BinaryIO, gzip.GzipFile(fileobj=stream))
    if packing == "bz2":
        return cast(BinaryIO, bz2.BZ2File(stream))
    if packing == "xz":
        return cast(BinaryIO, lzma.LZMAFile(stream))
    import pyarrow

    return cast(BinaryIO, io.BufferedReader(cast(io.RawIOBase, pyarrow.CompressedInputStream(stream, packing))))


@contextmanager
def _readable(file: Path) -> Iterator[None]:
    """Turn what goes wrong while the block reads a file into a JobError."""
    try:
        with bad_input_as_job_error():
            yield
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise JobError(f"{file}: cannot be read: {getattr(error, 'strerror', None) or error}") from None


def _head(file: Path) -> bytes:
    with _open(file) as stream:
        return stream.read(_HEAD_BYTES) or b""  # None where nothing can be read yet, as in /proc


def _check_text(head: bytes, file: Path) -> None:
    if head.startswith(b"version https://git-lfs"):
        raise JobError(f"{file}: is a pointer of Git LFS, not the data. Fetch the data: git lfs pull")
    if head.startswith((b"PAR1", b"ARROW1", b"PK\x03\x04")):
        kind = {b"PAR": "parquet", b"ARR": "Arrow", b"PK\x03": "zip or Excel"}[head[:3]]
        raise JobError(f"{file}: is a {kind} file with another ending. Rename it, or save it as csv")


def _is_lines(head: str) -> bool:
    """Whether the first line is a whole JSON object and another follows, as in JSON lines."""
    return re.match(r"\s*\{[^\r\n]*\}[ \t]*\r?\n\s*\{", head) is not None
