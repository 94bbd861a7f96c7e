"""The data keys of a job -> files and rows.  Light: `validate` uses it on machines that cannot train."""

from __future__ import annotations

import difflib
import glob
import hashlib
import os
import random
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from clusters.safe.reading import checked_path, printable
from orchestrator.data.readers.columnar import HubData, read_hub_rows
from orchestrator.data.readers.files import SUFFIXES, ReadOptions, check_kind, digest, kind_of_name, read_rows
from orchestrator.data.readers.folders import Listing, check_split_of_file, list_folder
from orchestrator.data.readers.remote import checked_address, fetch, scheme_of
from orchestrator.data.rows.mapping import ColumnMap, columns_in
from orchestrator.data.rows.row import Row
from orchestrator.errors import JobError, bad_input_as_job_error
from orchestrator.job.job_file import Job
from orchestrator.job.paths import resolve_path
from orchestrator.job.sections.training import Source

_READ = (
    f"files ({', '.join(SUFFIXES)}; a text also as .gz, .bz2, .xz, .zst), folders of them, patterns (data/*.jsonl),"
    " addresses (s3://, gs://, https://, hf://) and names of Hugging Face data sets"
)
_RELATIVE = "Paths are relative to the job file's folder"
_SLICE = re.compile(r"(.*?)\s*\[([^\[\]]*)\]", re.S)
_PATTERN = re.compile(r"[*?]|\[[^\]]+\]")
# Endings of files, so that a misspelt path is never taken for a name of the hub.
_FILE_ENDING = re.compile(
    r"\.(jsonl?|ndjson|jsonlines|csv|tsv|txt|text|md|parquet|arrow|feather|orc|avro|gz|zst|zip|bz2|xz|7z|tar|tgz|xlsx?|ods"
    r"|ya?ml|toml|xml|html?|pdf|docx?|pkl|pickle|npy|npz|pt|bin|db|sqlite3?|sql|log|bak|tmp)",
    re.I,
)


def sources_of(job: Job, value: Any, key: str) -> list[tuple[Source, list[Path]]]:
    """Each source of a data key with its files; an empty list of files is a hub dataset or an address.

    Raises JobError for paths that are not there.
    """
    return [(source, list(listing.files)) for source, listing in _listings(job, value, key)]


def fetched(sources: list[tuple[Source, list[Path]]], key: str) -> list[tuple[Source, list[Path]]]:
    """The same sources with the files at addresses, fetched where they are not in the cache.  Raises JobError."""
    return [
        (source, fetch(source.path.strip(), key) if not files and scheme_of(source.path) else files)
        for source, files in sources
    ]


def skipped_of(job: Job, value: Any, key: str) -> list[str]:
    """A sentence for each kind of file in the folders of a data key that is not read, and why."""
    return [
        f"{key}: {source.path}: {sentence}"
        for source, listing in _listings(job, value, key)
        for sentence in listing.skipped
    ]


def digest_of(job: Job, value: Any, key: str) -> str | None:
    """One SHA-256 for the bytes of a data key's files, in their order; None where a part is a data set of the hub.

    Raises JobError for paths that are not there.
    """
    found = [files for _, files in sources_of(job, value, key)]
    if not all(found):
        return None
    return hashlib.sha256("".join(digest(file) for files in found for file in files).encode()).hexdigest()


def rows_of(job: Job, source: Source, files: list[Path], first: bool = False) -> Iterator[Row]:
    """The rows of a source under our names: all, or the `max_samples` that it is to have, drawn by train.seed.

    `first`: nothing is drawn, rows come in their order: for a look at the first ones.
    """
    data = job.spec.data
    stated = source.columns.stated() if source.columns else {}
    mapping = ColumnMap(stated, data.roles, tuple(data.ignore_columns), source.format)
    named = tuple(part for theirs in stated.values() for part in (theirs, *columns_in(theirs)))
    options = ReadOptions(source.encoding, source.delimiter, source.sample_by, named)
    rows = map(mapping.apply, _all_rows(source, files, options))
    if source.max_samples is None or first:
        return rows
    return iter(draw_rows(rows, source.max_samples, job.spec.train.seed))


def _all_rows(source: Source, files: list[Path], options: ReadOptions) -> Iterator[Row]:
    if not files and scheme_of(source.path):
        files = fetch(source.path.strip(), "data")
    if not files:
        yield from read_hub_rows(HubData(source.path, source.split, source.config, source.revision, source.data_files))
    for file in files:
        yield from read_rows(file, options)


def draw_rows(rows: Iterable[Row], count: int, seed: int) -> list[Row]:
    """`count` of the rows, or all where there are no more, in their order; every choice is as likely (a reservoir)."""
    draw = random.Random(seed)
    kept: list[tuple[int, Row]] = []
    for number, row in enumerate(rows):
        if number < count:
            kept.append((number, row))
        elif (place := draw.randrange(number + 1)) < count:
            kept[place] = number, row
    return [row for _, row in sorted(kept, key=lambda one: one[0])]


