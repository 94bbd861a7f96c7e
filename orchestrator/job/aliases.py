"""Other tools' names for our keys (Axolotl, LLaMA-Factory, ms-swift, Unsloth, NeMo AutoModel, transformers).

other_tools.yaml lists them; `plain_values` reads values that other tools spell in another way.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from clusters.safe.reading import load_yaml, read_text


@dataclass(frozen=True)
class OtherTools:
    """Keys of other tools: our name, or what to write instead."""

    same: dict[str, str]
    not_yet: dict[str, str]
    not_needed: dict[str, str]


_ALIKE = 0.75  # of two keys, so that one may be the other misspelt
_WORDS_ALIKE = 0.72  # of each word in them: masking is no packing
_LOST = 0.15  # less, where the words are not the same in number


@cache
def other_tools() -> OtherTools:
    """The keys of other tools that people copy from there."""
    return OtherTools(**load_yaml(read_text(Path(__file__).with_name("other_tools.yaml"))))


_TARGETS = ("lora_target_modules", "shira_target_modules")


def plain_values(values: dict[str, Any], where: Callable[[tuple[str, str]], str]) -> list[str]:
    """Rewrite, in place, values that other tools spell differently; a notice for each."""
    method = values.get("method")
    if not isinstance(method, dict):
        return []
    notices = []
    for key in _TARGETS:
        if key not in method:
            continue
        stated, read = method[key], targets_of(method[key])
        if read == stated and type(read) is type(stated):
            continue
        method[key] = read
        notices.append(f"{where(('method', key))}: method.{key} {stated!r} is read as {read!r}")
    return notices


def nearest_name(name: str, known: Iterable[str]) -> str | None:
    """The known key that `name` may be misspelt of; None where each means something else.

    Keys are words joined by `_`, and each of them has to be alike: `logging_steps` is no `local_steps`.
    """
    alike = {one: _likeness(name.lower(), one) for one in known}
    best = max(alike, key=lambda one: alike[one], default=None)
    return best if best is not None and alike[best] >= _ALIKE else None


def _likeness(name: str, known: str) -> float:
    words, others = name.split("_"), known.split("_")
    if len(words) != len(others):  # a `_` too few or too many
        return _ratio(name.replace("_", ""), known.replace("_", "")) - _LOST
    pairs = list(zip(words, others, strict=True))
    return _ratio(name, known) if all(_ratio(*pair) >= _WORDS_ALIKE for pair in pairs) else 0.0


def _ratio(one: str, other: str) -> float:
    return difflib.SequenceMatcher(None, one, other).ratio()


def named_sections(values: dict[str, Any]) -> None:
    """Write, in place, an objective that is given by its name as the section it is short for."""
    if isinstance(values.get("objective"), str):
        values["objective"] = {"type": values["objective"]}


def targets_of(stated: Any) -> Any:
    """The targets as PEFT takes them: `all-linear`, a list of names, or an expression.

    `all` (LLaMA-Factory) and `true` (Axolotl's lora_target_linear) are all linear maps; names with commas are a list.
    """
    if stated is True or stated in (["all"], ["all-linear"]):
        return "all-linear"
    if not isinstance(stated, str):
        return stated
    if stated.strip().lower() in ("all", "all-linear", "all_linear"):
        return "all-linear"
    names = [name for name in re.split(r"[,\s]", stated) if name]
    is_list = names and all(re.fullmatch(r"[A-Za-z_][\w.]*", name) for name in names)
    return names if is_list else stated
