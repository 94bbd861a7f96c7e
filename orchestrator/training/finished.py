"""What can be done with a finished run: measure it again, merge it into a plain model."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from orchestrator.data.dataset import Dataset
from orchestrator.errors import JobError
from orchestrator.jobfile import Job
from orchestrator.rundir import RunFolder
from orchestrator.runs.condition import check_model, exported_whole
from orchestrator.training.parallel import Group
from orchestrator.training.worker import load_model, load_tokenizer, measure, prepare
from strategies.contract import TrainSetup


def evaluate(run: RunFolder, job: Job, held_out: Dataset) -> dict[str, Any]:
    """Held-out loss and metrics of what a run handed back, on this machine, in this process."""
    plan, location = run.plan(), model_of(run)
    device = torch.device(plan.device if plan.device == "cpu" or torch.cuda.is_available() else "cpu")
    torch.set_num_threads(plan.threads_per_worker * plan.num_workers)
    # The run's own set-up decides kernels and packing; its exported weights then take the place of the fresh ones.
    setup, techniques = prepare(job, plan, plan.nodes[0], location, device, lambda *_, **__: None)
    setup = TrainSetup(
        _exported_model(run, job, device), setup.optimizer, setup.parameters, setup.export, setup.export_name
    )
    inner: Any = setup.model
    inner = inner.get_base_model() if hasattr(inner, "get_base_model") else inner
    inner.set_attn_implementation(techniques.attn_implementation)
    return measure(job, plan, setup, load_tokenizer(location, job), held_out, techniques, Group())


def merge(run: RunFolder, job: Job, output: Path) -> Path:
    """Write base + adapter as a plain transformers model into `output`; it appears whole or not at all.

    Raises JobError when there is nothing to merge or `output` exists.
    """
    if output.exists():
        raise JobError(f"--output {output} exists already; choose a new folder")
    model = _exported_model(run, job, torch.device("cpu"))
    if hasattr(model, "merge_and_unload"):
        model = model.merge_and_unload(safe_merge=True)
    temporary = output.with_name(f"{output.name}.tmp-{uuid.uuid4().hex[:8]}")
    try:
        model.save_pretrained(temporary)
        load_tokenizer(model_of(run), job).save_pretrained(temporary)
        temporary.rename(output)
    except OSError as error:
        raise JobError(f"--output {output} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return output


def _exported_model(run: RunFolder, job: Job, device: torch.device) -> Any:
    """The tuned model in fp32: exported weights alone, or the base with the exported adapter on it."""
    exported = exported_whole(run)
    if not (exported / "adapter_config.json").exists():
        return load_model(str(exported), job, "float32", device, "sdpa")
    from peft import PeftModel

    base = load_model(model_of(run), job, "float32", device, "sdpa")
    return PeftModel.from_pretrained(base, str(exported))


def variants(run: RunFolder, job: Job, device: torch.device) -> Iterator[tuple[str, Any]]:
    """The model before, with its adapter, and merged; or before and after where all weights were trained."""
    yield "base", load_model(model_of(run), job, "float32", device, "sdpa")
    tuned = _exported_model(run, job, device)
    if not hasattr(tuned, "merge_and_unload"):
        yield "tuned", tuned
        return
    yield "adapter", tuned
    yield "merged", tuned.merge_and_unload(safe_merge=True)


def model_of(run: RunFolder) -> str:
    """Where the model lies that a run started from.  Raises JobError where it is no longer that one."""
    check_model(run)
    return run.data()["model"]
