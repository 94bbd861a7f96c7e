"""Blocks -> one HTML file that needs nothing else: no network, no script; light and dark, phone and paper."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from jinja2.sandbox import SandboxedEnvironment

from orchestrator.job.job_file import Job
from orchestrator.job.paths import write_text_file
from orchestrator.language.catalogue import translator
from orchestrator.report.blocks import Report
from orchestrator.report.run import report_of_run
from orchestrator.report.search import report_of_search
from orchestrator.runs.markdown import printable_lines
from orchestrator.runs.run_folder import RunFolder
from orchestrator.runs.search_folder import SearchFolder

_PAGE = Path(__file__).parent / "page.html"


def write(folder: RunFolder, job: Job, lang: str, file: Path | None) -> Path:
    """Write the page of a run or a search; by default into its folder.  Raises JobError."""
    file = file or folder.path / "report.html"
    write_text_file(file, html(report_of(folder, job, lang)), "--output")
    return file


def report_of(folder: RunFolder, job: Job, lang: str) -> Report:
    """The report of a run, or of a search."""
    if isinstance(folder, SearchFolder):
        return report_of_search(folder, job, lang)
    return report_of_run(folder, job, lang)


def html(report: Report) -> str:
    """The whole page as text."""
    environment = SandboxedEnvironment(autoescape=True, trim_blocks=True, lstrip_blocks=True, finalize=_shown)
    return _unique_ids(
        environment.from_string(_PAGE.read_text(encoding="utf-8")).render(
            report=report, w=translator(report.lang), kind_of=lambda block: type(block).__name__
        )
    )


def _shown(value: Any) -> Any:
    """Text without control characters; figures, which are marked as safe, as they are."""
    return printable_lines(value) if type(value) is str else value


def _unique_ids(page: str) -> str:
    """Each figure's own names for its clips and marks: in one page they would be mixed up."""
    parts = page.split("<figure id=")
    for place, part in enumerate(parts[1:], start=1):
        names = set(re.findall(r'<(?:clipPath|pattern|path|g|text|use)[^>]*? id="([^"]+)"', part))
        for name in sorted(names, key=len, reverse=True):
            part = part.replace(f'id="{name}"', f'id="f{place}-{name}"').replace(f"#{name}", f"#f{place}-{name}")
        parts[place] = part
    return "<figure id=".join(parts)
