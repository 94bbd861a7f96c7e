"""One section for each registered method, made from its dataclass."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import Discriminator, Field, Tag, create_model

from orchestrator.job.sections.section import MOST, Section, key
from strategies import METHODS

_KINDS = {"method": "training method", "objective": "training objective"}


def section_of(name: str, registered: type[Any], what: str) -> type[Section]:
    """The job-file section of a registered method or objective: its fields, with their own sentences and limits."""
    types = get_type_hints(registered)
    fields: dict[str, Any] = {"type": (Literal[name], Field(name, description=_KINDS[what]))}
    for option in dataclasses.fields(registered):
        limits = dict(option.metadata)
        doc = limits.pop("doc", "")
        limits.pop("tried", None)
        factory = option.default_factory
        default = factory() if factory is not dataclasses.MISSING else option.default
        kind = types[option.name]
        if {int, float} & {kind, *get_args(kind)} and not {"le", "lt"} & set(limits):
            limits["le"] = MOST
        kind, limits = _move_limits(kind, limits)
        fields[option.name] = (kind, Field(default, description=doc, **limits))
    label = f"{registered.__name__}{what.title()}"
    return create_model(label, __base__=Section, __doc__=registered.__doc__, **fields)


def _move_limits(kind: Any, limits: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A type and the limits of its field: those of a number that may also be a word belong to the number."""
    literals = [part for part in get_args(kind) if get_origin(part) is Literal]
    if not limits or not literals:
        return kind, limits
    numbers = [Annotated[part, Field(**limits)] for part in get_args(kind) if get_origin(part) is not Literal]
    return Union[(*literals, *numbers)], {}  # type: ignore[return-value]


class AutoMethod(Section):
    """The plan chooses the method."""

    type: Literal["auto"] = key("auto", "training method")


DEFAULT_METHOD = next(iter(METHODS))  # of a section that states options and no type
METHOD_SECTIONS: dict[str, type[Section]] = {name: section_of(name, cls, "method") for name, cls in METHODS.items()}
METHOD_SECTIONS["auto"] = AutoMethod


def _method_of(value: Any) -> str:
    named = value.get("type", DEFAULT_METHOD) if isinstance(value, dict) else getattr(value, "type", None)
    return named if isinstance(named, str) else ""


AnyMethod = Annotated[
    Union[tuple(Annotated[section, Tag(name)] for name, section in METHOD_SECTIONS.items())],  # type: ignore[valid-type]  # noqa: UP007
    Discriminator(_method_of),
]
