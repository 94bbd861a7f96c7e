"""Blocks -> Markdown, the figures as SVG files in a folder beside it."""

from __future__ import annotations

from pathlib import Path

from orchestrator.errors import JobError
from orchestrator.report.blocks import Answer, Block, Code, Facts, Figure, Paragraph, Report, Table
from orchestrator.report.words import words


def write_markdown(report: Report, file: Path) -> None:
    """Write the report and its figures (`NAME_figures/`).  Raises JobError."""
    try:
        _write(report, file)
    except OSError as error:
        raise JobError(f"--output {file}: cannot be written: {error.strerror}") from None


def _write(report: Report, file: Path) -> None:
    figures = file.with_name(f"{file.stem}_figures")
    lines = [f"# {report.title}", "", report.subtitle, ""]
    for section in report.sections:
        lines += [f"## {section.title}", ""]
        for block in section.blocks:
            if isinstance(block, Figure):
                figures.mkdir(parents=True, exist_ok=True)
                (figures / f"{block.name}.svg").write_text(block.svg, encoding="utf-8")
            lines += [*_lines(block, figures.name, report.lang), ""]
    file.write_text("\n".join(lines), encoding="utf-8")


def _lines(block: Block, figures: str, lang: str) -> list[str]:
    w = words(lang)
    if isinstance(block, Paragraph):
        return [block.text]
    if isinstance(block, Facts):
        return [f"- {name}: **{value}**" for name, value in block.facts]
    if isinstance(block, Code):
        return ["```", block.text, "```"]
    if isinstance(block, Figure):
        return [f"![{block.caption}]({figures}/{block.name}.svg)", "", block.caption]
    if isinstance(block, Table):
        rows = [_row(block.head), _row(["---"] * len(block.head))]
        for place, row in enumerate(block.rows):
            rows.append(_row([f"**{cell}**" if cell and place in block.marked else cell for cell in row]))
        return rows
    assert isinstance(block, Answer)
    said = {"prompt": block.prompt, "before": block.before, "after": block.after, "wanted": block.wanted}
    return [f"> **{w(name)}**: {' '.join(text.split())}  " for name, text in said.items() if text is not None]


def _row(cells: object) -> str:
    assert isinstance(cells, list | tuple)
    return "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
