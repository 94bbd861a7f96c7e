"""The verbs: parse, call, print.  Decisions live elsewhere; heavy libraries load only in the verb that needs them."""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from clusters.safe.reading import name_mistake
from orchestrator import __version__
from orchestrator.cli import bank, remote, report
from orchestrator.cli import cluster as cluster_cli
from orchestrator.cli import search as search_cli
from orchestrator.cli.options import (
    HardwareOption,
    JobArgument,
    JsonOption,
    RefreshOption,
    RunArgument,
    RunsOption,
    SetOption,
    asked_job,
    complete_job,
    err,
    out,
    print_json,
    say,
    show,
)
from orchestrator.errors import EXTRAS, JobError, MissingExtra, OrchestratorError, Stopped
from orchestrator.job.paths import resolve_path, write_text_file
from orchestrator.remote.record import Target
from orchestrator.runs.run_folder import RunFolder, utc
from orchestrator.views.screen import Screen, accept_every_character, write
from strategies.step import thread_waits

app = typer.Typer(
    name="orchestrator",
    help="Fine-tune language models on the machines you have.\n\nStart with: orchestrator recipes",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
cluster_cli.register(app)
search_cli.register(app)
report.register(app)
remote.register(app)
bank.register(app)


@app.command()
def init(
    path: Annotated[Path, typer.Argument(help="the file to write")] = Path("job.yaml"),
    model: Annotated[str, typer.Option(help="model.model_name_or_path")] = "smollm2-135m-instruct",
    train: Annotated[str, typer.Option(help="data.train")] = "train.jsonl",
    recipe: Annotated[str | None, typer.Option(help="copy a recipe instead of the starter")] = None,
    force: Annotated[bool, typer.Option(help="overwrite the file")] = False,
) -> None:
    """Write a commented starter job file.

    Example: orchestrator init job.yaml --train mydata.jsonl
    """
    from orchestrator.job.schema import starter

    file = resolve_path(path, "init", kind="new file")
    if file.exists() and not force:
        raise JobError(f"{path} exists already; --force overwrites it")
    for option, value in (("--model", model), ("--train", train)):
        if value.encode("utf-8", "replace").decode() != value:
            raise JobError(f"{option} is not UTF-8 text")
    write_text_file(file, _recipe_text(recipe) if recipe else starter(model, train), "init")
    show(f"wrote {path}. Next: orchestrator validate {path}")


@app.command()
def validate(
    job: JobArgument,
    set_: SetOption = [],
    exact: Annotated[bool, typer.Option("--exact", help="look at every row, not at the first 1,000")] = False,
    json_: JsonOption = False,
) -> None:
    """Check a job file, its model, and its first rows as the model will see them; starts and downloads nothing.

    Examples: orchestrator validate job.yaml --set method.lora_r=32
              orchestrator validate job.yaml --exact
    """
    from orchestrator.lifecycle.validate import check

    found = check(asked_job(job, set_), exact)
    if json_:
        print_json(found)
        return
    for line in [*found["notices"], *(f"not checked: {what}" for what in found["unchecked"])]:
        show(line)
    formats = ", ".join(f"{path} is {kind}" for path, kind in found["formats"].items())
    show(f"{job} is valid ({formats})")


@app.command()
def probe(
    cluster: Annotated[str, typer.Option(help="local, or the address of a Ray cluster")] = "local",
    hardware: HardwareOption = None,
    refresh: RefreshOption = False,
    json_: JsonOption = False,
) -> None:
    """Say what the machines can do: memory, FLOP/s by number format, bandwidths, links; measured once, then remembered.

    Examples: orchestrator probe
              orchestrator probe --cluster head:6379 --refresh
              orchestrator probe --hardware home-lab
    """
    from orchestrator.lifecycle.machines import declared, reached
    from orchestrator.views.machines import machines_view

    found = declared(hardware) if hardware else reached(cluster, say, refresh)
    if json_:
        print_json(found.as_dict())
    else:
        out.print(machines_view(found))


@app.command()
def techniques(
    job: Annotated[
        str | None, typer.Argument(help="judge for this job's model and data", autocompletion=complete_job)
    ] = None,
    hardware: HardwareOption = None,
    measure: Annotated[bool, typer.Option("--measure", help="try each on a small model here, some minutes")] = False,
    set_: SetOption = [],
    refresh: RefreshOption = False,
    json_: JsonOption = False,
) -> None:
    """Say what each optimization does on each device: effective, works, little gain, harmful or impossible, and why.

    Examples: orchestrator techniques
              orchestrator techniques job.yaml --hardware home-lab
              orchestrator techniques --measure
    """
    from orchestrator.lifecycle.machines import declared, reached
    from orchestrator.lifecycle.technique_report import catalogue, catalogue_view, measured_view

    asked = asked_job(job, set_) if job else None  # before anything is measured
    cluster = declared(hardware) if hardware else reached("local", say, refresh)
    rows = catalogue(cluster, asked, measure, say)
    if json_:
        print_json(rows)
    else:
        out.print(measured_view(rows) if measure else catalogue_view(rows))


@app.command()
def plan(
    job: JobArgument,
    set_: SetOption = [],
    hardware: HardwareOption = None,
    exact: Annotated[bool, typer.Option("--exact", help="prepare the data as `submit` does")] = False,
    trace: Annotated[bool, typer.Option("--trace", help="check the memory by tracing the model code")] = False,
    preflight: Annotated[
        bool, typer.Option("--preflight", help="really run the longest batch, an evaluation step and a checkpoint here")
    ] = False,
    refresh: RefreshOption = False,
    json_: JsonOption = False,
) -> None:
    """Say what would run where, whether it fits, how long it takes and what it costs; starts nothing.

    Exit code 0: it fits; 3: it does not, and what would make it fit; 2: the job is wrong.

    Examples: orchestrator plan job.yaml
              orchestrator plan job.yaml --hardware home-lab --set method.type=qlora
              orchestrator plan job.yaml --trace && orchestrator submit job.yaml
    """
    from orchestrator.data.counts import check_line
    from orchestrator.lifecycle.machines import declared
    from orchestrator.lifecycle.run import plan_without_data, prepare
    from orchestrator.views.plan import plan_view

    asked = asked_job(job, set_)
    cluster = declared(hardware) if hardware else None
    if exact or preflight:
        ready = prepare(asked, say, cluster, refresh)
    else:
        ready = plan_without_data(asked, cluster, say, refresh)
    checks: dict[str, Any] = {}
    if trace:
        from orchestrator.lifecycle.trace_check import trace_plan

        checks["trace"] = trace_plan(asked, ready.plan, ready.work)
    if preflight:
        from orchestrator.training.workers.preflight import preflight as fly

        checks["preflight"] = fly(asked, ready, say)
    if json_:
        print_json({**json.loads(ready.plan.to_json()), "statistics": ready.statistics, **checks})
        return
    out.print(plan_view(asked, ready.plan, ready.statistics))
    if ready.statistics["train"]:
        show(check_line(ready.statistics["train"]))
    for name, found in checks.items():
        out.print()
        show(f"{name}: {found['text']}")


@app.command()
def submit(
    job: JobArgument,
    set_: SetOption = [],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="plan only: the same as `plan --exact`")] = False,
    cluster: Annotated[
        str | None,
        typer.Option(
            "--cluster",
            help="where: HOST:PORT of a Ray cluster, http://HOST:8265 of its dashboard, kuberay[:[CONTEXT/]NAMESPACE]",
        ),
    ] = None,
    render: Annotated[
        Path | None, typer.Option("--render", help="with kuberay: write the RayJob into this file and stop")
    ] = None,
    attach: Annotated[
        str | None, typer.Option("--attach", help="with kuberay: run on this RayCluster instead of one of its own")
    ] = None,
    hardware: HardwareOption = None,
    detach: Annotated[bool, typer.Option("--detach", help="send the job to a cluster and do not wait")] = False,
    run_id: Annotated[
        str | None, typer.Option("--run-id", help="name of the run; one that exists goes on where it stands")
    ] = None,
    supervised: Annotated[bool, typer.Option("--supervised", hidden=True)] = False,
    json_: JsonOption = False,
) -> None:
    """Run a job: plan it, train on Ray, evaluate, hand back the tuned model.

    Ctrl-C saves a checkpoint and stops; `resume` goes on from there.  A job that was sent through a dashboard goes on
    without this terminal: Ctrl-C detaches.

    Examples: orchestrator submit quickstart
              orchestrator submit job.yaml --set train.learning_rate=1e-4
              orchestrator submit job.yaml --dry-run
              orchestrator submit job.yaml --cluster http://192.168.1.10:8265
              orchestrator submit job.yaml --cluster kuberay:team --detach
    """
    if run_id is not None and (wrong := name_mistake(run_id)):
        raise JobError(f"--run-id {wrong}")
    if dry_run:
        plan(job, set_, exact=True, json_=json_)
        return
    target = Target(cluster or "", hardware, attach, run_id)
    if not target.is_kuberay and (render or hardware or attach):
        raise JobError("--render, --attach and --hardware belong to --cluster kuberay; elsewhere use `plan --hardware`")
    if target.is_kuberay and render:
        remote.render(asked_job(job, set_), target, render)
        return
    if target.is_remote:
        found = remote.submit(asked_job(job, set_), target, detach, json_)
        if not detach:
            _print_result(found, json_)
        return
    from orchestrator.lifecycle.run import submit as run_job

    overrides = [*set_, *([f"cluster.address={json.dumps(cluster)}"] if cluster else [])]
    with _watcher(json_) as watcher:
        try:
            run = run_job(asked_job(job, overrides), watcher, run_id)
        except Stopped as stopped:
            if not supervised:
                raise
            say(str(stopped))  # whoever starts this again when it fails must not do so now
            return
    _print_result(run, json_)


