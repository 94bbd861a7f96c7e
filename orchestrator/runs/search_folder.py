"""The files of a search: what was asked, what was predicted, what was tried and what came of it.

runs/<search_id>/
  recorded.json      what it was begun with: the text of the files marked *
  asked.yaml *       the job as given             origin.json *    folder its relative paths start from
  search.yaml *      the job as it is searched: with held-out rows to compare by
  capability.json *  the machines                 data.json *      the samples of the trials
  advice.json *      every point's prediction     trials.jsonl     one JSON object a trial that ended
  recommended.yaml   the job to submit            summary.json *   the recommendation and what it was chosen from
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from clusters.safe.reading import BadInput, load_json, read_bytes, record
from orchestrator.data.data_files import DataFiles
from orchestrator.errors import JobError, bad_input_as_job_error
from orchestrator.job.space import Point, key_of
from orchestrator.runs.json_files import Values, finite, parse_record, parse_values
from orchestrator.runs.run_folder import RunFolder

Status = Literal["finished", "stopped", "failed"]  # stopped: its quality lagged


@dataclass(frozen=True)
class Trial:
    """One combination that was tried: what was predicted, and what was measured or why it was not."""

    number: int
    point: Point
    status: Status
    node: str = ""
    reason: str | None = None  # of a failure
    steps: int = 0
    seconds: float = 0.0  # from the start of its set-up to its end; of a process that it shared, its part
    eval_loss: float | None = None
    quality: dict[str, float] = field(default_factory=dict)
    curve: list[tuple[int, float]] = field(default_factory=list)  # (step, eval_loss)
    step_s: float | None = None  # of passes that it shared, its part by tokens
    tokens_per_s: float | None = None
    tensors_bytes: float | None = None
    predicted_step_s: float | None = None  # None where it shared passes
    predicted_tensors_bytes: float | None = None
    time: dict[str, Any] = field(default_factory=dict)  # as in a run's result.json: what calibration learns from
    name: str = ""  # of a study's combination

    @property
    def key(self) -> str:
        return key_of(self.point)

    @property
    def measured(self) -> bool:
        return self.step_s is not None


@dataclass(frozen=True, kw_only=True)
class Samples(DataFiles):
    """An entry of a search's data.json: samples at one max_length, and which of them the trials see."""

    train_rows: list[int]
    eval_rows: list[int]


@dataclass(frozen=True)
class Concluded:
    """An outcome in summary.json."""

    trial: int
    name: str
    point: Point
    status: Status
    total_s: float
    peak_bytes: float
    eval_loss: float
    lack: float  # of quality: the held-out loss, or 1 - score; less is better
    cost: float | None = None
    currency: str = ""


@dataclass(frozen=True)
class Summary:
    """summary.json: the recommendation and what it was chosen from."""

    why: str
    recommended: Concluded | None = None
    outcomes: list[Concluded] = field(default_factory=list)
    front: list[int] = field(default_factory=list)
    trial_seconds: float = 0.0
    wasted_seconds: float = 0.0
    values: Values = field(default_factory=dict)  # as in the file

    @property
    def best_trial(self) -> int | None:
        """The number of the trial that is recommended."""
        return self.recommended.trial if self.recommended else None


@dataclass(frozen=True)
class Study:
    """study.json: combinations to go through, each with a name."""

    named: list[tuple[str, Point]]


@dataclass(frozen=True)
class Advised:
    """advice.json: what was predicted before the first trial."""

    combinations: int
    impossible: dict[str, int]
    worth: list[dict[str, Any]]
    dominated: list[dict[str, Any]]


class SearchFolder(RunFolder):
    """One search on disk."""

    kind = "search"
    document = "search.yaml"

    def add(self, trial: Trial) -> None:
        """Append a trial that ended.  Raises RunFailed where the disk is full."""
        self.append("trials.jsonl", asdict(trial))

    def trials(self) -> list[Trial]:
        """Every trial that ended, in that order."""
        return read_trials(self.path / "trials.jsonl")

    def samples(self) -> dict[str, Samples]:
        """By max_length: where the samples lie, and which of them the trials see.  Raises JobError."""
        return parse_record(dict[str, Samples], self._require_text("data.json"), str(self.path / "data.json"))

    def study(self) -> list[tuple[str, Point]]:
        """A study's list of combinations; empty for a search of its own.  Raises JobError."""
        text, label = self._text("study.json"), str(self.path / "study.json")
        return parse_record(Study, f'{{"named": {text or "[]"}}}', label).named

    def advice(self) -> Advised | None:
        """What was predicted, None for a study.  Raises JobError."""
        text = self._text("advice.json")
        return None if text is None else parse_record(Advised, text, str(self.path / "advice.json"))

    def summary(self) -> Summary | None:
        """What it came to, None before its end.  Raises JobError."""
        text = self._text("summary.json")
        if text is None:
            return None
        values, found = parse_values(Summary, text, str(self.path / "summary.json"))
        known = {trial.number for trial in self.trials()}
        if lost := [one.trial for one in found.outcomes if one.trial not in known]:
            raise JobError(f"{self.path / 'trials.jsonl'}: trial {lost[0]}, listed in summary.json, is missing")
        return replace(found, values=values)

    def readers(self) -> list[Callable[[], Any]]:
        """A call for each file that must be readable."""
        return [self.job, self.capability, self.plan, self.samples, self.study, self.advice, self.summary]


def read_trials(file: Path) -> list[Trial]:
    """The whole lines of a trials.jsonl; a line that was cut or damaged is none.  Raises JobError."""
    if not os.path.lexists(file):
        return []
    with bad_input_as_job_error():
        lines = read_bytes(file).split(b"\n")
    found = []
    for line in lines:
        with contextlib.suppress(BadInput):
            found.append(record(Trial, finite(load_json(line, allow_nan=True)), str(file)))
    return found
