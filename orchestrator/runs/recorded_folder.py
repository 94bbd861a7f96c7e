"""A folder whose deciding files are recorded: they are read as they were written, or refused by name."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clusters.safe.masking import holds_secret
from clusters.safe.reading import checked_path, read_json, read_text
from clusters.safe.writing import write_whole
from orchestrator.errors import JobError, RunFailed, bad_input_as_job_error
from orchestrator.runs import json_files, record
from orchestrator.runs.digests import FileDigest
from orchestrator.runs.record import Difference, Recorded

if TYPE_CHECKING:  # a job's pydantic models wait for a verb that reads a job
    from orchestrator.job.job_file import Job

# Keys of a job that decide nothing of what is trained: they may be changed while a run waits.
_FREE_SECTIONS = ("tracking", "bank", "cost", "kubernetes", "search", "goal", "cluster")
_NOT_FREE = ("cluster.num_workers",)


class Folder:
    """The files of a run or a search."""

    kind: str  # run or search
    document: str  # the job that it is of

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def run_id(self) -> str:
        return self.path.name

    def begin(self, texts: Mapping[str, str], model: Mapping[str, FileDigest] | None = None) -> None:
        """Make the folder a run, in one write; the files of their own follow."""
        self._write_record(Recorded(self.kind, dict(texts), model=dict(model or {})))
        for name, text in texts.items():
            self.write(name, text)

    def job(self, name: str | None = None) -> Job:
        """The job, its relative paths starting where they did when it was submitted.  Raises JobError."""
        from orchestrator.job.job_file import parse_job

        name = name or self.document
        text = self._text(name)
        if text is None:
            raise JobError(f"{self.path} is not a {self.kind}'s folder: it has no {name}")
        return parse_job(text, self._origin(), str(self.path / name))

    def keep(self, name: str, text: str) -> None:
        """Write a file that decides the run and record it; only who holds the run, or its rank 0, does so."""
        found = record.read(self.path)
        if found:
            self._write_record(found.with_files({name: text}))
        self.write(name, text)

    def take_back(self, name: str) -> None:
        """Delete a file that was kept, and its record: it decides nothing any more."""
        if found := record.read(self.path):
            self._write_record(found.without(name))
        (self.path / name).unlink(missing_ok=True)

    def write(self, name: str, text: str) -> None:
        """Write a file so that it is there whole or not at all; one that holds a password is its owner's alone.

        Raises RunFailed where the disk is full.
        """
        try:
            write_whole(self.path / name, text, 0o600 if holds_secret(text) else 0o666)
        except OSError as error:
            raise self._cannot_write(name, error) from error

    def read_json(self, name: str, kind: type = dict) -> Any | None:
        """A JSON file of the run that holds a `kind`, None while it is not there.  Raises JobError."""
        file = self.path / name
        with bad_input_as_job_error():
            values = read_json(file) if os.path.lexists(file) else None
        if values is not None and not isinstance(values, kind):
            raise JobError(f"{file}: holds a {type(values).__name__}, not a {kind.__name__}")
        return values

    def differences(self) -> list[Difference]:
        """Recorded files that say something else now, or cannot be read.  Raises JobError for a damaged record."""
        found = record.read(self.path)
        compared = [self._difference(found, name) for name in found.files] if found else []
        return [one for one in compared if one]

    def restore(self, say: Callable[[str], None]) -> None:
        """Put back what was recorded where a file is damaged or gone.  Raises JobError where one was edited."""
        found = record.read(self.path)
        if found is None:
            say(f"{self.run_id} was started by an earlier version: its files cannot be compared with what they were")
            return
        wrong = self.differences()
        if edited := [one for one in wrong if one.fault == "edited"]:
            raise JobError([self._edited(one) for one in edited])
        for one in wrong:
            self.write(one.name, found.files[one.name])
            say(f"{one.text}; put back as it was recorded")

    def free_changes(self) -> list[str]:
        """Keys of the job that were changed since it was recorded, and may be."""
        found, text = record.read(self.path), self._text(self.document)
        if found is None or text is None or text == found.files.get(self.document):
            return []
        return [line.split(" ")[0] for line in self._changed_keys(found.files[self.document], text)]

    def _require_text(self, name: str) -> str:
        text = self._text(name)
        if text is None:
            raise JobError(
                f"{self.path / name} is gone, or {self.run_id} was interrupted before it had one; submit the job again"
            )
        return text

    def _text(self, name: str) -> str | None:
        """A file as it was recorded, None where there is none.  Raises JobError where it says something else."""
        found = record.read(self.path)
        if found and name in found.files:
            if wrong := self._difference(found, name):
                raise JobError(
                    self._edited(wrong)
                    if wrong.fault == "edited"
                    else f"{wrong.text}. `orchestrator resume {self.run_id}` puts it back as it was recorded"
                )
            if name != self.document:
                return found.files[name]
        with bad_input_as_job_error():
            return read_text(self.path / name) if os.path.lexists(self.path / name) else None

    def _difference(self, found: Recorded, name: str) -> Difference | None:
        return record.difference(self.path, name, found, self._unfree_keys if name == self.document else None)

    def _edited(self, wrong: Difference) -> str:
        return (
            f"{wrong.text}: it was edited after {self.run_id} began. Delete the file and `orchestrator resume"
            f" {self.run_id}` continues as it was recorded; for other settings submit a new run"
        )

    def _unfree_keys(self, old: str, new: str) -> list[str]:
        return [line for line in self._changed_keys(old, new) if not _is_free(line.split(" ")[0])]

    def _changed_keys(self, old: str, new: str) -> list[str]:
        from orchestrator.job.job_file import changed_keys, parse_job

        label = str(self.path / self.document)
        return changed_keys(parse_job(old, self.path, label).spec, parse_job(new, self.path, label).spec)

    def _origin(self) -> Path:
        text, label = self._text("origin.json"), str(self.path / "origin.json")
        with bad_input_as_job_error(f"{label}: folder"):
            if text is None:
                return self.path
            return checked_path(json_files.parse_record(json_files.Origin, text, label).folder)

    def _write_record(self, found: Recorded) -> None:
        try:
            record.write(self.path, found)
        except OSError as error:
            raise self._cannot_write(record.NAME, error) from error

    def _cannot_write(self, name: str, error: OSError) -> RunFailed:
        return RunFailed(
            f"{self.path / name} cannot be written: {error.strerror}. Free some space, then"
            f" `orchestrator resume {self.run_id}`"
        )


def _is_free(key: str) -> bool:
    return key.partition(".")[0] in _FREE_SECTIONS and key not in _NOT_FREE
