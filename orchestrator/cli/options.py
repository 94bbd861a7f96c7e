"""What the verbs share: arguments and options with their completion, loading a job, printing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from clusters.safe.masking import masked, masked_values
from orchestrator.errors import JobError, Mistake
from orchestrator.job.paths import resolve_path
from orchestrator.language.catalogue import tr
from orchestrator.views.screen import err, out, write

if TYPE_CHECKING:  # a job's pydantic models wait for a verb that reads a job
    from orchestrator.job.job_file import Job
    from orchestrator.runs.run_folder import RunFolder


def complete_job(incomplete: str) -> list[str]:
    from orchestrator.job.schema import recipes

    files = [str(path) for path in Path().glob(f"{incomplete}*") if path.suffix in (".yaml", ".yml") or path.is_dir()]
    return files + [name for name in recipes() if name.startswith(incomplete)]


def complete_run(incomplete: str) -> list[str]:
    from orchestrator.runs.run_folder import RunFolder
    from orchestrator.runs.search_folder import SearchFolder

    found = [*RunFolder.all(Path("runs")), *SearchFolder.all(Path("runs"))]
    return [run.run_id for run in found if run.run_id.startswith(incomplete)]


def complete_study(incomplete: str) -> list[str]:
    from orchestrator.search.study import SHIPPED

    return [file.stem for file in sorted(SHIPPED.glob("*.yaml")) if file.stem.startswith(incomplete)]


def complete_key(incomplete: str) -> list[str]:
    from orchestrator.job.schema import all_fields

    return [f"{key}=" for key in all_fields() if key.startswith(incomplete) and "*" not in key]


JobArgument = Annotated[str, typer.Argument(help="a job file, or the name of a recipe", autocompletion=complete_job)]
JobsArgument = Annotated[
    list[str],
    typer.Argument(help="a job file, or the name of a recipe; several run together", autocompletion=complete_job),
]
RunArgument = Annotated[
    str, typer.Argument(help="a run: its id, the start of it, its folder, or `latest`", autocompletion=complete_run)
]
SetOption = Annotated[
    list[str],
    typer.Option("--set", "-s", help="override a key: --set train.learning_rate=1e-4", autocompletion=complete_key),
]
JsonOption = Annotated[bool, typer.Option("--json", help="print one JSON document")]
RunsOption = Annotated[
    Path,
    typer.Option(
        "--runs",
        help="the folder that holds the runs",
        callback=lambda runs: resolve_path(runs, "--runs", kind="new folder") and runs,
    ),
]
HardwareOption = Annotated[
    Path | None, typer.Option("--hardware", help="a file that declares other machines, e.g. ones to buy")
]
RefreshOption = Annotated[bool, typer.Option("--refresh", help="measure the machines again")]


def is_job(name: str) -> bool:
    """Whether a name is a job file's or a recipe's, and not a run's."""
    from orchestrator.job.schema import recipes
    from orchestrator.runs.run_folder import RunFolder

    return Path(name).is_file() or (name in recipes() and RunFolder.at(name) is None)


def load_job(name: str, overrides: list[str]) -> Job:
    """A job file, or a recipe by its name; prints a notice for each key that is read under another name."""
    from orchestrator.job.job_file import read_job
    from orchestrator.job.schema import recipes

    known = recipes()
    is_recipe = name in known and not Path(name).is_file()  # a folder of that name is not a job
    try:
        job = read_job(known[name][0] if is_recipe else Path(name), overrides)
    except JobError as error:
        raise _of_another_tool(Path(name), error) or error from None
    for notice in job.notices:
        say(notice)
    return job


def _of_another_tool(file: Path, error: JobError) -> JobError | None:
    """The mistakes of a file that another tool's keys are in, with the verb that reads it; None for any other file."""
    from clusters.safe.reading import BadInput, load_yaml, read_text
    from orchestrator.job.importers.tables import recognise, tables

    try:
        values = load_yaml(read_text(file))
    except BadInput:
        return None
    if (tool := recognise(values)) is None:
        return None
    name = tables()[tool].name
    way = f"orchestrator import {file} --output {'imported.yaml' if file.name == 'job.yaml' else 'job.yaml'}"
    hint = Mistake(f"{file}: this looks like {'an' if name[0] in 'AU' else 'a'} {name} file: {way}", fix=way)
    is_own = isinstance(values.get("data"), dict) and "train" in values["data"]
    return JobError([hint, *(error.mistakes if is_own else [])])


def recipe_text(name: str) -> str:
    """The job file of a recipe.  Raises JobError for a name that is none."""
    from orchestrator.job.schema import recipes

    known = recipes()
    if name not in known:
        raise JobError(f"there is no recipe {name!r}; known: {', '.join(known)}")
    return known[name][0].read_text(encoding="utf-8")


def parse_numbers(option: str, text: str) -> list[int]:
    """Whole numbers above 0, separated by commas; none for an empty text.  Raises JobError."""
    try:
        found = [int(number) for number in text.split(",") if number.strip()]
    except ValueError:
        found = [0]
    if any(number < 1 for number in found):
        raise JobError(f"{option} {text}: write whole numbers above 0, e.g. 256,512")
    return found


def say(text: str) -> None:
    """Print a sentence about progress to standard error."""
    err.print(masked(tr(text)), soft_wrap=True)


def show(text: str) -> None:
    """Print lines of output without wrapping them."""
    out.print(masked(tr(text)), soft_wrap=True)


def show_data(text: str) -> None:
    """Print lines of a log or of a user's data: as `show`, in the language that they are in."""
    out.print(masked(text), soft_wrap=True)


def print_json(value: Any, indent: int | None = 1) -> None:
    """Print one JSON document in ASCII, other characters as escapes; without `indent` on one line."""
    write(json.dumps(masked_values(value), indent=indent, default=str).replace("\x7f", "\\u007f"))


def result_values(run: RunFolder) -> dict[str, Any]:
    """The result of a run that has ended, for JSON."""
    from orchestrator.runs.condition import exported_whole

    ended = {"run": run.run_id, "path": str(run.path), "exported": str(exported_whole(run))}
    result = run.result()
    return {**ended, "result": result and result.values, "data": run.data().statistics}


def print_result(run: RunFolder, as_json: bool) -> None:
    """Print the result of a run that has ended."""
    from orchestrator.runs.condition import exported_whole
    from orchestrator.runs.summary.summary_file import summary_of
    from orchestrator.views.result import result_view

    if as_json:
        print_json(result_values(run))
        return
    exported_whole(run)
    out.print()
    out.print(result_view(run, summary_of(run)))
    show(f"try: orchestrator evaluate {run.run_id} | orchestrator merge my-model {run.run_id}")
