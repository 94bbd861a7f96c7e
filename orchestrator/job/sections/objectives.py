"""One section for each registered objective, made from its dataclass."""

from __future__ import annotations

from typing import Annotated, Any, Union

from pydantic import Discriminator, Tag

from orchestrator.job.sections.methods import section_of
from orchestrator.job.sections.section import Section
from strategies import OBJECTIVES

DEFAULT_OBJECTIVE = next(iter(OBJECTIVES))
OBJECTIVE_SECTIONS: dict[str, type[Section]] = {
    name: section_of(name, kind, "objective") for name, kind in OBJECTIVES.items()
}


def _objective_of(value: Any) -> str:
    named = value.get("type", DEFAULT_OBJECTIVE) if isinstance(value, dict) else getattr(value, "type", None)
    return named if isinstance(named, str) else ""


AnyObjective = Annotated[
    Union[tuple(Annotated[section, Tag(name)] for name, section in OBJECTIVE_SECTIONS.items())],  # type: ignore[valid-type]  # noqa: UP007
    Discriminator(_objective_of),
]
