"""Where a generated answer ends: the stop tokens of model and tokenizer, and the template's end of turn."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from transformers import StoppingCriteria

_ANSWER = "the answer 7351"
_MARK = re.compile(r"[<\[{|(]\S{1,40}")  # a plain text that ends a turn, e.g. <end_of_turn> of another tokenizer


@dataclass(frozen=True)
class Stops:
    """Token ids that end an answer, and a text that does where the template's end of turn is no token of its own."""

    ids: tuple[int, ...]
    text: str | None = None

    def criterion(self, tokenizer: Any, start: int) -> list[StoppingCriteria]:
        """What ends the rows whose text after `start` tokens holds `text`."""
        return [_EndsWithText(tokenizer, start, self.text)] if self.text else []

    def before(self, tokens: list[int]) -> list[int]:
        """The tokens up to the first that ends an answer: not every such token is special and skipped in decoding."""
        return tokens[: next((place for place, token in enumerate(tokens) if token in self.ids), len(tokens))]

    def cut(self, text: str) -> str:
        """An answer up to its end."""
        return text.split(self.text)[0] if self.text else text


def stops_of(model: Any, tokenizer: Any) -> Stops:
    """The union of generation_config's ends, the tokenizer's, and the end of a turn in the tokenizer's template."""
    config = getattr(model, "generation_config", None) or model.config
    own = getattr(config, "eos_token_id", None)
    found = list(own) if isinstance(own, list | tuple) else [own]
    found.append(tokenizer.eos_token_id)
    turn, text = end_of_turn(tokenizer)
    ids = (token for token in [*found, turn] if isinstance(token, int) and not isinstance(token, bool))
    return Stops(tuple(dict.fromkeys(ids)), text)


def end_of_turn(tokenizer: Any) -> tuple[int | None, str | None]:
    """What the chat template writes after an answer: a special token's id, or else a text that marks the end."""
    if not getattr(tokenizer, "chat_template", None):
        return None, None
    turns = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": _ANSWER}]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False)
    except Exception:  # templates raise anything; one that takes no such turns has no known end
        return None, None
    _, found, after = text.rpartition(_ANSWER)
    after = after.strip()
    if not found or not after:
        return None, None
    first = tokenizer(after, add_special_tokens=False)["input_ids"][0]
    if first in tokenizer.all_special_ids or first in tokenizer.added_tokens_decoder:
        return first, None
    mark = _MARK.match(after)
    return None, mark[0] if mark else None


class _EndsWithText(StoppingCriteria):
    """Ends the rows whose last tokens hold a text."""

    def __init__(self, tokenizer: Any, start: int, text: str) -> None:
        self._tokenizer, self._start, self._text = tokenizer, start, text
        self._window = len(text.encode()) + 4  # tokens that can write it: none writes less than a byte

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **_: Any) -> torch.BoolTensor:  # type: ignore[override]
        recent = input_ids[:, self._start :][:, -self._window :]
        ended = [self._text in self._tokenizer.decode(row) for row in recent]
        return torch.tensor(ended, dtype=torch.bool, device=input_ids.device)  # type: ignore[return-value]
