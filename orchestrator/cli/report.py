"""The verbs `report` and `tco`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from orchestrator.cli import search
from orchestrator.cli.options import (
    HardwareOption,
    JsonOption,
    RunArgument,
    RunsOption,
    SetOption,
    complete_job,
    load_job,
    out,
    print_json,
    say,
    show,
)
from orchestrator.job.paths import resolve_path
from orchestrator.language.choice import language
from orchestrator.runs.run_folder import RunFolder
from orchestrator.views.screen import new_table

verbs = typer.Typer()


@verbs.command()
def report(
    name: RunArgument = "latest",
    output: Annotated[Path | None, typer.Option("--output", help="default: report.html in the run's folder")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Markdown with SVG files instead of HTML")] = False,
    runs: RunsOption = Path("runs"),
    json_: JsonOption = False,
) -> None:
    """Write one page about a run or a search: the job, the plan, the result, and what it cost.

    Examples: orchestrator report latest
              orchestrator report search-quickstart --lang ja --output report.html
    """
    from orchestrator.report.html import report_of, write
    from orchestrator.report.markdown import write_markdown

    if output is not None:
        output = resolve_path(output, "--output", kind="new file")
    folder = search.find(name, runs) or RunFolder.find(name, runs)
    job = folder.job()
    if markdown:
        file = output or folder.path / "report.md"
        write_markdown(report_of(folder, job, language()), file)
    else:
        file = write(folder, job, language(), output)
    if json_:
        print_json({"report": str(file)})
    else:
        show(f"wrote {file}")


@verbs.command()
def tco(
    job: Annotated[str, typer.Argument(help="a job file, or the name of a recipe", autocompletion=complete_job)],
    set_: SetOption = [],
    hardware: HardwareOption = None,
    against: Annotated[
        Path | None, typer.Option("--against", help="a hardware file: each of its machines alone, bought or rented")
    ] = None,
    json_: JsonOption = False,
) -> None:
    """Show what a job costs: machines, electricity, a run, a million tokens, a year; and on other machines.

    Examples: orchestrator tco job.yaml --set cost.power_w=65
              orchestrator tco job.yaml --hardware home-lab --against my_offers.yaml
    """

    from orchestrator.bank.hooks import BANK_HOOKS
    from orchestrator.lifecycle.machines import declared
    from orchestrator.lifecycle.prepare import plan_without_data
    from orchestrator.report.costs import tco_of_job

    loaded = load_job(job, set_)
    ready = plan_without_data(loaded, declared(hardware) if hardware else None, say, bank=BANK_HOOKS)
    costs, shown = tco_of_job(loaded, ready, against, language())
    if json_:
        print_json(
            {"currency": loaded.spec.cost.currency, "ways": [{**asdict(c), "per_run": c.per_run} for c in costs]}
        )
        return
    table = new_table(*shown.head, fold=True)
    for place, row in enumerate(shown.rows):
        table.add_row(*row, style="green" if place in shown.marked else None)
    out.print(table)
