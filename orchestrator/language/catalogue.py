"""An English text -> the same in Japanese.

Texts are made all over the project by f-strings.  A message's id is such a text with `{0}`, `{1}` ... where values
stand.  A text that was made is read in every way that the ids allow, as one message with values, which may be messages
too, or as several with a mark between them, and translated in the way that knows the most letters of it.  What is
unknown stays English.

The catalogue is gettext's, `locale/ja/LC_MESSAGES/orchestrator.po`, and the `.mo` that `tests/translations.py` makes of
it.  Nothing is loaded for English.
"""

from __future__ import annotations

import gettext
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import NamedTuple

from orchestrator.language.choice import language

LOCALE = Path(__file__).with_name("locale")
DOMAIN = "orchestrator"
PLACE = re.compile(r"\{(\d+)\}")
_ENOUGH_LETTERS = 7  # of an id with values: fewer match by chance
_LONGEST = 2000  # characters: a longer line is somebody's data
_NEXT = 0.9999  # that letters of a value, or of a part, count for
_MOST_READ = 20_000  # texts that are kept with their translation
_MANY = 12  # parts of a text: their number's square is how many readings there are
_MARK = re.compile(r"(?:; or|[.;:,]| or(?= be )) ")  # between messages
_JAPANESE_MARK = {". ": "。", "; ": "。", ", ": "、", "; or ": "、または ", " or ": "、または "}
_CORE = re.compile(r"([\s;,:]*)(.*?)([\s;,:]*)", re.DOTALL)
_WIDE = re.compile(r"[\u3040-\u30ff\u4e00-\u9fff。）」]")
_NUMBER = r"\d(?:[\d.,]*\d)?[%\w]*"
_COUNT = re.compile(rf"({_NUMBER}(?: [KMGT]?i?B)?) ([A-Za-z].*)")  # 12 rows dropped, 3 GiB usable
_QUANTITY = re.compile(rf"{_NUMBER} [A-Za-z/]+|'[^']*'(?:,? (?:or )?'[^']*')*|/.*")  # or names, or a path
_TURN = re.compile(r"(turn \d+) (.*)")  # turn 2 (user) has no text
_BRACKETS = re.compile(r"(.*\S) +\(([^()]+)\)")
_AMOUNT = re.compile(r"([a-z][a-z -]*) (\d.*)")  # training 82 s
Translator = Callable[[str], str]


class Rendering(NamedTuple):
    """How much of a text is known, in letters, and the text translated so."""

    known: float
    text: str


