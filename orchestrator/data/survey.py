"""One pass over a job's rows that stores nothing: counts what is supervised, cut, lost or broken."""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from clusters.safe.reading import printable
from orchestrator.data.counts import RowCounts, check_line, loss_notice, loss_refusal, reading_notices
from orchestrator.data.readers.sources import rows_of, skipped_of, sources_of
from orchestrator.data.rows.row import Row
from orchestrator.data.samples import TokenizeOptions, options_for, read_only, tokenise
from orchestrator.data.template import Renderer
from orchestrator.job.job_file import Job
from orchestrator.job.sections.training import HeldOutFraction

_NOT_FETCHED = "a data set of the hub"
Keep = Callable[[int, list[dict[str, Any]]], None]  # number of a row of data.train, from 1, and its samples


@dataclass
class _Key:
    """One data key."""

    counts: RowCounts = field(default_factory=RowCounts)
    lengths: list[int] = field(default_factory=list)
    fingerprints: list[int] = field(default_factory=list)
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
            f"the rows of {path}: they are not fetched" for path, what in self.formats().items() if what == _NOT_FETCHED
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
        options = options_for(job, [source for source, _ in sources], max_length, name)
        for source, files in sources:
            if not files and most_rows is not None:
                key.is_whole = False
                key.formats[source.path] = _NOT_FETCHED
                continue
            limit = None if most_rows is None else max(1, most_rows // max(1, len(files) * len(sources)))
            for file in [[file] for file in files] or [[]]:
                counts = key.counts
                before = counts.statistics.rows + counts.statistics.rejected
                rows = _limit(rows_of(source, file), limit, key)
                _look(rows, renderer, options, key, keep if name == "data.train" else None)
                shown = source.path if len(files) == 1 else str(file[0]) if file else source.path
                is_empty = counts.statistics.rows + counts.statistics.rejected == before
                key.formats[shown] = "no rows" if is_empty else _format(key, source.path, file)
    _compare(found)
    return found


def can_render() -> bool:
    """Whether the packages that render rows are installed."""
    try:
        return all(importlib.util.find_spec(name) for name in ("transformers", "tokenizers", "jinja2"))
    except ModuleNotFoundError:
        return False


def _limit(rows: Iterator[Row], limit: int | None, key: _Key) -> Iterator[Row]:
    yield from islice(rows, limit)
    if limit is not None and next(rows, None) is not None:
        key.is_whole = False


def _look(
    rows: Iterable[Row], renderer: Renderer | None, options: TokenizeOptions, key: _Key, keep: Keep | None
) -> None:
    if renderer is None:
        read_only(rows, options, key.counts)
        return
    for _, samples in tokenise(rows, renderer, options, key.counts):
        key.lengths += [
            size for sample in samples for size in sample.get("document_lengths", [len(sample["input_ids"])])
        ]
        key.fingerprints += [sample["fingerprint"] for sample in samples]
        if keep:
            keep(key.counts.statistics.rows, samples)


def _format(key: _Key, path: str, file: list[Path]) -> str:
    names = key.counts.formats
    if file:
        return names.get(str(file[0]), "unknown")
    return next((name for where, name in names.items() if where.startswith(f"{path}[")), "unknown")  # of the hub


def _compare(found: Survey) -> None:
    """Count samples that are equal to another, and those that are held out too."""
    train, held = found.keys["data.train"], found.keys.get("data.eval")
    prints = train.fingerprints
    for key in found.keys.values():
        counts = Counter(key.fingerprints)
        key.counts.statistics.repeated = sum(count for count in counts.values() if count > 1)
    kept = range(len(prints))
    others = set(held.fingerprints) if held else set()
    stated = found.job.spec.data.eval
    if isinstance(stated, HeldOutFraction) and train.is_whole and len(prints) > 1:
        from orchestrator.data.dataset import split_rows

        kept, apart = split_rows(len(prints), stated.split, found.job.spec.train.seed)
        others = {prints[index] for index in apart}
    train.counts.statistics.held_out = sum(prints[index] in others for index in kept)
