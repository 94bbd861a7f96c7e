"""Which language people read.  Files, logs and `--json` are data: they stay English."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

LANGUAGES = ("en", "ja")
_VARIABLES = ("LANGUAGE", "LC_ALL", "LC_MESSAGES", "LANG")  # in the order in which gettext reads them
_language = "en"


def language() -> str:
    """The language of what this process prints."""
    return _language


def speak(language: str) -> None:
    """Print in this language from now on."""
    global _language
    _language = language


def language_of(arguments: Sequence[str], environment: Mapping[str, str]) -> str:
    """What a command line and its environment choose; English for what is not known, which the parser refuses."""
    if "--json" in arguments:
        return "en"
    chosen = [after for one, after in pairwise(arguments) if one == "--lang"]
    chosen += [one.removeprefix("--lang=") for one in arguments if one.startswith("--lang=")]
    chosen += [value.split(":")[0] for name in _VARIABLES if (value := environment.get(name))][:1]
    first = chosen[0].replace("-", "_").split("_")[0].split(".")[0] if chosen else "en"
    return first if first in LANGUAGES else "en"
