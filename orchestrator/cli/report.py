"""The verbs `report`, `dashboard` and `tco`."""

from __future__ import annotations

import os
import sys
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
def dashboard(
    folder: Annotated[Path, typer.Argument(help="the folder that holds the runs")] = Path("runs"),
    cluster: Annotated[
        str | None,
        typer.Option("--cluster", help="HOST:PORT of a Ray cluster whose machines are shown beside the runs"),
    ] = None,
    host: Annotated[
        str, typer.Option("--host", help="another than this machine's own lets those in who have the printed token")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0: any free one")] = 8200,
    open_: Annotated[
        bool | None, typer.Option("--open/--no-open", help="open it in a browser; default: where there is a desktop")
    ] = None,
    json_: JsonOption = False,
) -> None:
    """Show the runs of a folder in the browser, live: loss curves, time left, machines, plan, logs; until Ctrl-C.

    Nothing can be changed there.  On another machine's loopback: ssh -L 8200:localhost:8200 MACHINE

    Examples: orchestrator dashboard
              orchestrator dashboard /data/runs --cluster 192.168.1.10:6379 --no-open
    """
    import asyncio
    import webbrowser

    from orchestrator.dashboard.server import Settings, serve
    from orchestrator.serving.address import is_loopback, listen

    place = resolve_path(folder, "dashboard", kind="new folder")
    if not is_loopback(host):
        say(f"anyone with the printed address and its token can read the runs, unencrypted (--host {host})")
    with listen(host, port) as listening:

        def begun(url: str) -> None:
            print_json({"url": url}) if json_ else show(f"dashboard of {folder}: {url}")
            sys.stdout.flush()
            if (_has_desktop() and not json_) if open_ is None else open_:
                webbrowser.open(url)

        try:
            asyncio.run(serve(Settings(place, host, cluster, language()), listening, begun))
        except KeyboardInterrupt:
            say("the dashboard has ended")


def _has_desktop() -> bool:
    """Whether somebody sits here: without a display a browser would start in the terminal."""
    if not out.is_terminal:
        return False
    return sys.platform in ("darwin", "win32") or any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY"))


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
