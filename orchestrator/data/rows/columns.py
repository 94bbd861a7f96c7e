"""The contract for data: what becomes of each column of a row, by the row's format.

A column is used, or refused where it holds a value that changes what the row means, or ignored and named by its count.
There is no fourth way: `columns` and `turn_fields` sort every name, known or not, and nothing else drops one.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from strategies import OBJECTIVES

DIALOGUE_KEYS = ("dialogue", "dialog", "chat", "turns")  # of turns where they hold a list of objects
TURN_KEYS = ("messages", "conversations", "conversation", *DIALOGUE_KEYS)
SHAREGPT_KEYS = ("conversations", "conversation", "messages")
SYSTEM_KEYS = ("system", "system_prompt", "system_message")
TOOL_KEYS = ("tools", "functions")
TEXT_KEYS = ("text", "sentence")
PROMPT_KEYS = ("prompt", "question", "query", "input", "instruction")
ANSWER_KEYS = ("completion", "output", "response", "answer")
# Read so where none of the above is there.
RARE_PROMPT_KEYS = ("inputs", "problem", "user", "human", "user_input", "質問")
RARE_ANSWER_KEYS = ("reply", "target", "targets", "solution", "assistant", "回答")
ALL_PROMPT_KEYS, ALL_ANSWER_KEYS = (*PROMPT_KEYS, *RARE_PROMPT_KEYS), (*ANSWER_KEYS, *RARE_ANSWER_KEYS)
ALPACA_ANSWER_KEYS = ("output", "response", "answer", "completion", "reply", "target")
INPUT_KEYS = ("input", "context")
RECOGNISED = {
    *TURN_KEYS,
    *SYSTEM_KEYS,
    *TOOL_KEYS,
    *TEXT_KEYS,
    *PROMPT_KEYS,
    *RARE_PROMPT_KEYS,
    *ANSWER_KEYS,
    *RARE_ANSWER_KEYS,
    *INPUT_KEYS,
    "label",
    "history",
}
CHOICE_KEYS = ("choices", "options")  # of a question with several answers to choose from

# In a turn of a conversation.
ROLE_KEYS = ("role", "from")
CONTENT_KEYS = ("content", "value", "text")
TRAIN_KEYS = ("train", "loss", "weight")  # whether a turn is trained: Axolotl's, ms-swift's and OpenAI's name
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
CALL_KEYS = ("tool_calls", "function_call")
_TURN_USED = {*ROLE_KEYS, *CONTENT_KEYS, *TRAIN_KEYS, *REASONING_KEYS, *CALL_KEYS, *TOOL_KEYS, "tool_call_id", "name"}


@dataclass(frozen=True)
class Columns:
    """The columns of a row, each in exactly one of three."""

    used: tuple[str, ...]
    refused: tuple[str, ...]  # where they hold a value; see `holds`
    ignored: tuple[str, ...]


@dataclass(frozen=True)
class Refusal:
    """What would be lost if a column were ignored, and what to do."""

    lost: str
    way: str

    @property
    def sentence(self) -> str:
        return f"ignoring it would lose {self.lost}. {self.way}"


_REMOVE = "or remove the field, or name it in data.ignore_columns"
_OF_PAIRS = ", ".join(name for name, objective in OBJECTIVES.items() if objective.rows == "pairs")
_OF_LABELLED = ", ".join(name for name, objective in OBJECTIVES.items() if objective.rows == "labelled")
_PICTURES = Refusal("what it shows or plays; only text is trained", f"Describe it in the text, {_REMOVE}")
_PREFERENCE = Refusal(
    "which answer is the better one; one answer a row is trained here",
    f"Train on both with one of `objective: {_OF_PAIRS}`, or name the better answer: data.columns: {{prompt: prompt,"
    " completion: chosen} and data.ignore_columns: [rejected]",
)
_WEIGHTS = Refusal(
    "how much it counts; rows of one file count the same",
    f"Put rows of one weight into a file of their own, whose source states it ({{path: ..., weight: 0.5}}), {_REMOVE}",
)
_MASK = Refusal(
    "which tokens are trained",
    "Give the row as messages whose turns have `train: true` or `train: false`, " + _REMOVE,
)
_THOUGHTS = Refusal(
    "the reasoning before the answer", f"Write it into the answer the way the chat template does, {_REMOVE}"
)
_DIALOGUE = Refusal("the earlier turns", f"Give the row as messages with all its turns, {_REMOVE}")
_FUNCTIONS = Refusal("the functions that the model may call", f"Give the row as messages with 'tools', {_REMOVE}")
_SYSTEM = Refusal("the system prompt", f"Give the row as messages or prompt and completion, {_REMOVE}")
_INPUT = Refusal("a part of the question", f"Write it into the prompt, {_REMOVE}")

_LABEL = Refusal(
    "that an answer is good or bad; a row marked bad would be trained like a good one",
    f"Train on both kinds with `objective: {_OF_LABELLED}`, or keep the good rows alone and remove the field or name it"
    " in data.ignore_columns",
)
_TEMPLATE = Refusal("an option of the chat template", f"Write it into a template for data.chat_template, {_REMOVE}")
_SPEAKER = Refusal("who speaks", "Write the name into the turn's text, or remove the field")
_REFUSED_ANSWER = Refusal("the text in which the model declined", "Write them as the turn's content and remove it")

# Known to change what a row means; refused in every format that does not use them.
_KNOWN: dict[str, Refusal] = {
    **dict.fromkeys(SYSTEM_KEYS, _SYSTEM),
    "history": _DIALOGUE,
    **dict.fromkeys((*TOOL_KEYS, *CALL_KEYS), _FUNCTIONS),
    **dict.fromkeys(("chosen", "rejected", "rejected_response", "rejected_messages"), _PREFERENCE),
    **dict.fromkeys(("preferred_output", "non_preferred_output", "rejected_answer", "chosen_answer"), _PREFERENCE),
    **dict.fromkeys(("label", "kto_tag", "desirable"), _LABEL),
    "labels": Refusal("what the text is labelled with", f"Give one label a row as 'label', {_REMOVE}"),
    **dict.fromkeys(("weight", "weights", "sample_weight", "loss_weight"), _WEIGHTS),
    **dict.fromkeys(("train", "loss", "mask", "loss_mask", "train_mask"), _MASK),
    **dict.fromkeys(("image", "images", "image_path", "image_url", "audio", "audios", "video", "videos"), _PICTURES),
    **dict.fromkeys(REASONING_KEYS, _THOUGHTS),
    **dict.fromkeys(("documents", "chat_template_kwargs"), _TEMPLATE),
    **dict.fromkeys(("text_pair", "sentence1", "sentence2"), _INPUT),
}
# Parts of the question where they stand beside another one.
_KNOWN_IN: dict[str, dict[str, Refusal]] = {
    "prompt_completion": dict.fromkeys((*INPUT_KEYS, "instruction", *CHOICE_KEYS), _INPUT),
    "alpaca": dict.fromkeys((*INPUT_KEYS, *CHOICE_KEYS), _INPUT),
    "classification": dict.fromkeys((*INPUT_KEYS, *PROMPT_KEYS), _INPUT),
    "messages": {"context": _INPUT},
    "sharegpt": {"context": _INPUT},
}
_KNOWN_IN_TURNS: dict[str, Refusal] = {
    **dict.fromkeys(("image", "images", "image_url", "audio", "audios", "video", "videos"), _PICTURES),
    **dict.fromkeys(
        ("mask", "masked", "loss_mask", "train_detail", "training_detail", "weights", "loss_weight"), _MASK
    ),
    "refusal": _REFUSED_ANSWER,
    "label": _LABEL,
}


@lru_cache(maxsize=1024)
def columns(row_format: str, names: tuple[str, ...]) -> Columns:
    """Sort the columns of a row of `row_format`."""
    present = set(names)
    used = {key for keys in _USED[row_format] if (key := first(keys, present))}
    return _sort(names, used, set(refusals(row_format)) - used)


@lru_cache(maxsize=1024)
def turn_fields(names: tuple[str, ...]) -> Columns:
    """Sort the fields of one turn of a conversation."""
    roles, texts = first(ROLE_KEYS, names), first(CONTENT_KEYS, names)
    used = (_TURN_USED - {*ROLE_KEYS, *CONTENT_KEYS}) | {roles, texts}
    return _sort(names, used, set(_KNOWN_IN_TURNS))


def _sort(names: tuple[str, ...], used: Container[str | None], known: Container[str]) -> Columns:
    return Columns(
        tuple(name for name in names if name in used),
        tuple(name for name in names if name in known),
        tuple(name for name in names if name not in used and name not in known),
    )


def refusals(row_format: str) -> dict[str, Refusal]:
    """What is lost with each known column, and the way out, for rows of `row_format`; used ones included."""
    if row_format == "text":  # rows with text and label are read so only where the job says so
        return {name: refusal for name, refusal in _KNOWN.items() if refusal is not _LABEL}
    return _KNOWN | _KNOWN_IN.get(row_format, {})


def turn_refusal(name: str) -> Refusal:
    """What is lost with a known field of a turn, and the way out."""
    found = _SPEAKER if name == "name" else _KNOWN_IN_TURNS[name]
    for way in (", or name it in data.ignore_columns", " or name it in data.ignore_columns"):  # columns of rows alone
        found = replace(found, way=found.way.replace(way, ""))
    return found


def missing(value: Any) -> bool:
    """Whether a value stands for nothing: null, NaN, a text without a character, an empty list or mapping.  0 does not.

    >>> [missing(value) for value in (None, float("nan"), " ", [], {}, 0, False, "0")]
    [True, True, True, True, True, False, False, False]
    """
    if isinstance(value, float):
        return math.isnan(value)
    return value is None or (isinstance(value, str) and not value.strip()) or value in ([], {}, ())


def holds(name: str, value: Any) -> bool:
    """Whether a refused column holds something that would be lost: a weight of 1, say, says nothing."""
    if missing(value):
        return False
    if name in ("weight", "weights", "sample_weight", "loss_weight", "train", "loss"):
        return value not in (1, True, "1", "1.0", "true", "True")
    if name == "label":  # a text beside a question and its answer is a note; yes and no are a judgement
        return not isinstance(value, str) or value.strip().lower() in _JUDGEMENTS
    return True


_JUDGEMENTS = ("true", "false", "0", "1", "-1", "yes", "no", "good", "bad", "chosen", "rejected")


def first(keys: Iterable[str], names: Iterable[str]) -> str | None:
    """The first of `keys` that is among `names`."""
    for key in keys:  # four times as fast as a generator: it is asked several times a row
        if key in names:
            return key
    return None


def is_pair(names: set[str]) -> bool:
    """Whether one name is a prompt's and one an answer's: of the usual ones, or of the usual and the rare together."""
    return any(len(names & asks) == len(names & answers) == 1 for asks, answers in _PAIRS)


_PAIRS = (
    ({*PROMPT_KEYS}, {*ANSWER_KEYS}),
    ({*ALL_PROMPT_KEYS}, {*ALL_ANSWER_KEYS}),
)


# Of each group of keys a row's first one is used.
_USED: dict[str, tuple[tuple[str, ...], ...]] = {
    "messages": (TURN_KEYS, SYSTEM_KEYS, TOOL_KEYS),
    "sharegpt": (SHAREGPT_KEYS, SYSTEM_KEYS, TOOL_KEYS),
    "prompt_completion": (
        ALL_PROMPT_KEYS,
        ALL_ANSWER_KEYS,
        SYSTEM_KEYS,
        ("history",),
        TOOL_KEYS,
    ),
    "alpaca": (("instruction",), INPUT_KEYS, ALPACA_ANSWER_KEYS, SYSTEM_KEYS, ("history",), TOOL_KEYS),
    "classification": (TEXT_KEYS, ("label",)),
    "text": (("text",),),
}
