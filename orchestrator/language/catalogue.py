"""An English text -> the same in Japanese.

Texts are made all over the project by f-strings.  A message's id is such a text with `{0}`, `{1}` ... where values
stand, so a text that was made is matched against the ids: first as it is, then with values, the id with the most
letters first.  A value that is a message is translated too.  A text that no id matches is taken apart at line breaks,
sentences, semicolons, colons and commas; what is unknown then stays English.

The catalogue is gettext's, `locale/ja/LC_MESSAGES/orchestrator.po`, and the `.mo` that `tests/translations.py` makes of
it.  Nothing is loaded for English.
"""

from __future__ import annotations

import gettext
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

from orchestrator.language.choice import language

LOCALE = Path(__file__).with_name("locale")
DOMAIN = "orchestrator"
PLACE = re.compile(r"\{(\d+)\}")
_ENOUGH_LETTERS = 7  # of an id with values: fewer match by chance
_LONGEST = 2000  # characters: a longer line is somebody's data
_APART = ("\n", ". ", "; ", ": ", ", ")  # where a text is taken apart
_CORE = re.compile(r"([\s;,:]*)(.*?)([\s;,:]*)", re.DOTALL)
_JOINED = {". ": "。"}
_WIDE_END = re.compile(r"[\u3040-\u30ff\u4e00-\u9fff。）」]$")
Translator = Callable[[str], str]


@dataclass(frozen=True)
class Pattern:
    """An id with values, and its translation."""

    id: str
    translation: str

    @cached_property
    def anchor(self) -> str:
        """The longest literal part: a text without it does not match."""
        return max(PLACE.split(self.id)[::2], key=len)

    @cached_property
    def regex(self) -> re.Pattern[str]:
        """A value is anything; in an id of few letters a word, or what follows a colon at the end."""
        parts, anything = PLACE.split(self.id), num_letters(self.id) >= _ENOUGH_LETTERS
        found = ""
        for number, part in enumerate(parts):
            if number % 2 == 0:
                found += re.escape(part)
            else:
                is_rest = anything or (parts[number - 1].endswith(": ") and parts[number + 1 :] == [""])
                found += f"(?P<v{part}>{'.' if is_rest else '[^ ]'}*?)"
        return re.compile(found)

    @property
    def is_certain(self) -> bool:
        """Whether a text that matches it is it: `{0} of {1}` would match any sentence."""
        return num_letters(self.id) >= _ENOUGH_LETTERS or (self.id[0].isalpha() and num_letters(self.id) > 1)


def tr(text: str) -> str:
    """The text in the language of this process."""
    return text if language() == "en" else translator(language())(text)


@cache
def translator(language: str) -> Translator:
    """Translates into a language."""
    return str if language == "en" else Catalogue(_messages(language)).translate


def _messages(language: str) -> dict[str, str]:
    """Id -> translation, by Python's gettext."""
    found = gettext.translation(DOMAIN, LOCALE, [language])
    return {key: value for key, value in vars(found)["_catalog"].items() if key and isinstance(key, str)}


class Catalogue:
    """Messages of one language, indexed once."""

    def __init__(self, messages: dict[str, str]) -> None:
        self._exact = messages
        with_values = [Pattern(*message) for message in messages.items() if PLACE.search(message[0])]
        certain = [pattern for pattern in with_values if pattern.is_certain]
        self._patterns = sorted(certain, key=lambda pattern: -len(PLACE.sub("", pattern.id)))
        self._made: dict[str, str] = {}

    def translate(self, text: str) -> str:
        """The text, or as much of it as is known, in this language."""
        if text not in self._made:
            self._made[text] = self._translated(text)
        return self._made[text]

    def _translated(self, text: str) -> str:
        before, bare, after = core(text)
        if not bare:
            return text
        found = self._exact.get(bare)
        if found is None and "\n" not in bare and len(bare) <= _LONGEST:
            found = self._by_pattern(bare)
        return f"{before}{self._by_parts(bare) if found is None else found}{after}"

    def _by_pattern(self, text: str) -> str | None:
        for pattern in self._patterns:
            if pattern.anchor in text and (match := pattern.regex.fullmatch(text)):
                values = {name[1:]: self._value(value) for name, value in match.groupdict().items()}
                return PLACE.sub(lambda place, values=values: values[place[1]], pattern.translation)
        return None

    def _value(self, text: str) -> str:
        """A value: translated where it is several words, for one word may be a name."""
        return self.translate(text) if " " in text.strip() else text

    def _by_parts(self, text: str) -> str:
        """What of a text is known."""
        for mark in _APART:
            if mark in text:
                first, rest = text.split(mark, 1)
                return _join(self._value(first), mark, self._value(rest) if mark != "\n" else self.translate(rest))
        number, _, rest = text.partition(" ")
        return f"{number} {self._exact[rest]}" if number[0].isdigit() and rest in self._exact else text


def core(text: str) -> tuple[str, str, str]:
    """A text without the white space and marks that join it to others, and these."""
    before, bare, after = _CORE.fullmatch(text).groups()  # type: ignore[union-attr]  # it matches every text
    return before, bare, after


def num_letters(id: str) -> int:
    """ASCII letters of an id, outside its places."""
    return sum(character.isascii() and character.isalpha() for character in PLACE.sub("", id))


def _join(first: str, mark: str, rest: str) -> str:
    """Two parts; between Japanese sentences stands a Japanese full stop."""
    return first + (_JOINED.get(mark, mark) if _WIDE_END.search(first) else mark) + rest
