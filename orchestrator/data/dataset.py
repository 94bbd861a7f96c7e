"""Tokenised samples in one memory-mapped Arrow file, made once and found again by content.

The cache's name is a hash of everything the tokens depend on: the data files' bytes, the tokenizer's files, the
template and the options.  Samples are read from the mapping, so a dataset may be larger than memory.
"""

from __future__ import annotations

import array
import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy
import pyarrow
import pyarrow.compute

from orchestrator.data.counts import RowCounts, Statistics
from orchestrator.data.rendering.template import Renderer
from orchestrator.data.rows.row import BadRow, Row
from orchestrator.data.samples import TokenizeOptions, tokenise
from orchestrator.errors import JobError, RunFailed
from orchestrator.job import manifest

_FILES = ("samples.arrow", "statistics.json")
_SCHEMA = pyarrow.schema(
    [
        ("input_ids", pyarrow.list_(pyarrow.int32())),
        ("supervised", pyarrow.list_(pyarrow.bool_())),
        ("num_supervised", pyarrow.int32()),
        ("fingerprint", pyarrow.int64()),  # of the token ids: equal samples have equal ones
        ("prompt_length", pyarrow.int32()),
        ("reference", pyarrow.string()),
        ("source", pyarrow.string()),
        ("text_fingerprint", pyarrow.int64()),  # of the row's text but for capitals, punctuation and spaces
    ]
)
_DOCUMENTS = pyarrow.schema(  # of samples of whole documents, end to end
    [
        *_SCHEMA,
        ("answer", pyarrow.list_(pyarrow.bool_())),  # of the supervised tokens those of the answers
        ("document_lengths", pyarrow.list_(pyarrow.int32())),
        ("document_supervised", pyarrow.list_(pyarrow.int32())),
        ("document_answers", pyarrow.list_(pyarrow.int32())),
        ("label", pyarrow.bool_()),  # of labelled rows: whether the answer is good
        ("margin", pyarrow.float64()),  # of pairs: how much better the chosen answer is, where the row says so
    ]
)
_ROWS_A_BATCH = 1000
_VERSION = 6  # raise it when the same inputs would give other tokens


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
class DocumentCounts:
    """Tokens of each document of each sample (N, 2), of labelled rows (N, 1)."""

    lengths: numpy.ndarray
    supervised: numpy.ndarray  # that are predicted
    answers: numpy.ndarray  # of the answers

    @classmethod
    def of(cls, table: pyarrow.Table, rows: numpy.ndarray) -> DocumentCounts:
        """Of some rows of a table of pairs."""

        def column(name: str) -> numpy.ndarray:
            flat = pyarrow.chunked_array([part.flatten() for part in table[name].chunks], pyarrow.int32())
            return _numbers(flat, numpy.int32).reshape(table.num_rows, -1)[rows]

        return cls(column("document_lengths"), column("document_supervised"), column("document_answers"))


