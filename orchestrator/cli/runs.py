"""The verbs of a run: list, status, logs, stop, resume, evaluate, merge, sync."""

from __future__ import annotations

import json
import time
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any

import typer

from orchestrator.cli import remote
from orchestrator.cli import search as search_verbs
from orchestrator.cli.options import (
    JsonOption,
    RunArgument,
    RunsOption,
    out,
    print_json,
    print_result,
    say,
    show,
    show_data,
)
from orchestrator.errors import JobError, OrchestratorError
from orchestrator.job.paths import resolve_path
from orchestrator.language.catalogue import tr
from orchestrator.runs.run_folder import RunFolder, runs_and_others
from orchestrator.views.screen import print_rows, write

verbs = typer.Typer()
_PIECE_BYTES = 2**20  # of events that are printed at a time: a long run has hundreds of megabytes


@verbs.command(name="list")
def list_runs(runs: RunsOption = Path("runs"), json_: JsonOption = False) -> None:
    """List the runs in a folder, oldest first."""
    from orchestrator.views.result import RUN_HEAD, damaged_row, listed_row, run_cells

    found, others = runs_and_others(runs)
    rows = []
    for run in found:
        try:
            rows.append(listed_row(run))
        except JobError as error:
            rows.append(damaged_row(run, error.mistakes))
    rows += _damaged_searches(others) if others else []
    if json_:
        print_json(rows)
    elif rows:
        print_rows(RUN_HEAD, [run_cells(row) for row in rows], dispensable=("started", "step"))
    else:
        show(f"no runs in {runs}")
    for row in rows:
        for line in row.get("damage", ()):
            say(f"{row['run']} is damaged: {line}")


def _damaged_searches(folders: list[Path]) -> list[dict[str, Any]]:
    from orchestrator.runs.condition import damage
    from orchestrator.runs.search_folder import SearchFolder
    from orchestrator.views.result import damaged_row

    searches = SearchFolder.in_order(one for one in map(SearchFolder, folders) if one.has_started)
    return [damaged_row(search, wrong) for search in searches if (wrong := damage(search))]


@verbs.command()
def status(run: RunArgument = "latest", runs: RunsOption = Path("runs"), json_: JsonOption = False) -> None:
    """Show how far a run is, and how good its result is."""
    from orchestrator.runs.condition import damage
    from orchestrator.runs.summary.summary_file import summary_of
    from orchestrator.runs.worker_stats import stages_of_run, stats_of_run
    from orchestrator.views.result import result_view, run_row, status_lines
    from orchestrator.views.workers import stages_view, workers_view

    if search := search_verbs.find(run, runs):
        _complete_mirror(search)
        search_verbs.show(search, json_)
        return
    found = RunFolder.find(run, runs)
    if remote.is_remote(found) and not remote.is_closed(found):
        remote.status(found, json_)
        return
    read = cache(partial(summary_of, found))
    if not found.is_locked() and (wrong := damage(found, lambda: read().state_by_events)):
        raise JobError([f"{found.run_id} is damaged: {line}" for line in wrong])
    summary = read()
    if text := summary.damaged_lines:
        say(f"{found.path / 'events.jsonl'}: {text}; passed over")
    _complete_mirror(found)
    row, events = run_row(found, summary), summary.group_events
    stages = stages_of_run(found.plan(), events) if (found.path / "plan.json").exists() else []
    by_worker = stats_of_run(events)
    if json_:
        lists = {"workers": by_worker, "stages": stages}
        print_json(row | {name: [one.to_json() for one in rows] for name, rows in lists.items() if rows})
        return
    for key, value in status_lines(row):
        show(f"{key:<13} {value}")
    if stages or by_worker:
        out.print()
        out.print(stages_view(stages) if stages else workers_view(by_worker))
    if row["state"] == "finished":
        out.print()
        out.print(result_view(found, summary))


def _complete_mirror(run: RunFolder) -> None:
    """Tell MLflow how a run ended whose driver was killed; a failure is reported and does not fail the verb."""
    from orchestrator.runs.mirror.state import is_left_running

    try:
        if not remote.is_remote(run) and is_left_running(run):
            from orchestrator.runs.mirror.tracking import complete

            if address := complete(run, run.job()):
                say(f"MLflow at {address} now shows how {run.run_id} ended")
    except OrchestratorError as error:
        say(str(error))


@verbs.command()
def logs(
    run: RunArgument = "latest",
    runs: RunsOption = Path("runs"),
    follow: Annotated[bool, typer.Option("--follow", "-f", help="keep printing until the run ends")] = False,
    workers: Annotated[bool, typer.Option(help="the workers' own log files instead of the run's events")] = False,
    json_: JsonOption = False,
) -> None:
    """Print what happened in a run: its events, or its workers' log files."""
    found = RunFolder.find(run, runs)
    if remote.is_remote(found):
        remote.logs(found, follow)
    elif workers:
        _print_worker_logs(found)
    else:
        _print_events(found, follow, json_)


def _print_worker_logs(run: RunFolder) -> None:
    for file in sorted(run.logs.glob("*.log")):
        show_data(f"== {file.name}")
        with file.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                show_data(line.rstrip("\n"))


def _print_events(run: RunFolder, follow: bool, as_json: bool) -> None:
    from orchestrator.views.result import event_line

    offset = 0
    while True:
        alive = run.is_locked()
        while (read := run.events(offset, _PIECE_BYTES))[1] > offset:
            events, offset = read
            for event in events:
                if as_json:
                    write(json.dumps(event.to_json()))
                else:
                    show_data(event_line(event))
        if not follow or not alive:
            return
        time.sleep(0.5)


