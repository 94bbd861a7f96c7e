"""Text of a user, a model or a library inside a Markdown page: shown as it is, never read as markup."""

from __future__ import annotations

import re

from clusters.safe.reading import printable

_SIGNS = re.compile(r"([\\`*\[\]|$~])")
_UNDERSCORE = re.compile(r"(?<![^\W_])_|_(?![^\W_])")  # inside a word it is no markup
_LINE_START = re.compile(r"^(\s*)([#>+-]|\d+(?=[.)]))")


def plain(text: str) -> str:
    """One line of Markdown that shows the text: control characters as escapes, line breaks as spaces."""
    line = printable(" ".join(text.split()) if text.strip() else text.strip())
    line = _UNDERSCORE.sub(r"\\_", _SIGNS.sub(r"\\\1", line))
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _LINE_START.sub(lambda found: f"{found[1]}&#{ord(found[2][0])};{found[2][1:]}", line)


def inline_code(text: str) -> str:
    """The text as a code span on one line; a pipe, which would end a table's cell, is escaped."""
    line = printable(" ".join(text.split()) if text.strip() else text.strip()).replace("|", r"\|")
    ticks = "`" * (1 + max((len(run) for run in re.findall(r"`+", line)), default=0))
    pad = " " if line.startswith("`") or line.endswith("`") or not line else ""
    return f"{ticks}{pad}{line}{pad}{ticks}"


def code_block(text: str, language: str = "") -> list[str]:
    """Lines of a fenced block that no line of the text can end."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", text)), default=0))
    return [f"{fence}{language}", printable_lines(text), fence]


def printable_lines(text: str) -> str:
    """The text with its line breaks, tabs as spaces, and every other control character as an escape."""
    return "\n".join(printable(line) for line in text.replace("\r\n", "\n").expandtabs(4).split("\n"))