@dataclass(frozen=True)
class Pattern:
    """An id with values, and its translation."""

    id: str
    translation: str

    @cached_property
    def num_letters(self) -> int:
        return num_letters(self.id)

    @property
    def weight(self) -> float:
        """Its letters; of two ids with as many letters the one with more signs counts a little more."""
        return self.num_letters + 0.001 * len(PLACE.sub("", self.id))

    @cached_property
    def literals(self) -> tuple[str, ...]:
        """What stands before, between and behind its places."""
        return tuple(PLACE.split(self.id)[::2])

    @cached_property
    def anchor(self) -> str:
        """The longest literal part: a text without it is not this message."""
        return max(self.literals, key=len)

    def values(self, text: str, widest_first: bool = False) -> dict[str, str] | None:
        """The value of each place; None where the text is not this message.  Takes time in proportion to the text.

        Where a value could end at several marks it ends at the first, or each of them at its last.
        """
        first, *between, last = self.literals
        begin, end, found = len(first), len(text) - len(last), list[str]()
        if begin > end or not text.startswith(first) or not text.endswith(last):
            return None
        for literal in reversed(between) if widest_first else between:
            at = text.rfind(literal, begin, end) if widest_first else text.find(literal, begin, end)
            if at < 0:
                return None
            if widest_first:
                found.append(text[at + len(literal) : end])
                end = at
            else:
                found.append(text[begin:at])
                begin = at + len(literal)
        found.append(text[begin:end])
        found = found[::-1] if widest_first else found
        if self.num_letters < _ENOUGH_LETTERS:  # values are words or quantities, but for what follows a mark at the end
            is_open = self.literals[-2].endswith((": ", ", ")) and not last
            if any(" " in value and not _QUANTITY.fullmatch(value) for value in found[: -1 if is_open else None]):
                return None
        return dict(zip(PLACE.findall(self.id), found, strict=True))

    def readings(self, text: str) -> list[dict[str, str]]:
        """The values in each way that they are looked for: one, or two that differ."""
        found = [values for widest in (False, True) if (values := self.values(text, widest))]
        return found[:1] if found[1:] == found[:1] else found

    @property
    def is_certain(self) -> bool:
        """Whether a text that matches it is it: `{0} of {1}` would match any sentence."""
        return self.num_letters >= _ENOUGH_LETTERS or (self.id[0].isalpha() and self.num_letters > 1)


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
        self._patterns = [pattern for pattern in with_values if pattern.is_certain]
        self._read: dict[str, Rendering] = {}

    def translate(self, text: str) -> str:
        """The text, or as much of it as is known, in this language."""
        return "\n".join(self._rendering(line).text for line in text.split("\n"))

    def _rendering(self, text: str) -> Rendering:
        if text not in self._read:
            if len(self._read) >= _MOST_READ:
                self._read.clear()
            before, bare, after = core(text)
            known, translated = self._best(bare) if 0 < len(bare) <= _LONGEST else Rendering(0, bare)
            self._read[text] = Rendering(known, f"{before}{translated}{after}")
        return self._read[text]

    def _best(self, text: str) -> Rendering:
        if text in self._exact:
            return Rendering(num_letters(text), self._exact[text])
        found = [*self._by_patterns(text), *self._by_marks(text), *self._by_number(text), *self._by_brackets(text)]
        return max(found, key=lambda one: one.known, default=Rendering(0, text))

    def _by_patterns(self, text: str) -> Iterator[Rendering]:
        """As one message with values, whose letters count a little less than its own.

        It is the worse where a value is a message and a part of another: it cuts that one in two.
        """
        for pattern in self._patterns:
            if pattern.anchor not in text:
                continue
            for found in pattern.readings(text):
                values = {place: self._value(value) for place, value in found.items()}
                cuts = sum(one.known > 0 and _MARK.search(one.text) is not None for one in values.values())
                known = pattern.weight + _NEXT * sum(one.known for one in values.values()) - cuts / 2
                shown = PLACE.sub(lambda place, values=values: values[place[1]].text, pattern.translation)
                yield Rendering(known, shown)

    def _by_marks(self, text: str) -> Iterator[Rendering]:
        """As two parts; of many parts the first is taken off, by each kind of mark."""
        marks = list(_MARK.finditer(text))
        if len(marks) > _MANY:
            marks = list({mark[0]: mark for mark in reversed(marks)}.values())
        for mark in marks:
            first, rest = self._value(text[: mark.start()]), self._value(text[mark.end() :])
            if known := first.known + rest.known:
                yield Rendering(_NEXT * known, _join(first.text, mark[0], rest.text))

    def _by_number(self, text: str) -> Iterator[Rendering]:
        """As a number of something, which in Japanese stands behind it, or as a turn by its number and what it has."""
        if (count := _COUNT.fullmatch(text)) and count[2] in self._exact and num_letters(count[2]) > 3:  # no unit
            yield Rendering(num_letters(count[2]), f"{self._exact[count[2]]} {count[1]}")
        if (amount := _AMOUNT.fullmatch(text)) and amount[1] in self._exact:
            yield Rendering(num_letters(amount[1]), f"{self._exact[amount[1]]} {amount[2]}")
        if (turn := _TURN.fullmatch(text)) and (fault := self._rendering(turn[2])).known:
            place = self._rendering(f"a {turn[1]}")
            yield Rendering(num_letters(turn[1]) + _NEXT * fault.known, f"{place.text} {fault.text}")

    def _by_brackets(self, text: str) -> Iterator[Rendering]:
        """As a part, and another one in brackets behind it."""
        if parts := _BRACKETS.fullmatch(text):
            first, inner = self._value(parts[1]), self._value(parts[2])
            rest = max(Rendering(inner.known, f"({inner.text})"), self._rendering(f"({parts[2]})"))
            if known := first.known + rest.known:
                yield Rendering(_NEXT * known, f"{first.text} {rest.text}")

    def _value(self, text: str) -> Rendering:
        """A value or a part: translated where it is several words, for one word may be a name."""
        return self._rendering(text) if " " in text.strip() else Rendering(0, text)


def core(text: str) -> tuple[str, str, str]:
    """A text without the white space and marks that join it to others, and these."""
    before, bare, after = _CORE.fullmatch(text).groups()  # type: ignore[union-attr]  # it matches every text
    return before, bare, after


def num_letters(id: str) -> int:
    """ASCII letters of an id, outside its places."""
    return sum(character.isascii() and character.isalpha() for character in PLACE.sub("", id))


def _join(first: str, mark: str, rest: str) -> str:
    """Two parts; between Japanese ones, and behind a Japanese sentence, stands a Japanese mark."""
    is_japanese = _WIDE.match(first[-1:]) and (mark == ". " or _WIDE.match(rest))
    return f"{first}{_JAPANESE_MARK.get(mark, mark) if is_japanese else mark}{rest}"
