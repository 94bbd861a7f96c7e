"""Tokens as text while they come, up to a stop."""

from __future__ import annotations

from typing import Any

_INCOMPLETE = "\ufffd"  # what decoders write for a part of a character


class AnswerText:
    """The text of one answer: each token gives what is certain so far.

    A character that spans tokens is held back until it is whole, and so is what may be the beginning of a stop.
    """

    def __init__(self, tokenizer: Any, stops: tuple[str, ...]) -> None:
        self._tokenizer, self._stops = tokenizer, tuple(stop for stop in stops if stop)
        self._tokens: list[int] = []
        self._from, self._read = 0, 0  # tokens that are decoded again for the sake of those after them; decoded ones
        self._held = ""
        self.is_stopped = False

    def add(self, token: int) -> str:
        """What is certain with this token; after a stop nothing is."""
        self._tokens.append(token)
        known, whole = self._decode(self._from, self._read), self._decode(self._from, len(self._tokens))
        if len(whole) <= len(known) or whole.endswith(_INCOMPLETE):
            return ""
        self._from, self._read = self._read, len(self._tokens)
        return self._up_to_stop(whole[len(known) :])

    def rest(self) -> str:
        """What was held back, at the end of an answer."""
        known, whole = self._decode(self._from, self._read), self._decode(self._from, len(self._tokens))
        text = "" if self.is_stopped else self._up_to_stop(whole[len(known) :])
        held, self._held = self._held, ""
        return text if self.is_stopped else text + held

    def _up_to_stop(self, text: str) -> str:
        text = self._held + text
        found = [place for place in map(text.find, self._stops) if place >= 0]
        if found:
            self.is_stopped, self._held = True, ""
            return text[: min(found)]
        size = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - size :]
        return text[: len(text) - size]

    def _decode(self, start: int, end: int) -> str:
        return self._tokenizer.decode(self._tokens[start:end], skip_special_tokens=True)


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` begin `stop`."""
    sizes = range(min(len(text), len(stop) - 1), 0, -1)
    return next((size for size in sizes if text.endswith(stop[:size])), 0)
