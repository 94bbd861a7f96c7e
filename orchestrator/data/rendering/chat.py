"""Renders a conversation with the chat template: the text, and which characters of it are answers.

There are two ways to locate an answer.  A template with `{% generation %}` marks it.  Any other is rendered turn by
turn: an answer is what a longer prefix of the conversation adds after the generation prompt.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

from clusters.safe.reading import first_line, printable
from orchestrator.data.rendering.supervision import (
    LostTurns,
    NoEnd,
    Span,
    answer_end,
    find_text,
    lost_text,
    lost_turns,
    missing_tools,
    outside,
    refuse_python,
)
from orchestrator.data.rendering.turnwise import Render, Turns, compile_template, endings_of
from orchestrator.data.rows.row import BadRow
from orchestrator.data.rows.turns import CALL_STYLES, CallStyle

T = TypeVar("T")
_FIX = (
    "Set data.chat_template to a .jinja file that puts assistant turns between {% generation %} and"
    " {% endgeneration %}, or set data.assistant_only_loss: false to train on every token"
)
_FIX_END = "Set data.chat_template to a .jinja file that writes {{ eos_token }} after each answer"
_FIX_LOSS = "Set data.chat_template to a .jinja file that writes it, or remove it from the rows"
_PLAIN_KEYS = {"role", "content"}  # of turns that hold nothing but text
_OWN_KEYS = ("train",)  # of a turn, not meant for the template


@dataclass(frozen=True)
class Conversation:
    """Turns, the functions that the model may call, and how many turns at the front come from the job, not the row."""

    turns: tuple[dict[str, Any], ...]
    tools: tuple[dict[str, Any], ...] = ()
    num_added: int = 0

    def answers(self) -> list[int]:
        """Numbers (from 0) of the assistant's turns."""
        return [number for number, turn in enumerate(self.turns) if turn["role"] == "assistant"]

    def is_trained(self, number: int) -> bool:
        """Whether an assistant turn is trained: all are, unless the row has `train: false`."""
        return bool(self.turns[number].get("train", True))

    def content(self, number: int) -> str:
        """The text of a turn; empty where it only calls functions."""
        return str(self.turns[number].get("content") or "")

    def name(self, number: int) -> str:
        """The name of a turn in a message."""
        if number < self.num_added:
            return "data.system_prompt"
        return f"turn {number - self.num_added + 1} ({self.turns[number]['role']})"

    def shown(self, calls: CallStyle | None = None) -> list[dict[str, Any]]:
        """The turns as a template takes them; turns with calls in the style that it reads."""
        turns = [{key: value for key, value in turn.items() if key not in _OWN_KEYS} for turn in self.turns]
        return [calls.of(turn) if calls and "tool_calls" in turn else turn for turn in turns]

    @property
    def has_calls(self) -> bool:
        """Whether the assistant calls functions in it."""
        return any("tool_calls" in turn for turn in self.turns)

    def through(self, number: int) -> Conversation:
        """The turns up to and with one."""
        return Conversation(self.turns[: number + 1], self.tools, self.num_added)


@dataclass(frozen=True)
class Written:
    """A conversation as the model reads it, and where each turn begins, where the template writes turn by turn."""

    text: str
    begins: list[int] | None = None


