"""What a run relies on when it is resumed: its job, data, model and exported result, each verified."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from orchestrator.data.data_files import DataFiles
from orchestrator.errors import JobError
from orchestrator.job import model_files
from orchestrator.job.job_file import Job, changed_keys
from orchestrator.runs import checkpoints
from orchestrator.runs.condition import check_model, exported_damage
from orchestrator.runs.record import few
from orchestrator.runs.run_folder import RunFolder


def is_handed_back(run: RunFolder, say: Callable[[str], None]) -> bool:
    """Whether a run has handed back what lies here; an adapter that is damaged is exported again.

    Raises JobError where no checkpoint is left to export it from.
    """
    result = run.result()
    if run.state_by_events() != "finished" or result is None:
        return False
    damage = exported_damage(run, result)
    if damage is None:
        return True
    if checkpoints.whole(run.checkpoints) is None:
        raise JobError(f"{damage}, and no whole checkpoint is left to export it from; submit the job again")
    say(f"{damage}: it is exported again from the checkpoints")
    return False


def verified_files(run: RunFolder, job: Job, say: Callable[[str], None]) -> DataFiles:
    """What data.json names, verified: the model is the one of the start, samples that are damaged are made again.

    Raises JobError where the model or the job's data files are others now.
    """
    from orchestrator.data.dataset import DamagedCache
    from orchestrator.data.prepare import datasets

    files = run.data()
    if Path(files.model).is_dir():
        check_model(run)
    try:
        if not Path(files.model).is_dir():
            raise DamagedCache(Path(files.model), "is gone")
        datasets(files)
    except DamagedCache as error:
        check_same_data(run, job)
        say(f"{error.folder}: {error.damage}; it is made again")
        files = _prepare_again(run, job, files, say)
        check_model(run)
    return files


def _prepare_again(run: RunFolder, job: Job, old: DataFiles, say: Callable[[str], None]) -> DataFiles:
    """The model's folder and the samples once more.  Raises JobError where they would be others."""
    from orchestrator.data.prepare import cache_beside, prepare_data

    model = model_files.locate(job.spec.model.model_name_or_path, job.folder, job.spec.model.model_revision, say)
    made = prepare_data(job, model, run.plan().max_length, cache_beside(run.path.parent), say).files
    for key, before, now in (("train", old.train, made.train), ("eval", old.eval, made.eval)):
        if before and Path(before).name != Path(now or "").name:
            raise JobError(
                f"data.{key}: its samples would be others than those {run.run_id} began with (the tokenizer, the"
                " template or this program has changed since). Submit a new run"
            )
    files = replace(made, statistics=old.statistics)
    if files != old:
        run.keep("data.json", files.to_json())
    return files


def check_same_job(run: RunFolder, job: Job) -> None:
    """Raises JobError where a run is not what this job would be: its result would be taken for this job's."""
    if changed := changed_keys(run.job().spec, job.spec):
        raise JobError(
            f"{run.run_id} exists and is of another job ({few(changed)}). `orchestrator resume {run.run_id}`"
            f" continues that one; for this one choose another run id, or delete {run.path}"
        )
    check_same_data(run, job)


def check_same_data(run: RunFolder, job: Job) -> None:
    """Raises JobError where the job's files are not as they were when the run began."""
    from orchestrator.data.prepare import digests

    known = run.data().as_dict()
    if changed := [name for name, digest in digests(job).items() if known.get(name) not in (None, digest)]:
        raise JobError(
            f"{', '.join('data.' + name.removesuffix('_digest') for name in changed)}: the files have changed since"
            f" {run.run_id} began. Put them back to continue, or submit a new run; to use its name again delete"
            f" {run.path}"
        )
