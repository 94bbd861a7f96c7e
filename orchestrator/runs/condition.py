"""Whether a run is whole and finished, and what is wrong with it.

`require_finished` is what every reader of a run's result calls: it answers with everything, verified, or refuses
with the file and its fault.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clusters.safe.cache import cache_folder
from clusters.safe.reading import BadInput, printable
from orchestrator.data.data_files import DataFiles
from orchestrator.errors import JobError, bad_input_as_job_error
from orchestrator.job import model_files
from orchestrator.runs import digests, record
from orchestrator.runs.digests import FileDigest
from orchestrator.runs.json_files import RunResult
from orchestrator.runs.run_folder import RunFolder
from strategies.export import ADAPTER_FOLDER, Export

if TYPE_CHECKING:  # a job's pydantic models wait for a verb that reads a job
    from orchestrator.job.job_file import Job
    from orchestrator.planning.plan import Plan


@dataclass(frozen=True)
class Finished:
    """A run that trained to its end and lies here as it was handed back."""

    run: RunFolder
    job: Job
    plan: Plan
    data: DataFiles
    result: RunResult
    exported: Path

    @property
    def is_adapter(self) -> bool:
        """Whether it belongs to a base model, which it does not hold."""
        return self.exported.name == ADAPTER_FOLDER


def require_finished(run: RunFolder) -> Finished:
    """A finished run with its files, its adapter and its model verified.  Raises JobError with file and fault."""
    state = run.state_by_events()  # the bank is added to by the driver, which holds the run
    job, plan, data, result = run.job(), run.plan(), run.data(), run.result()
    if state != "finished" or result is None:
        raise JobError(f"{run.run_id} is {run.state()}, not finished; `orchestrator resume {run.run_id}` continues it")
    exported = exported_whole(run)
    check_model(run)
    return Finished(run, job, plan, data, result, exported)


def exported_damage(run: RunFolder, result: RunResult, by_size: bool = False) -> str | None:
    """What is wrong with what a run handed back; None where every file is as it was, or none was recorded.

    `by_size` reads no file: for tables of many runs.
    """
    handed, folder = result.handed_back, run.exported()
    if folder is None or (handed and folder.name != handed.folder):
        return f"{run.path / printable(handed.folder if handed else 'adapter')} is gone"
    for name, expected in handed.files.items() if handed else ():
        file = folder / name
        if not file.is_file():
            return f"{file} is gone"
        is_same = file.stat().st_size == expected.bytes
        if not is_same or not (by_size or digests.of_file(file).sha256 == expected.sha256):
            return f"{file} has changed since it was handed back"
    return None


def exported_whole(run: RunFolder) -> Path:
    """What a run handed back, every file of it verified.  Raises JobError."""
    result, exported = run.result(), run.exported()
    if result is None:
        raise JobError(
            f"{run.run_id} has handed nothing back yet; `orchestrator status {run.run_id}` says how far it is"
        )
    if damage := exported_damage(run, result):
        raise JobError(f"{damage}. `orchestrator resume {run.run_id}` exports it again from its best checkpoint")
    assert exported is not None  # exported_damage would have said so
    return exported


def export_of(run: RunFolder) -> Export:
    """What the run's method hands back of this model, and which engines load it.  Raises JobError."""
    from orchestrator.planning.workload import model_shape

    shape, method = model_shape(model_files.read_config(Path(run.data().model))), run.plan().build_method()
    if not run.plan().build_objective().writes_text:
        return method.exports(shape.with_score()).of_score()
    return method.exports(shape)


def require_mergeable(run: RunFolder) -> None:
    """Raises JobError where base and adapter are never one plain model."""
    if why := export_of(run).unmerged:
        raise JobError(
            f"{run.run_id} is not merged: {why}. It is used with its base by `orchestrator chat`, `serve --engine"
            " transformers` and `evaluate`"
        )


def require_text(run: RunFolder, what: str) -> None:
    """Raises JobError where what a run hands back writes no answers and so cannot be used in this way."""
    objective = run.plan().build_objective()
    if not objective.writes_text:
        raise JobError(
            f"{run.run_id} gives documents a score (objective.type {objective.name}) and writes no text: {what}."
            f" README.md in {run.exported() or run.path} shows how transformers and PEFT load it"
        )


def check_model(run: RunFolder) -> None:
    """Raises JobError where the model's files are not those that the run began with."""
    found = record.read(run.path)
    if found is None or not found.model:
        return
    folder = Path(run.data().model)
    with bad_input_as_job_error("model.model_name_or_path"):
        changed = digests.changed(found.model, model_digests(folder))
    if changed:
        raise JobError(
            f"model.model_name_or_path: {folder} is not the model that {run.run_id} began with"
            f" ({record.few(changed)}). Put it back to continue, or submit a new run"
        )


def model_digests(folder: Path, say: Callable[[str], None] = lambda text: None) -> dict[str, FileDigest]:
    """Digests of a model's files, remembered between runs.  Raises BadInput."""
    return digests.of_model(folder, cache_folder("digests.json"), say)


def damage(run: RunFolder, read_state: Callable[[], str] | None = None) -> list[str]:
    """What can be seen to be wrong with a run's files, each named, without reading its model or checkpoints.

    `read_state` is its `state_by_events`, from where the events were read already.
    """
    wrong: list[str] = []
    read_state = read_state or run.state_by_events

    def look(read: Callable[[], Any]) -> Any:
        try:
            return read()
        except (JobError, BadInput) as error:
            wrong.extend(str(error).splitlines())
            return None

    wrong += [one.text for one in look(run.differences) or []]
    if wrong:
        return wrong
    for read in run.readers():
        look(read)
    result = look(run.result)
    if result and (damaged := look(lambda: exported_damage(run, result, by_size=True))):
        wrong.append(damaged)
    is_whole, state = not wrong, look(read_state)
    if result and is_whole and state == "interrupted":
        wrong.append(f"{run.path / 'events.jsonl'}: the end of the run is not in it")
    return wrong
