"""The verbs of a job file: recipes, schema, validate, inspect, plan, submit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from clusters.safe.reading import name_mistake
from orchestrator.cli import remote
from orchestrator.cli.options import (
    HardwareOption,
    JobArgument,
    JobsArgument,
    JsonOption,
    RefreshOption,
    SetOption,
    load_job,
    out,
    print_json,
    print_result,
    recipe_text,
    result_values,
    say,
    show,
)
from orchestrator.errors import JobError, OrchestratorError, RunFailed, Stopped
from orchestrator.job.paths import read_text_file
from orchestrator.language.catalogue import tr
from orchestrator.language.help import fill
from orchestrator.remote.record import ClusterTarget
from orchestrator.views.screen import write

if TYPE_CHECKING:
    from orchestrator.job.job_file import Job
    from orchestrator.runs.run_folder import RunFolder

verbs = typer.Typer()


@verbs.command()
def recipes(
    name: Annotated[str | None, typer.Argument(help="print this recipe")] = None, json_: JsonOption = False
) -> None:
    """List the ready-made jobs, or print one."""
    from orchestrator.job.schema import recipes as all_recipes

    found = all_recipes()
    if name is not None:
        text = recipe_text(name)
        if json_:
            path, about = found[name]
            print_json({name: {"path": str(path), "about": about, "text": text}})
        else:
            write(text)
        return
    if json_:
        print_json({key: {"path": str(path), "about": about} for key, (path, about) in found.items()})
        return
    for key, (_, about) in found.items():
        show(fill(f"{key:<20}{tr(about)}", out.width, 20))
    show("\nRun one: orchestrator submit NAME. Make it yours: orchestrator init job.yaml --recipe NAME")


@verbs.command()
def schema(
    field: Annotated[str | None, typer.Option(help="one key, e.g. method.lora_r")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="as a page: orchestrator/guides/job-file.md")] = False,
    json_: JsonOption = False,
) -> None:
    """Explain the job file's keys; --json prints its JSON schema for editors.

    Example: orchestrator schema --field packing
    """
    from orchestrator.job import schema as keys

    if markdown and (json_ or field is not None):
        other = "--json" if json_ else f"--field {field}"
        raise JobError(f"{other} beside --markdown: that prints every key as a page; leave one of them out")
    if markdown:
        write(keys.reference())
    elif json_:
        write(keys.json_schema()) if field is None else print_json(keys.one_field(field))
    else:
        one = {} if field is None else keys.one_field(field)
        for key, found in ({one["key"]: one} if one else keys.all_fields()).items():
            default = "required" if found["required"] else f"default {json.dumps(found['default'])}"
            show(f"{key}: {found['type']} ({default})\n  {found['description']}")


@verbs.command()
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
    from orchestrator.job.job_file import located
    from orchestrator.lifecycle.validate import check

    loaded = load_job(job, set_)
    try:
        found = check(loaded, exact)
    except JobError as error:
        raise (located(error, read_text_file(job, "validate")) if Path(job).is_file() else error) from None
    if json_:
        print_json(found)
        return
    for line in [*found["notices"], *(f"not checked: {what}" for what in found["unchecked"])]:
        show(line)
    formats = ", ".join(tr("{0} is {1}").format(path, kind) for path, kind in found["formats"].items())
    show(f"{job} is valid ({formats})")


@verbs.command()
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
    from orchestrator.lifecycle.inspect_data import inspect_data
    from orchestrator.views.samples import samples_view

    seen = inspect_data(load_job(job, set_), row, rows)
    if json_:
        print_json(seen)
    else:
        out.print(samples_view(seen, out.is_terminal and not out.no_color), soft_wrap=not out.is_terminal)


@verbs.command()
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
    """Show what would run where, whether it fits, how long it takes and what it costs; starts nothing.

    Exit code 0: it fits; 3: it does not, and what would make it fit; 2: the job is wrong.

    Examples: orchestrator plan job.yaml
              orchestrator plan job.yaml --hardware home-lab --set method.type=qlora
              orchestrator plan job.yaml --trace && orchestrator submit job.yaml
    """
    from orchestrator.bank.hooks import BANK_HOOKS
    from orchestrator.cli.progress import show_work
    from orchestrator.data.counts import check_line
    from orchestrator.lifecycle.machines import declared
    from orchestrator.lifecycle.prepare import plan_without_data, prepare
    from orchestrator.views.plan import plan_view

    loaded = load_job(job, set_)
    cluster = declared(hardware) if hardware else None
    if exact or preflight:
        with show_work(json_):
            ready = prepare(loaded, say, cluster, refresh, BANK_HOOKS)
    else:
        ready = plan_without_data(loaded, cluster, say, refresh, BANK_HOOKS)
    checks: dict[str, Any] = {}
    if trace:
        from orchestrator.lifecycle.trace_check import trace_plan

        checks["trace"] = trace_plan(loaded, ready.plan, ready.work)
    if preflight:
        from orchestrator.training.workers.preflight import preflight as fly

        checks["preflight"] = fly(loaded, ready, say)
    if json_:
        print_json({**json.loads(ready.plan.to_json()), "statistics": ready.statistics, **checks})
        return
    out.print(plan_view(loaded, ready.plan, ready.statistics))
    if ready.statistics["train"]:
        show(check_line(ready.statistics["train"]))
    for name, found in checks.items():
        out.print()
        show(f"{name}: {found['text']}")


ClusterOption = Annotated[
    str | None,
    typer.Option(
        "--cluster",
        help="where: HOST:PORT of a Ray cluster, http://HOST:8265 of its dashboard, kuberay[:[CONTEXT/]NAMESPACE]",
    ),
]
RenderOption = Annotated[
    Path | None, typer.Option("--render", help="with kuberay: write the RayJob into this file and stop")
]
AttachOption = Annotated[
    str | None, typer.Option("--attach", help="with kuberay: run on this RayCluster instead of one of its own")
]
RunIdOption = Annotated[
    str | None,
    typer.Option("--run-id", help="name of the run; an existing one is continued; of several jobs NAME-JOB each"),
]


@verbs.command()
def submit(
    jobs: JobsArgument,
    set_: SetOption = [],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="plan only: the same as `plan --exact`")] = False,
    cluster: ClusterOption = None,
    render: RenderOption = None,
    attach: AttachOption = None,
    hardware: HardwareOption = None,
    detach: Annotated[bool, typer.Option("--detach", help="send the job to a cluster and do not wait")] = False,
    run_id: RunIdOption = None,
    supervised: Annotated[bool, typer.Option("--supervised", hidden=True)] = False,
    json_: JsonOption = False,
) -> None:
    """Run a job: plan it, train on Ray, evaluate, hand back the tuned model.

    Several jobs run at once where they can share a base model: it is loaded once, and each has a run of its own.

    Ctrl-C saves a checkpoint and stops; `resume` continues from there.  A job that was sent through a dashboard
    continues without this terminal: Ctrl-C detaches.

    Examples: orchestrator submit quickstart
              orchestrator submit job.yaml --set train.learning_rate=1e-4
              orchestrator submit job.yaml --dry-run
              orchestrator submit a.yaml b.yaml c.yaml --run-id evening
              orchestrator submit job.yaml --cluster http://192.168.1.10:8265
              orchestrator submit job.yaml --cluster kuberay:team --detach
    """
    if run_id is not None and (wrong := name_mistake(run_id)):
        raise JobError(f"--run-id {wrong}")
    if len(jobs) > 1:
        given = {"--cluster": cluster, "--render": render, "--attach": attach, "--hardware": hardware}
        given |= {"--dry-run": dry_run, "--detach": detach, "--supervised": supervised}
        if named := [name for name, value in given.items() if value]:
            raise JobError(f"{', '.join(named)} belongs to one job, and {len(jobs)} are given: submit them one by one")
        _submit_several([load_job(job, set_) for job in jobs], run_id, json_)
        return
    (job,) = jobs
    target = ClusterTarget(cluster or "", hardware, attach, run_id)
    overrides = [*set_, *([f"cluster.address={json.dumps(cluster)}"] if cluster else [])]
    if dry_run:
        _refuse_beside_dry_run(target, {"--render": render, "--detach": detach})
        plan(job, overrides, hardware, exact=True, json_=json_)
        return
    if not target.is_kuberay and (render or hardware or attach):
        raise JobError("--render, --attach and --hardware belong to --cluster kuberay; elsewhere use `plan --hardware`")
    if target.is_remote:
        remote.submit(load_job(job, set_), target, render, detach, json_)
        return
    try:
        run = _submit_here(load_job(job, overrides), run_id, json_)
    except Stopped as stopped:
        if not supervised:
            raise
        say(str(stopped))  # exit code 0: a supervisor that restarts what fails must not restart this
        return
    print_result(run, json_)


def _refuse_beside_dry_run(target: ClusterTarget, given: dict[str, Any]) -> None:
    """Raises JobError for options of `submit` that a plan alone does not use."""
    given = given | {"--attach": target.attach, "--run-id": target.run_id}
    if named := [name for name, value in given.items() if value]:
        raise JobError(f"{', '.join(named)} beside --dry-run: nothing is sent or started; leave one of them out")
    if target.is_remote:
        raise JobError(
            f"--cluster {target.address} beside --dry-run: its machines plan themselves once the job is there; describe"
            " them in a file with --hardware instead"
        )
    if target.address and target.hardware:
        raise JobError(
            f"--cluster {target.address} and --hardware {target.hardware} both say which machines to plan for; leave"
            " one of them out"
        )


def _submit_here(job: Job, run_id: str | None, as_json: bool) -> RunFolder:
    """Run a job on this machine or on the Ray that it names."""
    from orchestrator.bank.hooks import BANK_HOOKS
    from orchestrator.cli.progress import watch_run
    from orchestrator.lifecycle.run import submit as run_job

    with watch_run(as_json) as watcher:
        return run_job(job, watcher, run_id, BANK_HOOKS)


def _submit_several(jobs: list[Job], run_id: str | None, as_json: bool) -> None:
    """Run jobs that may share a base model.  Raises RunFailed in the end where some failed, after all others."""
    from orchestrator.bank.hooks import BANK_HOOKS
    from orchestrator.cli.progress import Named
    from orchestrator.lifecycle.hooks import Quiet
    from orchestrator.lifecycle.together.submit import Submission, submit_together

    names = [job.spec.name for job in jobs]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise JobError(f"name: {', '.join(twice)} is the name of several of the jobs: give each its own")
    watchers = [Quiet() if as_json else Named(name) for name in names]
    ids = [None if run_id is None else f"{run_id}-{name}" for name in names]
    outcomes = submit_together(list(map(Submission, jobs, watchers, ids)), say, BANK_HOOKS)
    failed = [f"{name}: {one}" for name, one in zip(names, outcomes, strict=True) if isinstance(one, OrchestratorError)]
    if as_json:  # one document: an error stands in its job's place
        print_json([_outcome_values(*pair) for pair in zip(names, outcomes, strict=True)])
        if failed:
            raise typer.Exit(RunFailed.exit_code)
        return
    for outcome in outcomes:
        if not isinstance(outcome, OrchestratorError):
            print_result(outcome, as_json=False)
    if failed:
        again = (
            f"`--run-id {run_id}` tries" if run_id else "`orchestrator resume RUN` continues each, and --run-id tries"
        )
        raise RunFailed("\n".join([*failed, f"{len(failed)} of {len(jobs)} failed; {again} them again"]))


def _outcome_values(name: str, outcome: RunFolder | OrchestratorError) -> dict[str, Any]:
    if isinstance(outcome, OrchestratorError):
        return {"job": name, "error": str(outcome), "exit_code": outcome.exit_code}
    return {"job": name, **result_values(outcome)}
