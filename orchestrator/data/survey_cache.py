"""What a look through a job's rows found, kept in the user's cache: `validate` of unchanged data does not look again.

An entry is named by all that the findings follow from: what the job says of its data, the files of data, tokenizer and
template as their folders describe them (size, times, inode), the libraries' versions and the code that looks.  One that
cannot be read is made anew.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import clusters.safe
import orchestrator.data
import strategies.model
from clusters.safe import cache
from orchestrator.data.readers.sources import skipped_of, sources_of
from orchestrator.job.job_file import Job
from orchestrator.job.sections.training import HeldOutFraction

_LIBRARIES = ("transformers", "tokenizers", "jinja2", "datasets", "pyarrow")
_KEPT = 64  # entries; the oldest go
_MAX_BYTES = 16 * 2**20
_WEIGHTS = (".safetensors", ".bin", ".gguf", ".pt", ".pth")  # of a model folder: no tokenizer reads them


@dataclass(frozen=True)
class SurveyFindings:
    """What a survey says of the rows; as the methods of `Survey`."""

    formats: dict[str, str]
    statistics: dict[str, dict[str, Any]]
    lines: list[str]
    unchecked: list[str]
    mistakes: list[str]


def can_render() -> bool:
    """Whether the packages that render rows are installed."""
    try:
        return all(importlib.util.find_spec(name) for name in ("transformers", "tokenizers", "jinja2"))
    except ModuleNotFoundError:
        return False


def entry_of(job: Job, model_folder: Path, max_length: int | None, most_rows: int | None) -> Path | None:
    """Where the findings of such a look lie or belong; None where what they follow from cannot be seen here.

    Raises JobError for data that is not there.
    """
    spec, keys = job.spec, _keys(job)
    if not all(files for name, value in keys for _, files in sources_of(job, value, name)):
        return None  # rows of a hub or behind an address
    stated = [spec.data.model_dump(mode="json"), spec.build_objective().name, spec.train.seed, max_length, most_rows]
    stated += [spec.model.trust_remote_code, *(skipped_of(job, value, name) for name, value in keys)]
    try:
        seen = [(str(file), *_as_listed(file)) for file in _files(job, model_folder)]
        seen += [(name, importlib.metadata.version(name)) for name in _LIBRARIES]
        text = json.dumps([str(job.folder.absolute()), stated, seen], sort_keys=True)
        return cache.cache_folder("surveys", f"{hashlib.sha256(text.encode()).hexdigest()}.json")
    except (OSError, RuntimeError, importlib.metadata.PackageNotFoundError):
        return None


def _keys(job: Job) -> list[tuple[str, Any]]:
    data = job.spec.data
    stated = (("data.train", data.train), ("data.eval", data.eval))
    return [(name, value) for name, value in stated if value is not None and not isinstance(value, HeldOutFraction)]


def _files(job: Job, model_folder: Path) -> Iterator[Path]:
    for name, value in _keys(job):
        yield from (file for _, files in sources_of(job, value, name) for file in files)
    if job.spec.data.chat_template != "tokenizer":
        yield job.folder / job.spec.data.chat_template
    yield from (one for one in sorted(model_folder.iterdir()) if one.is_file() and one.suffix not in _WEIGHTS)
    yield from sorted(file for module in (orchestrator.data, strategies.model, clusters.safe) for file in _code(module))


def _code(package: ModuleType) -> Iterator[Path]:
    return (file for folder in package.__path__ for file in Path(folder).rglob("*.py"))


def _as_listed(file: Path) -> tuple[int, ...]:
    found = file.stat()
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino


def recall(entry: Path) -> SurveyFindings | None:
    """The findings that were kept; None where there are none."""
    return cache.recall(SurveyFindings, entry, _MAX_BYTES)


def keep(entry: Path, findings: SurveyFindings) -> None:
    """Keep findings for the next process."""
    cache.keep(entry, findings, _KEPT)
