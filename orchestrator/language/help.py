"""Help pages and mistakes of the command line in the language of people, in cells of a terminal.

The parser's own formatter counts characters, and a Japanese one takes two cells; its texts are English.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import rich.text
from rich.cells import cell_len
from typer.core import TyperGroup

from orchestrator.language.catalogue import tr
from orchestrator.language.choice import language, speak

_Context = TyperGroup.context_class
_English = _Context.formatter_class
_FIRST = 30  # cells: options longer than that stand on a line of their own
_EXTRA = re.compile(r"  \[([^\[\]]+)\]$")  # [default: runs], [required]
_divide_english_line: Any = getattr(rich.text, "divide_line", None)  # rich's own; without it lines break as rich likes
_END = "、。，．）」』ーっゃゅょァィゥェォッャュョ!?:;,.)…"  # a line does not begin so
_BITS = re.compile(rf"[!-~]+[{_END}]*\s*|\s+|[（「『(]*.[{_END}]*\s*")  # between them a line may break


class _Japanese(_English):
    """A help page whose texts are translated."""

    def write_usage(self, prog: str, args: str = "", prefix: str | None = None) -> None:
        super().write_usage(prog, args, f"{tr('Usage')}: ")

    def write_heading(self, heading: str) -> None:
        super().write_heading(tr(heading))

    def write_text(self, text: str) -> None:
        indent = " " * self.current_indent
        paragraphs = [_paragraph(paragraph, self.width - self.current_indent) for paragraph in text.split("\n\n")]
        self.write("\n\n".join("\n".join(indent + line for line in lines) for lines in paragraphs) + "\n")

    def write_dl(self, rows: Sequence[tuple[str, str]], col_max: int = _FIRST, col_spacing: int = 2) -> None:
        indent, rows = " " * self.current_indent, list(rows)
        first = min(max(cell_len(name) for name, _ in rows), col_max) + col_spacing
        for name, text in rows:
            lines = wrap(_explained(text), max(self.width - first - 2, 10)) or [""]
            if cell_len(name) > first - col_spacing:
                lines = ["", *lines]
            for line in lines:
                self.write(f"{indent}{name}{' ' * max(0, first - cell_len(name))}{line}".rstrip() + "\n")
                name = ""


class Verbs(TyperGroup):
    """A group of verbs that each take `--lang`, as the group does."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        for command in self.commands.values():
            self.add_language_to(command)

    def add_language_to(self, command: Any) -> None:
        """Give a verb, and the verbs of a group, the option `--lang`."""
        command.params += [one for one in self.params if one.name == "lang"]
        if isinstance(command, TyperGroup):
            for one in command.commands.values():
                self.add_language_to(one)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        if language() == "en":
            super().format_commands(ctx, formatter)
            return
        shown = [(name, command) for name, command in self.commands.items() if not command.hidden]
        with formatter.section("Commands"):
            formatter.write_dl([(name, _first_sentence(command.help or "")) for name, command in shown])


def print_in(language: str) -> None:
    """Print in this language from now on, help pages with it."""
    speak(language)
    is_english = language == "en"
    _Context.formatter_class = _English if is_english else _Japanese
    if _divide_english_line:
        lines = _divide_english_line if is_english else _divide_line
        rich.text.divide_line = lines  # pyright: ignore[reportPrivateImportUsage]


def mistake_text(error: Any) -> str:
    """A mistake in the command line: how the command is used, and what is wrong."""
    file = io.StringIO()
    error.show(file)
    return "\n".join(tr(line) for line in file.getvalue().split("\n"))


def wrap(text: str, width: int) -> list[str]:
    """Lines of at most so many cells."""
    ends = [*_breaks(text, width), len(text)]
    return [line for begin, end in pairwise([0, *ends]) if (line := text[begin:end].strip())]


def fill(text: str, width: int, indent: int) -> str:
    """One text of such lines, all but the first indented."""
    begins = _breaks(text, width, indent)
    lines = [text[begin:end].rstrip() for begin, end in pairwise([0, *begins, len(text)])]
    return f"\n{' ' * indent}".join(lines)


def _breaks(text: str, width: int, indent: int = 0) -> list[int]:
    """Where lines begin: between words, or between characters of Japanese, not before punctuation.

    All but the first are `indent` cells shorter.
    """
    found, used = list[int](), 0
    for bit in _BITS.finditer(text):
        size = cell_len(bit[0].rstrip())
        if used and used + size > width:
            found.append(bit.start())
            used = indent
        used += cell_len(bit[0])
    return found


def _divide_line(text: str, width: int, fold: bool = True) -> list[int]:
    """As rich's own, which takes a Japanese sentence for one word and moves it to a new line whole."""
    if text.isascii() or not fold:
        return _divide_english_line(text, width, fold)
    found = _breaks(text, width)
    lines = [text[begin:end].rstrip() for begin, end in pairwise([0, *found, len(text)])]
    has_long_word = any(cell_len(line) > width for line in lines)
    return _divide_english_line(text, width, fold) if has_long_word else found


def _paragraph(text: str, width: int) -> list[str]:
    """A paragraph of a help text; examples keep their lines."""
    if "Example" not in text.split(":")[0]:
        return wrap(tr(" ".join(text.split())), width)
    first, *rest = [line for line in text.split("\n") if line.strip("\b ")]
    mark, _, command = first.strip().partition(":")
    return [f"{tr(mark)}:", *(f"  {line.strip()}" for line in [command, *rest] if line.strip())]


def _explained(text: str) -> str:
    """The help of an option, its default and whether it is required."""
    if not (extra := _EXTRA.search(text)):
        return tr(text)
    return f"{tr(text[: extra.start()])}  [{'; '.join(map(tr, extra[1].split('; ')))}]".strip()


def _first_sentence(text: str) -> str:
    """What a list of verbs shows of a help text."""
    return tr(" ".join(text.split("\n\n")[0].split())).split("。")[0]
