"""Rows of jsonl, json, csv and parquet files, folders of them, and hub datasets, one at a time."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from orchestrator.data.row import BadRow, Row
from orchestrator.errors import JobError

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")


def find_files(path: Path, key: str) -> list[Path]:
    """The data files at `path`, in name order.  Raises JobError naming `key` when there is none."""
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES and file.is_file())
        if not found:
            raise JobError(f"{key}: the folder {path} holds no {', '.join(SUFFIXES)} file")
        return found
    if not path.exists():
        raise JobError(f"{key}: {path} does not exist. Paths are relative to the job file's folder")
    if path.suffix not in SUFFIXES:
        raise JobError(f"{key}: {path.name}: a data file ends in {', '.join(SUFFIXES)}")
    return [path]


def looks_like_hub_name(value: str) -> bool:
    """`org/name` or `name`, with no data-file suffix and no path characters: a dataset of the Hugging Face hub."""
    parts = value.split("/")
    return len(parts) <= 2 and all(parts) and not value.startswith((".", "~")) and not value.endswith(SUFFIXES)


def read_rows(file: Path) -> Iterator[Row]:
    """The rows of one file.  A row that cannot be parsed comes with the reason; a file that cannot raises JobError."""
    readers = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv, ".parquet": _read_parquet}
    try:
        yield from readers[file.suffix](file)
    except OSError as error:
        raise JobError(f"{file}: cannot be read: {error.strerror or error}") from None


def read_hub_rows(name: str, split: str) -> Iterator[Row]:
    """The rows of a hub dataset's split, through the `datasets` library."""
    import datasets

    try:
        rows = datasets.load_dataset(name, split=split)
    except Exception as error:  # the library raises dozens of types for hub trouble
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise JobError(f"data: {name} is neither a local file nor a dataset the hub gives: {first_line}") from None
    for number, values in enumerate(rows, start=1):
        yield Row(dict(values), f"{name}[{split}]", number)


def digest(file: Path) -> str:
    """SHA-256 of a file's bytes."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _read_jsonl(file: Path) -> Iterator[Row]:
    with file.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                yield _parsed(line, str(file), number)


def _parsed(line: bytes, file: str, number: int) -> Row:
    try:
        values = json.loads(line)
    except UnicodeDecodeError:
        return Row({}, file, number, BadRow("is not UTF-8 text"))
    except (ValueError, RecursionError) as error:
        return Row({}, file, number, BadRow(f"is not JSON: {error}", "is not JSON"))
    return _checked(values, file, number)


def _checked(values: Any, file: str, number: int) -> Row:
    if not isinstance(values, dict):
        return Row({}, file, number, BadRow(f"is a {type(values).__name__}, not an object with named fields"))
    return Row(values, file, number)


def _read_json(file: Path) -> Iterator[Row]:
    try:
        values = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise JobError(f"{file}: is not JSON: {error}. One object a line is a .jsonl file") from None
    if not isinstance(values, list):
        raise JobError(f"{file}: holds a {type(values).__name__}; a .json data file is a list of objects")
    yield from (_checked(item, str(file), number) for number, item in enumerate(values, start=1))


def _read_csv(file: Path) -> Iterator[Row]:
    with file.open(newline="", encoding="utf-8-sig", errors="strict") as stream:
        reader = csv.DictReader(stream)
        try:
            for number, values in enumerate(reader, start=1):
                short = None in values or None in values.values()
                broken = BadRow("has not as many cells as the header") if short else None
                yield Row(values, str(file), number, broken)
        except (csv.Error, UnicodeDecodeError) as error:
            raise JobError(f"{file}: is not a UTF-8 csv file: {error}") from None


def _read_parquet(file: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        number = 0
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=1024):
            for values in batch.to_pylist():
                number += 1
                yield Row(values, str(file), number)
    except pyarrow.ArrowInvalid as error:
        raise JobError(f"{file}: is not a parquet file: {error}") from None
