"""One data source of another tool as a source of the job: its keys by the tool's table, its columns and its roles."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from orchestrator.job.importers.draft import Group, JobDraft
from orchestrator.job.importers.tables import KeyTable, flat

_ROLES = ("system", "user", "assistant", "tool")
_KNOWN_ROLES = {"human": "user", "gpt": "assistant", "observation": "tool", "function": "tool"}  # without data.roles
_TURNS = ("messages", "conversations")
_USUAL = {  # found without data.columns
    "prompt": ("prompt",),
    "completion": ("completion",),
    "messages": _TURNS,
    "chosen": ("chosen",),
    "rejected": ("rejected",),
    "label": ("label", "kto_tag", "desirable"),
    "role": ("role", "from"),
    "content": ("content", "value"),
}
_USUAL_ALPACA = {"prompt": ("instruction",), "completion": ("output",)}
_BUILDERS = ("json", "csv", "parquet", "arrow", "text", "pandas")  # names that stand for a way to read files
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass
class Said:
    """What one entry says: what becomes of it, by the right sides of the tool's table."""

    options: dict[str, Any] = field(default_factory=dict)  # of Source, and what the tool's reader asks for
    columns: dict[str, Any] = field(default_factory=dict)  # our name -> theirs


def read_entry(draft: JobDraft, table: KeyTable, entry: Mapping[str, Any], where: str, name: str = "") -> Said:
    """What an entry says about its source; what counts for all sources is set, what has no counterpart is listed.

    `where` is the entry's place in the file, `name` what it is called in a file of its own.
    """
    said = Said()
    for key, value in flat(entry).items():
        if value is None or value is False or value in ("", {}):
            continue
        their_key = where if name else f"{where}.{key}"
        target = table.source.get(key)
        if isinstance(target, str) and "." in target:
            _take(draft, said, target, value, their_key)
        elif isinstance(target, str):
            said.options[target] = value
        elif target is None or value not in target:  # a list: the values that say what is so anyway
            group, sentence = table.group_of(f"source.{key}") or _UNKNOWN
            draft.leave(group, their_key, f"{name}: {key}: {sentence}" if name else sentence)
    return said


_UNKNOWN: tuple[Group, str] = "matters", "not known here: nothing is done with it"


def _take(draft: JobDraft, said: Said, target: str, value: Any, their_key: str) -> None:
    section, _, name = target.partition(".")
    if section == "columns":
        said.columns[name] = value
    elif section == "roles":
        _add_roles(draft, {str(one): name for one in listed(value)}, their_key)
    else:
        set_for_all(draft, target, value, their_key)


def set_for_all(draft: JobDraft, key: str, value: Any, their_key: str) -> None:
    """Set what the job states once for all its sources; another value of a second source is listed."""
    stated = draft.settings.get(key)
    if stated is None:
        draft.set(key, value, their_key)
    elif stated.value != value:
        draft.leave("matters", their_key, f"{key} is {stated.value} for all sources, by {stated.origin}")


def _add_roles(draft: JobDraft, roles: Mapping[str, str], their_key: str) -> None:
    stated = draft.settings["data.roles"].value if "data.roles" in draft.settings else {}
    new = {}
    for theirs, ours in roles.items():
        if stated.get(theirs, ours) != ours:
            draft.leave("matters", their_key, f"data.roles: {theirs} is {stated[theirs]} for all sources")
        elif theirs not in stated and theirs != ours and _KNOWN_ROLES.get(theirs) != ours:
            new[theirs] = ours
    if new:
        draft.set("data.roles", {**stated, **new}, their_key)


def sources_of(draft: JobDraft, kind: str | None, said: Said, where: str) -> list[Any]:
    """The sources of an entry, each its path alone where nothing else is stated.

    Files stand for themselves, except within a data set of the hub, which alone has a configuration and a revision.
    """
    options = {key: one for key, one in said.options.items() if (key, one) != ("split", "train")}
    path, files = options.pop("path", None), listed(options.pop("data_files", None))
    is_hub = isinstance(path, str) and path not in _BUILDERS and _is_hub_name(draft, path)
    if files and is_hub:
        options["data_files"] = files if len(files) > 1 else files[0]
    for key in [key for key in ("config", "revision") if key in options and not is_hub]:
        draft.leave("matters", where, f"{key} {options.pop(key)}: only data sets of the hub have one")
    columns = columns_beside(kind, said.columns)
    if columns and kind == "sharegpt" and "messages" in columns:
        kind = "messages"  # in whose rows the stated column comes before any other with turns
    stated = {**({"format": kind} if kind else {}), **options, **({"columns": columns} if columns else {})}
    places = [path] if is_hub or not files else files
    return [{"path": draft.path(one), **stated} if stated else draft.path(one) for one in places]


def _is_hub_name(draft: JobDraft, path: str) -> bool:
    return bool(_HUB_NAME.fullmatch(path)) and not draft.is_here(path)


def columns_beside(kind: str | None, columns: Mapping[str, Any]) -> dict[str, Any]:
    """The columns to state: none where each has a name by which it is found anyway."""
    usual = _USUAL | (_USUAL_ALPACA if kind == "alpaca" else {})
    return {} if all(one in usual.get(name, (name,)) for name, one in columns.items()) else dict(columns)


def listed(value: Any) -> list[Any]:
    """A list, names with commas, or one value."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    return value if isinstance(value, list) else [] if value is None else [value]
