"""Rows that say which of two answers is the better one: TRL's, LLaMA-Factory's, Axolotl's, OpenAI's and ms-swift's.

Each becomes two rows of a usual format, one with the chosen and one with the rejected answer, which are then read as
any other: whatever stands beside the answers (system prompt, tools, history) is in both.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from orchestrator.data.rows import columns, formats
from orchestrator.data.rows.columns import missing
from orchestrator.data.rows.formats import Example
from orchestrator.data.rows.row import BadRow, Row
from orchestrator.data.rows.turns import KNOWN_ROLES

NAME = "preference"  # of the format, in counts
KNOWN = (
    "prompt, chosen, rejected; chosen, rejected with all turns; conversations or messages with chosen, rejected;"
    " instruction, input, chosen, rejected; messages with rejected_response"
)
# Columns with the chosen and with the rejected answer, and the tool that names them so.
_ANSWERS = (
    ("chosen", "rejected"),
    ("chosen_response", "rejected_response"),  # Axolotl's chatml.argilla
    ("preferred_output", "non_preferred_output"),  # OpenAI's
    ("chosen_answer", "rejected_answer"),
)


@dataclass(frozen=True)
class Preference:
    """A prompt with two answers: each whole as an example of which the answer alone is trained."""

    chosen: Example
    rejected: Example
    margin: float | None = None  # how much better the chosen answer is, where the row says so and it is asked

    @property
    def both(self) -> tuple[Example, Example]:
        return self.chosen, self.rejected

    @property
    def ignored(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*self.chosen.ignored, *self.rejected.ignored)))

    @property
    def readings(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*self.chosen.readings, *self.rejected.readings)))


@dataclass(frozen=True)
class Labelled:
    """A question with an answer that is good or bad; the answer alone is trained."""

    example: Example
    is_good: bool

    @property
    def both(self) -> tuple[Example, ...]:
        return (self.example,)

    @property
    def ignored(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(self.example.ignored))

    @property
    def readings(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(self.example.readings))


_MARGIN = "margin"
LABELLED = "labelled"  # of the format, in counts
_LABELS = ("label", "kto_tag", "desirable")
_WORDS = {"true": True, "good": True, "yes": True, "1": True, "false": False, "bad": False, "no": False, "0": False}
_WORDS |= {"desirable": True, "undesirable": False, "-1": False, "1.0": True, "0.0": False}


def read_labelled(row: Row) -> Labelled:
    """A row as an answer that is good or bad.  Raises BadRow."""
    if row.broken:
        raise row.broken
    values = row.values
    key = columns.first(_LABELS, values)
    if key is None:
        names = sorted(map(str, values))
        raise BadRow(
            f"fields {names} hold no label: this objective trains on answers marked good or bad. Add 'label' (true or"
            " false), or remove `objective` to train on all alike"
        )
    is_good = _WORDS.get(str(values[key]).strip().lower())
    if is_good is None:
        raise BadRow(f"field {key!r} is {values[key]!r:.40}, neither true nor false. Write one of them")
    rest = {name: value for name, value in values.items() if name != key}
    row_format, names = formats.detect(rest), dict[str, str]()
    if row_format in ("messages", "sharegpt"):
        turns_key = columns.first(columns.TURN_KEYS, rest) or ""
        turns = _turns_or_text(rest[turns_key], turns_key)
        if not isinstance(turns, list) or len(turns) < 2:
            raise BadRow(f"field {turns_key!r} holds no question and answer. Write them as turns")
        rest = {name: value for name, value in rest.items() if name != turns_key}
        names = {"prompt": turns_key, "completion": turns_key}
        rest, row_format = {"prompt": turns[:-1], "completion": turns[-1:], **rest}, "prompt_completion"
    if row_format not in ("prompt_completion", "alpaca"):
        raise BadRow("a row with a label needs a question and an answer. Give them as 'prompt' and 'completion'")
    return Labelled(_convert(_AsRow(row_format, rest, names)), is_good)


def read_preference(row: Row, reads_margins: bool = False) -> Preference:
    """A row as a pair, with its margin where that is asked.  Raises BadRow."""
    if row.broken:
        raise row.broken
    values, margin = row.values, None
    if reads_margins and not missing(values.get(_MARGIN)):
        margin = _number_of(values[_MARGIN])
        values = {name: value for name, value in values.items() if name != _MARGIN}
    if "rejected_response" in values and "messages" in values and "chosen_response" not in values:
        chosen, rejected = _from_answered_turns(values)
    else:
        chosen, rejected = _from_answers(values)
    found = Preference(_convert(chosen), _convert(rejected), margin)
    if _answers_of(found.chosen) == _answers_of(found.rejected):
        raise BadRow("the chosen and the rejected answer are the same: there is nothing to prefer. Remove the row")
    return found


def _number_of(value: Any) -> float:
    """A margin.  Raises BadRow."""
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    raise BadRow(f"field {_MARGIN!r} is {value!r:.40}, no finite number. Write how much better the chosen answer is")


@dataclass(frozen=True)
class _AsRow:
    """A row with one answer in the columns of a usual format."""

    row_format: str
    values: dict[str, Any]
    names: Mapping[str, str]  # of columns there -> where the value stood in the file


def _convert(row: _AsRow) -> Example:
    """Raises BadRow; what is told of it names the columns of the file."""

    def told(text: str) -> str:
        for there, here in row.names.items():
            text = text.replace(f"{there!r}", f"{here!r}").replace(f"{there}[]", f"{here}[]")
        return text

    try:
        found = formats.convert(row.values, row.row_format)
    except BadRow as error:
        raise BadRow(told(error.reason), told(error.kind)) from None
    return replace(found, readings=tuple(map(told, found.readings)), ignored=tuple(map(told, found.ignored)))


def _from_answers(values: Mapping[str, Any]) -> tuple[_AsRow, _AsRow]:
    """A row with a column for each answer."""
    keys = next((pair for pair in _ANSWERS if set(pair) & set(values)), None)
    if keys is None:
        raise _no_pair(values)
    if absent := [key for key in keys if missing(values.get(key))]:
        raise BadRow(
            f"field {absent[0]!r} of the pair {keys[0]!r} and {keys[1]!r} is missing. Fill it or remove the row"
        )
    rest = {name: value for name, value in values.items() if name not in keys}
    answers = [_turns_or_text(values[key], key) for key in keys]
    asked, question, rest = _question(rest)
    if question is None:
        question, answers = _common_beginning(answers, keys)
    else:
        answers = [_without_prompt(answer, question) for answer in answers]
        if any(map(_holds_question, answers)):
            question, answers = _of_conversations(asked, question, answers, keys)
    if "instruction" in rest:
        chosen, rejected = (
            _AsRow("alpaca", {**rest, "output": _text_of(one)}, {"output": key})
            for key, one in zip(keys, answers, strict=True)
        )
        return chosen, rejected
    if any(isinstance(answer, list) for answer in answers) and isinstance(question, str):
        question = [{"role": "user", "content": question}]
    if isinstance(question, list):
        answers = [[{"role": "assistant", "content": one}] if isinstance(one, str) else one for one in answers]
    chosen, rejected = (
        _AsRow(
            "prompt_completion",
            {"prompt": question, "completion": one, **rest},
            {"prompt": asked or key, "completion": key},
        )
        for key, one in zip(keys, answers, strict=True)
    )
    return chosen, rejected


def _text_of(answer: str | list[Any]) -> Any:
    """The text of an answer of one turn."""
    if isinstance(answer, list) and len(answer) == 1 and isinstance(answer[0], dict):
        key = columns.first(columns.CONTENT_KEYS, answer[0])
        return answer[0][key] if key else answer
    return answer


def _from_answered_turns(values: Mapping[str, Any]) -> tuple[_AsRow, _AsRow]:
    """ms-swift's: a conversation with the chosen answer at its end, and the other one beside it."""
    turns = _turns_or_text(values["messages"], "messages")
    rest = {name: value for name, value in values.items() if name not in ("messages", "rejected_response")}
    if not isinstance(turns, list) or len(turns) < 2:
        raise BadRow("field 'messages' of a preference holds no question and answer. Write them as turns")
    rejected = _turns_or_text(values["rejected_response"], "rejected_response")
    answers = (turns[-1:], [{"role": "assistant", "content": rejected}] if isinstance(rejected, str) else rejected)
    chosen, rejected_row = (
        _AsRow(
            "prompt_completion",
            {"prompt": turns[:-1], "completion": one, **rest},
            {"prompt": "messages", "completion": key},
        )
        for key, one in zip(("messages", "rejected_response"), answers, strict=True)
    )
    return chosen, rejected_row