@app.command()
def resume(run: RunArgument, runs: RunsOption = Path("runs"), json_: JsonOption = False) -> None:
    """Go on with a stopped, failed or killed run from its newest whole checkpoint, or with a search.

    Example: orchestrator resume latest
    """
    from orchestrator.lifecycle.run import is_complete
    from orchestrator.lifecycle.run import resume as run_on

    if search := search_cli.found(run, runs):
        search_cli.go_on(search, json_)
        return
    found = RunFolder.find(run, runs)
    if remote.is_remote(found):
        remote.resume(found, json_)
        _print_result(found, json_)
        return
    if not found.differences() and is_complete(found, found.job()):
        _mend_mirror(found)
        raise JobError(f"{found.run_id} is finished; there is nothing to resume")
    with _watcher(json_) as watcher:
        run_on(found, watcher)
    _print_result(found, json_)


@app.command(name="list")
def list_runs(runs: RunsOption = Path("runs"), json_: JsonOption = False) -> None:
    """List the runs in a folder, oldest first."""
    from orchestrator.runs.condition import damage
    from orchestrator.runs.search_folder import SearchFolder
    from orchestrator.views.result import damaged_row, run_row, runs_table

    rows, searches = [], SearchFolder.all(runs)
    for run in RunFolder.all(runs):
        wrong = [] if run.is_locked() else damage(run)  # who holds it may be writing
        try:
            rows.append(damaged_row(run, wrong) if wrong else run_row(run))
        except JobError as error:
            rows.append(damaged_row(run, error.mistakes))
    wrong_searches = {search: wrong for search in searches if (wrong := damage(search))}
    rows += [damaged_row(search, wrong) for search, wrong in wrong_searches.items()]
    if json_:
        print_json(rows)
    elif rows:
        out.print(runs_table(rows))
    else:
        show(f"no runs in {runs}")
    for row in rows:
        for line in row.get("damage", ()):
            say(f"{row['run']} is damaged: {line}")


