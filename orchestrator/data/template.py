"""Examples -> token ids and the mask of supervised tokens, through the tokenizer's chat template.

Two ways to know which tokens the assistant wrote.  A template with `{% generation %}` says so itself.  Any other is
rendered turn by turn: the assistant's words are what a longer prefix of the conversation adds after the generation
prompt.  A template under which neither works, or whose mask is all zero or all one, is refused: a silently wrong mask
trains the wrong thing and shows only as a strange loss.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from orchestrator.data.formats import Example
from orchestrator.errors import JobError

_MEND = (
    "Set data.chat_template to a .jinja file whose assistant turns stand between {% generation %} and"
    " {% endgeneration %}, or set data.assistant_only_loss: false to train on every token"
)


@dataclass(frozen=True)
class Tokens:
    """One sample: token ids, the mask of those whose prediction is trained, and where its last answer starts."""

    input_ids: list[int]
    supervised: list[bool]
    prompt_length: int  # tokens before the last supervised run; what a generated answer starts from


class Renderer:
    """Renders examples for one tokenizer; `chat_template` is the Jinja text, None = plain concatenation."""

    def __init__(
        self,
        tokenizer: Any,
        chat_template: str | None,
        assistant_only: bool = True,
        completion_only: bool = True,
        system_prompt: str | None = None,
    ) -> None:
        self.tokenizer, self.chat_template = tokenizer, chat_template
        self.assistant_only, self.completion_only = assistant_only, completion_only
        self.system_prompt = system_prompt
        self._marks_generation = chat_template is not None and "{% generation" in chat_template.replace("{%-", "{%")

    def render(self, example: Example) -> Tokens:
        """Tokens of one example.  Raises JobError when the template cannot give a usable mask."""
        if example.text is not None:
            return self._plain("", example.text, only_answer=False)
        answer_only = self.completion_only if example.prompt_completion else self.assistant_only
        if self.chat_template is None:
            if not example.prompt_completion:
                raise JobError(
                    "data: these rows are conversations and the model's tokenizer has no chat template."
                    " Set data.chat_template to a .jinja file, or give prompt/completion rows"
                )
            question, answer = example.messages
            return self._plain(question["content"], answer["content"], answer_only)
        messages = list(example.messages)
        if self.system_prompt and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": self.system_prompt})
        return self._conversation(messages, answer_only)

    def _plain(self, prompt: str, text: str, only_answer: bool) -> Tokens:
        """Prompt and text end to end, then the end-of-text token; special tokens as the tokenizer adds them."""
        # Apart, as they are when an answer is generated: no token may straddle the border.
        question = list(self.tokenizer(prompt)["input_ids"]) if prompt else []
        answer = list(self.tokenizer(text, add_special_tokens=not prompt)["input_ids"])
        ids = question + answer
        supervised = [not only_answer] * len(question) + [True] * len(answer)
        eos = self.tokenizer.eos_token_id
        if eos is not None and (not ids or ids[-1] != eos):
            ids.append(eos)
            supervised.append(True)
        return _tokens(ids, supervised)

    def _conversation(self, messages: list[dict[str, str]], answer_only: bool) -> Tokens:
        if self._marks_generation and answer_only:
            rendered = self.tokenizer.apply_chat_template(
                messages,
                chat_template=self.chat_template,
                tokenize=True,
                return_dict=True,
                return_assistant_tokens_mask=True,
            )
            ids, supervised = list(rendered["input_ids"]), [bool(x) for x in rendered["assistant_masks"]]
        else:
            text = self._text(messages)
            encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            ids = list(encoded["input_ids"])
            spans = self._answer_spans(messages, text) if answer_only else [(0, len(text))]
            supervised = [any(a <= start < b for a, b in spans) for start, _ in encoded["offset_mapping"]]
        if answer_only and not any(supervised):
            raise JobError(f"data.chat_template: the template marks no token as the assistant's. {_MEND}")
        if answer_only and all(supervised):
            raise JobError(f"data.chat_template: the template marks every token as the assistant's. {_MEND}")
        return _tokens(ids, supervised)

    def _text(self, messages: list[dict[str, str]], add_generation_prompt: bool = False) -> str:
        try:
            return self.tokenizer.apply_chat_template(
                messages,
                chat_template=self.chat_template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        except Exception as error:  # Jinja raises its own tree, templates raise what they like
            raise JobError(f"data.chat_template: the template refuses a conversation: {error}") from None

    def _answer_spans(self, messages: list[dict[str, str]], text: str) -> list[tuple[int, int]]:
        """Character ranges of the assistant's words, each up to and with the end-of-turn token."""
        spans = []
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._text(messages[:index], add_generation_prompt=True) if index else ""
            through = self._text(messages[: index + 1])
            if not through.startswith(before) or not text.startswith(through):
                raise JobError(
                    "data.chat_template: the template writes earlier turns differently when later ones follow, so the"
                    f" assistant's words cannot be told apart. {_MEND}"
                )
            end = len(through)
            eos = self.tokenizer.eos_token
            if eos and eos in through[len(before) :]:
                end = through.rindex(eos) + len(eos)
            spans.append((len(before), end))
        return spans


def _tokens(ids: list[int], supervised: list[bool]) -> Tokens:
    if supervised:
        supervised[0] = False  # nothing comes before a first token that could predict it
    last = len(supervised) - 1
    while last >= 0 and not supervised[last]:
        last -= 1
    start = last
    while start > 0 and supervised[start - 1]:
        start -= 1
    return Tokens(ids, supervised, max(start, 0))


def chat_template_of(tokenizer: Any, setting: str, read: Any) -> str | None:
    """The Jinja text that `data.chat_template` names; `read(setting)` gives a file's text."""
    if setting == "tokenizer":
        template = getattr(tokenizer, "chat_template", None)
        return template.get("default") if isinstance(template, dict) else template
    return read(setting)