class ChatTemplate:
    """The Jinja text `source` with the tokenizer whose special tokens it writes."""

    def __init__(self, tokenizer: Any, source: str) -> None:
        self.tokenizer, self.source = tokenizer, source
        self.eos, self.bos = tokenizer.eos_token, tokenizer.bos_token
        self._calls = CALL_STYLES[0]
        self._marks_generation = "{% generation" in source.replace("{%-", "{%")

    def text(self, talk: Conversation, add_generation_prompt: bool = False) -> str:
        """The conversation as the model reads it.  Raises BadRow where the template refuses it."""
        if self._direct and self._is_plain(talk):
            try:
                return self._direct(list(talk.turns), add_generation_prompt)
            except Exception as error:  # as below
                raise _refusal(error) from None
        try:
            return self.tokenizer.apply_chat_template(
                talk.shown(self._calls),
                tools=list(talk.tools) or None,
                chat_template=self.source,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        except Exception as error:  # Jinja raises its own tree, templates raise what they like
            raise _refusal(error) from None

    def write(self, talk: Conversation) -> Written:
        """The conversation as the model reads it.  Raises BadRow where the template refuses it."""
        turns = Turns(talk.turns)
        if not (self._direct and self._endings and self._is_plain(talk)):
            return Written(self.text(talk))
        try:
            return Written(self._direct(turns, False), turns.begins)
        except Exception as error:  # as in `text`
            raise _refusal(error) from None

    def _is_plain(self, talk: Conversation) -> bool:
        return not talk.tools and all(turn.keys() <= _PLAIN_KEYS for turn in talk.turns)

    def _through(self, talk: Conversation, number: int, whole: Written, add_generation_prompt: bool = False) -> str:
        """As `text`, the turns up to and with one of a conversation that is written already."""
        if whole.begins is None or not self._endings:
            return self.text(talk.through(number), add_generation_prompt)
        return whole.text[: whole.begins[number + 1]] + self._endings[add_generation_prompt]

    @cached_property
    def _direct(self) -> Render | None:
        """The template itself, for turns of text alone: transformers' call around it takes twice as long."""
        return compile_template(self.tokenizer, self.source)

    @cached_property
    def _endings(self) -> tuple[str, str] | None:
        """What follows the turns, without and with the generation prompt, where the template writes turn by turn."""
        return endings_of(self._direct, self.source, set(self.tokenizer.special_tokens_map)) if self._direct else None

    def answers(self, talk: Conversation) -> tuple[str, list[Span] | None]:
        """The text, and each answer in it with its end; None where later turns change how earlier ones are written.

        Raises BadRow where an answer cannot be located or has no ending, or the template drops text.
        """
        return self._in_a_style(talk, lambda: self._answers(talk))

    def whole(self, talk: Conversation) -> str:
        """The conversation as the model reads it, all of it supervised.  Raises BadRow."""

        def render() -> str:
            text = self.text(talk)
            self.refuse_lost(talk, text, [])
            return text

        return self._in_a_style(talk, render)

    def _in_a_style(self, talk: Conversation, render: Callable[[], T]) -> T:
        """What `render` gives, in the first style of calls in which the template loses and refuses nothing.

        The style that one row showed is tried first for the next.  Raises BadRow as the first try does.
        """
        fault: BadRow | None = None
        for style in dict.fromkeys((self._calls, *CALL_STYLES)) if talk.has_calls else (self._calls,):
            before, self._calls = self._calls, style
            try:
                return render()
            except BadRow as error:  # a loss says more than a refusal of the style
                fault = error if fault is None or "refuses the conversation" in fault.kind else fault
                self._calls = before
        raise fault or AssertionError("there is a style")

    def _answers(self, talk: Conversation) -> tuple[str, list[Span] | None]:
        if self._marks_generation:
            text, spans = self._render_marked(talk)
        else:
            whole = self.write(talk)
            text, spans = whole.text, self._by_prefix(talk, whole)
        if spans is not None:
            self.refuse_lost(talk, text, spans)
        return text, spans

    def last_answer(self, talk: Conversation) -> tuple[str, Span]:
        """The text of a conversation that ends with an answer, as inference sees it, and that answer.  Raises BadRow.

        The reasoning of earlier answers may be missing, as it is when the next answer is generated.
        """
        return self._in_a_style(talk, lambda: self._last_answer(talk))

    def _last_answer(self, talk: Conversation) -> tuple[str, Span]:
        whole = self.write(talk)
        text = whole.text
        try:
            span = self._answer_span(talk, text, whole)
        except BadRow:
            if (after := self._after_prompt(talk, text)) is None:
                raise
            text, span = after
        last = len(talk.turns) - 1
        kept = [number for number, turn in enumerate(talk.turns) if number == last or turn["role"] != "assistant"]
        self.refuse_lost(talk, text, [span], kept)
        return text, span

    def without_end(self, text: str, span: Span, content: str) -> Span:
        """An answer's characters without what ends it: the end-of-text token, or what stands behind its content."""
        start, end = span
        if self.eos and self.eos in text[start:end]:
            return start, text.rindex(self.eos, start, end)
        found = find_text(content, text[start:end])
        return (start, start + found[1]) if content.strip() and found else span

    def ends_outside(self, text: str, answers: Sequence[Span]) -> list[Span]:
        """The end-of-text tokens that stand outside of the answers."""
        if not self.eos:
            return []
        return [
            (a + match.start(), a + match.end())
            for a, b in outside(text, answers)
            for match in re.finditer(re.escape(self.eos), text[a:b])
        ]

    def refuse_lost(
        self, talk: Conversation, text: str, answers: Sequence[Span], among: Sequence[int] | None = None
    ) -> None:
        """Raise LostTurns where the template drops text of these turns, BadRow for calls or marks it spoils."""
        numbers = range(len(talk.turns)) if among is None else among
        if lost := [numbers[k] for k in lost_turns([talk.turns[n] for n in numbers], text, answers)]:
            dropped = lost_text(talk.turns[lost[0]], text, answers)
            more = f" (and of {len(lost) - 1} more turns)" if len(lost) > 1 else ""
            raise LostTurns(
                f"{talk.name(lost[0])}: the chat template drops a part of it{more}: {dropped!r}. {_FIX_LOSS}",
                f"the chat template drops a part of a turn of {talk.turns[lost[0]]['role']}",
                len(lost),
            )
        refuse_python(talk.turns, text)
        if missing := missing_tools(talk.tools, text):
            raise LostTurns(
                f"the chat template drops the tool {missing[0]!r}. {_FIX_LOSS}",
                "the chat template drops tools",
            )
        bos = self.bos
        if bos and bos in text:
            inside = [number for number in range(len(talk.turns)) if bos in talk.content(number)]
            if inside and text.count(bos) > sum(talk.content(number).count(bos) for number in inside):
                raise BadRow(
                    f"{talk.name(inside[0])} holds {bos!r}, which the chat template writes at the start of a text: the"
                    " row was rendered already. Give it as `text`, or remove the template's tokens from it",
                    "a turn holds the token that begins a text",
                )

    def no_end(self, talk: Conversation, number: int) -> NoEnd:
        """The error for an answer without an ending."""
        return NoEnd(
            f"{talk.name(number)}: the chat template writes no ending after the answer, so the model would never learn"
            f" to stop. {_FIX_END}",
            "the chat template writes no ending after an answer",
        )

    def _by_prefix(self, talk: Conversation, whole: Written) -> list[Span] | None:
        spans = []
        for number in talk.answers():
            through = whole.text if number == len(talk.turns) - 1 else self._through(talk, number, whole)
            span = self._answer_span(talk.through(number), through, whole)
            if not whole.text.startswith(through[: span[1]]):
                return None
            spans.append(span)
        return spans

    def _after_prompt(self, talk: Conversation, text: str) -> tuple[str, Span] | None:
        """The prompt that inference gives, and behind it the answer as `text` writes it, with its characters.

        For templates that write earlier turns otherwise once the answer is there: gpt-oss drops the reasoning before
        a call.  None where the answer does not follow the generation prompt.
        """
        last, opening = len(talk.turns) - 1, self._generation_prompt
        before = self.text(talk.through(last - 1), add_generation_prompt=True) if last else ""
        at = text.rfind(opening) if opening and before.endswith(opening) else -1
        answer = text[at + len(opening) :] if at >= 0 else ""
        end = answer_end(answer, talk.content(last), self.eos)
        if end is None or not find_text(talk.content(last), answer):
            return None
        return before + answer, (len(before), len(before) + end)

    def _answer_span(self, talk: Conversation, text: str, whole: Written) -> Span:
        """Characters of the last turn of `talk`, the assistant's, in `text`; `whole` is of it, or of what it begins."""
        last = len(talk.turns) - 1
        start = self._answer_start(talk, text, whole)
        end = answer_end(text[start:], talk.content(last), self.eos)
        if end is None and find_text(talk.content(last), text, start):  # dropped text is another error
            raise self.no_end(talk, last)
        return start, start + end if end is not None else len(text)

    def _answer_start(self, talk: Conversation, text: str, whole: Written) -> int:
        last = len(talk.turns) - 1
        if any(turn["role"] not in ("system", "assistant") for turn in talk.turns[:last]):
            before = self._through(talk, last - 1, whole, add_generation_prompt=True)
            if not text.startswith(before):
                self.refuse_lost(talk, text, [])  # text that the template writes into the prompt only
                raise _other_prompt(talk.name(last), before, text)
            return len(before)
        at = 0  # the assistant speaks first: find what the template writes before the answer
        for number in range(last):
            at = (find_text(talk.content(number), text, at) or (at, at))[1]
        opening = text.find(self._generation_prompt, at) if self._generation_prompt else -1
        if opening >= 0:
            return opening + len(self._generation_prompt)
        return (find_text(talk.content(last), text, at) or (at, at))[0]

    @cached_property
    def _generation_prompt(self) -> str:
        """What the template writes where the assistant is to answer."""
        probe = Conversation(({"role": "user", "content": "a"},))
        try:
            prompted, whole = self.text(probe, add_generation_prompt=True), self.text(probe)
        except BadRow:
            return ""
        return prompted[len(whole) :] if prompted.startswith(whole) else ""

    def _render_marked(self, talk: Conversation) -> tuple[str, list[Span]]:
        """The text and each answer in it, by the template's own marks."""
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            rendered: Any = render_jinja_template(
                [talk.shown(self._calls)],
                tools=list(talk.tools) or None,
                chat_template=self.source,
                return_assistant_tokens_mask=True,
                **self.tokenizer.special_tokens_map,
            )
        except Exception as error:  # as in `text`
            raise _refusal(error) from None
        (text,), (marks,) = rendered
        spans, numbers = _merge(marks), talk.answers()
        _refuse_marks(text, spans, len(numbers))
        for number, (a, b) in zip(numbers, spans, strict=True):
            content = talk.content(number)
            if find_text(content, text[a:b]) and answer_end(text[a:b], content, self.eos) is None:
                raise self.no_end(talk, number)
        return text, spans


def _other_prompt(name: str, before: str, text: str) -> BadRow:
    """The error for a template whose generation prompt differs from what it writes before the answer."""
    pairs = enumerate(zip(before, text, strict=False))
    same = next((at for at, (one, other) in pairs if one != other), min(len(before), len(text)))
    prompt, written = printable(before[same:][-40:]), printable(text[same:][:40])
    return BadRow(
        f"{name}: data.chat_template: the template's generation prompt continues with '{prompt}', the conversation with"
        f" '{written}', so the answer cannot be located. Begin the answers as the prompt ends, or: {_FIX}",
        "the template's generation prompt is not how it writes the conversation",
    )


def _refuse_marks(text: str, spans: Sequence[Span], num_answers: int) -> None:
    if not spans:
        raise BadRow(f"data.chat_template: the template marks no token as the assistant's. {_FIX}")
    if not "".join(text[a:b] for a, b in outside(text, spans)).strip():
        raise BadRow(f"data.chat_template: the template marks every token as the assistant's. {_FIX}")
    if len(spans) != num_answers:
        raise BadRow(
            f"data.chat_template: the template marks {len(spans)} spans in a conversation with {num_answers} assistant"
            " turns. Put each turn, with its ending, between one {% generation %} and {% endgeneration %}",
            "the template marks another number of spans than there are assistant turns",
        )


def _merge(spans: Sequence[Span]) -> list[Span]:
    """Touching spans merged, empty ones dropped."""
    merged: list[Span] = []
    for a, b in spans:
        if merged and a == merged[-1][1]:
            merged[-1] = merged[-1][0], b
        elif a < b:
            merged.append((a, b))
    return merged


def _refusal(error: Exception) -> BadRow:
    return BadRow(
        f"data.chat_template: the template refuses the conversation: {printable(first_line(error))}. Fix the row, or"
        " set data.chat_template to a .jinja file that takes it"
    )


def template_of(tokenizer: Any) -> str | None:
    """The Jinja text that a tokenizer brings, its default one where it has several."""
    template = getattr(tokenizer, "chat_template", None)
    return template.get("default") if isinstance(template, dict) else template