@app.command()
def status(run: RunArgument = "latest", runs: RunsOption = Path("runs"), json_: JsonOption = False) -> None:
    """Say how far a run is, and how good its result is."""
    from orchestrator.runs import worker_stats as workers
    from orchestrator.runs.condition import damage, passed_over
    from orchestrator.views.result import result_view, run_row

    if search := search_cli.found(run, runs):
        _mend_mirror(search)
        search_cli.show(search, json_)
        return
    found = RunFolder.find(run, runs)
    if remote.is_remote(found) and not remote.is_closed(found):
        remote.status(found, json_)
        return
    if not found.is_locked() and (wrong := damage(found)):
        raise JobError([f"{found.run_id} is damaged: {line}" for line in wrong])
    if text := passed_over(found):
        say(text)
    _mend_mirror(found)
    row, by_worker = run_row(found), workers.of_run(found.events()[0])
    if json_:
        print_json({**row, "workers": by_worker} if by_worker else row)
        return
    for key, value in row.items():
        if value is not None:
            show(f"{key:<14}{value}")
    if by_worker:
        out.print()
        out.print(workers.view(by_worker))
    if row["state"] == "finished":
        out.print()
        out.print(result_view(found))


def _mend_mirror(run: RunFolder) -> None:
    """Tell MLflow how a run ended whose driver was killed; what hinders that is said, and is no error of the verb."""
    from orchestrator.runs.mirror.state import is_left_running

    try:
        if not remote.is_remote(run) and is_left_running(run):
            from orchestrator.runs.mirror.tracking import complete

            if address := complete(run, run.job()):
                say(f"MLflow at {address} now says how {run.run_id} ended")
    except OrchestratorError as error:
        say(str(error))