class Dataset:
    """Samples by number.  Lengths are in memory, tokens in the mapped file; a subset is a list of row numbers."""

    def __init__(
        self, table: pyarrow.Table, statistics: Statistics, digest: str, rows: numpy.ndarray | None = None
    ) -> None:
        self._table, self.statistics, self.digest = table, statistics, digest
        self._rows = numpy.arange(table.num_rows) if rows is None else rows
        lengths = pyarrow.compute.call_function("list_value_length", [table["input_ids"]])
        self.lengths: numpy.ndarray = _numbers(lengths, numpy.int32)[self._rows]
        self.num_supervised: numpy.ndarray = _numbers(table["num_supervised"], numpy.int32)[self._rows]
        self.fingerprints: numpy.ndarray = _numbers(table["fingerprint"], numpy.int64)[self._rows]
        texts = "text_fingerprint" if "text_fingerprint" in table.column_names else "fingerprint"  # of an earlier run
        self.text_fingerprints: numpy.ndarray = _numbers(table[texts], numpy.int64)[self._rows]
        self.documents = DocumentCounts.of(table, self._rows) if "document_lengths" in table.column_names else None
        self.references: numpy.ndarray | None = None  # log p of each document's answer under the reference (N, 2)

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

    def documents_of(self, index: int) -> list[tuple[numpy.ndarray, numpy.ndarray]]:
        """`tokens` of each document of a sample."""
        ids, mask = self.tokens(index)
        if self.documents is None:
            return [(ids, mask)]
        ends = self.documents.lengths[index].cumsum()[:-1]
        return list(zip(numpy.split(ids, ends), numpy.split(mask, ends), strict=True))

    def answers(self, index: int) -> numpy.ndarray:
        """Of a pair's supervised tokens, those that belong to the answers (bool)."""
        row = int(self._rows[index])
        is_answer = self._table["answer"][row].values.to_numpy(zero_copy_only=False)
        return is_answer[self.tokens(index)[1]]

    @cached_property
    def labels(self) -> numpy.ndarray | None:
        """Whether the answer of each labelled row is good; None of other rows."""
        column = self._table["label"] if self.documents else None
        if column is None or column.null_count:
            return None
        return numpy.concatenate([part.to_numpy(zero_copy_only=False) for part in column.chunks])[self._rows]

    @cached_property
    def margins(self) -> numpy.ndarray | None:
        """How much better each pair's chosen answer is, 0 where its row does not say; None where no row says so."""
        column = self._table["margin"] if "margin" in self._table.column_names else None
        if column is None or column.null_count == len(column):
            return None
        return numpy.array([value or 0.0 for value in column.to_pylist()])[self._rows]

    def mismatched(self, index: int) -> tuple[numpy.ndarray, numpy.ndarray]:
        """`tokens` of a labelled row's question with the answer of the row before it, cut to the longest row."""
        ids, (others, other_mask) = self.tokens(index)[0], self.tokens(index - 1)
        size, start = int(self.prompt_lengths[index]), int(self.prompt_lengths[index - 1])
        limit = int(self.lengths.max())
        joined = numpy.concatenate([ids[:size], others[start:]])[:limit]
        return joined, numpy.concatenate([numpy.zeros(size, bool), other_mask[start:]])[:limit]

    @cached_property
    def prompt_lengths(self) -> numpy.ndarray:
        """Tokens before the last answer."""
        return _numbers(self._table["prompt_length"], numpy.int32)[self._rows]

    @property
    def mismatched_lengths(self) -> numpy.ndarray:
        """Tokens of each row of `mismatched`."""
        answers = self.lengths - self.prompt_lengths
        return numpy.minimum(self.prompt_lengths + numpy.roll(answers, 1), self.lengths.max())

    @property
    def document_lengths(self) -> numpy.ndarray:
        """Tokens of every document, those of a sample one behind the other."""
        return self.lengths if self.documents is None else self.documents.lengths.flatten()

    @property
    def padded_lengths(self) -> numpy.ndarray:
        """Tokens that a sample takes in rows padded to its own longest document."""
        if self.documents is None:
            return self.lengths
        return self.documents.lengths.shape[1] * self.documents.lengths.max(axis=1)

    def num_counted(self, indices: Sequence[int]) -> int:
        """What the loss of these samples is a mean over: their supervised tokens, or themselves if they are pairs."""
        return len(indices) if self.documents else int(self.num_supervised[indices].sum())

    def num_chosen_tokens(self, indices: Sequence[int]) -> int:
        """Of pairs: tokens of the chosen documents that are predicted."""
        return int(self.documents.supervised[indices, 0].sum()) if self.documents else 0

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
        """The samples at `indices`, over the same mapped file, their tokens counted anew; counts of rows stay."""
        chosen = self._rows[numpy.asarray(indices, dtype=numpy.int64)]
        fingerprint = hashlib.sha256(chosen.tobytes()).hexdigest()[:8]
        subset = Dataset(self._table, self.statistics, f"{self.digest}-{fingerprint}", chosen)
        subset.references = None if self.references is None else self.references[numpy.asarray(indices)]
        subset.statistics = replace(
            self.statistics,
            samples=len(subset),
            tokens=int(subset.lengths.sum()),
            supervised_tokens=int(subset.num_supervised.sum()),
            longest=int(subset.lengths.max(initial=0)),
        )
        return subset

    def split(self, fraction: float, seed: int) -> tuple[Dataset, Dataset]:
        """(kept, held out) by a permutation of `seed`, all samples of a row on one side; neither is empty."""
        rows_N = self._row_numbers
        if not len(rows_N) or rows_N[-1] == rows_N[0]:
            raise JobError("data.eval.split: one row cannot be split; give data.eval a file of its own")
        kept, held = split_samples(rows_N, fraction, seed)
        return self.select(kept), self.select(held)

    @cached_property
    def _row_numbers(self) -> numpy.ndarray:
        """Of each sample the number of its row (N,), from 0: samples of one row follow each other."""
        begins, last = [numpy.zeros(0, bool)], None
        # Part by part: the file may be larger than memory.
        for part in [one for one in self._table["source"].chunks if len(one)]:
            differs = pyarrow.compute.call_function("not_equal", [part.slice(1), part.slice(0, len(part) - 1)])
            begins += [numpy.array([part[0].as_py() != last]), differs.to_numpy(zero_copy_only=False)]
            last = part[-1].as_py()
        return (numpy.cumsum(numpy.concatenate(begins)) - 1)[self._rows]

    def overlap(self, other: Dataset) -> int:
        """How many samples of `other` occur here too, token by token."""
        return int(numpy.isin(other.fingerprints, self.fingerprints).sum())

    def leaks(self, other: Dataset) -> int:
        """How many samples of `other` say what one here says, capitals, punctuation and spaces aside."""
        return int(numpy.isin(other.text_fingerprints, self.text_fingerprints).sum())

    def mix(self, weights: Sequence[float], seed: int) -> Dataset:
        """Each sample as often as its source weighs: whole times, and of the rest a part drawn by `seed`."""
        if all(weight == 1 for weight in weights):
            return self
        origins = numpy.searchsorted(numpy.cumsum(self.statistics.parts), self._rows, side="right")
        chosen = []
        for number, weight in enumerate(weights):
            own = numpy.flatnonzero(origins == number)
            draw = numpy.random.Generator(numpy.random.Philox(key=[seed, 2**33 + number])).permutation(own)
            chosen += [own] * int(weight) + [draw[: round((weight - int(weight)) * len(own))]]
        kept = numpy.sort(numpy.concatenate(chosen))
        if not len(kept):
            raise JobError("data.train: the weights of the sources leave no sample. Raise one")
        return self.select(kept.tolist())

    def num_repeated(self) -> int:
        """How many samples are equal to another one."""
        _, counts = numpy.unique(self.fingerprints, return_counts=True)
        return int(counts[counts > 1].sum())


