"""The answer inside a text, by a regular expression with one group, and when two of them are equal."""

from __future__ import annotations

import re
import unicodedata
from decimal import Decimal, InvalidOperation

_NUMBER = r"-?[$€£¥]?\d[\d,]*(?:\.\d+)?"
PATTERNS = {  # that have a name
    "gsm8k": rf"####\s*({_NUMBER})",  # https://arxiv.org/abs/2110.14168: the number behind the last ####
    "last_number": rf"({_NUMBER})",
}
_MARKS = str.maketrans("", "", "$€£¥, ")


def pattern_mistake(pattern: str | None) -> str | None:
    """What is wrong with `eval.answer_pattern`; None where it can be used."""
    if pattern is None or pattern in PATTERNS:
        return None
    named = f"or a name: {', '.join(PATTERNS)}"
    try:
        groups = re.compile(pattern).groups
    except re.error as error:
        return f"eval.answer_pattern: {pattern!r} is no regular expression ({error}); give one with one group, {named}"
    if groups != 1:
        return (
            f"eval.answer_pattern: {pattern!r} has {groups} groups; put the answer, and nothing else, in one pair of"
            f" parentheses ((?:...) groups without being one), {named}"
        )
    return None


def extract(pattern: str, text: str) -> str | None:
    """The answer in a text, of several the last; None where there is none."""
    found = [one[1] for one in re.finditer(PATTERNS.get(pattern, pattern), text) if one[1] is not None]
    return found[-1] if found else None


def comparable(answer: str) -> str:
    """Equal for equal answers: 1,000 and $1000.00 are one number, and width and outer spaces do not count."""
    text = unicodedata.normalize("NFKC", answer).strip()
    try:
        number = Decimal(text.translate(_MARKS).rstrip("."))
    except InvalidOperation:
        return text
    return f"{number.normalize():f}" if number.is_finite() else text


def pairs_of_answers(pattern: str, pairs: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """The answers of (generated, reference) pairs, such that two are equal texts exactly where they are one answer.

    A text without an answer equals none.
    """
    return [(_side(pattern, generated, "no answer"), _side(pattern, reference, "-")) for generated, reference in pairs]


def _side(pattern: str, text: str, without: str) -> str:
    found = extract(pattern, text)
    return f"<{without}>" if found is None else comparable(found)
