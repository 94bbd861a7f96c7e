"""The data keys of a job -> files and rows.  Light: `validate` uses it on machines that cannot train."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from orchestrator.data.files import digest, find_files, looks_like_hub_name, read_hub_rows, read_rows
from orchestrator.data.row import Row
from orchestrator.errors import JobError
from orchestrator.jobfile import Job
from orchestrator.spec import Source


def sources_of(job: Job, value: Any, key: str) -> list[tuple[Source, list[Path]]]:
    """Each source of a data key with its files; an empty list of files is a hub dataset.

    Raises JobError for paths that are not there.
    """
    sources = []
    for item in value if isinstance(value, list) else [value]:
        source = Source(path=item, format=job.spec.data.format) if isinstance(item, str) else item
        path = job.path(source.path)
        if not path.exists() and looks_like_hub_name(source.path):
            sources.append((source, []))
        else:
            sources.append((source, find_files(path, key)))
    if not sources:
        raise JobError(f"{key} is an empty list; give at least one path")
    return sources


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