def _numbers(column: pyarrow.ChunkedArray, dtype: type[numpy.integer]) -> numpy.ndarray:
    """A column without nulls.  Not by `to_numpy`, which imports pandas: 0.2 s of each start."""
    assert column.null_count == 0
    size = numpy.dtype(dtype).itemsize
    parts = [
        numpy.frombuffer(part.buffers()[1], dtype=dtype, count=len(part), offset=size * part.offset)
        for part in column.chunks
        if len(part)
    ]
    return numpy.concatenate(parts) if parts else numpy.empty(0, dtype)


def split_rows(count: int, fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """(kept, held out) numbers of `count` samples, by a permutation of `seed`; at least one on each side."""
    num_held = min(max(1, round(count * fraction)), count - 1)
    shuffled = numpy.random.Generator(numpy.random.Philox(key=[seed, 2**32])).permutation(count)
    return numpy.sort(shuffled[num_held:]).tolist(), numpy.sort(shuffled[:num_held]).tolist()


def split_samples(rows_N: Sequence[int] | numpy.ndarray, fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """(kept, held out) samples by `split_rows` of their rows, whose numbers rise; all samples of a row on one side."""
    numbers, row_N = numpy.unique(numpy.asarray(rows_N), return_inverse=True)
    _, held = split_rows(len(numbers), fraction, seed)
    is_held_N = numpy.isin(row_N, held)
    return numpy.flatnonzero(~is_held_N).tolist(), numpy.flatnonzero(is_held_N).tolist()


def cache_key(*parts: Any) -> str:
    """A name for what depends on `parts` (JSON-able) and on this module's version."""
    text = json.dumps([_VERSION, *parts], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def build(rows: Iterable[Row], renderer: Renderer, options: TokenizeOptions, folder: Path) -> Dataset:
    """Tokenise the rows of one source into `folder`; see `build_all`."""
    return build_all([rows], renderer, options, folder)


def build_all(sources: Iterable[Iterable[Row]], renderer: Renderer, options: TokenizeOptions, folder: Path) -> Dataset:
    """Tokenise rows into `folder`; it appears complete or not at all.  What another process made first stays.

    Raises JobError listing the broken rows (the first ten) when `options.strict`, else writes them to rejected.jsonl.
    """
    parts = [iter(rows) for rows in sources]
    first = list(itertools.islice(parts[0], 1))  # data that cannot be read at all leave no folder behind
    parts[0] = itertools.chain(first, parts[0])
    with manifest.temporary_folder(folder) as temporary:
        _write(parts, renderer, options, temporary)
        manifest.publish(temporary, folder, _FILES)
    return Dataset.load(folder)


def _record_batch(samples: list[dict[str, Any]], schema: pyarrow.Schema) -> pyarrow.RecordBatch:
    """Samples as columns; token ids and masks are laid end to end here, which `from_pylist` does value by value."""
    if schema is not _SCHEMA:
        return pyarrow.RecordBatch.from_pylist(samples, schema=schema)
    offsets = pyarrow.array(
        numpy.concatenate([[0], numpy.cumsum([len(one["input_ids"]) for one in samples])]), pyarrow.int32()
    )
    ids, masks = array.array("i"), bytearray()
    for one in samples:
        ids.extend(one["input_ids"])
        masks += bytes(one["supervised"])
    lists = {
        "input_ids": pyarrow.array(numpy.frombuffer(ids, dtype=numpy.int32)),
        "supervised": pyarrow.array(numpy.frombuffer(masks, dtype=numpy.bool_)),
    }
    columns = [
        pyarrow.ListArray.from_arrays(offsets, lists[field.name])
        if field.name in lists
        else pyarrow.array([one[field.name] for one in samples], field.type)
        for field in _SCHEMA
    ]
    return pyarrow.record_batch(columns, schema=_SCHEMA)


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


def _write(parts: Iterable[Iterator[Row]], renderer: Renderer, options: TokenizeOptions, folder: Path) -> None:
    counts, schema = RowCounts(), _SCHEMA if options.rows == "answers" else _DOCUMENTS
    with (
        pyarrow.OSFile(str(folder / "samples.arrow"), "wb") as sink,
        pyarrow.ipc.new_file(sink, schema) as writer,
        (folder / "rejected.jsonl").open("w") as rejected,
    ):

        def reject(row: Row, reason: BadRow) -> None:
            entry = {"where": row.where, "reason": reason.reason, "row": row.values}
            rejected.write(json.dumps(entry, default=str) + "\n")

        for rows in parts:
            before = counts.statistics.samples
            samples = (sample for _, made in tokenise(rows, renderer, options, counts, reject) for sample in made)
            while batch := list(itertools.islice(samples, _ROWS_A_BATCH)):
                writer.write_batch(_record_batch(batch, schema))
            counts.statistics.parts.append(counts.statistics.samples - before)
    if mistake := counts.mistake("data", options.strict):
        raise mistake
    (folder / "statistics.json").write_text(json.dumps(asdict(counts.statistics), indent=1))
