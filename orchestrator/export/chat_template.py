"""A chat template as the texts around each turn, found by rendering it; and those texts as Ollama's TEMPLATE.

A template that is more than such texts (it rewrites earlier turns, joins the system's text with the user's) is told by
rendering conversations both ways: then there is no such form of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_SYSTEM, _USER, _ANSWER, _NEXT, _LAST = "Rule7351", "Ask7352", "Say7353", "Ask7354", "Say7355"
Message = Mapping[str, str]
Around = tuple[str, str]


@dataclass(frozen=True)
class TurnTexts:
    """What stands before and after the content of each role's turn, and before an answer."""

    user: Around
    assistant: Around
    opening: str
    system: Around | None = None  # None where it knows no system turn
    default_system: str | None = None  # put first where the conversation has no system turn

    def render(self, messages: Sequence[Message]) -> str:
        """A conversation up to where the answer begins."""
        texts = []
        if self.system and self.default_system is not None and messages[0]["role"] != "system":
            texts = [self.system[0], self.default_system, self.system[1]]
        around = {"system": self.system or ("", ""), "user": self.user, "assistant": self.assistant}
        for message in messages:
            before, after = around[message["role"]]
            texts += [before, message["content"], after]
        return "".join([*texts, self.opening])

    def as_ollama(self) -> str:
        """A template of Go's text/template over .Messages (Ollama's docs/template.md)."""
        roles = {"system": self.system, "user": self.user, "assistant": self.assistant}
        parts = [
            f'if eq .Role "{role}" }}}}{around[0]}{{{{ .Content }}}}{around[1]}'
            for role, around in roles.items()
            if around
        ]
        return "{{ range .Messages }}{{ " + "{{ else ".join(parts) + "{{ end }}{{ end }}" + self.opening


def turn_texts(tokenizer: Any) -> TurnTexts | None:
    """The texts of a tokenizer's chat template; None where it is more than that, or there is none."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    try:
        found = _derive(tokenizer)
    except Exception:  # templates raise anything; one that takes no such turns has no such form
        return None
    return found if found and _renders_alike(tokenizer, found) else None


def _derive(tokenizer: Any) -> TurnTexts | None:
    user, answer = {"role": "user", "content": _USER}, {"role": "assistant", "content": _ANSWER}
    asked, open_ = _rendered(tokenizer, [user], False), _rendered(tokenizer, [user], True)
    answered = _rendered(tokenizer, [user, answer], False)
    again = _rendered(tokenizer, [user, answer, {"role": "user", "content": _NEXT}], False)
    lead, user_end = asked.split(_USER)
    if not (open_.startswith(asked) and answered.startswith(asked) and again.startswith(answered)):
        return None
    answer_begin, answer_end = answered[len(asked) :].split(_ANSWER)
    user_begin = again[len(answered) :].split(_NEXT)[0]
    if not lead.endswith(user_begin):
        return None
    system, default = _system(tokenizer, user, user_begin), lead[: len(lead) - len(user_begin)]
    if default and not (system and default.startswith(system[0]) and default.endswith(system[1])):
        return None
    own = default[len(system[0]) : len(default) - len(system[1])] if system and default else None
    return TurnTexts((user_begin, user_end), (answer_begin, answer_end), open_[len(asked) :], system, own)


def _system(tokenizer: Any, user: Message, user_begin: str) -> Around | None:
    try:
        text = _rendered(tokenizer, [{"role": "system", "content": _SYSTEM}, user], False)
        before, rest = text.split(_SYSTEM)
        between = rest.split(_USER)[0]
    except Exception:  # a template without a system turn refuses one, or drops it
        return None
    return (before, between[: len(between) - len(user_begin)]) if between.endswith(user_begin) else None


def _renders_alike(tokenizer: Any, found: TurnTexts) -> bool:
    turns = list(zip(("user", "assistant") * 3, (_USER, _ANSWER, _NEXT, _LAST, _USER), strict=False))
    talk = [{"role": role, "content": content} for role, content in turns]
    system = [[{"role": "system", "content": _SYSTEM}]] if found.system else []
    tried = [[*first, *talk[:count]] for first in ([], *system) for count in (1, 3, 5)]
    return all(_rendered(tokenizer, messages, True) == found.render(messages) for messages in tried)


def _rendered(tokenizer: Any, messages: Sequence[Message], opens: bool) -> str:
    """Without the token that begins a text: llama.cpp sets it by itself."""
    text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=opens)
    return text.removeprefix(getattr(tokenizer, "bos_token", None) or "")