@app.command()
def logs(
    run: RunArgument = "latest",
    runs: RunsOption = Path("runs"),
    follow: Annotated[bool, typer.Option("--follow", "-f", help="go on until the run ends")] = False,
    workers: Annotated[bool, typer.Option(help="the workers' own log files instead of the run's events")] = False,
    json_: JsonOption = False,
) -> None:
    """Print what happened in a run: its events, or its workers' log files."""
    found = RunFolder.find(run, runs)
    if remote.is_remote(found):
        remote.logs(found, follow)
        return
    if workers:
        for file in sorted(found.logs.glob("*.log")):
            show(f"== {file.name}")
            with file.open(encoding="utf-8", errors="replace") as lines:
                for line in lines:
                    show(line.rstrip("\n"))
        return
    offset = 0
    while True:
        alive = found.is_locked()
        events, offset = found.events(offset)
        for event in events:
            if json_:
                write(json.dumps(event))
            else:
                show(_event_line(event))
        if not follow or not alive:
            return
        time.sleep(0.5)


@app.command()
def stop(run: RunArgument = "latest", runs: RunsOption = Path("runs")) -> None:
    """Ask a running job to save a checkpoint and stop after its current step."""
    found = search_cli.found(run, runs) or RunFolder.find(run, runs)
    if remote.is_remote(found):
        remote.stop(found)
        return
    if not found.is_locked():
        raise JobError(f"{found.run_id} is not running (it is {found.state()})")
    found.stop_file.touch()
    show(f"{found.run_id} stops after its current step; `orchestrator resume {found.run_id}` goes on")


@app.command()
def evaluate(
    run: RunArgument = "latest",
    data: Annotated[Path | None, typer.Option(help="other held-out rows than the job's own")] = None,
    runs: RunsOption = Path("runs"),
    json_: JsonOption = False,
) -> None:
    """Measure a finished run's model again, on its held-out rows or on others.

    Example: orchestrator evaluate latest --data hard_cases.jsonl
    """
    from orchestrator.lifecycle.run import held_out_of
    from orchestrator.views.result import scores_view

    found = RunFolder.find(run, runs)
    job = found.job()
    from orchestrator.training.workers.finished import evaluate as measure

    quality = measure(found, job, held_out_of(found, job, data, say))
    if json_:
        print_json(quality)
    else:
        out.print(scores_view(quality))


