"""One pass over a job's rows that stores nothing: counts what is supervised, cut, lost or broken."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from clusters.safe.reading import printable
from orchestrator.data.counts import (
    RowCounts,
    Statistics,
    check_line,
    likeness_notices,
    loss_notice,
    loss_refusal,
    reading_notices,
)
from orchestrator.data.readers.remote import scheme_of
from orchestrator.data.readers.sources import fetched, rows_of, skipped_of, sources_of
from orchestrator.data.rendering.template import Renderer
from orchestrator.data.rows.likeness import MOST_COMPARED, nearly_equal, sketch
from orchestrator.data.rows.row import Row
from orchestrator.data.samples import TokenizeOptions, options_for, read_only, tokenise
from orchestrator.job.job_file import Job
from orchestrator.job.sections.training import HeldOutFraction, Source

_NOT_FETCHED = ("a data set of the hub", "an address")
Keep = Callable[[int, list[dict[str, Any]]], None]  # number of a row of data.train, from 1, and its samples


@dataclass
class SourceShare:
    """What comes from one source; `samples` and the rest as often as its weight has it."""

    path: str
    rows: int
    samples: int
    tokens: int
    supervised_tokens: int


@dataclass
class _Key:
    """One data key."""

    counts: RowCounts = field(default_factory=RowCounts)
    lengths: list[int] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)  # numbers of the samples' rows
    fingerprints: list[int] = field(default_factory=list)
    texts: list[int] = field(default_factory=list)  # fingerprints of what the samples' rows say
    sketches: list[Any] = field(default_factory=list)  # of the same, for those that are nearly equal
    shares: list[SourceShare] = field(default_factory=list)  # of its sources
    formats: dict[str, str] = field(default_factory=dict)  # of each path
    skipped: list[str] = field(default_factory=list)  # files of folders that are not read
    is_whole: bool = True  # False: only the first rows were looked at, or none of a hub's data set


@dataclass
class Survey:
    """What was found, by data key; `is_rendered` is False where the rows were read only."""

    job: Job
    is_rendered: bool
    keys: dict[str, _Key] = field(default_factory=dict)

    @property
    def train(self) -> _Key:
        return self.keys["data.train"]

    def statistics(self) -> dict[str, dict[str, Any]]:
        """Counts by data key."""
        return {key: asdict(found.counts.statistics) for key, found in self.keys.items()}

    def formats(self) -> dict[str, str]:
        """Format by path."""
        return {path: name for found in self.keys.values() for path, name in found.formats.items()}

    def unchecked(self) -> list[str]:
        """Which rows were not looked at, and why."""
        return [
            f"the rows of {path}: they are not fetched" for path, what in self.formats().items() if what in _NOT_FETCHED
        ]

    def lines(self, with_skipped: bool = True) -> list[str]:
        """Notices for each key: what is supervised, lost, not used, and which broken rows are skipped."""
        lines = []
        for key, found in self.keys.items():
            statistics = asdict(found.counts.statistics)
            part = "" if found.is_whole else f" (of the first {statistics['rows']:,} rows)"
            if self.is_rendered and statistics["rows"]:
                lines.append(f"{key}: {check_line(statistics)}{part}")
                notice = loss_notice(statistics, key)
                lines += [notice + part] if notice else []
                lines += [line + part for line in likeness_notices(statistics, key)]
            lines += [line + part for line in reading_notices(statistics, key)] + found.skipped
            if with_skipped and not self.job.spec.data.strict:
                lines += [f"{key}: skipped: {line}" for line in found.counts.broken.lines()]
        return lines

    def mistakes(self) -> list[str]:
        """Why these rows cannot be trained on."""
        data, mistakes = self.job.spec.data, []
        for key, found in self.keys.items():
            statistics = found.counts.statistics
            if found.is_whole and not statistics.rows:
                names = ", ".join(map(printable, list(found.formats)[:3])) or "it"
                mistakes.append(f"{key}: {names} holds no row. Fill it, or name another file")
            elif mistake := found.counts.mistake(key, data.strict, self.is_rendered and found.is_whole):
                mistakes += mistake.mistakes
            elif self.is_rendered and found.is_whole and not data.truncate:
                refusal = loss_refusal(asdict(statistics), key)
                mistakes += [refusal] if refusal else []
        if isinstance(data.eval, HeldOutFraction) and self.train.is_whole and self.is_rendered:
            mistakes += [ONE_ROW] if self.train.counts.statistics.samples == 1 else []
        return mistakes


ONE_ROW = "data.eval.split: one row cannot be split; give data.eval a file of its own"


def survey(
    job: Job, renderer: Renderer | None, max_length: int | None, most_rows: int | None = None, keep: Keep | None = None
) -> Survey:
    """Look through the rows of data.train and data.eval: all, or about the first `most_rows` of each key.

    Without a renderer they are read only.  With `most_rows` nothing is fetched from the hub.  Broken rows are counted,
    whatever data.strict says.  Raises JobError for files that cannot be read and where no row can be rendered.
    """
    found = Survey(job, renderer is not None)
    for name, value in (("data.train", job.spec.data.train), ("data.eval", job.spec.data.eval)):
        if value is None or isinstance(value, HeldOutFraction):
            continue
        key = found.keys[name] = _Key(skipped=skipped_of(job, value, name))
        sources = sources_of(job, value, name)
        if most_rows is None:
            sources = fetched(sources, name)
        look = _Look(renderer, options_for(job, max_length), key, keep if name == "data.train" else None)
        for source, files in sources:
            before = replace(key.counts.statistics)
            if most_rows is not None and not files:
                key.is_whole = False
                key.formats[source.path] = _NOT_FETCHED[scheme_of(source.path) is not None]
            elif most_rows is not None:
                limit = max(1, most_rows // max(1, len(files) * len(sources)))
                for file in files:
                    look.through(source, [file], _limit(rows_of(job, source, [file], first=True), limit, key))
            else:
                look.through(source, files, rows_of(job, source, files))
            key.shares.append(_share(source, before, key.counts.statistics))
    _compare(found)
    return found


def _limit(rows: Iterator[Row], limit: int | None, key: _Key) -> Iterator[Row]:
    yield from islice(rows, limit)
    if limit is not None and next(rows, None) is not None:
        key.is_whole = False


@dataclass
class _Look:
    """How rows of a key are looked at."""

    renderer: Renderer | None
    options: TokenizeOptions
    key: _Key
    keep: Keep | None

    def through(self, source: Source, files: list[Path], rows: Iterable[Row]) -> None:
        """Count these rows of a source and note the format of its files."""
        key, seen = self.key, Counter()
        rows = _counted(rows, seen)
        if self.renderer is None:
            read_only(rows, self.options, key.counts)
        else:
            for _, samples in tokenise(rows, self.renderer, self.options, key.counts):
                self._note(samples)
        names = key.counts.formats
        if not files:  # of the hub
            key.formats[source.path] = next((names[where] for where in seen if where in names), "no rows")
        for file in map(str, files):
            shown = source.path if len(files) == 1 and Path(file).name == Path(source.path).name else file
            key.formats[shown] = names.get(file, "unknown") if seen[file] else "no rows"

    def _note(self, samples: list[dict[str, Any]]) -> None:
        key = self.key
        for sample in samples:
            key.lengths += sample.get("document_lengths", [len(sample["input_ids"])])
            key.rows.append(key.counts.statistics.rows)
            key.fingerprints.append(sample["fingerprint"])
            key.texts.append(sample["text_fingerprint"])
            if len(key.sketches) < MOST_COMPARED:
                key.sketches.append(sketch(sample["plain"]))
        if self.keep:
            self.keep(key.counts.statistics.rows, samples)


def _counted(rows: Iterable[Row], seen: Counter[str]) -> Iterator[Row]:
    for row in rows:
        seen[row.file] += 1
        yield row


def _share(source: Source, before: Statistics, after: Statistics) -> SourceShare:
    weighed = [
        round((getattr(after, name) - getattr(before, name)) * source.weight)
        for name in ("samples", "tokens", "supervised_tokens")
    ]
    return SourceShare(source.path, after.rows - before.rows, *weighed)


def _compare(found: Survey) -> None:
    """Count samples that are equal to another, and those that are held out too or nearly so."""
    train, held = found.keys["data.train"], found.keys.get("data.eval")
    for key in found.keys.values():
        counts = Counter(key.fingerprints)
        statistics = key.counts.statistics
        statistics.repeated = sum(count for count in counts.values() if count > 1)
        near = nearly_equal(key.sketches)
        statistics.near = sum(key.texts[number] != key.texts[other] for number, other in near.items())
    kept: Sequence[int] = range(len(train.fingerprints))
    others: _Key | None = held
    places: Sequence[int] = range(len(held.fingerprints)) if held else ()
    stated = found.job.spec.data.eval
    if isinstance(stated, HeldOutFraction) and train.is_whole and len(set(train.rows)) > 1:
        from orchestrator.data.dataset import split_samples

        kept, places = split_samples(train.rows, stated.split, found.job.spec.train.seed)
        others = train
    if others is None:
        return
    statistics = train.counts.statistics
    prints, texts = ({getattr(others, name)[place] for place in places} for name in ("fingerprints", "texts"))
    statistics.held_out = sum(train.fingerprints[number] in prints for number in kept)
    statistics.leaked = sum(train.texts[number] in texts for number in kept)
    looked_at = ([key.sketches[n] for n in numbers if n < len(key.sketches)] for key, numbers in
                 ((train, kept), (others, places)))  # fmt: skip
    statistics.near_held_out = len(nearly_equal(*looked_at))
