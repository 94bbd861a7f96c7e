"""One metric of one task: of the base and of the tuned model, and how sure their difference is; a run's table."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from clusters.safe.reading import BadInput, record
from orchestrator.errors import JobError
from orchestrator.runs.comparison.intervals import of_mean
from orchestrator.runs.events import Event
from orchestrator.runs.run_folder import RunFolder

FILE = "lm_eval.json"
_WIDTH = 1.96  # standard errors on each side of 95 %


@dataclass(frozen=True)
class TaskScore(Event, kind="task"):
    """A metric of a task, in the task's own unit."""

    task: str
    metric: str  # with its filter where it has one: exact_match,strict-match
    rows: int
    before: float | None = None
    before_stderr: float | None = None
    after: float | None = None
    after_stderr: float | None = None
    low: float | None = None  # of after - before, 95 %
    high: float | None = None
    is_paired: bool = False  # row by row: the same rows before and after
    limit: int | None = None  # rows a task, where not all
    where: str | None = None  # which machine

    @property
    def difference(self) -> float | None:
        return None if self.before is None or self.after is None else self.after - self.before

    @property
    def may_be_chance(self) -> bool:
        return self.low is not None and self.high is not None and self.low <= 0.0 <= self.high


@dataclass(frozen=True)
class ModelScore:
    """A metric of one model: its value, the harness's standard error, and each row's value where rows have one."""

    value: float
    stderr: float | None
    rows: int
    by_row: Sequence[float] = ()


def compared(task: str, metric: str, before: ModelScore, after: ModelScore, **where: Any) -> TaskScore:
    """Both with an interval of the difference: of the rows' differences where each has a value, else of both errors."""
    low = high = None
    is_paired = bool(before.by_row) and len(before.by_row) == len(after.by_row) > 1
    if is_paired:
        interval = of_mean([new - old for old, new in zip(before.by_row, after.by_row, strict=True)])
        low, high = interval.low, interval.high
    elif before.stderr is not None and after.stderr is not None:
        middle, wide = after.value - before.value, _WIDTH * math.hypot(before.stderr, after.stderr)
        low, high = middle - wide, middle + wide
    return TaskScore(
        task,
        metric,
        after.rows,
        before.value,
        before.stderr,
        after.value,
        after.stderr,
        low,
        high,
        is_paired,
        **where,
    )


def scores_of_tasks(run: RunFolder) -> list[TaskScore]:
    """The newest of each metric of each task."""
    return list({(one.task, one.metric): one for one in run.events_of(TaskScore)}.values())


def write_tasks(run: RunFolder) -> None:
    """Write lm_eval.json."""
    run.write(FILE, json.dumps({"tasks": to_rows(scores_of_tasks(run))}, indent=1))


def read_tasks(run: RunFolder) -> list[TaskScore]:
    """The scores of lm_eval.json; none where there is no such file.  Raises JobError for a damaged one."""
    values = run.read_json(FILE) or {}
    try:
        return [record(TaskScore, _without(one, "difference"), FILE) for one in values.get("tasks", ())]
    except (BadInput, AttributeError, TypeError) as error:
        again = f"`orchestrator evaluate {run.run_id} --tasks ...` writes it again"
        raise JobError(f"{run.path / FILE}: {error}; {again}") from None


def to_rows(scores: Sequence[TaskScore]) -> list[dict[str, Any]]:
    """As lm_eval.json and --json have them."""
    return [_without(asdict(one), "time", "extra") | {"difference": one.difference} for one in scores]


def _without(values: dict[str, Any], *names: str) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in names}
