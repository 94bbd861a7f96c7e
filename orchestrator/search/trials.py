"""The files of a search: what was asked, what was predicted, what was tried and what came of it.

runs/<search_id>/
  asked.yaml         the job as given             origin.json      folder its relative paths start from
  search.yaml        the job as it is searched: with held-out rows to compare by
  capability.json    the machines                 data.json        the samples of the trials
  advice.json        every point's prediction     trials.jsonl     one JSON object a trial that ended
  recommended.yaml   the job to submit            summary.json     the recommendation and what it was chosen from
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from orchestrator.errors import RunFailed
from orchestrator.rundir import RunFolder
from orchestrator.search.space import Point, key_of

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
    seconds: float = 0.0  # from the start of its set-up to its end
    eval_loss: float | None = None
    quality: dict[str, float] = field(default_factory=dict)
    curve: list[tuple[int, float]] = field(default_factory=list)  # (step, eval_loss)
    step_s: float | None = None
    tokens_per_s: float | None = None
    tensors_bytes: float | None = None
    predicted_step_s: float | None = None
    predicted_tensors_bytes: float | None = None
    time: dict[str, Any] = field(default_factory=dict)  # as in a run's result.json: what calibration learns from
    name: str = ""  # of a study's combination

    @property
    def key(self) -> str:
        return key_of(self.point)

    @property
    def measured(self) -> bool:
        return self.step_s is not None


class SearchFolder(RunFolder):
    """One search on disk."""

    marker = "search.yaml"

    def add(self, trial: Trial) -> None:
        """Append a trial that ended.  Raises RunFailed where the disk is full."""
        try:
            with (self.path / "trials.jsonl").open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(asdict(trial)) + "\n")
        except OSError as error:
            raise RunFailed(
                f"{self.path / 'trials.jsonl'} cannot be written: {error.strerror}. Free some space, then"
                f" `orchestrator resume {self.run_id}`"
            ) from error

    def trials(self) -> list[Trial]:
        """Every trial that ended, in that order."""
        return read_trials(self.path / "trials.jsonl")


def read_trials(file: Path) -> list[Trial]:
    """The whole lines of a trials.jsonl; a line cut by a power loss is none."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    found = []
    for line in lines:
        try:
            values = json.loads(line)
        except ValueError:
            continue
        values["curve"] = [tuple(point) for point in values["curve"]]
        found.append(Trial(**values))
    return found
