"""Blocks -> Markdown, the figures as SVG files in a folder beside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from orchestrator.errors import JobError
from orchestrator.language.catalogue import translator
from orchestrator.report.blocks import Block, Code, Facts, Figure, Paragraph, Report, SampleOutput, Table
from orchestrator.runs.markdown import code_block, plain


def write_markdown(report: Report, file: Path) -> None:
    """Write the report and its figures (`NAME_figures/`).  Raises JobError."""
    try:
        _write(report, file)
    except OSError as error:
        raise JobError(f"--output {file}: cannot be written: {error.strerror}") from None


def _write(report: Report, file: Path) -> None:
    figures = file.with_name(f"{file.stem}_figures")
    lines = [f"# {plain(report.title)}", "", plain(report.subtitle), ""]
    for section in report.sections:
        lines += [f"## {plain(section.title)}", ""]
        for block in section.blocks:
            if isinstance(block, Figure):
                figures.mkdir(parents=True, exist_ok=True)
                (figures / f"{block.name}.svg").write_text(block.svg, encoding="utf-8")
            lines += [*_lines(block, figures.name, report.lang), ""]
    file.write_text("\n".join(lines), encoding="utf-8")


def _lines(block: Block, figures: str, lang: str) -> list[str]:
    w = translator(lang)
    if isinstance(block, Paragraph):
        return [plain(block.text)]
    if isinstance(block, Facts):
        return [f"- {plain(name)}: **{plain(value)}**" for name, value in block.facts]
    if isinstance(block, Code):
        return code_block(block.text)
    if isinstance(block, Figure):
        caption = plain(block.caption)
        return [f"![{caption}]({quote(figures)}/{block.name}.svg)", "", caption]
    if isinstance(block, Table):
        rows = [_row(block.head), "|" + " --- |" * len(block.head)]
        for place, row in enumerate(block.rows):
            rows.append(_row(row, bold=place in block.marked))
        return rows
    assert isinstance(block, SampleOutput)
    texts = {"prompt": block.prompt, "before": block.before, "after": block.after, "wanted": block.wanted}
    return [f"> **{w(name)}**: {plain(text)}  " for name, text in texts.items() if text is not None]


def _row(cells: Sequence[str], bold: bool = False) -> str:
    shown = (plain(str(cell)) for cell in cells)
    return "| " + " | ".join(f"**{cell}**" if bold and cell else cell for cell in shown) + " |"
