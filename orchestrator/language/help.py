"""Help pages and mistakes of the command line in the language of people, in cells of a terminal.

The parser's own formatter counts characters, and a Japanese one takes two cells; its texts are English.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Any

from rich.cells import cell_len
from typer.core import TyperGroup

from orchestrator.language.catalogue import tr
from orchestrator.language.choice import language, speak

_Context = TyperGroup.context_class
_English = _Context.formatter_class
_FIRST = 30  # cells: options longer than that stand on a line of their own
_EXTRA = re.compile(r"  \[([^\[\]]+)\]$")  # [default: runs], [required]
_BITS = re.compile(r"[!-~]+|\s+|.[、。，．）」』!?:;,.)]*")  # between them a line may break


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
        for option in [one for one in self.params if one.name == "lang"]:
            _add_option(self, option)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        if language() == "en":
            super().format_commands(ctx, formatter)
            return
        shown = [(name, command) for name, command in self.commands.items() if not command.hidden]
        with formatter.section("Commands"):
            formatter.write_dl([(name, _first_sentence(command.help or "")) for name, command in shown])


def _add_option(group: TyperGroup, option: Any) -> None:
    for command in group.commands.values():
        command.params.append(option)
        if isinstance(command, TyperGroup):
            _add_option(command, option)


def print_in(language: str) -> None:
    """Print in this language from now on, help pages with it."""
    speak(language)
    _Context.formatter_class = _English if language == "en" else _Japanese


def mistake_text(error: Any) -> str:
    """A mistake in the command line: how the command is used, and what is wrong."""
    file = io.StringIO()
    error.show(file)
    return "\n".join(tr(line) for line in file.getvalue().split("\n"))


def wrap(text: str, width: int) -> list[str]:
    """Lines of at most so many cells: between words, or between characters of Japanese, not before punctuation."""
    lines, used = [""], 0
    for bit in _BITS.findall(text):
        size = cell_len(bit)
        if used + size > width and used and not bit.isspace():
            lines.append("")
            used = 0
        if bit.isspace() and not used:
            continue
        lines[-1] += bit
        used += size
    return [line.rstrip() for line in lines if line.strip()]


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
