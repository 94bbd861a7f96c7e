"""Loads samples, tokenizer and model: the pretrained one, or what a run handed back."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch

from clusters.safe.reading import first_line
from orchestrator.data.dataset import Dataset
from orchestrator.data.prepare import datasets
from orchestrator.errors import JobError
from orchestrator.job.job_file import Job
from orchestrator.job.weights import stored_tensors
from orchestrator.runs.run_folder import RunFolder
from orchestrator.training.model import export
from orchestrator.training.worker_context import WorkerContext
from strategies.model import heads
from strategies.model.architecture import LoadReport, faults, quiet
from strategies.registry import load_adapter
from strategies.shape import SCORE
from strategies.step import document_attention
from strategies.step.out_of_memory import is_out_of_memory
from strategies.step.quantise import keep_layout
from strategies.workload import Techniques


def load_data(run: RunFolder) -> tuple[Dataset, Dataset | None]:
    """Training and held-out samples that data.json names.  Raises DamagedCache, JobError."""
    return datasets(run.data())


def tokenizer_of(run: RunFolder, job: Job) -> Any:
    """The tokenizer of a run with the chat template that its samples were rendered with; not to be changed.

    Runs of one process share it: each copy takes about 10 MB.
    """
    files = run.data()
    return _tokenizer(files.model, job.spec.model.trust_remote_code, files.chat_template)


def load_tokenizer(location: str, job: Job, chat_template: str | None = None) -> Any:
    """The tokenizer of a model; `chat_template` takes the place of its own."""
    return _tokenizer.__wrapped__(location, job.spec.model.trust_remote_code, chat_template)


@lru_cache(maxsize=1)
def _tokenizer(location: str, trust_remote_code: bool, chat_template: str | None) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(location, trust_remote_code=trust_remote_code)
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    return tokenizer


@dataclass(frozen=True)
class Placing:
    """How a model's weights are read: in which precision, where to, with which attention and quantisation."""

    dtype: str
    device: torch.device
    attn_implementation: str
    arguments: Mapping[str, Any] = field(default_factory=dict)  # more of `from_pretrained`

    def as_arguments(self) -> dict[str, Any]:
        """Of transformers' `from_pretrained`.

        On a GPU each weight goes from its file straight to the device: the host never holds the model, whatever number
        of workers load it.
        """
        return {
            "dtype": getattr(torch, self.dtype),
            "attn_implementation": self.attn_implementation,
            "output_loading_info": True,
            **placement_arguments(self.device),
            **self.arguments,
        }


def load_model(location: str, job: Job, placing: Placing) -> Any:
    """The pretrained model.  Raises JobError; an out-of-memory error passes unchanged."""
    if not job.spec.build_objective().writes_text:
        return _load_with_score(location, job, placing)
    from transformers import AutoModelForCausalLM

    with _loading(location):
        loaded = _from_pretrained(AutoModelForCausalLM, location, job, placing)
    model, info = loaded
    report = LoadReport.from_loading_info(info)
    if wrong := faults(report, [name for name, _ in model.named_parameters()], report.unexpected):
        raise JobError(f"model.model_name_or_path: {location}: {wrong}")
    return _placed(model, placing)


def _from_pretrained(kind: Any, location: str, job: Job, placing: Placing, **more: Any) -> Any:
    """The model and what transformers says of its loading; with `eager` attention where it has no `sdpa` (Gemma 2)."""
    more |= {"trust_remote_code": job.spec.model.trust_remote_code}
    try:
        return kind.from_pretrained(location, **more, **placing.as_arguments())
    except ValueError as error:  # raised before any weight is read
        if placing.attn_implementation != "sdpa" or "scaled_dot_product_attention" not in str(error):
            raise
    return kind.from_pretrained(location, **more, **replace(placing, attn_implementation="eager").as_arguments())