def _question(rest: Mapping[str, Any]) -> tuple[str, Any, dict[str, Any]]:
    """The column with what both answers answer, that, and the other columns; None where the answers hold it."""
    if "instruction" in rest:
        return "instruction", rest["instruction"], dict(rest)
    opened = rest.get("input")
    if isinstance(opened, dict) and isinstance(opened.get("messages"), list):  # OpenAI's
        tools = {"tools": opened["tools"]} if not missing(opened.get("tools")) else {}
        left = {name: value for name, value in rest.items() if name != "input"}
        return "input", opened["messages"], left | tools
    for keys in (columns.PROMPT_KEYS, columns.TURN_KEYS):
        if (key := columns.first(keys, rest)) is not None and not missing(rest[key]):
            question = _turns_or_text(rest[key], key)
            return key, question, {name: value for name, value in rest.items() if name != key}
    return "", None, dict(rest)


def _turns_or_text(value: Any, key: str) -> str | list[Any]:
    """An answer or a question as text or as turns: a single turn, and turns in JSON, are read too."""
    if isinstance(value, dict):
        return [value]
    if isinstance(value, str) and value.lstrip().startswith(('[{"role"', '[{"from"', '[{"content"', '[{"value"')):
        try:
            return json.loads(value)
        except ValueError:
            return value
    if isinstance(value, str | list):
        return value
    raise BadRow(f"field {key!r} is a {type(value).__name__}, neither text nor turns. Write it as one of them")


