"""Exports what a run hands back: a folder that plain transformers and PEFT load, complete or not there.

weights          adapter_config.json + adapter_model.safetensors, or config.json + model*.safetensors
tokenizer        its files, with the chat template that was trained with (chat_template.jinja)
generation       generation_config.json: the base model's, with every token that ends an answer
README.md        the model card (orchestrator/runs/model_card.py), written when everything is known
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from clusters.safe.reading import BadInput, read_json
from orchestrator.job import model_files
from orchestrator.job.job_file import Job
from orchestrator.training.stops import stops_of
from strategies.step.supervised_logits import inner_model
from strategies.train_setup import TrainSetup

_ADAPTER, _GENERATION = "adapter_config.json", "generation_config.json"


def write(
    folder: Path, setup: TrainSetup, weights: Mapping[str, Any] | None, tokenizer: Any, job: Job, base: Path
) -> None:
    """Export a training into `folder`; `weights` where no worker holds them whole, `base` is the model's folder."""
    inner = inner_model(setup.model)
    with plain_generation(inner):
        setup.export(folder, weights)
    write_beside(folder, inner, tokenizer, base)
    if (folder / _ADAPTER).exists():
        names = {"base_model_name_or_path": base_name(job), "revision": job.spec.model.model_revision}
        _write_json(folder / _ADAPTER, _json(folder / _ADAPTER) | names)
    make_readable(folder)


def write_beside(folder: Path, model: Any, tokenizer: Any, base: Path) -> None:
    """Tokenizer with the trained template, and the settings of generation with every stop."""
    tokenizer.save_pretrained(folder)
    settings = _json(base / _GENERATION) | {"eos_token_id": list(stops_of(model, tokenizer).ids)}
    settings.pop("_from_model_config", None)  # transformers would take the model's config for newer
    for key in ("bos_token_id", "pad_token_id"):
        if settings.get(key) is None and (token := getattr(tokenizer, key, None)) is not None:
            settings[key] = token
    _write_json(folder / _GENERATION, settings)


def base_name(job: Job) -> str:
    """The base model's name as others can load it: of the hub or a package as given, a folder by its full path."""
    name = job.spec.model.model_name_or_path
    is_folder = name.lower() not in model_files.PACKAGED and job.path(name).is_dir()
    return str(job.path(name)) if is_folder else name


@contextlib.contextmanager
def plain_generation(model: Any) -> Iterator[None]:
    """Drop the base's generation settings inside the block: transformers saves none that contradict each other."""
    from transformers import GenerationConfig

    own = getattr(model, "generation_config", None)
    if own is not None:
        model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        if own is not None:
            model.generation_config = own


def make_readable(folder: Path) -> None:
    """Make a result readable for all: files written by way of temporary ones are private."""
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter for PEFT, not a whole model."""
    return (folder / _ADAPTER).is_file()


def _json(file: Path) -> dict[str, Any]:
    """The fields of a JSON file; none where there is no such file or it cannot be read."""
    try:
        found = read_json(file)
    except BadInput:
        return {}
    return found if isinstance(found, dict) else {}


def _write_json(file: Path, values: dict[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
