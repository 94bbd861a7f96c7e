"""How a method's fields become keys of the job file: each knob carries its sentence, its limits, and what is worth
trying."""

from __future__ import annotations

from dataclasses import field
from typing import Any


def knob(default: Any, doc: str, tried: tuple[Any, ...] = (), **limits: Any) -> Any:
    """A dataclass field with the sentence and the limits that the job file's schema shows.

    `tried` are the values that a search takes where the job says nothing.
    """
    metadata = {"doc": doc, "tried": tried, **limits}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)
