"""The turns of a conversation: OpenAI's and ShareGPT's roles and keys, tool calls, and which turns are trained."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from orchestrator.data.rows import columns
from orchestrator.data.rows.columns import missing
from orchestrator.data.rows.row import BadRow, Message

ROLES = ("system", "user", "assistant", "tool")
_CALL = "function_call"  # a turn that is nothing but a call
KNOWN_ROLES = {
    **{role: role for role in ROLES},
    "human": "user",
    **dict.fromkeys(("gpt", "bot", "model", "chatgpt"), "assistant"),
    "developer": "system",
    **dict.fromkeys(("observation", "function", "ipython", "tool_response", "function_response"), "tool"),
    **dict.fromkeys((_CALL, "tool_call"), _CALL),
}
_USUAL_ROLES = {*ROLES, "human", "gpt"}
_TEXT_PARTS = ("text", "input_text", "output_text")


@dataclass
class Reading:
    """What was seen beside the turns while reading one row."""

    key: str  # the column with the turns
    usual: tuple[str, str]  # column and role key that need no note
    notes: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    tools: tuple[dict[str, Any], ...] = ()

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def ignore(self, name: str) -> None:
        if (shown := f"{self.key}[].{name}") not in self.ignored:
            self.ignored.append(shown)


def read_turns(turns: Any, reading: Reading) -> list[Message]:
    """The messages of a conversation with at least one answer to train on.  Raises BadRow."""
    if isinstance(turns, str) and turns.strip():  # the only way in a csv file
        turns = _from_json(turns, f"field {reading.key!r}")
        reading.note(f"field {reading.key!r} is read as turns in JSON")
    if not isinstance(turns, list) or not turns:
        raise BadRow(f"field {reading.key!r}: the conversation is {'empty' if turns == [] else 'not a list of turns'}")
    messages = [_message(turn, number, reading) for number, turn in enumerate(turns, start=1)]
    _check_answers(messages)
    return messages


def read_prompt_and_answer(
    values: Mapping[str, Any], prompt_key: str, answer_key: str, reading: Reading
) -> list[Message]:
    """A prompt of turns and an answer of turns, either of which may be plain text; only the answer is trained."""
    messages: list[Message] = []
    for key, role in ((prompt_key, "user"), (answer_key, "assistant")):
        value = values.get(key)
        if isinstance(value, str) and not missing(value):
            messages.append({"role": role, "content": value})
        elif isinstance(value, list) and value:
            part = Reading(key, (key, "role"), reading.notes, reading.ignored, reading.tools)
            for number, turn in enumerate(value, start=1):
                message = _message(turn, number, part)
                read_only = key == prompt_key and message["role"] == "assistant"
                messages.append(message | {"train": False} if read_only else message)
            reading.tools = part.tools
        else:
            raise BadRow(f"field {key!r} is neither text nor a list of turns. Write it as one of them")
    _check_answers(messages)
    return messages


def history(value: Any) -> list[Message]:
    """Alpaca's earlier turns, pairs of question and answer.  Raises BadRow."""
    value = [] if missing(value) else _from_json(value, "field 'history'")
    messages: list[Message] = []
    pairs: list[Any] = value if isinstance(value, list) else [None]
    for number, pair in enumerate(pairs, start=1):
        if not isinstance(pair, list | tuple) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise BadRow(
                f"field 'history': item {number} is not a pair [question, answer] of texts, and ignoring it"
                " would lose the earlier turns. Write it as such pairs",
                "field 'history' holds no pairs [question, answer]",
            )
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    if messages:
        _check_answers(messages)
    return messages


def tools_of(value: Any, label: str) -> tuple[dict[str, Any], ...]:
    """The functions a model may call, each as {type: function, function: {...}}.  Raises BadRow."""
    if missing(value):
        return ()
    listed = _from_json(value, label)
    tools = []
    for number, item in enumerate(listed if isinstance(listed, list | tuple) else [listed], start=1):
        tool = _from_json(item, label)
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise BadRow(
                f"{label}: item {number} is not a function with a 'name', and ignoring it would lose what the"
                " model may call. Write it as {'type': 'function', 'function': {'name', 'description', 'parameters'}}",
                f"{label} holds an item that is not a function with a 'name'",
            )
        tools.append({**tool, "type": "function", "function": function} if "function" in tool else _wrap(function))
    return tuple(tools)


