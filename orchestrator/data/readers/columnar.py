"""Rows of parquet and Arrow files and of hub data sets: null, NaN and "" stay apart; no value ends in a traceback."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from clusters.safe.reading import first_line
from orchestrator.data.rows.row import Row
from orchestrator.errors import JobError
from orchestrator.job.hub import why_unreachable

_ROWS = 1024
_ARROW_FILE = b"ARROW1"


@dataclass(frozen=True)
class Unreadable:
    """A value that Python has no type for, such as a date of the year 300000."""

    arrow_type: str


def read_parquet(stream: BinaryIO, file: str) -> Iterator[Row]:
    """The rows of a parquet file.  Raises JobError."""
    import pyarrow
    import pyarrow.parquet

    try:
        yield from _rows(pyarrow.parquet.ParquetFile(stream).iter_batches(batch_size=_ROWS), file)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError, MemoryError) as error:
        raise JobError(f"{file}: is not a parquet file: {first_line(error)}") from None


def read_arrow(stream: BinaryIO, file: str) -> Iterator[Row]:
    """The rows of an Arrow file, in the file or the stream format.  Raises JobError."""
    import pyarrow

    is_file = stream.read(len(_ARROW_FILE)) == _ARROW_FILE
    stream.seek(0)
    try:
        if is_file:
            opened = pyarrow.ipc.open_file(stream)
            batches: Iterable[Any] = (opened.get_batch(number) for number in range(opened.num_record_batches))
        else:
            batches = pyarrow.ipc.open_stream(stream)
        yield from _rows(_validated(batches), file)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError, MemoryError) as error:
        raise JobError(f"{file}: is not an Arrow file: {first_line(error)}") from None


def write_selected(files: Sequence[Path], index: Sequence[Path], target: Path, key: str) -> None:
    """Write rows of Arrow streams, those whose numbers an index of such streams holds, as one.  Raises JobError."""
    import pyarrow
    import pyarrow.compute

    def opened(parts: Sequence[Path]) -> Any:
        return pyarrow.concat_tables(
            [pyarrow.ipc.open_stream(pyarrow.memory_map(str(one))).read_all() for one in parts]
        )

    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        rows, numbers = opened(files), opened(index)["indices"]
        if len(numbers) and pyarrow.compute.call_function("max", [numbers]).as_py() >= len(rows):
            raise JobError(f"{key}: {index[0]} names rows that are not there; save the data set again")
        with pyarrow.ipc.new_stream(temporary, rows.schema) as stream:
            for begin in range(0, len(numbers), _ROWS):
                stream.write_table(rows.take(numbers.slice(begin, _ROWS)))
        temporary.replace(target)
    except (pyarrow.ArrowException, KeyError, OSError) as error:
        raise JobError(f"{key}: {index[0]} is no index of rows: {first_line(error)}. Save the data set again") from None
    finally:
        temporary.unlink(missing_ok=True)


@dataclass(frozen=True)
class HubData:
    """A data set of the hub, by the arguments of `datasets.load_dataset`."""

    path: str
    split: str = "train"
    config: str | None = None
    revision: str | None = None
    data_files: str | list[str] | None = None

    @property
    def label(self) -> str:
        return f"{self.path}[{self.split}]"


def read_hub_rows(data: HubData) -> Iterator[Row]:
    """The rows of a hub data set's split, through the `datasets` library."""
    import datasets

    trouble = why_unreachable()
    try:
        with _offline() if trouble else contextlib.nullcontext():
            loaded: Any = datasets.load_dataset(
                data.path, data.config, split=data.split, revision=data.revision, data_files=data.data_files
            )
        tables = loaded.with_format("arrow").iter(batch_size=_ROWS)
        yield from _rows((batch for table in tables for batch in table.to_batches()), data.label)
    except Exception as error:  # the library raises dozens of types for hub trouble
        raise JobError(_hub_trouble(data.path, trouble, error)) from None


def _hub_trouble(path: str, trouble: str | None, error: Exception) -> str:
    """What is wrong with a data set of the hub: its configuration, its split, or that it is not to be had."""
    told = " ".join(str(error).split())
    if "Config name is missing" in told or "BuilderConfig" in told:
        return f"data: {path}: {told[:400]}. State it: {{path: {path}, config: ...}}"
    if "Unknown split" in told:
        return f"data: {path}: {told[:400]}. State one of them: {{path: {path}, split: ...}}"
    return f"data: {path} is neither a local file nor a data set on the hub: {trouble or first_line(error)}"


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """Let `datasets` read its cache only; it reads HF_HUB_OFFLINE from the environment once, when it is imported."""
    from datasets import config
    from huggingface_hub import constants

    kept = constants.HF_HUB_OFFLINE, config.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, config.HF_HUB_OFFLINE = kept


def _validated(batches: Iterable[Any]) -> Iterator[Any]:
    """Batches whose buffers were checked: Arrow reads a damaged file's memory as it stands, past its end."""
    for batch in batches:
        batch.validate(full=True)
        yield batch


def _rows(batches: Iterable[Any], file: str) -> Iterator[Row]:
    number = 0
    for batch in batches:
        names = batch.schema.names
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise JobError(f"{file}: names the column {', '.join(map(repr, repeated))} twice. Rename or remove one")
        columns = [_values(column) for column in batch.columns]
        for row in zip(*columns, strict=True) if columns else ():
            number += 1
            yield Row(dict(zip(names, row, strict=True)), file, number)


def _values(column: Any) -> list[Any]:
    """Python values of a column.  Nulls within a struct are fields that a row does not have."""
    import pyarrow

    try:
        values = column.to_pylist()
    except (pyarrow.ArrowException, ValueError, OverflowError, TypeError):
        values = [_value(scalar) for scalar in column]
    return [_without_nulls(value) for value in values] if pyarrow.types.is_nested(column.type) else values


def _value(scalar: Any) -> Any:
    import pyarrow

    try:
        return scalar.as_py()
    except (pyarrow.ArrowException, ValueError, OverflowError, TypeError):
        return Unreadable(str(scalar.type))


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nulls(part) for name, part in value.items() if part is not None}
    return [_without_nulls(part) for part in value] if isinstance(value, list) else value
