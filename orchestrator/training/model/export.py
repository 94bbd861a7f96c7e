"""Exports what a run hands back: a folder that plain transformers and PEFT load, complete or not there.

weights          adapter_config.json + adapter_model.safetensors, or config.json + model*.safetensors
tokenizer        its files, with the chat template that was trained with (chat_template.jinja)
generation       generation_config.json: the base model's, with every token that ends an answer; none of a score
base_model.json  of an adapter: name and revision of its base, size and SHA-256 of the base's files
README.md        the model card (orchestrator/runs/model_card.py), written when everything is known
"""

from __future__ import annotations

import contextlib
import json
import stat
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from clusters.safe.reading import BadInput, read_json
from orchestrator.job.model_files import BaseName
from orchestrator.runs.digests import FileDigest
from orchestrator.training.stops import stops_of
from strategies.model.heads import has_score, inner_model
from strategies.train_setup import TrainSetup

_ADAPTER, _GENERATION, _BASE = "adapter_config.json", "generation_config.json", "base_model.json"


@dataclass(frozen=True)
class BaseModel:
    """The model that a result belongs to: where it lies here, how others get it, and which files it is."""

    folder: Path
    name: BaseName
    files: Mapping[str, FileDigest]


def write(folder: Path, setup: TrainSetup, weights: Mapping[str, Any] | None, tokenizer: Any, base: BaseModel) -> None:
    """Export a training into `folder`; `weights` where no worker holds them whole."""
    inner = inner_model(setup.model)
    with plain_generation(inner):
        setup.export(folder, weights)
    if has_score(inner):  # there is nothing to generate
        tokenizer.save_pretrained(folder)
    else:
        write_beside(folder, inner, tokenizer, base.folder)
    if is_adapter(folder):
        names = {"base_model_name_or_path": base.name.name, "revision": base.name.revision}
        _write_json(folder / _ADAPTER, _json(folder / _ADAPTER) | names)
        files = {name: asdict(digest) for name, digest in base.files.items()}
        _write_json(folder / _BASE, {"name": base.name.name, "revision": base.name.revision, "files": files})
    share(folder)


def write_beside(folder: Path, model: Any, tokenizer: Any, base: Path) -> None:
    """Tokenizer with the trained template, and the settings of generation with every stop."""
    tokenizer.save_pretrained(folder)
    settings = _json(base / _GENERATION) | {"eos_token_id": list(stops_of(model, tokenizer).ids)}
    settings.pop("_from_model_config", None)  # transformers would take the model's config for newer
    for key in ("bos_token_id", "pad_token_id"):
        if settings.get(key) is None and (token := getattr(tokenizer, key, None)) is not None:
            settings[key] = token
    _write_json(folder / _GENERATION, settings)


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


def share(folder: Path) -> None:
    """Let the umask decide who reads a result, as it did for its folder: files made as temporary ones are private."""
    mode = stat.S_IMODE(folder.stat().st_mode)
    for path in folder.rglob("*"):
        path.chmod(mode if path.is_dir() else mode & 0o666)


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
