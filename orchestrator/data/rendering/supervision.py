"""Which text of a row is supervised: what a template dropped, and where an answer ends.  Pure.

The rules: every turn's text occurs in the text that the model sees; an answer is not empty and its end is supervised;
nothing before the first answer is.
"""

from __future__ import annotations

import bisect
import contextlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

from clusters.safe.reading import printable
from orchestrator.data.rows.row import BadRow

Span = tuple[int, int]  # of characters: first, and the one after the last
_BETWEEN = "\0"  # stands between pieces that are searched as one text; no piece holds it
_SHOWN = 60
_MANY_TURNS = 50
_TEXT_KEYS = {"role", "content", "train"}


class LostTurns(BadRow):
    """The chat template drops text of `num_turns` turns."""

    def __init__(self, reason: str, kind: str, num_turns: int = 1) -> None:
        self.num_turns = num_turns
        super().__init__(reason, kind)


class NoEnd(BadRow):
    """An answer without a supervised ending: a model trained on it does not learn to stop."""


# --- what a template dropped


def find_text(wanted: str, text: str, start: int = 0) -> Span | None:
    """Where `wanted` stands in `text` from `start` on, outer whitespace aside.

    A template may write more whitespace inside, or another amount of it, but no less than a line break for a line
    break; next to a tag such as </think> it may trim.
    """
    exact = wanted.strip()
    at = text.find(exact, start)
    if at >= 0:
        return at, at + len(exact)
    dense, places = _dense(text)
    needle = "".join(exact.split())
    at = dense.find(needle, bisect.bisect_left(places, start))
    if at < 0:
        return None
    found = places[at], places[at + len(needle) - 1] + 1
    have = _gaps(text[found[0] : found[1]])
    kept = all(offset in have and have[offset] >= breaks for offset, breaks in _gaps(exact).items())
    return found if kept else None


@lru_cache(maxsize=4)  # a row whose text was dropped is searched many times
def _dense(text: str) -> tuple[str, list[int]]:
    """The text without whitespace, and the place of each of its characters."""
    places = [index for index, character in enumerate(text) if not character.isspace()]
    return "".join([text[index] for index in places]), places


def _gaps(text: str) -> dict[int, bool]:
    """Offset among the characters that are no whitespace -> whether the whitespace there breaks the line."""
    gaps, count = {}, 0
    for word in re.finditer(r"(\s*)(\S+)", text):
        beside_tag = word[2].startswith("<") or text[max(0, word.start() - 1)] == ">"
        if word[1] and not beside_tag:
            gaps[count] = "\n" in word[1]
        count += len(word[2])
    return gaps


def lost_turns(messages: Sequence[Mapping[str, Any]], text: str, answers: Sequence[Span]) -> list[int]:
    """Numbers (from 0) of the turns whose text does not occur in `text`.

    The assistant's are searched in the spans of `answers`, those of the others outside of them, in their order or,
    where the template moves one, wherever no other turn stands.  No answers: all are searched in the whole text.
    Reasoning and calls stand in the answers too: the names of functions are in the list of tools as well.
    """
    if _stand_in_order(messages, text, answers):
        return []
    inside = _BETWEEN.join(text[a:b] for a, b in answers) if answers else text
    around = _BETWEEN.join(text[a:b] for a, b in outside(text, answers)) if answers else text
    is_answer = [bool(answers) and message["role"] == "assistant" for message in messages]
    is_tool = [message["role"] == "tool" for message in messages]  # what tools answer may be written as JSON
    contents = [str(message.get("content") or "") for message in messages]
    lost: set[int] = set()
    for place, mine in ((inside, True), (around, False)):
        turns = [n for n, answer in enumerate(is_answer) if answer == mine and contents[n].strip() and not is_tool[n]]
        lost |= {turns[k] for k in _unplaced([contents[n] for n in turns], place)}
    for n, message in enumerate(messages):
        place = inside if is_answer[n] else text
        lost |= {n} if not all(_occurs(part, place) for part in _parts(message)) else set()
    return sorted(lost)


def _stand_in_order(messages: Sequence[Mapping[str, Any]], text: str, answers: Sequence[Span]) -> bool:
    """Whether turns of text alone stand there letter by letter, answers in their spans: the usual case, found fast."""
    at, spans = 0, iter(answers)
    coming = next(spans, None)
    for message in messages:
        content = message.get("content")
        if not isinstance(content, str) or not message.keys() <= _TEXT_KEYS or message["role"] == "tool":
            return False
        content = content.strip()
        if answers and message["role"] == "assistant":
            if coming is None or text.find(content, *coming) < 0:
                return False
            at, coming = coming[1], next(spans, None)
            continue
        place = text.find(content, at)
        if place < 0 or (coming is not None and coming[0] < place + len(content)):
            return False
        at = place + len(content)
    return True


