"""A job checked without starting it: its data files, their first rows, its model, and the plan's contradictions."""

from __future__ import annotations

from itertools import islice
from typing import Any

from clusters.probe import look_at_this_node
from orchestrator import models, planner, workload
from orchestrator.data.files import read_rows
from orchestrator.data.formats import read_example
from orchestrator.data.row import BadRow
from orchestrator.data.sources import sources_of
from orchestrator.errors import JobError
from orchestrator.job import hub, model_check
from orchestrator.job.tokenizer_size import check_tokens
from orchestrator.jobfile import Job
from orchestrator.search.space import stated_space
from orchestrator.spec import HeldOut
from strategies.targets import architecture_of_shape

_ROWS_LOOKED_AT = 20


def check(job: Job) -> dict[str, Any]:
    """Formats by path and notices.  Raises JobError with every mistake found."""
    mistakes: list[str] = []
    formats: dict[str, str] = {}
    data = job.spec.data
    for key, value in (("data.train", data.train), ("data.eval", data.eval)):
        if value is None or isinstance(value, HeldOut):
            continue
        try:
            for source, files in sources_of(job, value, key):
                wanted = source.format if source.format != "auto" else data.format
                for file in files:
                    formats[source.path if len(files) == 1 else str(file)] = _format_of(file, wanted, data.instruction)
        except JobError as error:
            mistakes += error.mistakes
    if data.chat_template != "tokenizer" and not job.path(data.chat_template).is_file():
        mistakes.append(f"data.chat_template: {job.path(data.chat_template)} does not exist")
    notices = list(job.notices)
    try:
        notices += _check_model(job)
    except JobError as error:
        mistakes += error.mistakes
    try:
        stated_space(job.spec)
    except JobError as error:
        mistakes += error.mistakes
    if mistakes:
        raise JobError(mistakes)
    return {"valid": True, "name": job.spec.name, "formats": formats, "notices": notices}


def _check_model(job: Job) -> list[str]:
    """Notices about the model, without loading or downloading it.  Raises JobError."""
    spec = job.spec
    num_workers, _ = planner.resolve_workers(spec, look_at_this_node())
    workload.check_batch(spec, num_workers if spec.cluster.address == "local" else None)
    if mistakes := workload.step_mistakes(spec):
        raise JobError(mistakes)
    notices = workload.step_notices(spec)
    folder = models.local_folder(spec.model.model_name_or_path, job.folder)
    if folder is None:
        hub.check_trust(spec.model.model_name_or_path, spec.model.model_revision, spec.model.trust_remote_code)
        if models.is_packaged(spec.model.model_name_or_path):
            return notices
        later = "the model is not on this machine yet: its files, targets and tokenizer are checked by `submit`"
        return [*notices, later]
    config = models.read_config(folder)
    shape = workload.trainable_shape(config)
    planner.resolve_max_length(spec, config)
    check_tokens(folder, shape.vocab_size)
    model_check.check_targets(spec.methods(), architecture_of_shape(shape))
    return notices + model_check.check_model(folder, spec.methods(), spec.model.trust_remote_code)


def _format_of(file: Any, wanted: str, instruction: str) -> str:
    found: str | None = None
    detected: dict[str, str] = {}
    for row in islice(read_rows(file), _ROWS_LOOKED_AT):
        try:
            row_format, _ = read_example(row, wanted, instruction, detected)
        except BadRow as reason:
            raise JobError(f"{row.where}: {reason}") from None
        found = found or row_format
    if found is None:
        raise JobError(f"{file}: holds no row")
    return found
