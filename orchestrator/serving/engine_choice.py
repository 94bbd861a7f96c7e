"""Which engine serves a base model, and why."""

from __future__ import annotations

import contextlib
import importlib.util
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clusters.hardware.gpus import look_at_gpus
from clusters.safe.reading import BadInput, read_json
from orchestrator.errors import JobError, MissingExtra
from orchestrator.job import hub, model_files
from orchestrator.serving.catalog import ServedBase
from orchestrator.serving.engines.kinds import kind_of_adapter
from orchestrator.serving.engines.process import ProcessEngine
from orchestrator.serving.engines.protocol import ServedModel, ServingEngine
from orchestrator.serving.engines.ray_serve import LlmApplication, RayServeEngine, refusal_without_store
from orchestrator.serving.engines.vllm import VllmEngine
from strategies.adapter_bank import gguf_adapter
from strategies.adapter_bank.object_store import ObjectStore, address_mistake

ENGINES = ("auto", "transformers", "llama.cpp", "vllm")
_PACKAGE = "xllamacpp"
_LEAST_RANK = 16  # room for adapters that come later


@dataclass(frozen=True)
class EngineOptions:
    """What a command says of the engines."""

    engine: str = "auto"
    gguf: Path | None = None  # the base model as GGUF
    max_adapters: int = 8
    dtype: str | None = None
    vllm_python: Path | None = None  # of the environment that vLLM is installed in
    cluster: str | None = None  # a Ray cluster's dashboard
    adapter_store: str | None = None  # where a cluster's nodes load adapters from
    replicas: int = 1  # the most that a cluster computes with
    gpus_per_replica: int = 1

    def __post_init__(self) -> None:
        self._check_cluster()
        if self.engine not in ENGINES:
            raise JobError(f"--engine {self.engine}: one of {', '.join(ENGINES)}")
        if self.dtype not in (None, "float32", "bfloat16", "float16"):
            raise JobError(f"--dtype {self.dtype}: one of float32, bfloat16, float16")
        if self.engine == "llama.cpp" and not _is_installed():
            raise MissingExtra(_PACKAGE)

    def _check_cluster(self) -> None:
        of_cluster = {"--adapter-store": self.adapter_store, "--replicas": self.replicas > 1}
        of_cluster["--gpus-per-replica"] = self.gpus_per_replica > 1
        if self.cluster is None:
            if given := [name for name, value in of_cluster.items() if value]:
                raise JobError(f"{', '.join(given)}: belongs to --cluster; give a cluster, or leave it out")
            return
        if not self.cluster.startswith(("http://", "https://")):
            raise JobError(
                f"--cluster {self.cluster}: serving needs the address of a Ray cluster's dashboard, e.g."
                " http://192.168.1.10:8265"
            )
        of_machine = {"--gguf": self.gguf, "--vllm-python": self.vllm_python, "--engine": self.engine != "auto"}
        if given := [name for name, value in of_machine.items() if value]:
            raise JobError(f"{', '.join(given)}: is of engines on this machine; --cluster serves by Ray Serve LLM")
        if self.adapter_store and (mistake := address_mistake(self.adapter_store)):
            raise JobError(f"--adapter-store {mistake}")


def engine_of(
    base: ServedBase, models: Sequence[ServedModel], options: EngineOptions, say: Callable[[str], None]
) -> ServingEngine:
    """The engine for a base model and what is served of it.  Raises JobError where the one that is wanted cannot."""
    if options.cluster:
        return _on_cluster(base, models, options, say)
    if options.engine == "vllm":
        command, most_rank = _vllm_command(options), _most_rank(models)
        return VllmEngine(base.folder, command, options.max_adapters, most_rank, options.dtype)
    file = gguf_of(base, options)
    settings: dict[str, Any] = {"base": base.folder, "run": base.run, "dtype": options.dtype}
    settings["max_adapters"] = options.max_adapters
    if options.engine == "llama.cpp" and file is None:
        raise JobError(f"--engine llama.cpp: give {base.name} as a GGUF file with --gguf FILE")
    reason = "as asked" if options.engine != "auto" else _why_not_llama_cpp(base, models, options)
    if options.engine == "llama.cpp" or (options.engine == "auto" and reason is None):
        settings |= {"engine": "llama.cpp", "gguf": str(file), "run": None}
    elif options.engine == "auto":
        say(f"{base.name} is served by transformers: {reason}")
    return ProcessEngine(settings, say)