def path_from_job(text: str, folder: Path, key: str) -> str:
    """A path or pattern that stands where the user is, as a job in `folder` names it; everything else as it is.

    Raises JobError, which begins with `key`, for what no path can be.
    """
    with bad_input_as_job_error(key):
        place = checked_path(text)
    is_here = place.exists() or (is_pattern(text) and any(Path().glob(text)))
    if scheme_of(text) or Path(text).is_absolute() or not is_here or folder.resolve() == Path.cwd():
        return text
    return Path(os.path.relpath(place, folder.resolve())).as_posix()


def is_pattern(value: str) -> bool:
    """Whether a path that is not there may be a pattern of files."""
    return scheme_of(value) is None and _PATTERN.search(value) is not None


def looks_like_hub_name(value: str, folder: Path = Path()) -> bool:
    """`org/name` or `name`, with no ending of a file, and no path of `folder` that was misspelt."""
    parts = value.split("/")
    if len(parts) > 2 or not all(re.fullmatch(r"[A-Za-z0-9][\w.-]*", part) for part in parts):
        return False
    if _FILE_ENDING.fullmatch(Path(value).suffix) or (len(parts) == 2 and (folder / parts[0]).is_dir()):
        return False
    return not _near(value, folder)


def _listings(job: Job, value: Any, key: str) -> list[tuple[Source, Listing]]:
    found = []
    for item in value if isinstance(value, list) else [value]:
        source = _with_defaults(job, Source(path=item) if isinstance(item, str) else item)
        found.append((source, _listing(job, source, key)))
    if not found:
        raise JobError(f"{key} is an empty list; give at least one path")
    if key == "data.eval" and any(source.weight != 1 for source, _ in found):
        raise JobError("data.eval: a weight says how often rows are trained on, which held-out rows are not; remove it")
    return found


def _with_defaults(job: Job, source: Source) -> Source:
    """A source with what the data section states for all of them."""
    data = job.spec.data
    return source.model_copy(
        update={
            "format": data.format if source.format == "auto" else source.format,
            "columns": source.columns or data.columns,
            "max_samples": source.max_samples or data.max_samples,
        }
    )


def _listing(job: Job, source: Source, key: str) -> Listing:
    """The files of one source; none for a data set of the hub and for an address."""
    text, split = source.path, source.split if "split" in source.model_fields_set else None
    if checked_address(text, key):
        return Listing(())
    with bad_input_as_job_error(key):
        checked_path(text, job.folder)
    named = job.folder / Path(text).expanduser()
    if not os.path.lexists(named):
        if is_pattern(text):
            return _matching(text, key, job.folder)
        if looks_like_hub_name(text, job.folder):
            return _hub(source, key, split)
        if near := _near(text, job.folder):
            raise JobError(f"{key}: {printable(text)} does not exist. Did you mean {near}? {_RELATIVE}")
    _refuse_hub_options(source, key)
    path = resolve_path(text, key, job.folder)
    if path.is_dir():
        return list_folder(path, key, split)
    path = named.parent.resolve() / named.name  # a link keeps its own name, which may state more than its target's
    check_kind(path, key)
    check_split_of_file(path, key, split)
    return Listing((path,))


def _matching(text: str, key: str, folder: Path) -> Listing:
    """The data files that a pattern matches, in the order of their names; hidden ones never."""
    pattern = str(Path(text).expanduser())
    found = sorted(path for path in (folder / one for one in glob.glob(pattern, root_dir=folder, recursive=True)))
    files = tuple(path for path in found if path.is_file())
    if not files:
        raise JobError(_no_match(text, key))
    for path in files:
        check_kind(path, key)
    return Listing(files)


def _refuse_hub_options(source: Source, key: str) -> None:
    stated = [name for name in ("config", "revision", "data_files") if getattr(source, name) is not None]
    if stated:
        raise JobError(
            f"{key}: {stated[0]} is given for {printable(source.path)}, which is no data set of the hub. Remove it"
        )


def _hub(source: Source, key: str, split: str | None) -> Listing:
    if key == "data.eval" and split is None:
        raise JobError(
            f"{key}: {source.path} is a data set of the hub and its split train would be read. Name the split to"
            f" hold out: {{path: {source.path}, split: test}}"
        )
    return Listing(())


def _no_match(text: str, key: str) -> str:
    if match := _SLICE.fullmatch(text):
        return (
            f"{key}: {printable(text)} does not exist, and a slice in brackets is not supported; supported"
            f" are {_READ}. State the number of rows: {{path: {printable(match[1] or 'data.jsonl')}, max_samples:"
            " 1000}; for a hub data set, name the split as `split` (there a slice works: split: 'train[:1000]')"
        )
    return f"{key}: {printable(text)} matches no file. {_RELATIVE}"


def _near(text: str, folder: Path) -> str | None:
    """The data file or folder beside a path that is not there whose name is most like it."""
    path = folder / Path(text).expanduser()
    try:
        names = sorted(
            entry.name
            for entry in path.parent.iterdir()
            if not entry.name.startswith(".") and (kind_of_name(entry.name) or entry.suffix == ".txt" or entry.is_dir())
        )
    except OSError:
        return None
    plain = {name.lower(): name for name in names} | {Path(name).stem.lower(): name for name in names}
    close = difflib.get_close_matches(path.name.lower(), plain, n=1, cutoff=0.75)
    return printable(str(Path(text).parent / plain[close[0]])) if close else None
