"""The verbs `bench`, `report` and `tco`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from orchestrator.bank.hooks import BANK_HOOKS
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
    parse_numbers,
    print_json,
    say,
    show,
)
from orchestrator.errors import JobError
from orchestrator.job.paths import resolve_path
from orchestrator.runs.run_folder import RunFolder
from orchestrator.views.screen import new_table

LangOption = Annotated[str, typer.Option("--lang", help="en or ja")]


verbs = typer.Typer()


@verbs.command()
def bench(
    what: Annotated[
        str | None, typer.Argument(help="a job file or recipe; with --generate a run", autocompletion=complete_job)
    ] = None,
    set_: SetOption = [],
    steps: Annotated[int, typer.Option("--steps", min=1, help="steps that are timed")] = 5,
    generate: Annotated[bool, typer.Option("--generate", help="time a run's tuned model as it generates")] = False,
    batch_sizes: Annotated[str, typer.Option("--batch-sizes", help="of --generate")] = "1,4",
    prompt_lengths: Annotated[str, typer.Option("--prompt-lengths", help="of --generate, in tokens")] = "64,256",
    new_tokens: Annotated[int, typer.Option("--new-tokens", min=2, help="of --generate")] = 32,
    timeline: Annotated[
        bool, typer.Option("--timeline", help="draw two steps: computation and transfers, layer by layer")
    ] = False,
    bus: Annotated[
        float | None, typer.Option("--bus", min=0.001, help="GB/s of a bus to emulate, where the machine has none")
    ] = None,
    compare: Annotated[
        tuple[Path, Path] | None, typer.Option("--compare", help="two earlier results, number by number")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", help="the result's file; default: beside the runs")] = None,
    runs: RunsOption = Path("runs"),
    json_: JsonOption = False,
) -> None:
    """Measure where the time and memory of training go, or how fast the tuned model answers, on this machine.

    Examples: orchestrator bench quickstart
              orchestrator bench latest --generate --batch-sizes 1,4,8
              orchestrator bench job.yaml --timeline --bus 10
              orchestrator bench --compare runs/bench-a.json runs/bench-b.json
    """
    if compare is not None:
        _compare(*compare, json_)
        return
    output = resolve_path(output, "--output", kind="new file") if output else None
    if what is None:
        raise JobError("bench: nothing to measure; give a job file, a recipe, or a run with --generate")
    from orchestrator.lifecycle.prepare import prepare
    from orchestrator.training.workers import bench as benchmarks

    if generate:
        run = RunFolder.find(what, runs)
        sizes, lengths = parse_numbers("--batch-sizes", batch_sizes), parse_numbers("--prompt-lengths", prompt_lengths)
        result = benchmarks.bench_generation(run, run.job(), sizes, lengths, new_tokens, say)
    else:
        loaded = load_job(what, ["cluster.num_workers=1", *set_])
        bus_bytes_per_s = bus * 1e9 if bus else None
        ready = prepare(loaded, say, bank=BANK_HOOKS)
        result = benchmarks.bench_training(loaded, ready, steps, say, timeline, bus_bytes_per_s)
    _print_bench(result, benchmarks.save(result, runs, output), json_)


def _compare(a: Path, b: Path, as_json: bool) -> None:
    from orchestrator.views.bench import comparison_view, flat, read

    first, second = read(a), read(b)
    if as_json:
        print_json({"a": flat(first), "b": flat(second)})
    else:
        out.print(comparison_view(first, second))


def _print_bench(result: dict[str, Any], file: Path, as_json: bool) -> None:
    from orchestrator.views.bench import bench_view

    picture = None
    if "timeline" in result:
        from orchestrator.report.bench import timeline_picture

        picture = timeline_picture(result, file)
    if as_json:
        print_json({**result, "file": str(file), **({"picture": str(picture)} if picture else {})})
        return
    out.print(bench_view(result))
    for written in (picture, file):
        if written:
            show(f"wrote {written}")


@verbs.command()
def report(
    name: RunArgument = "latest",
    lang: LangOption = "en",
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
    from orchestrator.report.translations import LANGUAGES

    if lang not in LANGUAGES:
        raise JobError(f"--lang {lang}: is not available; use {' or '.join(LANGUAGES)}")
    if output is not None:
        output = resolve_path(output, "--output", kind="new file")
    folder = search.find(name, runs) or RunFolder.find(name, runs)
    job = folder.job()
    if markdown:
        file = output or folder.path / "report.md"
        write_markdown(report_of(folder, job, lang), file)
    else:
        file = write(folder, job, lang, output)
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
    lang: LangOption = "en",
    json_: JsonOption = False,
) -> None:
    """Show what a job costs: machines, electricity, a run, a million tokens, a year; and on other machines.

    Examples: orchestrator tco job.yaml --set cost.power_w=65
              orchestrator tco job.yaml --hardware home-lab --against my_offers.yaml
    """

    from orchestrator.lifecycle.machines import declared
    from orchestrator.lifecycle.prepare import plan_without_data
    from orchestrator.report.costs import tco_of_job

    loaded = load_job(job, set_)
    ready = plan_without_data(loaded, declared(hardware) if hardware else None, say, bank=BANK_HOOKS)
    costs, shown = tco_of_job(loaded, ready, against, lang)
    if json_:
        print_json(
            {"currency": loaded.spec.cost.currency, "ways": [{**asdict(c), "per_run": c.per_run} for c in costs]}
        )
        return
    table = new_table(*shown.head, fold=True)
    for place, row in enumerate(shown.rows):
        table.add_row(*row, style="green" if place in shown.marked else None)
    out.print(table)
