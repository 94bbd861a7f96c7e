"""The report's own words in Japanese; English is the key.  What a planner or a library reports stays in English."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

from clusters.safe.reading import load_yaml, read_text

LANGUAGES = ("en", "ja")
Word = Callable[[str], str]


@cache
def japanese() -> dict[str, str]:
    """English text -> its translation."""
    return load_yaml(read_text(Path(__file__).with_name("japanese.yaml")))


def words(lang: str) -> Word:
    """A translator into `lang`.  Raises KeyError for a sentence of ours that has no translation."""
    return japanese().__getitem__ if lang == "ja" else lambda text: text