def outside(text: str, spans: Sequence[Span]) -> list[Span]:
    """The spans of `text` before, between and after others."""
    borders = [0, *(place for span in spans for place in span), len(text)]
    return list(zip(borders[::2], borders[1::2], strict=True))


def _unplaced(contents: list[str], text: str) -> list[int]:
    """Which of `contents` have no place of their own in `text`."""
    if all(_find_in_order(contents, text)):
        return []
    for k in range(min(len(contents), _MANY_TURNS)):  # one that is gone, rather than the one whose place it took
        spans = list(_find_in_order(contents[:k] + contents[k + 1 :], text))
        if all(spans):
            return [] if find_text(contents[k], _without(text, spans)) else [k]
    lost, rest = [], text
    for k in sorted(range(len(contents)), key=lambda k: -len(contents[k])):
        span = find_text(contents[k], rest)
        rest = _without(rest, [span])
        lost += [] if span else [k]
    return lost


def _find_in_order(contents: Iterable[str], text: str) -> Iterator[Span | None]:
    """Where each of `contents` stands in `text` behind those before it; None for one that does not."""
    at = 0
    for content in contents:
        span = find_text(content, text, at)
        at = span[1] if span else at
        yield span


def _without(text: str, spans: Iterable[Span | None]) -> str:
    """The text with these spans blanked."""
    for a, b in filter(None, spans):
        text = text[:a] + _BETWEEN * (b - a) + text[b:]
    return text


def _parts(message: Mapping[str, Any]) -> Iterator[str]:
    """The parts of a turn that have no fixed place: reasoning, names and arguments of calls, answers of tools."""
    if message["role"] == "tool" and str(message.get("content") or "").strip():
        yield str(message["content"])
    reasoning = message.get("reasoning_content")
    if isinstance(reasoning, str) and reasoning.strip():
        yield reasoning
    for call in message.get("tool_calls") or ():
        yield from _leaves(call.get("function", call))


def _leaves(value: Any) -> Iterator[str]:
    if isinstance(value, str) and value.strip()[:1] in ("{", "["):
        with contextlib.suppress(ValueError, RecursionError):  # arguments as JSON, which a template may write anew
            value = json.loads(value)
    if isinstance(value, Mapping):
        for key, item in value.items():
            if key not in ("id", "type", "name", "arguments"):
                yield str(key)
            yield from _leaves(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _leaves(item)
    elif value is not None and not isinstance(value, bool) and str(value).strip():
        yield str(value)


def _occurs(part: str, text: str) -> bool:
    written = (json.dumps(part, ensure_ascii=ascii)[1:-1] for ascii in (False, True))
    return find_text(part, text) is not None or any(form in text for form in written)


def refuse_python(messages: Sequence[Mapping[str, Any]], text: str) -> None:
    """Raise BadRow where `text` holds the arguments of a call as Python writes a dict, which a model must not learn."""
    for call in [call for message in messages for call in message.get("tool_calls") or ()]:
        arguments = call.get("function", call).get("arguments")
        if isinstance(arguments, dict) and arguments and repr(arguments) in text:
            raise BadRow(
                f"the chat template writes the arguments of a call as Python does: {printable(repr(arguments)[:60])}."
                " Set data.chat_template to a .jinja file that writes them as JSON: {{ arguments | tojson }}",
                "the chat template writes arguments of calls as Python does",
            )


def missing_tools(tools: Sequence[Mapping[str, Any]], text: str) -> list[str]:
    """Names of the functions that `text` does not mention."""
    names = [str((tool.get("function") or tool).get("name")) for tool in tools]
    return [name for name in names if name not in text]


def lost_text(message: Mapping[str, Any], text: str, answers: Sequence[Span] = ()) -> str:
    """The beginning of what `text` lacks of a turn, short enough for a message; of an answer, what `answers` lack."""
    if answers and message["role"] == "assistant":
        text = _BETWEEN.join(text[a:b] for a, b in answers)
    content = str(message.get("content") or "")
    lines = [line.strip() for line in content.splitlines() if line.strip()]
    gone = " ".join(line for line in lines if find_text(line, text) is None)
    gone = gone or next((part for part in _parts(message) if not _occurs(part, text)), content.strip())
    return printable(gone if len(gone) <= _SHOWN else f"{gone[:_SHOWN]}...")


# --- where an answer ends


def answer_end(text: str, content: str, eos: str | None) -> int | None:
    """Characters of `text`, which begins with an answer, that belong to it with its end; None where it has no end.

    The end is the end-of-text token after the content or else whatever the template writes there, whitespace aside.
    """
    span = find_text(content, text) if content.strip() else (0, 0)
    after = span[1] if span else 0
    if eos and eos in text[after:]:
        return text.rindex(eos) + len(eos)
    end = len(text.rstrip())
    return end if end > after else None


def is_empty(message: Mapping[str, Any]) -> bool:
    """Whether a turn has neither text nor calls."""
    return not str(message.get("content") or "").strip() and not any(True for _ in _parts(message))
