"""Loads the weights that an engine computes with, as the run that trained them did."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from clusters.units import format_bytes
from orchestrator.errors import JobError
from orchestrator.job.job_file import Job, parse_job
from orchestrator.job.weights import stored_tensors
from orchestrator.runs.run_folder import RunFolder
from orchestrator.serving.engines.protocol import Refused
from orchestrator.training.model.agreement import free_bytes
from orchestrator.training.model.devices import device_like
from orchestrator.training.model.loading import Placing, load_model, load_tokenizer, load_tuned
from strategies.step.supervised_logits import inner_model
from strategies.workload import Dtype


@dataclass(frozen=True)
class EngineSettings:
    """What an engine of ours is started with."""

    base: str  # folder of the model
    run: str | None = None  # folder of a run whose precision, quantisation and device are used
    dtype: str | None = None  # None: the run's, else float32 on a CPU and bfloat16 on a GPU
    max_adapters: int = 8
    max_rows: int = 32
    engine: str = "transformers"  # or llama.cpp
    gguf: str | None = None  # of llama.cpp: the base model's file


class Weights:
    """Models and tokenizers, all in one precision on one device."""

    def __init__(self, settings: EngineSettings) -> None:
        self.base = settings.base
        arguments: dict[str, Any] = {}
        if settings.run:
            run = RunFolder(Path(settings.run))
            self._job, plan = run.job(), run.plan()
            device, techniques, method = device_like(plan.nodes[0]), plan.nodes[0].techniques, plan.build_method()
            dtype, arguments = method.load_dtype(techniques), method.load_arguments(techniques)
            computed: str = techniques.dtype
        else:
            self._job = _job_of(settings.base)
            device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
            dtype = computed = "float32" if device.type == "cpu" else "bfloat16"
        self.device = device
        self.dtype: Dtype = cast(Dtype, settings.dtype or computed)
        self._placing = Placing(settings.dtype or dtype, device, "sdpa", arguments)

    def load(self, folder: str) -> Any:
        """A whole model.  Raises JobError, and Refused where there is no memory for it."""
        self._check_room(Path(folder))
        return load_model(folder, self._job, self._placing)

    def load_tuned(self, folder: Path) -> Any:
        """A model of its own: a whole one, or an adapter on the base's weights once more."""
        return load_tuned(self.load, folder, self.base)

    def ready(self, model: Any) -> Any:
        """The model as generation needs it."""
        model.eval()
        model.requires_grad_(False)
        # transformers hands the output matrix a strided slice, for which torch copies the matrix once a row.
        output = inner_model(model).get_output_embeddings()
        output.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(), *inputs[1:]))
        return model

    def tokenizer(self, folder: Path) -> Any:
        return load_tokenizer(str(folder), self._job)

    def _check_room(self, folder: Path) -> None:
        size, free = _size_bytes(folder, self._placing.dtype), free_bytes(self.device)
        if free is not None and size > free and "quantization_config" not in self._placing.arguments:
            raise Refused(
                503,
                f"{folder.name} takes {format_bytes(size)} and {format_bytes(free)} are free on {self.device}. Serve"
                " fewer models in one process, or on another machine; an adapter that needs a model of its own can be"
                " made a plain one with `orchestrator merge` and served alone",
                "out_of_memory",
                "model",
            )


def _size_bytes(folder: Path, dtype: str) -> int:
    """Bytes of a model's weights in a precision, as far as its files say."""
    shapes = (tensor.shape or () for tensor in stored_tensors(folder).values())
    return sum(math.prod(shape) for shape in shapes) * getattr(torch, dtype).itemsize


def _job_of(folder: str) -> Job:
    """The least job over a model: what loads one asks it whether it may run the model's own code, which it may not."""
    try:
        return parse_job(json.dumps({"model": {"model_name_or_path": folder}, "data": {"train": folder}}), Path())
    except JobError as error:
        raise Refused(500, str(error)) from error
