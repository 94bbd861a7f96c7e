"""The parts of a report; html.py and markdown.py write them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Paragraph:
    text: str


@dataclass(frozen=True)
class Facts:
    """The few numbers that matter: large, side by side."""

    facts: Sequence[tuple[str, str]]  # name, value


@dataclass(frozen=True)
class Table:
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    marked: Sequence[int] = ()  # rows that stand out


@dataclass(frozen=True)
class Figure:
    name: str  # of its file where it is not inside the report
    svg: str
    caption: str


@dataclass(frozen=True)
class Code:
    text: str


@dataclass(frozen=True)
class SampleOutput:
    """A sample output: the prompt, the model's answers before and after, and the reference."""

    prompt: str
    before: str | None
    after: str
    wanted: str


Block = Paragraph | Facts | Table | Figure | Code | SampleOutput


@dataclass
class ReportSection:
    title: str
    blocks: list[Block] = field(default_factory=list)


@dataclass
class Report:
    title: str
    subtitle: str
    lang: str
    sections: list[ReportSection] = field(default_factory=list)

    def section(self, title: str, *blocks: Block | None) -> None:
        """Add a section of the blocks that are there; none without any."""
        there = [block for block in blocks if block is not None]
        if there:
            self.sections.append(ReportSection(title, there))
