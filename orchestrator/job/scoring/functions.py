"""`module:function` as a metric: found in the job's folder or installed, tried before anything starts, called.

A function gets two lists of texts, the generated answers and their references, and returns a score in [0, 1], the
higher the better: one for all, or one for each answer, which then get an interval.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import math
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clusters.safe.reading import first_line
from orchestrator.errors import JobError

FOLDER = "metrics"  # of a run: the modules of its job's folder, as they were when it began
_OURS = ("orchestrator", "strategies", "clusters")
_TAKEN = ("eval_loss", "rows", "answers", "seconds", "samples", "compared", "by_answer", "without_room",
          "out_of_memory", "no_answer")  # fmt: skip


@dataclass(frozen=True)
class Scored:
    """What a function said."""

    mean: float
    by_answer: list[float] | None  # where it scores each


def is_function(metric: str) -> bool:
    return ":" in metric


def functions_of(metrics: Iterable[str]) -> list[str]:
    return [metric for metric in metrics if is_function(metric)]


def name_of(metric: str) -> str:
    """Under which a metric stands in a result: of a function its own name."""
    return metric.rpartition(":")[2]


def name_mistakes(metrics: Sequence[str]) -> list[str]:
    """What is wrong with the names of a job's metrics."""
    names = [name_of(metric) for metric in metrics]
    found = []
    for metric in functions_of(metrics):
        if name_of(metric) in _TAKEN or names.count(name_of(metric)) > 1:
            found.append(
                f"eval.metrics: {metric}: a result has a number of the name {name_of(metric)} already; give the"
                " function another name"
            )
        if metric.split(".")[0].partition(":")[0] in _OURS:
            found.append(f"eval.metrics: {metric}: a module of this name belongs to this program; give it another name")
    return found


def files_of(metrics: Iterable[str], folder: Path) -> dict[str, Path]:
    """The files of the job's folder that its functions need, by their names below it: a module, or a whole package.

    Installed modules have none.
    """
    found: dict[str, Path] = {}
    for metric in functions_of(metrics):
        root = metric.partition(":")[0].split(".")[0]
        package, module = folder / root, folder / f"{root}.py"
        files = sorted(package.rglob("*.py")) if (package / "__init__.py").is_file() else [module]
        found |= {file.relative_to(folder).as_posix(): file for file in files if file.is_file()}
    return found


def keep_files(metrics: Iterable[str], folder: Path, run: Path) -> None:
    """Copy them into a run's folder, which all workers see."""
    for name, file in files_of(metrics, folder).items():
        place = run / FOLDER / name
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, place)


def load(metric: str, folder: Path) -> Callable[..., Any]:
    """A metric's function, of a module below `folder` or an installed one.

    Raises JobError saying what is missing.
    """
    module, _, name = metric.partition(":")
    root = module.split(".")[0]
    if files_of([metric], folder):  # another job may have a module of the same name
        _forget(root)
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        found = getattr(importlib.import_module(module), name, None)
    except Exception as error:  # whatever a user's module does when it is imported
        raise JobError(
            f"eval.metrics: {metric}: the module cannot be imported: {type(error).__name__}: {first_line(error)}. Of"
            f" the job's folder ({folder}) {root}.py travels to the workers, or {root}/ with its modules"
        ) from error
    finally:
        sys.path.remove(str(folder))
    if not callable(found):
        raise JobError(f"eval.metrics: {metric}: the module has no function {name}")
    return found


def _forget(root: str) -> None:
    for name in [name for name in sys.modules if name == root or name.startswith(f"{root}.")]:
        del sys.modules[name]


def check(metrics: Sequence[str], folder: Path, references: Sequence[str] = ()) -> None:
    """Load each function as a worker will, and try it on a few references as if they were the answers.

    Raises JobError with all mistakes.
    """
    mistakes: list[str] = []
    with tempfile.TemporaryDirectory() as place:
        keep_files(metrics, folder, Path(place))
        for metric in functions_of(metrics):
            try:
                function = load(metric, Path(place) / FOLDER)
                _check_signature(metric, function)
                if references:
                    call(metric, function, list(references), list(references))
            except JobError as error:
                mistakes += error.mistakes
            if files_of([metric], folder):
                _forget(metric.split(".")[0].partition(":")[0])  # its files are gone with the folder
    if mistakes:
        raise JobError(mistakes)


def _check_signature(metric: str, function: Callable[..., Any]) -> None:
    try:
        inspect.signature(function).bind([], [])
    except TypeError as error:
        raise JobError(
            f"eval.metrics: {metric}: it is called as {name_of(metric)}(predictions, references): {error}"
        ) from None
    except ValueError:  # a builtin that does not say
        return


def call(metric: str, function: Callable[..., Any], predictions: list[str], references: list[str]) -> Scored:
    """What a function says of some answers.  Raises JobError for what is no score."""
    found: Any
    try:
        found = function(predictions, references)
    except Exception as error:
        raise JobError(f"eval.metrics: {metric} failed: {type(error).__name__}: {first_line(error)}") from error
    is_list = not isinstance(found, str | bytes | dict) and hasattr(found, "__iter__")
    scores: list[Any] = list(found) if is_list else [found]
    try:
        numbers = [float(one) for one in scores]
    except (TypeError, ValueError):
        numbers = [math.nan]
    wrong = next((one for one in numbers if not 0.0 <= one <= 1.0), None)
    if wrong is not None:
        raise JobError(
            f"eval.metrics: {metric} gave {scores[0] if math.isnan(wrong) else wrong!r}; it should give a number from 0"
            " to 1, the higher the better, or a list of such, one for each answer"
        )
    if is_list and len(numbers) != len(references):
        raise JobError(f"eval.metrics: {metric} gave {len(numbers)} scores for {len(references)} answers")
    return Scored(sum(numbers) / len(numbers), numbers if is_list else None)