@app.command()
def merge(
    output: Annotated[Path, typer.Argument(help="the folder to write")],
    run: RunArgument = "latest",
    runs: RunsOption = Path("runs"),
) -> None:
    """Write base model + adapter as one plain transformers model.

    Example: orchestrator merge my-model latest
    """
    found = RunFolder.find(run, runs)
    from orchestrator.training.workers.finished import merge as write

    output = resolve_path(output, "merge", kind="new folder")
    agreement = write(found, found.job(), output)
    show(agreement.text)
    show(f"wrote {output}")


@app.command()
def inspect(
    job: JobArgument,
    rows: Annotated[int, typer.Option(help="how many rows to show")] = 3,
    row: Annotated[int, typer.Option(help="the first row to show, from 1")] = 1,
    set_: SetOption = [],
    json_: JsonOption = False,
) -> None:
    """Show rows as the model will see them: which tokens are supervised, what is cut, how well it packs.

    Example: orchestrator inspect quickstart --rows 2
    """
    from orchestrator.lifecycle.inspect_data import view
    from orchestrator.lifecycle.run import look_at_data

    seen = look_at_data(asked_job(job, set_), row, rows)
    if json_:
        print_json(seen)
    else:
        out.print(view(seen, out.is_terminal and not out.no_color), soft_wrap=not out.is_terminal)


@app.command()
def sync(
    run: RunArgument = "latest",
    runs: RunsOption = Path("runs"),
    experiment: Annotated[
        str | None, typer.Option("--experiment", help="send it into this experiment instead of the job's")
    ] = None,
) -> None:
    """Send a run or a search to MLflow again, after a server was down or an experiment was deleted."""
    from orchestrator.runs.mirror.tracking import sync as send
    from orchestrator.runs.mirror.tracking import sync_search

    if experiment is not None and not experiment.strip():
        raise JobError("--experiment: is empty; give the name of an experiment in MLflow")

    if search := search_cli.found(run, runs):
        address = sync_search(search, search.job(), experiment)
        show(f"{search.run_id} is in {address}")
        return
    found = RunFolder.find(run, runs)
    address = send(found, found.job(), experiment)
    show(f"{found.run_id} is in {address}")


@app.command()
def schema(
    field: Annotated[str | None, typer.Option(help="one key, e.g. method.lora_r")] = None, json_: JsonOption = False
) -> None:
    """Explain the job file's keys; --json prints its JSON schema for editors.

    Example: orchestrator schema --field packing
    """
    from orchestrator.job import schema as keys

    if field is not None:
        found = keys.one_field(field)
        if json_:
            print_json(found)
            return
        default = "required" if found["required"] else f"default {json.dumps(found['default'])}"
        show(f"{found['key']}: {found['type']} ({default})\n  {found['description']}")
    elif json_:
        write(keys.json_schema())
    else:
        for key, found in keys.all_fields().items():
            default = "required" if found["required"] else f"default {json.dumps(found['default'])}"
            show(f"{key}: {found['type']} ({default})\n  {found['description']}")


@app.command()
def recipes(
    name: Annotated[str | None, typer.Argument(help="print this recipe")] = None, json_: JsonOption = False
) -> None:
    """List the ready-made jobs, or print one."""
    from orchestrator.job.schema import recipes as all_recipes

    if name is not None:
        write(_recipe_text(name))
        return
    found = all_recipes()
    if json_:
        print_json({key: {"path": str(path), "about": about} for key, (path, about) in found.items()})
        return
    for key, (_, about) in found.items():
        show(f"{key:<20}{about}")
    show("\nRun one: orchestrator submit NAME. Make it yours: orchestrator init job.yaml --recipe NAME")


