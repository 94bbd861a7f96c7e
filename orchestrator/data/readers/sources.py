"""The data keys of a job -> files and rows.  Light: `validate` uses it on machines that cannot train."""

from __future__ import annotations

import difflib
import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from clusters.safe.reading import checked_path, printable
from orchestrator.data.readers.columnar import read_hub_rows
from orchestrator.data.readers.files import SUFFIXES, check_kind, digest, kind_of_name, read_rows
from orchestrator.data.readers.folders import Listing, check_split_of_file, list_folder
from orchestrator.data.rows.row import Row
from orchestrator.errors import JobError, bad_input_as_job_error
from orchestrator.job.job_file import Job
from orchestrator.job.paths import resolve_path
from orchestrator.job.sections.training import Source

_READ = f"files ({', '.join(SUFFIXES)}; a text also as .gz), folders of them and names of Hugging Face data sets"
_RELATIVE = "Paths are relative to the job file's folder"
_ADDRESS = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]*)://(.*)", re.S)
_SLICE = re.compile(r"(.*?)\s*\[([^\[\]]*)\]", re.S)
_FETCH = {
    "s3": "aws s3 cp {address} .",
    "gs": "gcloud storage cp {address} .",
    "http": "curl -LO {address}",
    "https": "curl -LO {address}",
}
# Endings of files, so that a misspelt path is never taken for a name of the hub.
_FILE_ENDING = re.compile(
    r"\.(jsonl?|ndjson|jsonlines|csv|tsv|txt|text|md|parquet|arrow|feather|orc|avro|gz|zst|zip|bz2|xz|7z|tar|tgz|xlsx?|ods"
    r"|ya?ml|toml|xml|html?|pdf|docx?|pkl|pickle|npy|npz|pt|bin|db|sqlite3?|sql|log|bak|tmp)",
    re.I,
)


def sources_of(job: Job, value: Any, key: str) -> list[tuple[Source, list[Path]]]:
    """Each source of a data key with its files; an empty list of files is a hub dataset.

    Raises JobError for paths that are not there.
    """
    return [(source, list(listing.files)) for source, listing in _listings(job, value, key)]


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


def rows_of(source: Source, files: list[Path]) -> Iterator[Row]:
    """All rows of a source."""
    if not files:
        yield from read_hub_rows(source.path, source.split)
    for file in files:
        yield from read_rows(file)


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
        source = Source(path=item, format=job.spec.data.format) if isinstance(item, str) else item
        found.append((source, _listing(job, source, key)))
    if not found:
        raise JobError(f"{key} is an empty list; give at least one path")
    return found


def _listing(job: Job, source: Source, key: str) -> Listing:
    """The files of one source; none for a data set of the hub."""
    text, split = source.path, source.split if "split" in source.model_fields_set else None
    _check_address(text, key)
    with bad_input_as_job_error(key):
        checked_path(text, job.folder)
    named = job.folder / Path(text).expanduser()
    if not os.path.lexists(named):
        if _SLICE.fullmatch(text) or any(character in text for character in "*?"):
            raise JobError(_no_such_syntax(text, key))
        if looks_like_hub_name(text, job.folder):
            return _hub(source, key, split)
        if near := _near(text, job.folder):
            raise JobError(f"{key}: {printable(text)} does not exist. Did you mean {near}? {_RELATIVE}")
    path = resolve_path(text, key, job.folder)
    if path.is_dir():
        return list_folder(path, key, split)
    path = named.parent.resolve() / named.name  # a link keeps its own name, which may state more than its target's
    check_kind(path, key)
    check_split_of_file(path, key, split)
    return Listing((path,))


def _hub(source: Source, key: str, split: str | None) -> Listing:
    if key == "data.eval" and split is None:
        raise JobError(
            f"{key}: {source.path} is a data set of the hub and its split train would be read. Name the split to"
            f" hold out: {{path: {source.path}, split: test}}"
        )
    return Listing(())


def _check_address(text: str, key: str) -> None:
    """Raise JobError for an address: nothing is fetched but data sets of the hub, by their names."""
    match = _ADDRESS.fullmatch(text.strip())
    if match is None:
        return
    scheme, rest = match[1].lower(), match[2]
    if scheme == "file":
        way = f"Give the path alone: {printable(rest)}"
    elif scheme in ("hf", "huggingface"):
        parts = [part for part in rest.removeprefix("datasets/").split("/") if part]
        way = f"Give the data set's name alone: {printable('/'.join(parts[:2]))}"
    else:
        command = _FETCH.get(scheme, "").format(address=printable(text.strip()))
        way = f"Fetch it first{f': {command}' if command else ''}, and give the file's path"
    raise JobError(f"{key}: {printable(text)} is an address; supported are {_READ}. {way}")


def _no_such_syntax(text: str, key: str) -> str:
    if match := _SLICE.fullmatch(text):
        plain = match[1] or "data.jsonl"
        return (
            f"{key}: {printable(text)} does not exist, and a slice in brackets is not supported; supported"
            f" are {_READ}. Cut the file first (head -n 1000 {printable(plain)} > part.jsonl), or set"
            " train.max_steps; for a hub data set, name the split as `split`"
        )
    return (
        f"{key}: {printable(text)} does not exist, and patterns are not expanded; supported are {_READ}. Give the"
        " folder, or a list of files"
    )


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
