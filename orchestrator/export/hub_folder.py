"""A folder for the Hugging Face hub: what a run handed back, with a card that a stranger can judge and use it by.

The card's head follows the hub's model card metadata (https://huggingface.co/docs/hub/model-cards): licence, languages,
tags, metrics as model-index.  Nothing in the folder names a path of this machine.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from clusters.safe.masking import holds_secret, masked
from clusters.safe.reading import BadInput, load_yaml, read_text
from clusters.units import format_s
from orchestrator.data.readers.sources import looks_like_hub_name
from orchestrator.errors import JobError, RunFailed
from orchestrator.job import hub, model_files
from orchestrator.job.job_file import Job
from orchestrator.job.sections.training import HeldOutFraction
from orchestrator.runs import model_card
from orchestrator.runs.condition import Finished
from orchestrator.runs.markdown import inline_code, plain
from orchestrator.runs.model_card import CardSubject
from strategies.export import WHOLE_MODEL

_TEXTS = (".json", ".md", ".jinja", ".txt", ".py")
_HUB = "https://huggingface.co/"
_HUB_PLACE = "USER/NAME"  # on the hub, which the owner of the folder decides


@dataclass(frozen=True)
class Stated:
    """What the person who exports says of the model, in the place of what is found."""

    base: str | None = None  # the base's name on the hub
    licence: str | None = None
    languages: tuple[str, ...] = ()


def base_on_hub(finished: Finished, stated: Stated, is_merged: bool) -> model_files.BaseName:
    """The base as the hub knows it.  Raises JobError where nobody can get it by its name."""
    base = model_files.name_for_others(finished.job, Path(finished.data.model), finished.exported)
    if stated.base:
        name, revision = _hub_name(stated.base)
        return model_files.BaseName(name, revision or (base.revision if base.name == name else None))
    if base.is_folder and not is_merged:
        raise JobError(
            f"--hub-folder: the base is a folder of this machine ({base.title}), by which nobody on the hub gets it:"
            " --base ORG/NAME says where it is there, --merged writes the whole model"
        )
    return base


def _hub_name(text: str) -> tuple[str, str | None]:
    """Name and revision of a model on the hub, also of its page's address.  Raises JobError."""
    name, _, revision = text.removeprefix(_HUB).strip("/").partition("@")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.startswith("."):
        raise JobError(f"--base {text!r} is no name of the hub: give ORG/NAME, or ORG/NAME@REVISION")
    return name, revision or None


def check_stated(stated: Stated) -> None:
    """Raises JobError for a language or a licence that the hub does not know as such."""
    if wrong := next((one for one in stated.languages if not re.fullmatch("[a-z]{2,3}(-[A-Za-z0-9]+)*", one)), None):
        raise JobError(f"--language {wrong!r} is no code of a language: en, ja, zh ...")
    if stated.licence and not re.fullmatch("[a-z0-9][a-z0-9.+-]*", stated.licence.lower()):
        raise JobError(
            f"--licence {stated.licence!r} is no identifier of the hub: apache-2.0, mit, cc-by-4.0, other ..."
        )


def write(
    finished: Finished, folder: Path, stated: Stated, is_merged: bool, merge_check: str | None = None
) -> list[str]:
    """Fill `folder`, which holds the merged model already where `is_merged`; sentences about what is not known.

    `merge_check` says how the merged model was compared.  Raises JobError, RunFailed where a path of this machine or a
    password would be published.
    """
    base = base_on_hub(finished, stated, is_merged)
    if not is_merged:
        shutil.copytree(finished.exported, folder, dirs_exist_ok=True)
        _name_base(folder, base)
    subject = model_card.subject_of(finished.run, finished.job, finished.exported)
    assert subject is not None  # it is finished
    known = _known_of_base(base, Path(finished.data.model))
    subject = replace(
        subject,
        base=base,
        folder=folder,
        place=_HUB_PLACE,
        made=WHOLE_MODEL if is_merged else subject.made,
        check=merge_check or subject.check,
    )
    metadata, notes = _metadata(subject, known, stated)
    lines = model_card.card_of(subject, metadata, [*_origin(subject, known, stated), *_hardware(subject)])
    model_card.write(folder, [masked(line) for line in lines])
    _check_private(finished, folder)
    return notes


def _name_base(folder: Path, base: model_files.BaseName) -> None:
    for file, key in (("adapter_config.json", "base_model_name_or_path"), ("base_model.json", "name")):
        if (folder / file).is_file():
            values = json.loads((folder / file).read_text(encoding="utf-8")) | {
                key: base.name,
                "revision": base.revision,
            }
            (folder / file).write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _known_of_base(base: model_files.BaseName, located: Path) -> dict[str, Any]:
    """Licence and languages of the base: as its own card says, beside its files or on the hub where that answers."""
    if origin := model_files.ORIGINS.get(base.name):
        return {"license": origin.licence, "language": list(origin.languages), "name": origin.name}
    try:
        text = read_text(located / model_card.NAME)
        head = load_yaml(text.split("---")[1]) if text.startswith("---") else {}
    except (BadInput, IndexError):
        head = {} if base.is_folder else hub.metadata_of(base.name, base.revision)
    return head if isinstance(head, dict) else {}


