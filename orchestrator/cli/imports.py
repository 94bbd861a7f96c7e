"""The verb `import`: a configuration of another fine-tuning tool as a job file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orchestrator.cli.options import JsonOption, err, print_json, say, show
from orchestrator.errors import JobError
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
