"""The verb `export`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orchestrator.cli.options import JsonOption, RunArgument, RunsOption, print_json, say, show
from orchestrator.errors import JobError
from orchestrator.job.paths import resolve_path
from orchestrator.runs.run_folder import RunFolder

if TYPE_CHECKING:
    from orchestrator.export.write import Kind

verbs = typer.Typer()


@verbs.command()
def export(
    run: RunArgument = "latest",
    gguf: Annotated[bool, typer.Option("--gguf", help="the adapter for llama.cpp; with --merged the model")] = False,
    ollama: Annotated[bool, typer.Option("--ollama", help="a folder for `ollama create`")] = False,
    merged: Annotated[bool, typer.Option("--merged", help="base and adapter as one model, in 16 bits")] = False,
    hub_folder: Annotated[bool, typer.Option("--hub-folder", help="a folder for the hub, with its card")] = False,
    out: Annotated[Path | None, typer.Option("--out", help="the folder to write; default: RUN-KIND here")] = None,
    base: Annotated[
        str | None, typer.Option("--base", help="the base elsewhere: a GGUF file, or its name on Ollama or the hub")
    ] = None,
    converter: Annotated[
        Path | None, typer.Option("--converter", help="llama.cpp's convert_hf_to_gguf.py, where it is not on PATH")
    ] = None,
    licence: Annotated[str | None, typer.Option("--licence", help="for the hub: e.g. apache-2.0")] = None,
    language: Annotated[list[str], typer.Option("--language", help="for the hub: en, ja; may be repeated")] = [],
    check: Annotated[bool, typer.Option("--check", help="load it again and compare answers with the run's")] = False,
    force: Annotated[bool, typer.Option("--force", help="write an export anew that lies there")] = False,
    runs: RunsOption = Path("runs"),
    json_: JsonOption = False,
) -> None:
    """Write a finished run's result for llama.cpp, Ollama, the hub, or any program that loads plain models.

    Examples: orchestrator export latest --gguf --check
              orchestrator export latest --ollama --base llama3.2:1b
    """
    forms: dict[Kind, bool] = {"gguf": gguf, "ollama": ollama, "hub-folder": hub_folder}
    wanted: list[Kind] = [form for form, is_set in forms.items() if is_set]
    if len(wanted) > 1 or not (wanted or merged):
        raise JobError("export writes one form: --gguf, --ollama or --hub-folder, each with --merged or without it,"
                       " or --merged alone")  # fmt: skip
    given = {"--base": base, "--converter": converter, "--licence": licence, "--language": language}
    _refuse_unused(wanted, check, given)
    found = RunFolder.find(run, runs)
    from orchestrator.export.hub_folder import Stated
    from orchestrator.export.write import ExportWish
    from orchestrator.export.write import export as write

    kind: Kind = wanted[0] if wanted else "merged"
    output = resolve_path(out or Path(f"{found.run_id}-{kind}"), "--out", kind="new folder")
    script = converter and resolve_path(converter, "--converter", kind="file")
    stated = Stated(base if kind == "hub-folder" else None, licence, tuple(language))
    wish = ExportWish(kind, merged, base, script, stated, force)
    written = write(found, output, wish, say)
    if check:
        written["check"] = _check(found, output, base if kind != "hub-folder" else None)
    if json_:
        print_json(written)
        return
    for note in written["notes"]:
        show(note)
    if check:
        show(written["check"]["text"])
    show(f"wrote {output}")


_OF_FORMS = {  # option -> forms that use it
    "--base": ("ollama", "hub-folder"),
    "--converter": ("gguf", "ollama"),
    "--licence": ("hub-folder",),
    "--language": ("hub-folder",),
}


def _refuse_unused(wanted: Sequence[str], checks: bool, given: Mapping[str, object]) -> None:
    """Raise JobError for an option that the form of export does not use; `--base` serves --check too."""
    for option, value in given.items():
        forms = _OF_FORMS[option]
        if value and not (set(wanted) & set(forms) or (checks and option == "--base")):
            raise JobError(f"{option} belongs to {' and '.join(f'--{form}' for form in forms)}; remove it")


def _check(run: RunFolder, folder: Path, base: str | None) -> dict[str, Any]:
    from dataclasses import asdict

    from orchestrator.export.check import check
    from orchestrator.runs.condition import require_finished

    report = check(require_finished(run), folder, base)
    return {**asdict(report), "text": report.text}