def _metadata(subject: CardSubject, known: Mapping[str, Any], stated: Stated) -> tuple[dict[str, Any], list[str]]:
    """The head of the card, and a sentence for each part that is not known."""
    job, made, notes = subject.job, subject.made, []
    licence = stated.licence or job.spec.bank.licence or known.get("license")
    languages = list(stated.languages) or known.get("language")
    languages = [languages] if isinstance(languages, str) else languages
    head: dict[str, Any] = {"pipeline_tag": "text-generation"}
    head["base_model_relation"] = "adapter" if made.is_adapter else "finetune"
    if name := known.get("name"):
        head["base_model"] = name
    elif subject.base.is_folder:  # a name of this machine might be another model's on the hub
        head["base_model"] = head["base_model_relation"] = None
        notes.append("the base's name on the hub is not known here: --base ORG/NAME states it")
    if licence:
        head["license"] = str(licence).lower()
    else:
        notes.append("the base's licence is not known here: --licence states it, or fill it in before you publish")
    if languages:
        head["language"] = languages
    else:
        notes.append("the language is not known here: --language en states it")
    datasets = [source for source in _sources(job) if _is_on_hub(source, job)]
    head |= {"datasets": datasets} if datasets else {}
    method = str(subject.run.plan().method.get("type"))
    head["tags"] = [*(["peft"] if made.library == "peft" else []), method, "finetune-orchestrator"]
    if results := _model_index(subject):
        head["model-index"] = results
    return head, notes


def _model_index(subject: CardSubject) -> list[dict[str, Any]]:
    after = subject.result.after
    if after is None:
        return []
    metrics = [{"type": key, "name": key, "value": round(value, 6)} for key, value in after.scores.items()]
    data = subject.job.spec.data
    is_split = isinstance(data.eval, HeldOutFraction)
    source = next(iter(_paths(data.train if is_split else data.eval)), "rows")
    name = f"held-out rows of {Path(source).name}" if is_split else Path(source).name
    held_out = {"name": name, "type": Path(source).stem}
    result = {"task": {"type": "text-generation"}, "dataset": held_out, "metrics": metrics}
    return [{"name": subject.job.spec.name, "results": [result]}]


def _sources(job: Job) -> list[str]:
    return _paths(job.spec.data.train)


def _paths(sources: Any) -> list[str]:
    """Of one source or several."""
    listed = sources if isinstance(sources, list) else [sources]
    return [one if isinstance(one, str) else one.path for one in listed if one is not None]


def _is_on_hub(source: str, job: Job) -> bool:
    return not job.path(source).exists() and looks_like_hub_name(source, job.folder)


def _origin(subject: CardSubject, known: Mapping[str, Any], stated: Stated) -> list[str]:
    """What it was trained on, and under which licences."""
    licence = known.get("license") or (stated.licence and f"{stated.licence}, as stated by who exported it")
    lines = ["## Where it comes from", ""]
    lines += [f"- Base: {inline_code(str(known.get('name') or subject.base.title))}"]
    lines[-1] += f", licence {plain(str(licence))}" if licence else ", licence not known here: see its page"
    if origin := model_files.ORIGINS.get(subject.base.name):
        lines.append(f"- {plain(origin.note)}")
    for source in _sources(subject.job):
        on_hub = _is_on_hub(source, subject.job)
        licence = hub.metadata_of(source, kind="dataset").get("license") if on_hub else None
        shown = f"licence {plain(str(licence))}" if licence else "licence not known here"
        lines.append(f"- Data: {inline_code(source if on_hub else Path(source).name)}, {shown}")
    if rows := (subject.run.data().statistics or {}).get("rows"):
        lines.append(f"- Rows: {rows}")
    return [*lines, ""]


def _hardware(subject: CardSubject) -> list[str]:
    plan, result = subject.run.plan(), subject.result
    devices = [part.device for part in plan.nodes]
    counted = [f"{devices.count(one)} x {one}" for one in dict.fromkeys(devices)]
    lines = ["## Trained on", "", f"- {plain(', '.join(counted))}, {format_s(result.train_seconds)} of training"]
    if result.energy:
        lines.append(f"- {result.energy.wh:.1f} Wh ({plain(result.energy.source)})")
    versions = result.versions or {}
    shown = ", ".join(f"{name} {number}" for name, number in versions.items())
    return [*lines, *([f"- {plain(shown)}"] if shown else []), ""]


def _check_private(finished: Finished, folder: Path) -> None:
    """Raises RunFailed where a file would publish a path of this machine or a password."""
    for file, text in _texts(folder):
        if found := [place for place in _places(finished) if place in text]:
            raise RunFailed(f"{file.name} would publish a path of this machine: {found[0]}")
        if holds_secret(text):
            raise RunFailed(f"{file.name} would publish a password or a token in an address")


def _texts(folder: Path) -> Iterator[tuple[Path, str]]:
    for file in sorted(folder.rglob("*")):
        if file.is_file() and file.suffix in _TEXTS and file.name != "tokenizer.json":
            yield file, file.read_text(encoding="utf-8", errors="replace")


def _places(finished: Finished) -> Sequence[str]:
    """Folders of this machine that a result could name."""
    known = (finished.run.path.absolute(), finished.job.folder, Path(finished.data.model), Path.home())
    return [str(place) for place in known if len(place.parts) > 1]
