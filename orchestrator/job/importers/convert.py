"""A configuration of another tool -> a job: each key by the tool's table, then its data, then its defaults.

Nothing is dropped in silence: a key is converted, or listed with what happens instead, or named as not set.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clusters.safe.reading import name_mistake, printable
from orchestrator.errors import JobError, Mistake
from orchestrator.job.aliases import other_tools
from orchestrator.job.document import Document, load_document, shown
from orchestrator.job.importers.conversions import CONVERSIONS, OFF, IsSet, NoCounterpart
from orchestrator.job.importers.datasets import READERS
from orchestrator.job.importers.draft import Group, JobDraft, Setting
from orchestrator.job.importers.objectives import fit_to_objective, objective_of, set_objective
from orchestrator.job.importers.tables import TOOLS, Entry, KeyTable, flat, recognise, spelt, tables
from orchestrator.job.job_file import Job, job_of
from orchestrator.job.paths import read_text_file
from orchestrator.job.sections.methods import METHOD_SECTIONS
from strategies.optimizers import OPTIMIZERS

_OF_HELD_OUT_ROWS = (
    *("eval.eval_steps", "eval.early_stopping_patience", "checkpoint.load_best_model_at_end"),
    *("eval.metrics", "eval.temperature", "eval.top_p"),
)


def convert_file(path: Path, tool: str | None, target: Path, objective: str | None = None) -> tuple[JobDraft, Job]:
    """The draft of a file of another tool, and its job in the folder `target`, validated.

    `objective` is what the tool's command trains for, where the file does not say it.

    Raises JobError for a file of no known tool, for what cannot be trained here at all, and for values that are wrong.
    """
    label = printable(str(path))
    document = load_document(read_text_file(path, "import"), label)
    tool = tool or recognise(document.values)
    if tool is None:
        known = ", ".join(table.name for table in tables().values())
        raise JobError(
            f"{label}: is of no tool that is known here ({known}); `--from TOOL` states one ({', '.join(TOOLS)}), and a"
            " job of this program needs no import: `orchestrator validate` reads it"
        )
    try:
        draft = convert(document, tables()[tool], path.resolve().parent, target, objective)
    except JobError as error:
        raise JobError([mistake.with_text(f"{label}: {mistake}") for mistake in error.mistakes]) from None
    if "name" not in draft.settings and not name_mistake(path.stem):
        draft.settings = {"name": Setting(path.stem, "the file's name"), **draft.settings}
    lines = {tuple(key.split(".")): _place(setting.line) for key, setting in draft.settings.items()}
    return draft, job_of(Document(draft.document(), {**lines}), target, label)


def _place(line: int | str | None) -> int | str:
    return "not in the file" if line is None else line


def convert(document: Document, table: KeyTable, source: Path, target: Path, objective: str | None = None) -> JobDraft:
    """The draft of a document by the table of its tool.  Raises JobError for what cannot be trained here at all."""
    lines = {".".join(map(str, path)): line for path, line in document.lines.items() if path}
    draft = JobDraft(table.name, document.values, flat(document.values, whole=table.entries), lines, source, target)
    _refuse(draft, table)
    set_objective(draft, table, objective)
    decided = (*table.data_keys, *(draft.used - table.entries.keys()))
    READERS[table.data](draft, table)
    rest = [key for key in draft.flat if not any(key == one or key.startswith(f"{one}.") for one in decided)]
    for key in dict.fromkeys([*(key for key in table.entries if key in rest), *rest]):
        _take(draft, table, key)
    _add_defaults(draft, table)
    _leave_schedule(draft)
    _leave_options_of_other_methods(draft)
    fit_to_objective(draft, table)
    _leave_measuring(draft)
    return draft


def _refuse(draft: JobDraft, table: KeyTable) -> None:
    """Raise JobError for a file whose work is of another kind: a job that trains something else helps nobody."""
    mistakes = []
    for key, refusal in table.refuse.items():
        if key in draft.flat and spelt(value := draft.flat[key]) not in map(spelt, refusal["values"]):
            line, told = draft.line(key), refusal["sentence"]
            text = f"line {line}: {key} is {shown(value)}: {told}"
            mistakes.append(Mistake(text, line if isinstance(line, int) else None, key, shown(value), told))
    if mistakes:
        raise JobError(mistakes)


def _take(draft: JobDraft, table: KeyTable, key: str) -> None:
    """Convert one key, or leave it with its sentence."""
    value, entry = draft.flat[key], table.entries.get(key)
    if value is None or value == "":
        draft.unset.append(key)
        return
    if entry is None:
        _leave(draft, table, key)
        return
    try:
        for ours, one in _settings(draft, entry, key).items():
            draft.set(ours, one, key)
        if entry.note and value not in OFF:
            draft.leave("matters", key, entry.note)
    except NoCounterpart:
        _leave(draft, table, key)


def _settings(draft: JobDraft, entry: Entry, key: str) -> Mapping[str, Any]:
    """What one key sets here.  Raises NoCounterpart."""
    value = draft.flat[key]
    if entry.values is not None:
        if spelt(value) not in entry.values:
            raise NoCounterpart
        return entry.values[spelt(value)] or _nothing(draft, key)
    if entry.matches is not None:
        fitting = [one for pattern, one in entry.matches.items() if re.search(pattern, str(value))]
        if not fitting:
            raise NoCounterpart
        return fitting[0] or _nothing(draft, key)
    assert entry.to
    try:
        return {entry.to: CONVERSIONS[entry.conversion](value, draft) if entry.conversion else value}
    except IsSet:
        return {}


def _nothing(draft: JobDraft, key: str) -> Mapping[str, Any]:
    if key not in draft.used:
        draft.leave("default", key, "the same here")
    return {}


def _leave(draft: JobDraft, table: KeyTable, key: str) -> None:
    """List a key without a counterpart: by the tool's table, else by what is known of any tool's key."""
    found: tuple[Group, str] | None = table.group_of(key)
    name, known = key.rpartition(".")[2], other_tools()
    if found is None and name in known.not_needed:
        found = "default", known.not_needed[name].removesuffix("; remove it")
    if found is None and name in known.not_yet:
        found = "matters", known.not_yet[name]
    if found is None:
        found = "matters", "not known here: nothing is done with it"
    if draft.flat[key] in OFF and found[0] == "matters":
        found = "default", "off here too"
    draft.leave(*(found[0], key, found[1]))


def _add_defaults(draft: JobDraft, table: KeyTable) -> None:
    """What the tool would do where its file says nothing, as far as this program would do something else."""
    own = table.objective_defaults.get(objective_of(draft).name, {})
    for key, value in {**own, **{key: one for key, one in table.defaults.items() if key not in own}}.items():
        if key == "train.global_batch_size" and "train.gradient_accumulation_steps" in draft.settings:
            continue
        if key == "train.warmup_ratio" and "train.warmup_steps" in draft.settings:
            continue
        if isinstance(value, dict):
            half = draft.settings.get(value["twice"], Setting(None, "")).value
            if not isinstance(half, int | float):
                continue
            value = 2 * half
        draft.set_default(key, value)
    weights_train = draft.settings["method.type"].value == table.full_type
    for key, value in table.full_defaults.items() if weights_train else ():
        if draft.settings[key].line is None:
            del draft.settings[key]
            draft.set_default(key, value)


def _leave_schedule(draft: JobDraft) -> None:
    """What a file says of the learning rate beside an optimizer that does it by itself."""
    optim = draft.settings.get("train.optim")
    facts = OPTIMIZERS.get(str(optim.value)) if optim else None
    if optim is None or facts is None:
        return
    for key in ("lr_scheduler_type", "warmup_steps", "warmup_ratio"):
        setting = draft.settings.get(f"train.{key}")
        if setting and facts.schedule_mistakes(str(optim.value), {key: setting.value}):
            draft.drop(f"train.{key}", "matters", f"{optim.value} does by itself what the rate does")
            draft.settings.pop("train.lr_scheduler_kwargs", None)


def _leave_options_of_other_methods(draft: JobDraft) -> None:
    """Options of adapters in a file that trains none."""
    known = METHOD_SECTIONS[draft.settings["method.type"].value].model_fields
    for key in [
        key for key in draft.settings if key.startswith("method.") and key.removeprefix("method.") not in known
    ]:
        draft.drop(key, "default", f"method.type {draft.settings['method.type'].value} has no such option")


def _leave_measuring(draft: JobDraft) -> None:
    """When held-out rows are measured, in a file that names none."""
    for key in _OF_HELD_OUT_ROWS if "data.eval" not in draft.settings else ():
        if key in draft.settings:
            draft.drop(key, "default", "the file names no rows to measure: data.eval: {split: 0.05} holds out some")
