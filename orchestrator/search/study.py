"""The ready-made study: one factor at a time from a plain baseline, then the combinations that are published defaults.

A study is a YAML file (recipes/studies/): `baseline`, `one_factor` and `combinations`, each a point of the job file's
keys; the last two are laid over the first.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clusters.safe.reading import BadInput, load_yaml
from orchestrator.errors import JobError
from orchestrator.job.job_file import spec_with
from orchestrator.job.paths import read_text_file
from orchestrator.job.space import Point, canonical, check_key
from orchestrator.job.spec import JobSpec

SHIPPED = Path(__file__).parent.parent / "recipes" / "studies"
_PARTS = ("baseline", "one_factor", "combinations")


def read_study(name: str, spec: JobSpec, lengths: Sequence[int]) -> list[tuple[str, Point]]:
    """(name, point) of each combination, for each length where some are given.  Raises JobError."""
    shipped = {path.stem: path for path in SHIPPED.glob("*.yaml")}
    try:
        text = read_text_file(shipped.get(name, name), f"--study {name}")
    except JobError as error:
        raise JobError(f"{error}; no such study is shipped either: {', '.join(sorted(shipped))}") from None
    try:
        named = _points(load_yaml(text, "it"))
        named = [(name, canonical(point)) for name, point in named]
        for _, point in named:
            for key in point:
                check_key(key)
            spec_with(spec, point)
    except (BadInput, JobError) as error:
        raise JobError([f"--study {name}: {mistake}" for mistake in str(error).splitlines()]) from None
    if not lengths:
        return named
    return [(f"{name} @{length}", {**point, "data.max_length": length}) for length in lengths for name, point in named]


def _points(values: Any) -> list[tuple[str, Point]]:
    """The named points of a study's values, those of its parts laid over the baseline.  Raises BadInput."""
    if not isinstance(values, dict) or set(values) - set(_PARTS) or not _is_point(values.get("baseline")):
        raise BadInput("it needs `baseline`, keys of the job file, and may have `one_factor` and `combinations`")
    named = [("baseline", dict(values["baseline"]))]
    for part in _PARTS[1:]:
        changes = values.get(part) or {}
        if not isinstance(changes, dict) or not all(isinstance(name, str) for name in changes):
            raise BadInput(f"`{part}` needs names, each with keys of the job file")
        if wrong := [name for name, point in changes.items() if not _is_point(point)]:
            raise BadInput(f"{part}.{wrong[0]}: give keys of the job file with values, e.g. train.learning_rate: 1e-4")
        named += [(name, {**values["baseline"], **point}) for name, point in changes.items()]
    return named


def _is_point(value: Any) -> bool:
    return isinstance(value, dict) and bool(value) and all(isinstance(key, str) for key in value)
