"""Examples -> token ids and the mask of supervised tokens.

Where later turns change how the chat template writes earlier ones (it drops reasoning, for example) each answer becomes
a sample of its own, after the same prompt as at inference.  A row whose text the template drops, or whose answer is
empty or has no ending, is a broken row: a wrong mask trains the wrong tokens and shows only as a strange loss.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from orchestrator.data.rendering.chat import ChatTemplate, Conversation
from orchestrator.data.rendering.supervision import NoEnd, Span, answer_end, find_text, is_empty
from orchestrator.data.rendering.together import Rendering, Texts, Underway, encode, token_at
from orchestrator.data.rows.formats import Example
from orchestrator.data.rows.row import BadRow
from orchestrator.errors import JobError

_MARK = re.compile(r"<\|[a-z_]{2,24}\|>|</?s>|<(?:bos|eos|start_of_turn|end_of_turn)>")


@dataclass(frozen=True)
class Tokens:
    """One sample: token ids, the mask of those whose prediction is trained, and where its last answer starts."""

    input_ids: list[int]
    supervised: list[bool]
    prompt_length: int  # tokens before the last answer; what a generated one starts from
    answer: str | None = None  # the text of the last answer
    bos_doubled: bool = False  # a second beginning-of-text token was taken out
    ended: bool = True  # the last answer's or text's end is supervised
    num_repeated: int = 0  # tokens at the front that end the piece before, of a text that was split


class Renderer:
    """Renders examples for one tokenizer; `chat_template` is the Jinja text, None = plain concatenation."""

    def __init__(
        self,
        tokenizer: Any,
        chat_template: str | None,
        assistant_only: bool = True,
        completion_only: bool = True,
        system_prompt: str | None = None,
        train_on_eos: str = "turn",
    ) -> None:
        self.tokenizer = tokenizer
        self.eos, self.eos_id, self.bos_id = tokenizer.eos_token, tokenizer.eos_token_id, tokenizer.bos_token_id
        self.template = None if chat_template is None else ChatTemplate(tokenizer, chat_template)
        self.assistant_only, self.completion_only = assistant_only, completion_only
        self.system_prompt, self.train_on_eos = system_prompt, train_on_eos
        self._marks: dict[str, bool] = {}

    def render(self, example: Example) -> list[Tokens]:
        """The samples of one example: one, or one an answer where the template writes earlier answers differently.

        Raises BadRow where the template drops text or an answer is empty or has no ending, JobError where no row can be
        rendered.
        """
        (found,) = self.render_all([example])
        if isinstance(found, Exception):
            raise found
        return found

    def render_all(self, examples: Sequence[Example]) -> list[list[Tokens] | Exception]:
        """The samples of each example, or what `render` would raise for it; their texts are tokenised together."""
        return self.begin(examples).results()

    def begin(self, examples: Sequence[Example], pool: Executor | None = None) -> Underway[list[Tokens]]:
        """The same, begun: its texts are tokenised in the thread of `pool` while the next ones are rendered."""
        return Underway(self.tokenizer, map(self._render, examples), pool)

    def _render(self, example: Example) -> Rendering[list[Tokens]]:
        if example.text is not None:
            return [(yield from self._plain("", example.text, only_answer=False))]
        answer_only = self.completion_only if example.prompt_completion else self.assistant_only
        talk = self._conversation(example)
        for number in talk.answers():
            if talk.is_trained(number) and is_empty(talk.turns[number]):
                raise BadRow(
                    f"{talk.name(number)} is empty: there is nothing to train on. Remove the turn or the row",
                    "an answer is empty",
                )
        trained = [number for number in talk.answers() if talk.is_trained(number)]
        if not trained:
            raise BadRow("no assistant turn is trained. Train one (`train: true`) or remove the row")
        if self.template is None:
            return [(yield from self._without_template(talk, example.prompt_completion, answer_only))]
        if not answer_only:
            return [(yield from self._all_of(talk, self.template))]
        text, spans = self.template.answers(talk)
        if spans is None:
            found = []
            for number in trained:
                is_last = number == trained[-1]
                found.append((yield from self._one_turn(talk.through(number), self.template, is_last)))
            return found
        kept = {number: span for number, span in zip(talk.answers(), spans, strict=True) if number in trained}
        learnt = self._with_ends(text, talk, kept, self.template)
        answer_at = kept[trained[-1]][0]
        return [(yield from self._encode(text, learnt, answer_at, talk.content(trained[-1]), self._learns_end))]

    @property
    def _learns_end(self) -> bool:
        return self.train_on_eos != "none"

    def _with_ends(
        self, text: str, talk: Conversation, answers: Mapping[int, Span], template: ChatTemplate, is_last: bool = True
    ) -> list[Span]:
        """What is learnt of a text: its answers by their turns, with the ends that data.train_on_eos states."""
        if self.train_on_eos == "turn":
            return list(answers.values())
        if self.train_on_eos == "all":
            return sorted([*answers.values(), *template.ends_outside(text, list(answers.values()))])
        whole = max(answers) if self.train_on_eos == "last" and is_last else None
        return [
            span if number == whole else template.without_end(text, span, talk.content(number))
            for number, span in answers.items()
        ]

    def _conversation(self, example: Example) -> Conversation:
        turns = tuple(example.messages)
        added = bool(self.system_prompt) and turns[0]["role"] != "system"
        if added and self.template is None:
            raise JobError(
                "data.system_prompt: the model's tokenizer has no chat template to write it; set data.chat_template"
            )
        if added:
            turns = ({"role": "system", "content": self.system_prompt or ""}, *turns)
        return Conversation(turns, example.tools, int(added))

    def _without_template(self, talk: Conversation, prompt_completion: bool, answer_only: bool) -> Rendering[Tokens]:
        if not prompt_completion or len(talk.turns) != 2 or talk.tools:
            raise JobError(
                "data: these rows are conversations and the model's tokenizer has no chat template."
                " Set data.chat_template to a .jinja file, or give prompt/completion rows"
            )
        tokens = yield from self._plain(talk.content(0), talk.content(1), answer_only)
        if self.eos_id is None:
            raise NoEnd(
                "the tokenizer has no end-of-text token, so the model would never learn to stop. Set eos_token in its"
                " tokenizer_config.json"
            )
        return tokens

    def _plain(self, prompt: str, text: str, only_answer: bool) -> Rendering[Tokens]:
        """Prompt and text end to end between one beginning-of-text and one end-of-text token, where there are such."""
        eos_id = self.eos_id
        if self.eos and text.rstrip().endswith(self.eos):
            text = text.rstrip()
        # Apart, as they are when an answer is generated: no token may straddle the border.
        *asked, (answered, _) = yield Texts((prompt, text) if prompt else (text,))
        question = [*self._opening, *(asked[0][0] if asked else [])]
        ids = question + answered
        supervised = [not only_answer] * len(question) + [True] * (len(ids) - len(question))
        if eos_id is not None and (not ids or ids[-1] != eos_id):
            ids.append(eos_id)
            supervised.append(True)
        if eos_id is not None and not self._learns_end:
            supervised[-1] = False
        answer = text if prompt else None
        return self._finish(
            ids, supervised, len(question) if prompt else 1, answer, eos_id is not None and self._learns_end
        )

    def foreign_marks(self, text: str) -> list[str]:
        """Marks of chat templates in a plain text that are no token here: the text was rendered for another model."""
        marks = dict.fromkeys(_MARK.findall(text)) if "<" in text else {}
        return [mark for mark in marks if not self._is_token(mark)]

    def _is_token(self, mark: str) -> bool:
        if mark not in self._marks:
            self._marks[mark] = len(self._ids(mark)) == 1
        return self._marks[mark]

    def _ids(self, text: str) -> list[int]:
        return encode(self.tokenizer, [text], with_offsets=False)[0][0]

    @cached_property
    def _opening(self) -> list[int]:
        """What the tokenizer puts before every text: its beginning-of-text token or nothing."""
        whole, bare = list(self.tokenizer("a")["input_ids"]), self._ids("a")
        places = [at for at in range(len(whole) - len(bare) + 1) if whole[at : at + len(bare)] == bare]
        return whole[: places[0]] if places else []

    def _all_of(self, talk: Conversation, template: ChatTemplate) -> Rendering[Tokens]:
        """Every token of a conversation supervised."""
        if self.train_on_eos in ("last", "none"):
            raise JobError(
                f"data.train_on_eos: {self.train_on_eos} says which ends of answers are learnt, and"
                " data.assistant_only_loss: false (or completion_only_loss: false) learns every token. Change one"
            )
        text, last = template.whole(talk), len(talk.turns) - 1
        content = talk.content(last)
        if talk.turns[last]["role"] != "assistant":
            return (yield from self._encode(text, [(0, len(text))], 1, None))
        start, _ = find_text(content, text, max(0, text.rfind(content.strip()))) or (0, len(text))
        if answer_end(text[start:], content, self.eos) is None:
            raise template.no_end(talk, last)
        return (yield from self._encode(text, [(0, len(text))], start, content))

    def _one_turn(self, talk: Conversation, template: ChatTemplate, is_last: bool) -> Rendering[Tokens]:
        text, span = template.last_answer(talk)
        number = len(talk.turns) - 1
        learnt = self._with_ends(text, talk, {number: span}, template, is_last)
        return (yield from self._encode(text, learnt, span[0], talk.content(number), self._learns_end))

    def _encode(
        self, text: str, spans: Sequence[Span], answer_at: int, answer: str | None, ended: bool = True
    ) -> Rendering[Tokens]:
        """Tokens of a rendered text, supervised inside the spans; no token straddles the start or the end of one."""
        ((ids, offsets),) = yield Texts((text,), with_offsets=True)
        borders = sorted({place for span in spans for place in span if 0 < place < len(text)})
        at = {place: token_at(offsets, place) for place in borders} | {0: 0, len(text): len(ids)}
        cuts = [place for place in borders if _straddles(offsets, at[place], place)]
        if cuts:
            whole = self.tokenizer.decode(ids)
            places = list(zip([0, *cuts], [*cuts, len(text)], strict=True))
            pieces = yield Texts(tuple(text[a:b] for a, b in places), with_offsets=True)
            ids = [i for piece, _ in pieces for i in piece]
            offsets = [(x + a, y + a) for (a, _), (_, piece) in zip(places, pieces, strict=True) for x, y in piece]
            if self.tokenizer.decode(ids) != whole:
                raise BadRow(
                    "data.chat_template: the tokenizer joins an answer and what the template writes beside it in one"
                    " token. End the template's prompt with a line break or a special token"
                )
            at = {place: token_at(offsets, place) for place in borders} | {0: 0, len(text): len(ids)}
        supervised = [False] * len(ids)
        for a, b in spans:
            supervised[at[a] : at[b]] = [True] * (at[b] - at[a])
        begins = at[answer_at] if answer_at in at else token_at(offsets, answer_at)
        return self._finish(ids, supervised, begins, answer, ended)

    def _finish(
        self, ids: list[int], supervised: list[bool], prompt_length: int, answer: str | None, ended: bool = True
    ) -> Tokens:
        """With one beginning-of-text token at most, and the first token never supervised: nothing predicts it."""
        bos, extra = self.bos_id, 0
        while bos is not None and ids[extra : extra + 2] == [bos, bos]:
            extra += 1
        ids, supervised = ids[extra:], supervised[extra:]
        if supervised:
            supervised[0] = False
        return Tokens(ids, supervised, max(prompt_length - extra, 0), answer, bool(extra), ended)


def _straddles(offsets: Sequence[Span], at: int, border: int) -> bool:
    """Whether a token holds characters of both sides of `border`, which token number `at` is the first behind.

    Offsets may leave out a token's leading space.
    """
    return at > 0 and offsets[at - 1][1] != border
