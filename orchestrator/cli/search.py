"""The verb `search`, and how `status` and `resume` show and continue a search."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from orchestrator.cli.options import (
    JobArgument,
    JsonOption,
    SetOption,
    complete_study,
    err,
    load_job,
    out,
    parse_numbers,
    print_json,
    say,
)
from orchestrator.cli.options import show as show_lines
from orchestrator.errors import JobError
from orchestrator.language.choice import language

if TYPE_CHECKING:  # a job's pydantic models wait for a verb that reads a job
    from orchestrator.job.job_file import Job
    from orchestrator.runs.search_folder import SearchFolder

verbs = typer.Typer()


@verbs.command()
def search(
    job: JobArgument,
    set_: SetOption = [],
    trials: Annotated[int | None, typer.Option("--trials", min=1, help="search.budget.trials")] = None,
    minutes: Annotated[float | None, typer.Option("--minutes", min=0.0, help="search.budget.minutes")] = None,
    sampler: Annotated[
        str | None, typer.Option("--sampler", help="planned, or without the planner: optuna, random")
    ] = None,
    study: Annotated[
        str | None,
        typer.Option("--study", help="a ready-made list instead: default, or a file", autocompletion=complete_study),
    ] = None,
    lengths: Annotated[str, typer.Option("--lengths", help="study: for each max_length, e.g. 256,512")] = "",
    models: Annotated[str, typer.Option("--models", help="study: for each model, e.g. a,b")] = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="predict every combination and try none")] = False,
    json_: JsonOption = False,
) -> None:
    """Try combinations of optimizations on a sample of the data, and recommend the job to submit.

    The planner removes what cannot run or cannot win before anything is computed, and names where to start.

    Examples: orchestrator search job.yaml --minutes 20
              orchestrator search job.yaml --sampler random --trials 8
              orchestrator search job.yaml --study default --lengths 256,512
    """
    values = {"trials": trials, "minutes": minutes}
    budget = [f"search.budget.{key}={value}" for key, value in values.items() if value is not None]
    overrides = [*set_, *budget, *([f"search.sampler={sampler}"] if sampler else [])]
    loaded = load_job(job, overrides)
    if dry_run:
        _predict(loaded, json_)
        return
    if (lengths or models) and not study:
        raise JobError("--lengths and --models belong to --study; for a search list data.max_length in search.space")
    for one in _models(loaded, models):
        _search(one, study, parse_numbers("--lengths", lengths), json_)


def _search(job: Job, study: str | None, lengths: list[int], as_json: bool) -> None:
    from orchestrator.bank.hooks import BANK_HOOKS
    from orchestrator.search.run import search as run
    from orchestrator.search.study import read_study
    from orchestrator.views.search import SearchWatcher

    named = None if study is None else lambda job: read_study(study, job.spec, lengths)
    folder = run(job, SearchWatcher(err if as_json else out), named, BANK_HOOKS)
    _conclude(folder)
    show(folder, as_json)


def find(name: str, runs: Path) -> SearchFolder | None:
    """The search of that name; None for runs and for `latest`."""
    if name == "latest":
        return None
    from orchestrator.runs.search_folder import SearchFolder

    known = [folder for folder in SearchFolder.all(runs) if folder.run_id.startswith(name)]
    by_path = [here] if (here := SearchFolder.at(name)) else []
    found = by_path or known
    return found[0] if len(found) == 1 else None


def resume(folder: SearchFolder, as_json: bool) -> None:
    """Resume a search."""
    from orchestrator.search.run import resume as resume_search
    from orchestrator.views.search import SearchWatcher

    if folder.state() == "finished":
        if not folder.differences():
            raise JobError(f"{folder.run_id} is finished; a larger search.budget needs a new search")
        with folder.lock():
            folder.restore(say)
        return
    resume_search(folder, SearchWatcher(err if as_json else out))
    _conclude(folder)
    show(folder, as_json)


def _conclude(folder: SearchFolder) -> None:
    """Write the report, then send everything to MLflow, the report with it."""
    from orchestrator.report.html import write
    from orchestrator.runs.mirror.tracking import TrackingFailed, sync_search

    job = folder.job()
    say(f"report: {write(folder, job, language(), None)}")
    if "mlflow" not in job.spec.tracking.report_to:
        return
    try:
        say(f"tracked in {sync_search(folder, job)}")
    except TrackingFailed as error:
        say(f"not tracked: {error}")


def show(folder: SearchFolder, as_json: bool) -> None:
    """The table of a search and what to do next."""
    from orchestrator.runs.condition import damage
    from orchestrator.search.prepare import planning_in
    from orchestrator.search.recommend import outcomes
    from orchestrator.views.search import recommendation_text, trials_table

    if wrong := damage(folder):
        raise JobError([f"{folder.run_id} is damaged: {line}" for line in wrong])
    trials, summary = folder.trials(), folder.summary()
    if as_json:
        state = folder.state()
        print_json(
            {
                "search": folder.run_id,
                "path": str(folder.path),
                "state": state,
                **(summary.values if summary else {}),
                "trials": [*map(asdict, trials)],
            }
        )
        return
    job = folder.job()
    planning = planning_in(folder, job)
    done = outcomes(trials, planning.real, job.spec.search.metric)
    recommended = summary.best_trial if summary else None
    out.print()
    out.print(
        trials_table(done, [trial for trial in trials if not trial.measured], recommended, planning.steps_per_epoch)
    )
    show_lines(recommendation_text(folder))


def _predict(job: Job, as_json: bool) -> None:
    from orchestrator.bank.hooks import BANK_HOOKS
    from orchestrator.search.advice import advice_json
    from orchestrator.search.run import predict
    from orchestrator.views.search import advised_text

    space, advised = predict(job, say, BANK_HOOKS)
    if as_json:
        print_json(advice_json(space, advised))
    else:
        show_lines(advised_text(space, advised))


def _models(job: Job, models: str) -> list[Job]:
    names = [name.strip() for name in models.split(",") if name.strip()]
    if not names:
        return [job]
    from orchestrator.job.job_file import parse_job

    return [parse_job(job.text, job.folder, "job", [f"model.model_name_or_path={name}"]) for name in names]
