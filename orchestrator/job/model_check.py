"""A model checked before anything starts, without a weight being read: its files, its parts, its adapter's targets.

Start with `check_model`.  What needs transformers says so where that is absent.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from clusters.safe.reading import printable
from orchestrator.errors import JobError
from orchestrator.job import architecture_cache
from orchestrator.job.weights import stored_tensors
from strategies.model import architecture
from strategies.model.architecture import Architecture, CannotBuild, LoadReport

_KEY = "model.model_name_or_path"
_WHOLE = ("I8", "U8", "I16", "I32", "I64")  # as safetensors spells types


def check_model(folder: Path, methods: Sequence[Any], trust_remote_code: bool = False) -> list[str]:
    """What is worth saying of a model that can be trained from these files by one of the methods.

    Raises JobError for files that are missing, cut or of another model, and for targets that every method refuses.
    """
    stored = stored_tensors(folder)
    try:
        built, report = _examine(folder, _signature(folder), trust_remote_code)
    except ModuleNotFoundError as error:
        return [f"weights and targets were not compared with the model: {error.name} is not installed here"]
    except CannotBuild as error:
        raise JobError(f"{_KEY}: {folder} cannot be loaded: {printable(str(error))}") from None
    if isinstance(report, str):
        check_targets(methods, built)
        return [
            f"weights were not compared with the model ({printable(report)}); the workers do it when they load them"
        ]
    if wrong := architecture.faults(report, built.parameters, stored):
        raise JobError(f"{_KEY}: {folder}: {printable(wrong)}")
    if whole := [name for name in built.parameters if name in stored and stored[name].dtype in _WHOLE]:
        raise JobError(
            f"{_KEY}: {folder}: {printable(whole[0])} holds whole numbers ({stored[whole[0]].dtype}): the weights were"
            " quantised, and without their scales they mean nothing. Give the model they were made from"
        )
    check_targets(methods, built)
    unused = architecture.unused(report, built.parameters)
    if not unused:
        return []
    return [f"{len(unused)} tensors of the files are not part of the model and stay unused: {printable(unused[0])} ..."]


@lru_cache(8)
def _examine(folder: Path, signature: object, trust_remote_code: bool) -> tuple[Architecture, LoadReport | str]:
    """The model's parts, and what loading would report or why that is unknown."""
    stored = {name: (one.shape, one.dtype) for name, one in stored_tensors(folder).items()}
    # Code that the model ships may read anything, so its answer is not kept.
    entry = None if trust_remote_code else architecture_cache.entry_of(folder, stored)
    if entry and (known := architecture_cache.recall(entry)):
        return known.built, known.report
    model = architecture.build(folder, trust_remote_code)
    built = architecture.architecture_of(model)
    try:
        report = architecture.load_report(model, stored)
    except CannotBuild as error:
        return built, str(error)
    if entry:
        architecture_cache.keep(entry, architecture_cache.Findings(built, report))
    return built, report


def _signature(folder: Path) -> tuple[tuple[str, int, int], ...]:
    """Names, sizes and times of a folder's files: the same ones need no second look."""
    states = ((path.name, path.stat()) for path in sorted(folder.iterdir()) if path.is_file())
    return tuple((name, state.st_size, state.st_mtime_ns) for name, state in states)


def check_targets(methods: Sequence[Any], built: Architecture) -> None:
    """Raises JobError with the mistakes of the options that choose modules."""
    mistakes = [method.find_misfits(built) for method in methods]
    if mistakes and all(mistakes):
        raise JobError(mistakes[0])