def _version(wanted: bool) -> None:
    if wanted:
        show(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    """Fine-tune language models on the machines you have."""


def _keep_lines_of_examples() -> None:
    """Click would join them to one paragraph; the mark is its own (https://click.palletsprojects.com, "\\b")."""
    groups = [group.typer_instance for group in app.registered_groups if group.typer_instance]
    for command in [command for one in (app, *groups) for command in one.registered_commands]:
        if command.callback and command.callback.__doc__:
            command.callback.__doc__ = command.callback.__doc__.replace("    Example", "    \b\n    Example")


_keep_lines_of_examples()


def main() -> None:
    """Run the command line; every OrchestratorError, and a disk's or a file's, becomes a message and an exit code."""
    for name in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(name) is not signal.SIG_IGN:  # nohup ignores the second, and means it
            signal.signal(name, _as_interrupt)
    os.environ |= thread_waits.environment()  # of this process and all that it starts
    _hush_libraries()
    accept_every_character()
    try:
        app(prog_name="orchestrator")
    except OrchestratorError as error:
        sys.exit(_fail(error))
    except OSError as error:
        if error.filename is None and error.errno != errno.ENOSPC:
            raise
        sys.exit(_fail(_of_the_machine(error)))
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        if package not in EXTRAS:
            raise
        sys.exit(_fail(MissingExtra(package)))
    except KeyboardInterrupt:
        sys.exit(130)


def _of_the_machine(error: OSError) -> JobError:
    """A file that vanished, a full disk, a folder that is read-only: nothing that a traceback would explain."""
    what = "Free some space" if error.errno == errno.ENOSPC else "See whether it is there and may be read and written"
    return JobError(f"{error.filename or 'the disk'}: {(error.strerror or str(error)).lower()}. {what}, then try again")


def _hush_libraries() -> None:
    """What they tell their own developers: old names, kernels that are not installed."""
    for message in ("`is_gradient_checkpointing` is deprecated", "Sparse invariant checks are implicitly disabled"):
        warnings.filterwarnings("ignore", message)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def _fail(error: OrchestratorError) -> int:
    if "--json" in sys.argv:
        print_json({"error": str(error), "exit_code": error.exit_code})
    else:
        err.print(str(error), soft_wrap=True, style="red")
    return error.exit_code


def _as_interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def _recipe_text(name: str) -> str:
    from orchestrator.job.schema import recipes

    known = recipes()
    if name not in known:
        raise JobError(f"there is no recipe {name!r}; known: {', '.join(known)}")
    return known[name][0].read_text(encoding="utf-8")


@contextmanager
def _watcher(as_json: bool) -> Iterator[Any]:
    from orchestrator.cli.progress import Lines, Live, Quiet

    watcher = Quiet() if as_json else Live(out) if out.is_terminal else Lines(out)
    Screen.outlives_reader = True
    try:
        yield watcher
    finally:
        watcher.close()
        Screen.outlives_reader = False


def _print_result(run: RunFolder, as_json: bool) -> None:
    from orchestrator.runs.condition import exported_whole
    from orchestrator.views.result import result_view

    exported = exported_whole(run)
    if as_json:
        told = {"run": run.run_id, "path": str(run.path), "exported": str(exported), "result": run.result()}
        print_json({**told, "data": run.data().get("statistics")})
        return
    out.print()
    out.print(result_view(run))
    show(f"try: orchestrator evaluate {run.run_id} | orchestrator merge my-model {run.run_id}")


def _event_line(event: dict[str, Any]) -> str:
    rest = {key: value for key, value in event.items() if key not in ("event", "time", "traceback", "samples")}
    return f"{utc(event['time'])} {event['event']:<10} " + " ".join(f"{key}={value}" for key, value in rest.items())


if __name__ == "__main__":
    main()
