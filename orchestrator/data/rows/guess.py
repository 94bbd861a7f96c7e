"""Which column of a file is what, from its first rows: the mapping that `init --train FILE` writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from orchestrator.data.rows import columns
from orchestrator.data.rows.formats import detect, plainly_named
from orchestrator.data.rows.mapping import plain_names
from orchestrator.data.rows.row import Row
from orchestrator.data.rows.turns import KNOWN_ROLES

_FEW_SPEAKERS = 6


@dataclass(frozen=True)
class Guess:
    """`data.columns` and `data.roles` for a file; `is_sure` where the names alone tell."""

    columns: dict[str, str] = field(default_factory=dict)
    roles: dict[str, str] = field(default_factory=dict)
    is_sure: bool = True


def guess_columns(rows: Sequence[Row]) -> Guess | None:
    """The mapping of rows of one file; empty where they are read as they are, None where nothing fits."""
    good = [row for row in rows if not row.broken]
    if not good:
        return None
    row_format = detect(plainly_named(good[0]).values)
    if row_format is None:
        return _by_values(good)
    if row_format != "prompt_completion":
        return Guess()
    names = tuple(map(str, good[0].values))
    plain = {plain_names(names).get(name, name): name for name in names}
    asked, answered = (
        next(plain[key] for key in keys if key in plain) for keys in (columns.ALL_PROMPT_KEYS, columns.ALL_ANSWER_KEYS)
    )
    usual = (asked, answered) == ("prompt", "completion")
    return Guess() if usual else Guess({"prompt": asked, "completion": answered})


def _by_values(rows: Sequence[Row]) -> Guess | None:
    """By what the columns hold: a list of turns, or texts, the first the question and the longest other the answer."""
    names = list(rows[0].values)
    for name in names:
        if turns := [turn for row in rows for turn in _turns(row.values.get(name))]:
            return _by_turns(name, turns)
    texts = [name for name in names if _holds_texts([row.values.get(name) for row in rows])]
    texts = [name for name in texts if len({row.values[name] for row in rows}) > len(rows) // 2]  # no category
    if len(texts) == 1:
        return Guess({"text": texts[0]}, is_sure=False)
    if not texts:
        return None
    answer = max(texts[1:], key=lambda name: sum(len(row.values[name]) for row in rows))
    return Guess({"prompt": texts[0], "completion": answer}, is_sure=False)


def _holds_texts(values: Sequence[Any]) -> bool:
    """Whether most have words; an answer may be a number."""
    worded = sum(isinstance(value, str) and any(letter.isalpha() for letter in value) for value in values)
    return all(isinstance(value, str) for value in values) and 2 * worded > len(values)


def _turns(value: Any) -> list[Mapping[str, Any]]:
    return value if isinstance(value, list) and value and all(isinstance(turn, dict) for turn in value) else []


def _by_turns(name: str, turns: Sequence[Mapping[str, Any]]) -> Guess | None:
    """The key with few and short values is the role, the longest other one the text; who speaks first asks."""
    keys = [key for key in turns[0] if all(isinstance(turn.get(key), str) for turn in turns)]
    speakers = {key: list(dict.fromkeys(turn[key] for turn in turns)) for key in keys}
    few = sorted(
        (key for key in keys if len(speakers[key]) <= _FEW_SPEAKERS), key=lambda key: len("".join(speakers[key]))
    )
    role = next((key for key in columns.ROLE_KEYS if key in keys), few[0] if few else None)
    others = [key for key in keys if key != role]
    if role is None or not others:
        return None
    content = max(others, key=lambda key: sum(len(turn[key]) for turn in turns))
    stated = {"messages": name} | {ours: key for ours, key in (("role", role), ("content", content)) if ours != key}
    unknown = [speaker for speaker in speakers[role] if speaker.strip().lower() not in KNOWN_ROLES]
    roles: dict[str, str] = dict(zip(unknown, ("user", "assistant"), strict=True)) if len(unknown) == 2 else {}
    return Guess(stated, roles, is_sure=not unknown)