def _wrap(function: dict[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": {name: part for name, part in function.items() if name != "type"}}


def _from_json(value: Any, label: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        is_python = value.lstrip().startswith(("{'", "[{'"))  # what str() makes of a list, as pandas' to_csv does
        way = " (these are Python's quotes: in pandas .map(json.dumps) before to_csv)" if is_python else ""
        raise BadRow(
            f"{label} is a text that is not JSON. Write it as a list or as JSON{way}", f"{label} is no JSON"
        ) from None


def _message(turn: Any, number: int, reading: Reading) -> Message:
    if not isinstance(turn, dict):
        raise _bad(number, f"is a {type(turn).__name__}, not an object with 'role' and 'content'")
    if len(turn) == 2 and turn.get("role") in ROLES and reading.usual == (reading.key, "role"):
        content = turn.get("content")
        if isinstance(content, str):  # as most turns are: nothing to look up
            return {"role": turn["role"], "content": content}
    names = tuple(map(str, turn))
    role_key, text_key = columns.first(columns.ROLE_KEYS, names), columns.first(columns.CONTENT_KEYS, names)
    if role_key is None:
        raise _bad(
            number,
            f"has no role; its fields are {sorted(names)}. Say which is what: data.columns: {{role: .., content: ..}}",
        )
    role = _role(turn[role_key], role_key, number, reading)
    if (reading.key, role_key) != reading.usual:
        reading.note(f"turns with {role_key!r} and {text_key!r} under {reading.key!r} are read as role and content")
    _refuse(turn, names, number, role, reading)
    message: Message = {"role": "assistant" if role == _CALL else role, "content": None}
    if role == _CALL:
        calls = _calls(turn.get(text_key or ""), number)
    else:
        message["content"] = _text(turn.get(text_key or ""), number, role, reading)
        calls = _calls_of(turn, number, role)
    if calls:
        message |= {"content": message["content"] or "", "tool_calls": calls}
    if message["content"] is None:
        raise _bad(number, f"({role}) has no text in {text_key or 'content'!r}. Fill it or remove the turn")
    return message | _extras(turn, number, role, reading)


def _role(value: Any, key: str, number: int, reading: Reading) -> str:
    role = KNOWN_ROLES.get(value.strip().lower()) if isinstance(value, str) else None
    if role is None:
        known = ", ".join(KNOWN_ROLES)
        raise _bad(
            number,
            f"has {key} {value!r:.60}; known: {known}. Say who it is: data.roles: {{{value!s:.60}: user}}",
            f"has the {key} {value!r:.60}",
        )
    if value not in _USUAL_ROLES:
        reading.note(f"role {value.strip()!r:.40} is read as {'an assistant that calls' if role == _CALL else role}")
    return role


def _refuse(turn: dict[str, Any], names: tuple[str, ...], number: int, role: str, reading: Reading) -> None:
    """Raise BadRow for fields whose meaning would be lost, and note those that are ignored."""
    sorted_fields = columns.turn_fields(names)
    wrong = [name for name in sorted_fields.refused if columns.holds(name, turn[name])]
    if role != "tool" and not missing(turn.get("name")):
        wrong.append("name")
    if wrong:
        refusal = columns.turn_refusal(wrong[0])
        raise _bad(number, f"({role}) has the field {wrong[0]!r}; {refusal.sentence}")
    for name in sorted_fields.ignored:
        if not missing(turn[name]):
            reading.ignore(name)
    key = columns.first(columns.TOOL_KEYS, names)
    if key and not missing(turn[key]):
        if role != "system" or reading.tools:
            raise _bad(
                number, f"({role}) has the field {key!r}; tools stand in the row or in its system turn. Move them"
            )
        reading.tools = tools_of(turn[key], f"turn {number}, field {key!r}")


def _text(value: Any, number: int, role: str, reading: Reading) -> str | None:
    """The text of a turn's content; None where there is none."""
    if isinstance(value, str):
        return value
    if missing(value):
        return None
    if not isinstance(value, list):
        raise _bad(number, f"({role}) has content of the type {type(value).__name__}, not text. Write it as text")
    texts = []
    for part in value:
        kind = part.get("type", "text") if isinstance(part, dict) else None
        text = part if isinstance(part, str) else part.get("text") if kind in _TEXT_PARTS else None
        if not isinstance(text, str):
            seen = f"of type {kind!r:.40}" if kind and kind not in _TEXT_PARTS else "without text"
            raise _bad(number, f"({role}) has a part {seen}; only text is trained. Remove the part")
        texts.append(text)
    reading.note("content in parts is read as its texts joined")
    return "".join(texts)


def _calls_of(turn: dict[str, Any], number: int, role: str) -> list[dict[str, Any]]:
    keys = [key for key in columns.CALL_KEYS if not missing(turn.get(key))]
    if not keys:
        return []
    if len(keys) > 1:
        raise _bad(number, f"({role}) has both {keys[0]!r} and {keys[1]!r}. Remove one")
    key = keys[0]
    if role != "assistant":
        raise _bad(
            number, f"({role}) has the field {key!r}; only the assistant calls functions. Move it to an assistant turn"
        )
    return _calls(turn[key], number)


def _calls(value: Any, number: int) -> list[dict[str, Any]]:
    """Tool calls as {type, function: {name, arguments: {...}}}, whichever of the usual ways they are written."""
    listed = _from_json(value, f"turn {number}: the tool call")
    calls = []
    for item in listed if isinstance(listed, list) else [listed]:
        function = item.get("function", item) if isinstance(item, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise _bad(number, "has a tool call without a 'name'; write it as {'name', 'arguments'}")
        arguments = function.get("arguments", function.get("parameters"))
        arguments = {} if missing(arguments) else _from_json(arguments, f"turn {number}: the arguments of a tool call")
        if not isinstance(arguments, dict):
            raise _bad(number, "has a tool call whose arguments are not an object with named values. Name them")
        call = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
        calls.append({"id": item["id"], **call} if isinstance(item.get("id"), str) else call)
    return calls


def _extras(turn: dict[str, Any], number: int, role: str, reading: Reading) -> Message:
    extras: Message = {}
    keys = [key for key in columns.REASONING_KEYS if not missing(turn.get(key))]
    if keys:
        key = keys[0]
        if any(turn[other] != turn[key] for other in keys):
            raise _bad(number, f"({role}) has different reasoning in {' and '.join(map(repr, keys))}. Remove one")
        if role != "assistant" or not isinstance(turn[key], str):
            raise _bad(number, f"({role}) has the field {key!r}; reasoning is text of assistant turns. Remove it")
        if key != columns.REASONING_KEYS[0]:
            reading.note(f"field {key!r} of turns is read as 'reasoning_content'")
        extras["reasoning_content"] = turn[key]
    if role == "tool":
        extras |= {name: turn[name] for name in ("name", "tool_call_id") if not missing(turn.get(name))}
    if not _is_trained(turn, number, role):
        extras["train"] = False
    return extras


def _is_trained(turn: dict[str, Any], number: int, role: str) -> bool:
    """Whether the flags of a turn let it be trained; a turn of another role than the assistant cannot be."""
    flags = [(key, turn[key]) for key in columns.TRAIN_KEYS if not missing(turn.get(key))]
    for key, value in flags:
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise _bad(
                number,
                f"({role}) has {key} {value!r:.40}: a turn is trained (1) or not (0), not in part. Write 0 or 1,"
                " or put such rows into a file of their own whose source has a weight",
            )
        if value and role not in ("assistant", _CALL):
            raise _bad(
                number,
                f"({role}) has {key} {value!r}: only assistant turns are trained. Remove it, or set"
                " data.assistant_only_loss: false to train on every token",
            )
    return role not in ("assistant", _CALL) or all(value for _, value in flags)


def _check_answers(messages: list[Message]) -> None:
    answers = [(number, turn) for number, turn in enumerate(messages, start=1) if turn["role"] == "assistant"]
    trained = [(number, turn) for number, turn in answers if turn.get("train", True)]
    if not any(turn["content"].strip() or "tool_calls" in turn for _, turn in trained):
        why = "no assistant turn is trained" if answers and not trained else "no assistant turn with text"
        raise BadRow(f"{why}: there is nothing to train on. Add an answer or remove the row")
    for number, turn in trained:
        if not turn["content"].strip() and "tool_calls" not in turn:
            raise _bad(number, "(assistant) is empty: the model would learn to answer nothing. Remove or fill it")


def _bad(number: int, fault: str, kind: str | None = None) -> BadRow:
    return BadRow(f"turn {number} {fault}", f"a turn {kind or fault}")


@dataclass(frozen=True)
class CallStyle:
    """How a template reads a call: its arguments as an object or as JSON, beside a content that is "" or null."""

    as_text: bool = False
    null_content: bool = False

    def of(self, turn: dict[str, Any]) -> dict[str, Any]:
        """A turn with calls in this style."""
        changed = dict(turn)
        if self.as_text:
            changed["tool_calls"] = [
                call | {"function": call["function"] | {"arguments": _as_json(call["function"]["arguments"])}}
                for call in turn["tool_calls"]
            ]
        if self.null_content and not turn.get("content"):
            changed["content"] = None
        return changed


def _as_json(arguments: Any) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


CALL_STYLES = tuple(CallStyle(as_text, null) for as_text in (False, True) for null in (False, True))
