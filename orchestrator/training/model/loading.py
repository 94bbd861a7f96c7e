"""Loads samples, tokenizer and model: the pretrained one, or what a run handed back."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
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
from strategies.model.architecture import LoadReport, faults
from strategies.step import document_attention
from strategies.step.out_of_memory import is_out_of_memory
from strategies.workload import Techniques


def load_data(run: RunFolder) -> tuple[Dataset, Dataset | None]:
    """Training and held-out samples that data.json names.  Raises DamagedCache, JobError."""
    return datasets(run.data())


def tokenizer_of(run: RunFolder, job: Job) -> Any:
    """The tokenizer of a run with the chat template that its samples were rendered with."""
    files = run.data()
    return load_tokenizer(files.model, job, files.chat_template)


def load_tokenizer(location: str, job: Job, chat_template: str | None = None) -> Any:
    """The tokenizer of a model; `chat_template` takes the place of its own."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(location, trust_remote_code=job.spec.model.trust_remote_code)
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    return tokenizer


def load_model(
    location: str,
    job: Job,
    dtype: str,
    device: torch.device,
    attn_implementation: str,
    arguments: dict[str, Any] | None = None,
) -> Any:
    """The pretrained model, in `dtype` on `device`.

    On a GPU each weight goes from its file straight to the device: the host never holds the model, whatever number of
    workers load it.  Raises JobError; an out-of-memory error passes unchanged.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as hf_logging

    hf_logging.disable_progress_bar()
    document_attention.register()
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            location,
            dtype=getattr(torch, dtype),
            attn_implementation=attn_implementation,
            trust_remote_code=job.spec.model.trust_remote_code,
            output_loading_info=True,
            **straight_to(device),
            **(arguments or {}),
        )
    except (ValueError, OSError, ImportError, KeyError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        raise JobError(f"model.model_name_or_path: {location} cannot be loaded: {first_line(error)}") from error
    model, info = loaded
    report = LoadReport.from_loading_info(info)
    if wrong := faults(report, [name for name, _ in model.named_parameters()], report.unexpected):
        raise JobError(f"model.model_name_or_path: {location}: {wrong}")
    return model if getattr(model, "is_quantized", False) else model.to(device)


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


def straight_to(device: torch.device) -> dict[str, Any]:
    """Arguments of `from_pretrained` that put each weight on `device` as it is read."""
    return {"device_map": {"": device}} if device.type != "cpu" else {}


def load_exported(context: WorkerContext, folder: Path, techniques: Techniques, attention: str) -> Any:
    """What a run handed back, in the precision it was trained in: a whole model, or by plain PEFT on its base."""
    method = context.plan.build_method()
    load = partial(
        load_model,
        job=context.job,
        dtype=method.load_dtype(techniques),
        device=context.device,
        attn_implementation=attention,
        arguments=method.load_arguments(techniques),
    )
    return load_tuned(load, folder, context.model_folder)


def load_tuned(load: Callable[[str], Any], folder: Path, base: str) -> Any:
    """The model in a folder, or its adapter on the base model; `load` loads a model from where it lies."""
    if not export.is_adapter(folder):
        return load(str(folder))
    from peft import PeftModel

    return PeftModel.from_pretrained(load(base), str(folder))
