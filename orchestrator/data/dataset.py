"""Tokenised samples in one memory-mapped Arrow file, made once and found again by content.

The cache's name is a hash of everything the tokens depend on: the data files' bytes, the tokenizer's files, the
template and the options.  Samples are read from the mapping, so a dataset may be larger than memory.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy
import pyarrow
import pyarrow.compute

from orchestrator.data.formats import read_example
from orchestrator.data.row import BadRow, Row
from orchestrator.data.template import Renderer, Tokens
from orchestrator.errors import JobError, RunFailed
from orchestrator.job import manifest

_FILES = ("samples.arrow", "statistics.json")
_SCHEMA = pyarrow.schema(
    [
        ("input_ids", pyarrow.list_(pyarrow.int32())),
        ("supervised", pyarrow.list_(pyarrow.bool_())),
        ("num_supervised", pyarrow.int32()),
        ("prompt_length", pyarrow.int32()),
        ("reference", pyarrow.string()),
        ("source", pyarrow.string()),
    ]
)
_ROWS_A_BATCH = 1000
_VERSION = 3  # raise it when the same inputs would give other tokens


class DamagedCache(RunFailed):
    """A folder of tokenised samples is gone, cut or changed since it was written."""

    def __init__(self, folder: Path, damage: str) -> None:
        self.folder, self.damage = folder, damage
        super().__init__(
            f"the tokenised data in {folder} is damaged ({damage}). `orchestrator resume` makes it again, and so does"
            " `submit`"
        )

    def __reduce__(self) -> tuple[type, tuple[Path, str]]:  # crosses process borders with its fields
        return type(self), (self.folder, self.damage)


@dataclass(frozen=True)
class Options:
    """What decides how one row becomes tokens, beside the renderer."""

    format: str
    instruction: str
    max_length: int | None  # None = keep every token
    overlong: str
    strict: bool


@dataclass
class Statistics:
    """What happened to the rows."""

    rows: int = 0
    samples: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    longest: int = 0
    truncated: int = 0
    dropped: int = 0
    rejected: int = 0
    formats: dict[str, int] = field(default_factory=dict)


class Dataset:
    """Samples by number.  Lengths are in memory, tokens in the mapped file; a subset is a list of row numbers."""

    def __init__(
        self, table: pyarrow.Table, statistics: Statistics, digest: str, rows: numpy.ndarray | None = None
    ) -> None:
        self._table, self.statistics, self.digest = table, statistics, digest
        self._rows = numpy.arange(table.num_rows) if rows is None else rows
        self.lengths: numpy.ndarray = pyarrow.compute.call_function(
            "list_value_length", [table["input_ids"]]
        ).to_numpy()[self._rows]
        self.num_supervised: numpy.ndarray = table["num_supervised"].to_numpy()[self._rows]

    @classmethod
    def load(cls, folder: Path) -> Dataset:
        """The samples of a folder that `build` made, every byte of it verified (once a process, about 1 s a GB).

        Raises DamagedCache, saying which file is not as it was written.
        """
        if damage := _damage(folder):
            raise DamagedCache(folder, damage)
        mapped = pyarrow.memory_map(str(folder / "samples.arrow"))
        table = pyarrow.ipc.open_file(mapped).read_all()
        return cls(table, Statistics(**json.loads((folder / "statistics.json").read_text())), folder.name)

    def __len__(self) -> int:
        return len(self._rows)

    def tokens(self, index: int) -> tuple[numpy.ndarray, numpy.ndarray]:
        """Token ids (int32) and supervised mask (bool) of a sample."""
        row = int(self._rows[index])
        ids = self._table["input_ids"][row].values.to_numpy()
        return ids, self._table["supervised"][row].values.to_numpy(zero_copy_only=False)

    def prompt(self, index: int) -> tuple[numpy.ndarray, str | None]:
        """The tokens a generated answer starts from and the text it is compared with (None: nothing to compare)."""
        row = int(self._rows[index])
        length = self._table["prompt_length"][row].as_py()
        return self.tokens(index)[0][:length], self._table["reference"][row].as_py()

    @property
    def num_references(self) -> int:
        """Samples with an answer that a generated one can be compared with."""
        return int(self._table["reference"].is_valid().to_numpy()[self._rows].sum())

    def source(self, index: int) -> str:
        """File and line a sample came from."""
        return self._table["source"][int(self._rows[index])].as_py()

    def select(self, indices: Sequence[int]) -> Dataset:
        """The samples at `indices`, over the same mapped file; statistics counted anew."""
        chosen = self._rows[numpy.asarray(indices, dtype=numpy.int64)]
        fingerprint = hashlib.sha256(chosen.tobytes()).hexdigest()[:8]
        subset = Dataset(self._table, self.statistics, f"{self.digest}-{fingerprint}", chosen)
        subset.statistics = Statistics(
            rows=len(subset),
            samples=len(subset),
            tokens=int(subset.lengths.sum()),
            supervised_tokens=int(subset.num_supervised.sum()),
            longest=int(subset.lengths.max(initial=0)),
            formats=self.statistics.formats,
        )
        return subset

    def split(self, fraction: float, seed: int) -> tuple[Dataset, Dataset]:
        """(kept, held out) by a permutation of `seed`; at least one sample on each side."""
        if len(self) < 2:
            raise JobError("data.eval.split: one row cannot be split; give data.eval a file of its own")
        num_held = min(max(1, round(len(self) * fraction)), len(self) - 1)
        shuffled = numpy.random.Generator(numpy.random.Philox(key=[seed, 2**32])).permutation(len(self))
        return self.select(numpy.sort(shuffled[num_held:]).tolist()), self.select(
            numpy.sort(shuffled[:num_held]).tolist()
        )

    def overlap(self, other: Dataset) -> int:
        """How many samples of `other` occur here too, token by token; looks only at samples of equal lengths."""
        theirs = {other.tokens(index)[0].tobytes() for index in range(len(other))}
        candidates = numpy.flatnonzero(numpy.isin(self.lengths, other.lengths))
        ours = {content for index in candidates.tolist() if (content := self.tokens(index)[0].tobytes()) in theirs}
        return sum(other.tokens(index)[0].tobytes() in ours for index in range(len(other)))


def cache_key(*parts: Any) -> str:
    """A name for what depends on `parts` (JSON-able) and on this module's version."""
    text = json.dumps([_VERSION, *parts], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def build(rows: Iterator[Row], renderer: Renderer, options: Options, folder: Path) -> Dataset:
    """Tokenise `rows` into `folder`; it appears complete or not at all.  What another process made first stays.

    Raises JobError listing the broken rows (the first ten) when `options.strict`, else writes them to rejected.jsonl.
    """
    with manifest.temporary_folder(folder) as temporary:
        _write(rows, renderer, options, temporary)
        manifest.publish(temporary, folder, _FILES)
    return Dataset.load(folder)


def _damage(folder: Path) -> str | None:
    """What is wrong with a folder of samples; files that have not been touched since are not read again."""
    try:
        found = [(folder / name).stat() for name in (*_FILES, manifest.NAME)]
    except OSError:
        return manifest.damage(folder, _FILES)
    return _damage_once(folder, tuple((one.st_ino, one.st_size, one.st_mtime_ns, one.st_ctime_ns) for one in found))


@lru_cache(maxsize=64)
def _damage_once(folder: Path, touched: tuple[tuple[int, ...], ...]) -> str | None:
    return manifest.damage(folder, _FILES)


def _write(rows: Iterator[Row], renderer: Renderer, options: Options, folder: Path) -> None:
    statistics, formats, broken = Statistics(), Counter[str](), list[str]()
    detected: dict[str, str] = {}
    with (
        pyarrow.OSFile(str(folder / "samples.arrow"), "wb") as sink,
        pyarrow.ipc.new_file(sink, _SCHEMA) as writer,
        (folder / "rejected.jsonl").open("w") as rejected,
    ):
        waiting: list[dict[str, Any]] = []
        for row in rows:
            statistics.rows += 1
            try:
                row_format, samples = samples_of(row, renderer, options, statistics, detected)
            except BadRow as reason:
                statistics.rejected += 1
                broken.append(f"{row.where}: {reason}")
                rejected.write(
                    json.dumps({"where": row.where, "reason": str(reason), "row": row.values}, default=str) + "\n"
                )
                continue
            formats[row_format] += 1
            waiting += samples
            if len(waiting) >= _ROWS_A_BATCH:
                writer.write_batch(pyarrow.RecordBatch.from_pylist(waiting, schema=_SCHEMA))
                waiting = []
        if waiting:
            writer.write_batch(pyarrow.RecordBatch.from_pylist(waiting, schema=_SCHEMA))
    if broken and options.strict:
        more = [f"... and {len(broken) - 10} more"] if len(broken) > 10 else []
        raise JobError([*broken[:10], *more, "Mend these rows, or set data.strict: false to skip and count them"])
    statistics.formats = dict(formats)
    if statistics.samples == 0:
        raise JobError(
            f"data: no sample is left of {statistics.rows} rows ({statistics.rejected} rejected, {statistics.dropped}"
            " dropped as too long or without a supervised token); raise data.max_length or look with `inspect`"
        )
    (folder / "statistics.json").write_text(json.dumps(asdict(statistics), indent=1))


def samples_of(
    row: Row, renderer: Renderer, options: Options, statistics: Statistics, detected: dict[str, str]
) -> tuple[str, list[dict[str, Any]]]:
    """The format of a row and its samples (none when dropped, several when split), counted into `statistics`.

    Where the format is open, the first row of a file that has one decides for the file; `detected` remembers it.
    """
    row_format, example = read_example(row, options.format, options.instruction, detected)
    tokens = renderer.render(example)
    pieces = _fit(tokens, options, statistics)
    samples = []
    for piece in pieces:
        whole = len(pieces) == 1 and len(piece.input_ids) == len(tokens.input_ids)
        num_supervised = sum(piece.supervised)
        if num_supervised == 0:
            statistics.dropped += 1
            continue
        statistics.samples += 1
        statistics.tokens += len(piece.input_ids)
        statistics.supervised_tokens += num_supervised
        statistics.longest = max(statistics.longest, len(piece.input_ids))
        samples.append(
            {
                "input_ids": piece.input_ids,
                "supervised": piece.supervised,
                "num_supervised": num_supervised,
                "prompt_length": piece.prompt_length,
                "reference": example.reference if whole else None,
                "source": row.where,
            }
        )
    return row_format, samples


def _fit(tokens: Tokens, options: Options, statistics: Statistics) -> list[Tokens]:
    limit = options.max_length
    if limit is None or len(tokens.input_ids) <= limit:
        return [tokens]
    statistics.truncated += 1
    if options.overlong == "drop":
        statistics.dropped += 1
        return []
    starts = range(0, len(tokens.input_ids), limit) if options.overlong == "split" else [0]
    return [_piece(tokens, start, limit) for start in starts]


def _piece(tokens: Tokens, start: int, limit: int) -> Tokens:
    ids, mask = tokens.input_ids[start : start + limit], tokens.supervised[start : start + limit]
    return Tokens(ids, [False, *mask[1:]], 0)
