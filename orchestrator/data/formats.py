"""What a row is: conversation, prompt and completion, Alpaca, ShareGPT, label and text, or plain text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Message = dict[str, str]

ROLES = ("system", "user", "assistant", "tool")
_SHAREGPT_ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
_TEXT_KEYS = ("text", "sentence")


@dataclass(frozen=True)
class Example:
    """A row in one of two canonical forms: turns of a conversation, or raw text."""

    messages: tuple[Message, ...] = ()
    text: str | None = None
    prompt_completion: bool = False  # one question, one answer: may also be laid end to end without a template

    @property
    def reference(self) -> str | None:
        """The answer a generated text is compared with."""
        ends_with_answer = bool(self.messages) and self.messages[-1]["role"] == "assistant"
        return self.messages[-1]["content"] if ends_with_answer else None


class BadRow(ValueError):
    """A row that does not have the form its format asks for; the text says why."""


def detect(values: Mapping[str, Any]) -> str | None:
    """The format of a row by its field names, None when no format fits."""
    keys = set(values)
    if "messages" in keys:
        return "messages"
    if "conversations" in keys:
        return "sharegpt"
    if {"prompt", "completion"} <= keys:
        return "prompt_completion"
    if {"instruction", "output"} <= keys:
        return "alpaca"
    if "label" in keys and keys & set(_TEXT_KEYS):
        return "classification"
    if "text" in keys:
        return "text"
    return None


DETECTABLE = (
    "messages (messages), sharegpt (conversations), prompt_completion (prompt, completion), "
    "alpaca (instruction, output), classification (label, text), text (text)"
)


def convert(values: Mapping[str, Any], row_format: str, instruction: str = "") -> Example:
    """A row of the named format as an Example.  Raises BadRow with the reason."""
    if row_format == "messages":
        return Example(_messages(values.get("messages"), "role", "content", dict(zip(ROLES, ROLES, strict=True))))
    if row_format == "sharegpt":
        turns = _messages(values.get("conversations"), "from", "value", _SHAREGPT_ROLES)
        system = values.get("system")
        return Example(({"role": "system", "content": system}, *turns) if isinstance(system, str) and system else turns)
    if row_format == "prompt_completion":
        return _pair(_string(values, "prompt"), _string(values, "completion"))
    if row_format == "alpaca":
        given = values.get("input") or ""
        question = _string(values, "instruction") + (f"\n\n{given}" if given else "")
        return _pair(question, _string(values, "output"))
    if row_format == "classification":
        key = next((key for key in _TEXT_KEYS if key in values), "text")
        label = values.get("label")
        if label is None or isinstance(label, list | dict) or str(label).strip() == "":
            raise BadRow(f"field 'label' is {label!r}; it must be a word or a number")
        text = _string(values, key)
        return _pair(f"{instruction}\n{text}" if instruction else text, str(label))
    return Example(text=_string(values, "text"))


def _pair(question: str, answer: str) -> Example:
    turns = ({"role": "user", "content": question}, {"role": "assistant", "content": answer})
    return Example(turns, prompt_completion=True)


def _string(values: Mapping[str, Any], key: str) -> str:
    value = values.get(key)
    if not isinstance(value, str):
        seen = "is missing" if key not in values else f"is a {type(value).__name__}, not text"
        raise BadRow(f"field {key!r} {seen}")
    if not value.strip():
        raise BadRow(f"field {key!r} is empty")
    return value


def _messages(turns: Any, role_key: str, text_key: str, roles: Mapping[str, str]) -> tuple[Message, ...]:
    if not isinstance(turns, list) or not turns:
        raise BadRow(f"the conversation is {'empty' if turns == [] else 'not a list of turns'}")
    messages = []
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, dict):
            raise BadRow(f"turn {number} is a {type(turn).__name__}, not an object with {role_key!r} and {text_key!r}")
        role, text = turn.get(role_key), turn.get(text_key)
        if not isinstance(role, str) or role not in roles:
            raise BadRow(f"turn {number} has {role_key} {role!r}; known: {', '.join(roles)}")
        if not isinstance(text, str):
            raise BadRow(f"turn {number} ({role}) has no text in {text_key!r}")
        messages.append({"role": roles[role], "content": text})
    if not any(message["role"] == "assistant" and message["content"].strip() for message in messages):
        raise BadRow("no assistant turn with text: there is nothing to learn")
    return tuple(messages)
