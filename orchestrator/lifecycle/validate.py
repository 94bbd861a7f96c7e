"""A job checked without starting it: its data files, their rows as the model would see them, its model, its search."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clusters.probe.machine import look_at_this_node
from clusters.safe.reading import printable
from orchestrator.data import survey_cache
from orchestrator.data.readers.sources import sources_of
from orchestrator.data.survey_cache import SurveyFindings, can_render
from orchestrator.errors import JobError
from orchestrator.job import hub, model_check, model_files
from orchestrator.job.job_file import Job
from orchestrator.job.paths import read_text_file, resolve_path
from orchestrator.job.scoring import functions
from orchestrator.job.secrets import secret_names
from orchestrator.job.sections.training import HeldOutFraction
from orchestrator.job.space import stated_space
from orchestrator.job.tokenizer_size import check_tokens
from orchestrator.planning import planner, workload
from orchestrator.planning.stated import unused
from strategies.model.targets import architecture_of_shape

_ROWS = 1000  # of each data key that are checked, without --exact


@dataclass(frozen=True)
class _Model:
    """What is known of the model here; no folder where it is not on this machine."""

    folder: Path | None = None
    max_length: int | None = None
    vocab_size: int = 0
    notices: tuple[str, ...] = ()


def check(job: Job, exact: bool = False) -> dict[str, Any]:
    """Formats by path, counts, notices, and which checks could not run here; `exact` looks at every row.

    Raises JobError with every mistake found.  Nothing is downloaded and no weight is read.
    """
    notices = list(job.notices)
    model, entry, found = _Model(), None, None
    most_rows = None if exact else _ROWS
    mistakes = _mistakes_in_paths(job)
    data_is_there = not mistakes
    with _collect(mistakes):
        stated_space(job.spec)
    with _collect(mistakes):
        model = _check_model(job)
        notices += model.notices
    if model.folder and not mistakes and can_render():
        entry = survey_cache.entry_of(job, model.folder, model.max_length, most_rows)
        found = survey_cache.recall(entry) if entry else None
    if model.folder and found is None:
        with _collect(mistakes):
            check_tokens(model.folder, model.vocab_size)
    unchecked = _unchecked(job, model.folder)
    if data_is_there:
        with _collect(mistakes):
            is_rendered = not mistakes and can_render()
            found = found or _survey_rows(job, model.folder if is_rendered else None, model.max_length, most_rows)
            if entry and is_rendered:
                survey_cache.keep(entry, found)
            mistakes += found.mistakes
    if mistakes or found is None:
        raise JobError(mistakes)
    return {
        "valid": True,
        "name": job.spec.name,
        "formats": found.formats,
        "notices": notices + found.lines,
        "statistics": found.statistics,
        "unchecked": unchecked + found.unchecked,
    }


@contextlib.contextmanager
def _collect(mistakes: list[str]) -> Iterator[None]:
    """Add the mistakes of a JobError that the block raises, and continue."""
    try:
        yield
    except JobError as error:
        mistakes += error.mistakes


def _survey_rows(job: Job, folder: Path | None, max_length: int | None, most_rows: int | None) -> SurveyFindings:
    from orchestrator.data.survey import survey

    renderer = None
    if folder is not None:
        from orchestrator.data.samples import renderer_for

        renderer = renderer_for(job, folder)
    found = survey(job, renderer, max_length, most_rows)
    return SurveyFindings(found.formats(), found.statistics(), found.lines(), found.unchecked(), found.mistakes())


def _unchecked(job: Job, folder: Path | None) -> list[str]:
    """Checks that cannot run on this machine, each with the reason."""
    unset = [name for name in secret_names(job.spec) if not os.environ.get(name)]
    found = [f"the secret {name}: it is not set here, and must be where the job runs" for name in unset]
    if folder is None:
        name = job.spec.model.model_name_or_path
        return [*found, f"the files, targets and rendered rows of {name}: it is not on this machine yet"]
    if not can_render():
        return [*found, "the rows as the model sees them: this needs transformers, which is not installed here"]
    return found


def _check_start(job: Job) -> None:
    """Raises JobError where the adapter to start from is not there; a relative path means nothing to the workers."""
    key = "method.init_adapter"
    for start in filter(None, (method.adapter_folder for method in job.spec.methods())):
        if not start.startswith("/"):
            raise JobError(f"{key}: {printable(start)} is a relative path; give the whole one, from / on")
        resolve_path(f"{start}/adapter_config.json", key, kind="file")


def _mistakes_in_paths(job: Job) -> list[str]:
    """Data files and a chat template that are not there, folders that can be none."""
    mistakes: list[str] = []
    data = job.spec.data
    for key, value in (("data.train", data.train), ("data.eval", data.eval)):
        if value is None or isinstance(value, HeldOutFraction):
            continue
        with _collect(mistakes):
            sources_of(job, value, key)
    if data.chat_template != "tokenizer":
        with _collect(mistakes):
            read_text_file(data.chat_template, "data.chat_template", job.folder)
    with _collect(mistakes):
        _check_start(job)
    with _collect(mistakes):
        functions.check([] if job.spec.eval.metrics == "auto" else job.spec.eval.metrics, job.folder)
    written = (
        ("checkpoint.output_dir", job.spec.checkpoint.output_dir, Path()),
        ("bank.path", job.spec.bank.path, job.folder),
        ("strategy.nvme_path", job.spec.strategy.nvme_path or ".", job.folder),
    )
    for key, place, folder in written:
        with _collect(mistakes):
            resolve_path(place, key, folder, "new folder")
    return mistakes


def _check_model(job: Job) -> _Model:
    """The model, its files checked where it is on this machine.  Raises JobError."""
    spec = job.spec
    num_workers, _ = planner.resolve_workers(spec, look_at_this_node())
    workload.check_batch(spec, num_workers if spec.cluster.address == "local" else None)
    is_local = model_files.is_local(spec.model.model_name_or_path, job.folder)
    if mistakes := workload.step_mistakes(spec) + unused.job_mistakes(spec, is_local):
        raise JobError(mistakes)
    notices = workload.step_notices(spec) + unused.job_notices(spec)
    folder = model_files.local_folder(spec.model.model_name_or_path, job.folder)
    if folder is None:
        hub.check_trust(spec.model.model_name_or_path, spec.model.model_revision, spec.model.trust_remote_code)
        if near := hub.find_similar(spec.model.model_name_or_path):
            notices.append(f"the hub's cache here holds {printable(near)}, whose name is spelt almost like this one")
        return _Model(notices=tuple(notices))
    config = model_files.read_config(folder)
    shape = workload.trainable_shape(config)
    max_length, _ = planner.resolve_max_length(spec, config)
    model_check.check_targets(spec.methods(), architecture_of_shape(shape))
    notices += model_check.check_model(folder, spec.methods(), spec.model.trust_remote_code)
    return _Model(folder, max_length, shape.vocab_size, tuple(notices))
