"""The verbs that write a job file: init, and import, which makes one of another fine-tuning tool's."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from clusters.safe.reading import checked_path
from orchestrator.cli.options import JsonOption, err, print_json, recipe_text, say, show
from orchestrator.errors import JobError, bad_input_as_job_error
from orchestrator.job.paths import resolve_path, write_text_file
from orchestrator.language.catalogue import tr
from orchestrator.language.help import fill
from orchestrator.views.screen import write

if TYPE_CHECKING:
    from orchestrator.job.importers.draft import JobDraft

verbs = typer.Typer()


def _complete_tool(incomplete: str) -> list[str]:
    from orchestrator.job.importers.tables import TOOLS

    return [tool for tool in TOOLS if tool.startswith(incomplete)]


@verbs.command("import")
def import_(
    file: Annotated[Path, typer.Argument(help="a configuration of another tool")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="the job file to write")] = None,
    tool: Annotated[
        str | None,
        typer.Option("--from", help="the tool, where the file does not show it", autocompletion=_complete_tool),
    ] = None,
    objective: Annotated[
        str | None,
        typer.Option(
            help="what is trained for (dpo, kto, reward ...), where the tool's command says it and not the file"
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="overwrite the file")] = False,
    json_: JsonOption = False,
) -> None:
    """Make a job file of one of Axolotl, LLaMA-Factory, TRL, ms-swift, Unsloth or torchtune.

    Each value says where it came from; what has no counterpart is listed with what happens instead.  Without --output
    the job is printed and the list goes to standard error.

    Example: orchestrator import axolotl.yml --output job.yaml
    """
    from orchestrator.job.importers.convert import convert_file
    from orchestrator.job.importers.tables import TOOLS
    from orchestrator.job.importers.written import job_text

    if tool is not None and tool not in TOOLS:
        raise JobError(f"--from {tool}: is not known here; known: {', '.join(TOOLS)}")
    target = resolve_path(output, "--output", kind="new file") if output else None
    if target and target.exists() and not force:
        raise JobError(f"{output} exists already; --force overwrites it")
    draft, job = convert_file(file, tool, target.parent if target else Path.cwd(), objective)
    text = job_text(draft, file.name)
    if target:
        write_text_file(target, text, "--output")
    if json_:
        print_json(
            {"tool": draft.tool, "written": output, "job": job.spec.model_dump(exclude_unset=True)} | _left(draft)
        )
        return
    if not target:
        write(text)
    tell = show if target else say  # beside a job on standard output nothing else is
    for line in [*_listed(draft), *job.notices]:
        tell(fill(tr(line), err.width, 4))
    if target:
        show(f"wrote {output}. Next: orchestrator validate {output}")


def _left(draft: JobDraft) -> dict[str, Any]:
    """What has no counterpart, for JSON."""
    groups = {group: [vars(one) for one in left] for group, left in draft.left.items()}
    return {"without_counterpart": groups, "not_set": draft.unset}


def _listed(draft: JobDraft) -> list[str]:
    """What has no counterpart, in groups; keys with one fate on one line."""
    from orchestrator.job.importers.draft import GROUPS

    lines = []
    for group, title in GROUPS.items():
        fates: dict[str, list[str]] = {}
        for one in draft.left[group]:
            fates.setdefault(one.instead, []).append(
                f"{one.key} ({tr(f'line {one.line}')})" if group == "matters" else one.key
            )
        if fates:
            lines += [f"{title}:", *(f"  {', '.join(keys)}: {tr(fate)}" for fate, keys in fates.items())]
    return lines + ([f"not set in the file: {', '.join(draft.unset)}"] if draft.unset else [])


@verbs.command()
def init(
    ctx: typer.Context,
    path: Annotated[Path, typer.Argument(help="the file to write")] = Path("job.yaml"),
    model: Annotated[str, typer.Option(help="model.model_name_or_path")] = "smollm2-135m-instruct",
    train: Annotated[
        str | None, typer.Option(help="data.train, looked at for its columns; default: the one data file here")
    ] = None,
    recipe: Annotated[str | None, typer.Option(help="copy a recipe and its data instead of the starter")] = None,
    full: Annotated[bool, typer.Option("--full", help="every key, not the few that most people change first")] = False,
    force: Annotated[bool, typer.Option(help="overwrite the file")] = False,
) -> None:
    """Write a commented starter job file.

    Examples: orchestrator init job.yaml --train mydata.jsonl
              orchestrator init job.yaml --recipe classify
    """
    from orchestrator.data.readers.folders import data_files_of
    from orchestrator.data.readers.sources import path_from_job
    from orchestrator.job.schema import starter

    file = resolve_path(path, "init", kind="new file")
    if file.exists() and not force:
        raise JobError(f"{path} exists already; --force overwrites it")
    typed = {"--model": _is_typed(ctx, "model"), "--train": train is not None, "--full": full}
    if recipe and (named := [option for option, is_typed in typed.items() if is_typed]):
        raise JobError(f"{', '.join(named)} beside --recipe {recipe}: a recipe is copied as it is; edit the copy")
    for option, value in (("--model", model), ("--train", train or "")):
        if value.encode("utf-8", "replace").decode() != value:
            raise JobError(f"{option} is not UTF-8 text")
    if recipe:
        _copy_recipe(recipe, file, force)
    else:
        found, held_out = (path_from_job(train, file.parent, "--train"), None) if train else data_files_of(file.parent)
        more = _look_at_rows(model, found, file.parent) if found else {}
        write_text_file(file, starter(model, found or "train.jsonl", held_out, full, more), "init")
        if found is None:
            say("data.train is train.jsonl, which is not here: set it to the path of your rows")
    show(f"wrote {path}. Next: orchestrator validate {path}")


def _is_typed(ctx: typer.Context, name: str) -> bool:
    """Whether an option was given, be it at its default."""
    source = ctx.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


def _copy_recipe(name: str, file: Path, force: bool) -> None:
    """Write a recipe, and beside it the data that it names.  Raises JobError before anything is written."""
    from clusters.safe.reading import load_yaml
    from orchestrator.job.job_file import path_values
    from orchestrator.job.schema import RECIPES

    text = recipe_text(name)
    named = [one for one in path_values(load_yaml(text)) if (RECIPES / one).is_file()]
    copies = {file.parent / one: (RECIPES / one).read_text(encoding="utf-8") for one in named}
    if others := [place for place, rows in copies.items() if place.exists() and not force and not _holds(place, rows)]:
        raise JobError(f"{others[0]} exists already and holds something else; --force overwrites it")
    write_text_file(file, text, "init")
    for place, rows in copies.items():
        place.parent.mkdir(parents=True, exist_ok=True)
        write_text_file(place, rows, "init")
        show(f"wrote {place.relative_to(file.parent)}")


def _holds(place: Path, text: str) -> bool:
    return place.is_file() and place.read_bytes() == text.encode()


def _look_at_rows(model: str, train: str, folder: Path) -> dict[str, Any]:
    """What to state about the columns of a file, after showing its first row; nothing where it is not here."""
    from orchestrator.data.readers.remote import scheme_of

    with bad_input_as_job_error("--train"):
        place = checked_path(train, folder)
    if scheme_of(train) or not place.exists():
        show(f"{train} is not a file here: its columns are not looked at; `orchestrator inspect` shows its rows")
        return {}
    from orchestrator.lifecycle.inspect_data import look_first

    found = look_first(model, train, folder)
    stated = {"data.columns": found.guess.columns, "data.roles": found.guess.roles}
    for key, value in stated.items():
        if value:
            listed = ", ".join(f"{name}: {other}" for name, other in value.items())
            show(f"{key}: {{{listed}}}" + ("" if found.guess.is_sure else "  (a guess: look at the row below)"))
    row = "".join(f"⟦{text}⟧" if learnt else text for text, learnt in found.pieces)
    for line in (*found.readings, f"{found.source}, what is learnt between ⟦ and ⟧:", row):
        show(line)
    return {key: value for key, value in stated.items() if value}