@verbs.command()
def stop(run: RunArgument = "latest", runs: RunsOption = Path("runs")) -> None:
    """Ask a running job to save a checkpoint and stop after its current step."""
    found = search_verbs.find(run, runs) or RunFolder.find(run, runs)
    if remote.is_remote(found):
        remote.stop(found)
        return
    if not found.is_locked():
        raise JobError(f"{found.run_id} is not running (it is {found.state()})")
    found.stop_file.touch()
    show(f"{found.run_id} stops after its current step; `orchestrator resume {found.run_id}` continues it")


@verbs.command()
def resume(run: RunArgument, runs: RunsOption = Path("runs"), json_: JsonOption = False) -> None:
    """Continue a stopped, failed or killed run from its newest complete checkpoint, or a search.

    Example: orchestrator resume latest
    """
    from orchestrator.bank.hooks import BANK_HOOKS
    from orchestrator.cli.progress import watch_run
    from orchestrator.lifecycle.run import is_complete
    from orchestrator.lifecycle.run import resume as resume_run

    if search := search_verbs.find(run, runs):
        search_verbs.resume(search, json_)
        return
    found = RunFolder.find(run, runs)
    if remote.is_remote(found):
        remote.resume(found, json_)
        print_result(found, json_)
        return
    if not found.differences() and is_complete(found, found.job()):
        _complete_mirror(found)
        raise JobError(f"{found.run_id} is finished; there is nothing to resume")
    with watch_run(json_) as watcher:
        resume_run(found, watcher, bank=BANK_HOOKS)
    print_result(found, json_)


@verbs.command()
def evaluate(
    run: RunArgument = "latest",
    data: Annotated[Path | None, typer.Option(help="other held-out rows than the job's own")] = None,
    tasks: Annotated[
        str | None, typer.Option("--tasks", help="instead: tasks of lm-evaluation-harness, with commas between")
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option("--include-path", help="with --tasks: a folder of task files of your own")
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="with --tasks: so many rows of each")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="with --tasks: prompts in the model's chat template")] = False,
    runs: RunsOption = Path("runs"),
    json_: JsonOption = False,
) -> None:
    """Measure a finished run's model again: on its held-out rows, on others, or base and tuned model on public tasks.

    Examples: orchestrator evaluate latest --data hard_cases.jsonl
              orchestrator evaluate latest --tasks gsm8k,arc_easy --limit 200
              orchestrator evaluate latest --tasks my_task --include-path tasks/
    """
    if tasks is not None or include_path or limit or chat:
        if data is not None or tasks is None:
            raise JobError("--include-path, --limit and --chat belong to --tasks, which has rows of its own: no --data")
        names = tuple(dict.fromkeys(name.strip() for name in tasks.split(",") if name.strip()))
        folder = include_path and str(resolve_path(include_path, "--include-path", kind="folder"))
        _evaluate_tasks(RunFolder.find(run, runs), (names, folder, limit, chat), json_)
        return
    from orchestrator.cli.progress import show_work
    from orchestrator.lifecycle.prepare import held_out_of
    from orchestrator.runs.json_files import quality_of
    from orchestrator.views.result import scores_view

    found = RunFolder.find(run, runs)
    job = found.job()
    from orchestrator.training.workers.finished import evaluate as measure

    with show_work(json_):
        quality = measure(found, job, held_out_of(found, job, data, say))
    if json_:
        print_json(quality)
    else:
        out.print(scores_view(quality_of(quality)))


def _evaluate_tasks(run: RunFolder, wish: tuple[tuple[str, ...], str | None, int | None, bool], as_json: bool) -> None:
    from orchestrator.harness.evaluate import evaluate_tasks
    from orchestrator.harness.wish import TaskWish
    from orchestrator.runs.tasks.task_score import FILE, to_rows
    from orchestrator.views.tasks import tasks_view

    if not wish[0]:
        raise JobError("--tasks: names no task, e.g. --tasks gsm8k,arc_easy")
    scores = evaluate_tasks(run, TaskWish(*wish), say)
    if as_json:
        print_json({"tasks": to_rows(scores), "file": str(run.path / FILE)})
        return
    out.print(tasks_view(scores))
    show(f"wrote {run.path / FILE}")


@verbs.command()
def merge(
    output: Annotated[Path, typer.Argument(help="the folder to write")],
    run: RunArgument = "latest",
    runs: RunsOption = Path("runs"),
) -> None:
    """Write base model + adapter as one plain transformers model.

    Example: orchestrator merge my-model latest
    """
    found = RunFolder.find(run, runs)
    from orchestrator.training.workers.finished import merge as merge_adapter

    output = resolve_path(output, "merge", kind="new folder")
    agreement = merge_adapter(found, found.job(), output)
    show(agreement.text)
    show(f"wrote {output}")


@verbs.command()
def sync(
    run: RunArgument = "latest",
    runs: RunsOption = Path("runs"),
    experiment: Annotated[
        str | None, typer.Option("--experiment", help="send it into this experiment instead of the job's")
    ] = None,
) -> None:
    """Send a run or a search to MLflow again, after a server was down or an experiment was deleted."""
    from orchestrator.runs.mirror.tracking import sync as sync_run
    from orchestrator.runs.mirror.tracking import sync_search

    if experiment is not None and not experiment.strip():
        raise JobError("--experiment: is empty; give the name of an experiment in MLflow")
    if search := search_verbs.find(run, runs):
        address = sync_search(search, search.job(), experiment)
        show(tr("{0} is in {1}").format(search.run_id, address))
        return
    found = RunFolder.find(run, runs)
    address = sync_run(found, found.job(), experiment)
    show(tr("{0} is in {1}").format(found.run_id, address))