def _load_with_score(location: str, job: Job, placing: Placing) -> Any:
    """The pretrained model with one score a document in place of its output matrix; a new one is drawn by the seed."""
    from transformers import AutoModelForSequenceClassification

    with _loading(location), quiet():  # that the score is new and the output matrix not used is as it should be
        loaded = _from_pretrained(AutoModelForSequenceClassification, location, job, placing, num_labels=1)
    model, info = loaded
    if not heads.has_score(model):
        raise JobError(f"model.model_name_or_path: {type(model).__name__} has no single score; use another model")
    report = LoadReport.from_loading_info(info)
    own = {name for name, _ in model.named_parameters()}
    missing = tuple(name for name in report.missing if name.split(".")[0] != SCORE)
    unused = tuple(name for name in report.unexpected if name.split(".")[0] in {part.split(".")[0] for part in own})
    if wrong := faults(replace(report, missing=missing, unexpected=unused), own, report.unexpected):
        raise JobError(f"model.model_name_or_path: {location}: {wrong}")
    if len(missing) < len(report.missing):
        heads.begin_score(model, job.spec.train.seed)
    text = model.config.get_text_config()
    if text.pad_token_id is None:
        tokenizer = load_tokenizer(location, job)
        text.pad_token_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return _placed(model, placing)


def load_layers(
    kind: Any, config: Any, tensors: dict[str, torch.Tensor], placing: Placing
) -> tuple[Any, dict[str, Any]]:
    """A smaller model of some layers of another, from their tensors, and what transformers says of its loading.

    Raises as `load_model`.
    """
    with _loading("a stage of the model"), quiet():  # its other parts are missing on purpose
        model, info = kind.from_pretrained(None, config=config, state_dict=tensors, **placing.as_arguments())
    return _placed(model, placing), info


def _placed(model: Any, placing: Placing) -> Any:
    if not getattr(model, "is_quantized", False):
        return model.to(placing.device)
    keep_layout(model)
    return model


@contextlib.contextmanager
def _loading(what: str) -> Iterator[None]:
    """Name a failure of the library as the job's."""
    from transformers.utils import logging as hf_logging

    hf_logging.disable_progress_bar()
    document_attention.register()
    try:
        yield
    except (ValueError, OSError, ImportError, KeyError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        raise JobError(f"model.model_name_or_path: {what} cannot be loaded: {first_line(error)}") from error


def refuse_conversion(folder: Path, dtype: str) -> None:
    """Raises JobError where weights would be converted in memory: on a CPU what streams is read from the files."""
    wanted = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}[dtype]
    held = {tensor.dtype for tensor in stored_tensors(folder).values()} - {wanted}
    if not held:
        return
    known = sorted(name for name in held if name) or ["another form than safetensors"]
    raise JobError(
        f"strategy.offload: weights reads the model's files as they lie there: they hold {', '.join(known)}, training"
        f" computes in {dtype}. Set model.dtype to what they hold, or strategy.offload: none"
    )


def placement_arguments(device: torch.device) -> dict[str, Any]:
    """Arguments of `from_pretrained` that put each weight on `device` as it is read."""
    return {"device_map": {"": device}} if device.type != "cpu" else {}


def load_exported(context: WorkerContext, folder: Path, techniques: Techniques, attention: str) -> Any:
    """What a run handed back, in the precision it was trained in: a whole model, or an adapter on its base."""
    method = context.plan.build_method()
    placing = Placing(method.load_dtype(techniques), context.device, attention, method.load_arguments(techniques))
    load = partial(load_model, job=context.job, placing=placing)
    if (seat := context.seat) is None:
        return load_tuned(load, folder, context.model_folder)

    def copy_base(location: str) -> Any:
        model = seat.copy_base(partial(load, location))
        model.set_attn_implementation(attention)
        return model

    return load_tuned(copy_base, folder, context.model_folder)


def load_tuned(load: Callable[[str], Any], folder: Path, base: str) -> Any:
    """The model in a folder, or its adapter on the base model; `load` loads a model from where it lies."""
    if not export.is_adapter(folder):
        return load(str(folder))
    return load_adapter(load(base), folder)