def _on_cluster(
    base: ServedBase, models: Sequence[ServedModel], options: EngineOptions, say: Callable[[str], None]
) -> ServingEngine:
    """Ray Serve LLM, with the base as the cluster's nodes get it: by its name on the hub, or in the same folder."""
    assert options.cluster
    if (adapters := [model.name for model in models if model.folder]) and not options.adapter_store:
        raise JobError(refusal_without_store(", ".join(adapters[:3])))
    source, revision = hub.name_in_cache(Path(base.folder).absolute()) or (str(Path(base.folder).absolute()), None)
    say(f"{base.name} is served by Ray Serve LLM on {options.cluster}: --cluster")
    application = LlmApplication(
        base.folder,
        source,
        revision,
        options.dtype,
        _most_rank(models),
        options.max_adapters,
        options.replicas,
        options.gpus_per_replica,
    )
    store = ObjectStore(options.adapter_store) if options.adapter_store else None
    return RayServeEngine(options.cluster, application, store, say)


def why_not(engine: str, base: ServedBase, models: Sequence[ServedModel], options: EngineOptions) -> str | None:
    """Why an engine cannot serve a base model with what is served of it; None where it has all it needs."""
    tuned = [model for model in models if model.folder]
    if engine == "llama.cpp":
        if not _is_installed():
            return f"{_PACKAGE} (llama.cpp) is not installed"
        if gguf_of(base, options) is None:
            return "no GGUF file of it is known (--gguf FILE)"
        other = [model.name for model in tuned if not _as_gguf(Path(model.folder or ""))]
        return f"{', '.join(other[:3])}: llama.cpp takes pairs of A and B alone" if other else None
    if engine == "vllm":
        if options.vllm_python is None and not shutil.which("vllm"):
            return "there is no vllm on PATH (--vllm-python PYTHON)"
        other = [model.name for model in tuned if not _is_plain(Path(model.folder or ""))]
        return f"{', '.join(other[:3])}: vLLM takes pairs of A and B alone" if other else None
    return None


def _why_not_llama_cpp(base: ServedBase, models: Sequence[ServedModel], options: EngineOptions) -> str | None:
    """Why `auto` passes over it; None where it is the faster one and has all it needs."""
    return "there is a GPU" if look_at_gpus()[0] else why_not("llama.cpp", base, models, options)


def _as_gguf(folder: Path) -> bool:
    """Whether an adapter is there as GGUF or can be written so."""
    return (folder / gguf_adapter.FILE).is_file() or _is_plain(folder)


def _is_plain(folder: Path) -> bool:
    """Whether a folder holds pairs of A and B and nothing else."""
    with contextlib.suppress(BadInput):
        return kind_of_adapter(folder) == "shared"
    return False


def gguf_of(base: ServedBase, options: EngineOptions) -> Path | None:
    """The GGUF file that llama.cpp reads as a base model: the one that was given, or the packaged one."""
    return options.gguf or _packaged(base.name)


def _vllm_command(options: EngineOptions) -> list[str]:
    """What starts its server.  Raises JobError where there is none."""
    if options.vllm_python:
        return [str(options.vllm_python), "-m", "vllm.entrypoints.cli.main", "serve"]
    if found := shutil.which("vllm"):
        return [found, "serve"]
    raise JobError(
        "--engine vllm: there is no vllm on PATH. Install it into an environment of its own (python -m venv vllm &&"
        " vllm/bin/pip install vllm) and give --vllm-python vllm/bin/python"
    )


def _most_rank(models: Sequence[ServedModel]) -> int:
    """The highest rank of adapters that vLLM is started for."""
    ranks = [_LEAST_RANK]
    for model in models:
        with contextlib.suppress(BadInput):
            settings = read_json(Path(model.folder or "") / "adapter_config.json")
            patterns = settings.get("rank_pattern") or {}
            ranks += [rank for rank in (settings.get("r"), *patterns.values()) if isinstance(rank, int)]
    return max(ranks)


def _is_installed() -> bool:
    return importlib.util.find_spec(_PACKAGE) is not None


def _packaged(name: str) -> Path | None:
    """The GGUF file of a packaged model that is installed."""
    package, file, _ = model_files.PACKAGED.get(name.lower(), ("", "", ""))
    spec = importlib.util.find_spec(package) if package else None
    places = spec.submodule_search_locations if spec else None
    return Path(places[0]) / file if places else None
