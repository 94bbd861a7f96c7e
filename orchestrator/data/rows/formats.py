"""What a row is: conversation, prompt and completion, Alpaca, ShareGPT, label and text, or plain text."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from orchestrator.data.rows import columns, mapping, turns
from orchestrator.data.rows.columns import missing
from orchestrator.data.rows.row import BadRow, Message, Row

DETECTABLE = (
    "messages (messages), sharegpt (conversations), prompt_completion (prompt, completion), "
    "alpaca (instruction, output), classification (label, text), text (text)"
)


@dataclass(frozen=True)
class Example:
    """A row in one of two canonical forms: turns of a conversation, or raw text.

    A message holds `role` (system, user, assistant, tool) and `content` (text, "" beside tool calls), and where the row
    has them: `reasoning_content` (text), `tool_calls` ([{type, id, function: {name, arguments: {...}}}]), of a tool's
    turn `name` and `tool_call_id`, and `train: False` for an assistant's turn that is read but not trained (a key that
    no chat template should see).
    """

    messages: tuple[Message, ...] = ()
    text: str | None = None
    prompt_completion: bool = False  # a prompt and its answer; of two turns it needs no template
    tools: tuple[dict[str, Any], ...] = ()  # [{type: function, function: {name, description, parameters}}]
    ignored: tuple[str, ...] = ()  # columns and fields of turns ("messages[].id") that hold something and are not used
    readings: tuple[str, ...] = ()  # how what is unusual was read, without values of the row: to be counted and named

    @property
    def reference(self) -> str | None:
        """The answer a generated text is compared with."""
        ends_with_answer = bool(self.messages) and self.messages[-1]["role"] == "assistant"
        return (self.messages[-1]["content"] or None) if ends_with_answer else None


def read_example(
    row: Row, wanted: str, instruction: str = "", detected: dict[str, str] | None = None
) -> tuple[str, Example]:
    """The format of a row and the row as an Example.  Raises BadRow.

    Where `wanted` is auto, the first row of a file that has a format decides for the file; `detected` remembers it.
    """
    if row.broken:
        raise row.broken
    row = plainly_named(row)
    wanted = row.row_format if row.row_format != "auto" else wanted
    known = (detected or {}).get(row.file) if wanted == "auto" else None
    row_format = known or (wanted if wanted != "auto" else detect(row.values))
    if row_format is None:
        raise unknown_format(row.values)
    try:
        example = convert(row.values, row_format, instruction)
    except BadRow as error:
        own = detect(row.values)
        if known is None or own in (None, known):
            raise
        raise BadRow(
            f"{error.reason}: the file's first row is read as {known}, this one looks like {own}. Put each format"
            " into a file of its own"
        ) from None
    if detected is not None:
        detected[row.file] = row_format
    used = columns.columns(row_format, tuple(row.values)).used
    doubtful = tuple(
        f"field {name!r} is the text {value!r}, which some tools write for a missing value"
        for name in used
        if isinstance(value := row.values[name], str) and value in _MISSING_TEXTS
    )
    if doubtful or row.notes or row.ignored:
        readings = (*row.notes, *example.readings, *doubtful)
        example = replace(example, readings=readings, ignored=(*row.ignored, *example.ignored))
    return row_format, example


def plainly_named(row: Row) -> Row:
    """A row under plain names, where its own are those with capitals or spaces, if it has a format then."""
    names = mapping.plain_names(tuple(map(str, row.values)))
    if not names:
        return row
    values = {names.get(name, name): value for name, value in row.values.items()}
    if detect(values) is None:
        return row
    listed = ", ".join(f"{name!r} as {plain}" for name, plain in names.items())
    return replace(row, values=values, notes=(*row.notes, f"columns are read by their names: {listed}"))


def detect(values: Mapping[str, Any]) -> str | None:
    """The format of a row by its field names, None when no format fits."""
    keys = set(values)
    if "messages" in keys:
        return "messages"
    if keys & set(columns.SHAREGPT_KEYS):
        return "sharegpt"
    if {"prompt", "completion"} <= keys:
        return "prompt_completion"
    if "instruction" in keys and keys & set(columns.ALPACA_ANSWER_KEYS):
        return "alpaca"
    if "label" in keys and keys & set(columns.TEXT_KEYS):
        return "classification"
    if any(_is_list_of_objects(values.get(key)) for key in columns.DIALOGUE_KEYS):
        return "messages"
    if columns.is_pair(keys):
        return "prompt_completion"
    if keys & {"chosen", "rejected"}:  # not a text with two notes
        return None
    return "text" if "text" in keys else None


def _is_list_of_objects(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def unknown_format(values: Mapping[str, Any]) -> BadRow:
    """Says why the fields of a row fit no format, and what to do."""
    names = sorted(map(str, values))
    if {"chosen", "rejected"} & set(names):
        refusal = columns.refusals("messages")["chosen"]
        return BadRow(f"fields {names} are a preference; {refusal.sentence}")
    if "input_ids" in names:
        return BadRow(f"fields {names} are tokens; rows are tokenised here. Give their text instead")
    texts = [str(name) for name, value in values.items() if isinstance(value, str) and any(map(str.isalpha, value))]
    texts = texts if len(texts) > 1 else list(map(str, values))
    example = {"prompt": texts[0], "completion": texts[1]} if len(texts) > 1 else {"text": "".join(texts)}
    stated = ", ".join(f"{ours}: {theirs}" for ours, theirs in example.items())
    return BadRow(
        f"fields {names} fit no known format; known: {DETECTABLE}. Say which is what, for example data.columns:"
        f" {{{stated}}}"
    )


_FILL = "Fill it or remove the row"
_MISSING_TEXTS = ("nan", "NaN", "<NA>", "NaT", "None", "null", "NULL")


def convert(values: Mapping[str, Any], row_format: str, instruction: str = "") -> Example:
    """A row of the named format as an Example.  Raises BadRow with the reason."""
    sorted_columns = columns.columns(row_format, tuple(values))
    for name in sorted_columns.refused:
        if columns.holds(name, values[name]):
            refusal = columns.refusals(row_format)[name]
            raise BadRow(f"field {name!r} is not used in {row_format} rows; {refusal.sentence}")
    ignored = tuple(name for name in sorted_columns.ignored if not missing(values[name]))
    if row_format == "text":
        return Example(text=_string(values, "text"), ignored=ignored)
    if row_format == "classification":
        return _classification(values, instruction, ignored)
    if row_format in ("messages", "sharegpt"):
        keys = columns.TURN_KEYS if row_format == "messages" else columns.SHAREGPT_KEYS
        key = columns.first(keys, values) or keys[0]
        usual = ("", "") if key in columns.DIALOGUE_KEYS else (key, "role" if key == "messages" else "from")
        reading = turns.Reading(key, usual)
        return _conversation(values, turns.read_turns(values.get(key), reading), reading, ignored)
    return _pair(values, row_format, ignored)


def _classification(values: Mapping[str, Any], instruction: str, ignored: tuple[str, ...]) -> Example:
    key = columns.first(columns.TEXT_KEYS, values) or "text"
    label = values.get("label")
    if missing(label) or not isinstance(label, str | int | float) or label in (math.inf, -math.inf):
        raise BadRow(f"field 'label' is {label!r:.80}; it must be a text or a number", "field 'label' is not a label")
    text = _string(values, key)
    readings = ()
    if isinstance(label, float) and label.is_integer():  # pandas makes floats of whole numbers beside a missing one
        label, readings = int(label), ("labels like 1.0 are read as 1",)
    question = f"{instruction}\n{text}" if instruction else text
    return Example(_one_turn(question, str(label)), None, True, (), ignored, readings)


def _pair(values: Mapping[str, Any], row_format: str, ignored: tuple[str, ...]) -> Example:
    """Prompt and completion or Alpaca, by whatever names; with a system prompt or a history it is a conversation."""
    alpaca = row_format == "alpaca"
    prompt_key = "instruction" if alpaca else columns.first(columns.ALL_PROMPT_KEYS, values) or "prompt"
    answers = columns.ALPACA_ANSWER_KEYS if alpaca else columns.ALL_ANSWER_KEYS
    answer_key = columns.first(answers, values) or answers[0]
    input_key = columns.first(columns.INPUT_KEYS, values) if alpaca else None
    reading = turns.Reading(prompt_key, ("", ""))
    if (prompt_key, answer_key) not in (("prompt", "completion"), ("instruction", "output")) or input_key == "context":
        read_as = "instruction, input and output" if alpaca else "prompt and completion"
        names = ", ".join(repr(key) for key in (prompt_key, input_key, answer_key) if key)
        reading.note(f"fields {names} are read as {read_as}")
    if isinstance(values.get(prompt_key), list) or isinstance(values.get(answer_key), list):
        messages = turns.read_prompt_and_answer(values, prompt_key, answer_key, reading)
        return replace(_conversation(values, messages, reading, ignored), prompt_completion=True)
    given = values.get(input_key) if input_key else None
    question = _string(values, prompt_key) + ("" if missing(given) else f"\n\n{_string(values, str(input_key))}")
    messages = [*turns.history(values.get("history")), *_one_turn(question, _string(values, answer_key))]
    return replace(_conversation(values, messages, reading, ignored), prompt_completion=True)


def _conversation(
    values: Mapping[str, Any], messages: list[Message], reading: turns.Reading, ignored: tuple[str, ...]
) -> Example:
    """Turns with the row's system prompt and tools."""
    key = columns.first(columns.SYSTEM_KEYS, values)
    if key and not missing(values[key]):
        system = _string(values, key)
        if any(message["role"] == "system" and message["content"].strip() != system.strip() for message in messages):
            raise BadRow(f"field {key!r} and a system turn hold two different system prompts. Remove one")
        if messages[0]["role"] != "system":
            messages = [{"role": "system", "content": system}, *messages]
    key = columns.first(columns.TOOL_KEYS, values)
    tools = turns.tools_of(values[key], f"field {key!r}") if key else ()
    if tools and reading.tools:
        raise BadRow(f"field {key!r} and a system turn both list tools. Remove one")
    tools = tools or reading.tools
    return Example(tuple(messages), None, False, tools, (*ignored, *reading.ignored), tuple(reading.notes))


def _one_turn(question: str, answer: str) -> tuple[Message, ...]:
    return {"role": "user", "content": question}, {"role": "assistant", "content": answer}


def _string(values: Mapping[str, Any], key: str) -> str:
    value = values.get(key)
    if isinstance(value, float) and missing(value):
        raise BadRow(f"field {key!r} is NaN, a missing value. {_FILL}")
    if not isinstance(value, str):
        if key not in values or value is None:
            raise BadRow(f"field {key!r} {'is missing' if key not in values else 'is null, a missing value'}. {_FILL}")
        raise BadRow(f"field {key!r} is a {type(value).__name__}, not text. Write it as text")
    if not value.strip():
        raise BadRow(f"field {key!r} is empty. {_FILL}")
    return value
