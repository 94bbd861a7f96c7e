"""The ready-made study: one factor at a time from a plain baseline, then the combinations that are published defaults.

A study is a YAML file (recipes/studies/): `baseline`, `one_factor` and `combinations`, each a point of the job file's
keys; the last two are laid over the first.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from orchestrator.errors import JobError
from orchestrator.jobfile import spec_with
from orchestrator.search.space import Point, canonical
from orchestrator.spec import JobSpec

SHIPPED = Path(__file__).parent.parent / "recipes" / "studies"
_PARTS = ("baseline", "one_factor", "combinations")


def read_study(name: str, spec: JobSpec, lengths: Sequence[int]) -> list[tuple[str, Point]]:
    """(name, point) of each combination, for each length where some are given.  Raises JobError."""
    file = SHIPPED / f"{name}.yaml" if (SHIPPED / f"{name}.yaml").exists() else Path(name)
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        known = ", ".join(sorted(path.stem for path in SHIPPED.glob("*.yaml")))
        raise JobError(f"--study {name}: no such study or file; shipped: {known}") from None
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise JobError(f"--study {file}: cannot be read: {str(error).splitlines()[0]}") from None
    if not isinstance(values, dict) or not values.get("baseline") or set(values) - set(_PARTS):
        raise JobError(f"--study {file}: it needs `baseline`, and may have `one_factor` and `combinations`")
    named: list[tuple[str, Point]] = [("baseline", values["baseline"])]
    for part in _PARTS[1:]:
        named += [(name, {**values["baseline"], **changes}) for name, changes in (values.get(part) or {}).items()]
    named = [(name, canonical(point)) for name, point in named]
    for _, point in named:
        _check(file, spec, point)
    if not lengths:
        return named
    return [(f"{name} @{length}", {**point, "data.max_length": length}) for length in lengths for name, point in named]


def _check(file: Path, spec: JobSpec, point: Any) -> None:
    try:
        spec_with(spec, point)
    except JobError as error:
        raise JobError([f"--study {file}: {mistake}" for mistake in error.mistakes]) from None
