"""Rows of one data file: JSON lines, JSON, csv, parquet or Arrow, plain or gzipped, by its name or by its content."""

from __future__ import annotations

import gzip
import hashlib
import re
import shlex
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

from clusters.safe.reading import open_regular
from orchestrator.data.readers.columnar import read_arrow, read_parquet
from orchestrator.data.readers.encoding import check_encoding
from orchestrator.data.readers.text import read_csv, read_json, read_jsonl
from orchestrator.data.rows.formats import detect
from orchestrator.data.rows.row import Row
from orchestrator.errors import JobError, bad_input_as_job_error

_KINDS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
SUFFIXES = tuple(_KINDS)
_TEXT = ("jsonl", "json", "csv", "tsv")
_READERS: dict[str, Callable[[BinaryIO, str], Iterator[Row]]] = {
    "jsonl": read_jsonl,
    "json": read_json,
    "csv": read_csv,
    "tsv": lambda stream, file: read_csv(stream, file, "\t"),
    "parquet": read_parquet,
    "arrow": read_arrow,
}
_PACKED = {  # what unpacks an archive or a compressed file that is not read as it is
    ".zst": "zstd -d",
    ".bz2": "bunzip2 -k",
    ".xz": "unxz -k",
    ".zip": "unzip",
    ".7z": "7z x",
    ".tar": "tar -xf",
    ".tgz": "tar -xzf",
    ".lz4": "lz4 -d",
}
_HEAD_BYTES = 2**16
_GZIP = b"\x1f\x8b"


def kind_of_name(name: str) -> str | None:
    """jsonl, json, csv, tsv, parquet or arrow by the ending of a file's name, `.gz` behind a text's ending allowed."""
    name = name.lower()
    kind = _KINDS.get(_suffix(name.removesuffix(".gz")))
    return None if name.endswith(".gz") and kind not in _TEXT else kind


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
    if suffix in _PACKED or suffix == ".gz":
        command = _PACKED.get(suffix, "tar -xzf" if ".tar" in file.suffixes else "gunzip -k")
        raise JobError(f"{key}: {file.name} is packed. Unpack it: {command} {name}")
    hint = ""
    if suffix == ".txt":
        code = "import json, sys; [print(json.dumps({'text': t.strip()})) for t in sys.stdin if t.strip()]"
        hint = f". For one row a line: python -c {shlex.quote(code)} < {name} > {shlex.quote(file.stem + '.jsonl')}"
    elif suffix in (".xlsx", ".xls", ".ods"):
        hint = ". Save the sheet as csv (UTF-8)"
    raise JobError(f"{key}: {file.name}: a data file ends in {', '.join(SUFFIXES)}{hint}")


def read_rows(file: Path) -> Iterator[Row]:
    """The rows of one file.  A row that cannot be parsed comes with the reason; a file that cannot raises JobError."""
    kind = kind_of_name(file.name) or kind_of_content(file)
    if kind is None:
        raise JobError(f"{file}: is of no known kind; a data file ends in {', '.join(SUFFIXES)}")
    if kind in _TEXT:
        head = _head(file)
        _check_text(head, file)
        begins = head.decode("utf-8-sig", "replace").lstrip()[:1]
        if kind == "jsonl" and begins == "[":
            kind = "json"
        elif kind == "json" and begins == "{" and _is_lines(head):
            kind = "jsonl"
    with _open(file) as stream:
        yield from _READERS[kind](stream, str(file))


def digest(file: Path) -> str:
    """SHA-256 of a file's bytes.  Raises JobError."""
    with _readable(file), open_regular(file) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _suffix(name: str) -> str:
    dot = name.rfind(".")
    return name[dot:].lower() if dot > 0 else ""


@contextmanager
def _open(file: Path) -> Iterator[BinaryIO]:
    """The bytes of a file, unpacked where they are gzipped.  Raises JobError, also for what is met while reading."""
    with _readable(file), open_regular(file) as stream:
        packed = stream.read(2) == _GZIP
        stream.seek(0)
        yield cast(BinaryIO, gzip.GzipFile(fileobj=stream)) if packed else stream


@contextmanager
def _readable(file: Path) -> Iterator[None]:
    """Turn what goes wrong while the block reads a file into a JobError."""
    try:
        with bad_input_as_job_error():
            yield
    except (OSError, EOFError, zlib.error) as error:
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
    check_encoding(head, str(file))


def _is_lines(head: bytes) -> bool:
    """Whether the first line is a whole JSON object and another follows, as in JSON lines."""
    return re.match(rb"\s*\{[^\r\n]*\}[ \t]*\r?\n\s*\{", head.removeprefix(b"\xef\xbb\xbf")) is not None
