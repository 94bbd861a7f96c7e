"""The tables of other tools' keys, and which tool a file is of."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from clusters.safe.reading import load_yaml, read_text
from orchestrator.job.importers.draft import GROUPS, Group

TOOLS = ("axolotl", "llama_factory", "trl", "ms_swift", "unsloth", "torchtune")
_SIGNS = 2  # keys that only this tool has; one of a nested file's is enough


@dataclass(frozen=True)
class Entry:
    """What becomes of one key: another name, another value, or several settings by its value.

    `values` and `matches` (patterns) give settings by value, null for one that needs none.
    """

    to: str | None = None
    conversion: str | None = None
    values: Mapping[str, Mapping[str, Any] | None] | None = None
    matches: Mapping[str, Mapping[str, Any] | None] | None = None
    note: str | None = None


@dataclass(frozen=True)
class ObjectiveRule:
    """Keys by whose values a file trains for an objective.

    A name that no objective has is refused with the note; any other note is listed with what matters.
    """

    name: str
    when: Mapping[str, tuple[str, ...] | None]  # None = any value that is not off
    note: str | None = None
    is_guess: bool = False  # several trainers of the tool have these keys


@dataclass(frozen=True)
class KeyTable:
    """What the keys of one tool are here."""

    name: str
    signs: frozenset[str]
    data: str  # reader of its data sources
    data_keys: frozenset[str]
    source: Mapping[str, Any]  # of one data source: what a key is there, or the values that say what is so anyway
    entries: Mapping[str, Entry]
    sentences: Mapping[Group, Mapping[str, str]]  # keys without a counterpart: what happens instead
    refuse: Mapping[str, Mapping[str, Any]]
    defaults: Mapping[str, Any]
    full_type: str | None  # of method.type, for which other defaults count
    full_defaults: Mapping[str, Any]
    objectives: tuple[ObjectiveRule, ...]  # the first that fits counts
    objective_defaults: Mapping[str, Mapping[str, Any]]  # by objective, before `defaults`
    without_dropout: frozenset[str]  # objectives that the tool trains without any

    def group_of(self, key: str) -> tuple[Group, str] | None:
        """The group and sentence of a key, of what it stands in where it has none of its own."""
        while key:
            for group, sentences in self.sentences.items():
                if key in sentences:
                    return group, sentences[key]
            key = key.rpartition(".")[0]
        return None


def spelt(value: Any) -> str:
    """A value as tables name it: YAML's true, whatever way it is written; a list of one as that one."""
    value = value[0] if isinstance(value, list) and len(value) == 1 else value
    return str(value).lower() if isinstance(value, bool) else "null" if value is None else str(value)


@cache
def tables() -> dict[str, KeyTable]:
    """The table of each tool, by the name of its file."""
    return {tool: _table(tool) for tool in TOOLS}


def recognise(values: Any) -> str | None:
    """The tool that a configuration is of, by keys that only it has; None for any other file."""
    if not isinstance(values, dict):
        return None
    keys = set(flat(values))
    found = {tool: len(keys & table.signs) for tool, table in tables().items()}
    tool = max(found, key=lambda one: found[one])
    nested = any("." in key for key in tables()[tool].signs & keys)
    alone = tool == "trl"  # its files may state a model and a dataset alone
    return tool if found[tool] >= (1 if nested or alone else _SIGNS) else None


def flat(values: Mapping[str, Any], prefix: str = "", whole: Container[str] = ()) -> dict[str, Any]:
    """Nested mappings as `outer.inner`; those of `whole` stay as they are."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        is_nested = isinstance(value, dict) and value and name not in whole
        found |= flat(value, f"{name}.", whole) if is_nested else {name: value}
    return found


def _table(tool: str) -> KeyTable:
    own = _read(tool)
    shared = _read(own["inherits"]) if "inherits" in own else {}

    def joined(part: str) -> dict[str, Any]:
        return {**shared.get(part, {}), **own.get(part, {})}

    return KeyTable(
        name=own["name"],
        signs=frozenset(own["signs"]),
        data=own["data"],
        data_keys=frozenset(own["data_keys"]),
        source=own.get("source", {}),
        entries={key: _entry(value) for key, value in joined("keys").items()},
        sentences={group: joined(group) for group in GROUPS},
        refuse=own.get("refuse", {}),
        defaults={key: value for key, value in joined("defaults").items() if value is not None},
        full_type=own.get("full_type"),
        full_defaults=own.get("full_defaults", {}),
        objectives=tuple(map(_rule, own.get("objective", ()))),
        objective_defaults=own.get("objective_defaults", {}),
        without_dropout=frozenset(own.get("without_dropout", ())),
    )


def _read(name: str) -> dict[str, Any]:
    return load_yaml(read_text(Path(__file__).with_name(f"{name}.yaml")))


def _rule(stated: Mapping[str, Any]) -> ObjectiveRule:
    when = {key: None if values == "any" else tuple(map(spelt, values)) for key, values in stated["when"].items()}
    return ObjectiveRule(stated["is"], when, stated.get("note"), stated.get("guess", False))


def _entry(stated: Any) -> Entry:
    if isinstance(stated, str):
        return Entry(stated)
    by_value = {
        part: {spelt(key): one for key, one in stated[part].items()} for part in ("values", "matches") if part in stated
    }
    return Entry(stated.get("to"), stated.get("as"), note=stated.get("note"), **by_value)