def _without_prompt(answer: str | list[Any], question: Any) -> str | list[Any]:
    """Turns of an answer that repeats the question before it (Axolotl's ultra, UltraFeedback)."""
    if not isinstance(answer, list) or len(answer) < 2:
        return answer
    asked = question if isinstance(question, list) else [question]
    said = list(map(_said, (*asked, *answer)))
    return answer[len(asked) :] if said[: len(asked)] == said[len(asked) : 2 * len(asked)] else answer


def _said(turn: Any) -> Any:
    """The text of a turn, or the text itself."""
    return turn.get("content", turn.get("value")) if isinstance(turn, dict) else turn


def _holds_question(answer: str | list[Any]) -> bool:
    """Whether an answer is a conversation: somebody else than the assistant asks or instructs in it."""
    turns = [turn for turn in answer if isinstance(turn, dict)] if isinstance(answer, list) else []
    roles = [str(turn.get(columns.first(columns.ROLE_KEYS, turn) or "")).strip().lower() for turn in turns]
    return any(KNOWN_ROLES.get(role) in ("user", "system") for role in roles)


def _of_conversations(asked: str, question: Any, answers: list[Any], keys: tuple[str, str]) -> tuple[Any, list[Any]]:
    """`_common_beginning` of whole conversations beside a question that they hold too.  Raises BadRow."""
    beginning, ends = _common_beginning(answers, keys)
    held, wanted = list(map(_said, beginning)), question if isinstance(question, list) else [question]
    if any(map(_holds_question, ends)) or not all(_said(one) in held for one in wanted):
        raise BadRow(
            f"fields {keys[0]!r} and {keys[1]!r} are whole conversations that do not begin alike with field {asked!r}."
            " Remove that field, or give the two answers alone",
            f"{keys[0]!r} and {keys[1]!r} are conversations that do not begin alike",
        )
    return beginning, ends


def _common_beginning(answers: list[Any], keys: tuple[str, str]) -> tuple[Any, list[Any]]:
    """The prompt that both answers begin with, and what each adds (TRL's implicit prompt)."""
    if not all(isinstance(answer, list) for answer in answers):
        raise BadRow(
            f"a row with {keys[0]!r} and {keys[1]!r} as text needs its question. Give it as 'prompt', or both as turns"
        )
    chosen, rejected = answers
    pairs = enumerate(zip(chosen, rejected, strict=False))
    size = next((place for place, (one, other) in pairs if one != other), min(len(chosen), len(rejected)))
    size = min(size, len(chosen) - 1, len(rejected) - 1)
    if size < 1:
        raise BadRow(f"fields {keys[0]!r} and {keys[1]!r} have no turn in common. Begin both with the same question")
    return chosen[:size], [chosen[size:], rejected[size:]]


def _answers_of(example: Example) -> list[Any]:
    return [turn for turn in example.messages if turn["role"] == "assistant" and turn.get("train", True)]


def _no_pair(values: Mapping[str, Any]) -> BadRow:
    names = sorted(map(str, values))
    return BadRow(
        f"fields {names} are no preference: this objective trains on pairs of a chosen and a rejected answer; known:"
        f" {KNOWN}. Rename the fields to these, or remove `objective` to train on single answers"
    )
