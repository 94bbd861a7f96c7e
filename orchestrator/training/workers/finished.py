"""What can be done with a finished run: evaluate it again, merge it into a plain model."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from clusters.safe.writing import new_folder
from orchestrator.data.dataset import Dataset
from orchestrator.errors import JobError, RunFailed
from orchestrator.job.job_file import Job
from orchestrator.runs.condition import check_model, exported_whole, require_mergeable, require_text
from orchestrator.runs.model_card import write_merged_card
from orchestrator.runs.run_folder import RunFolder
from orchestrator.training.model import agreement, merged
from orchestrator.training.model.agreement import Agreement
from orchestrator.training.model.devices import device_like
from orchestrator.training.model.kernels import with_loss_that_runs, without_leaks
from orchestrator.training.model.loading import (
    Placing,
    load_data,
    load_exported,
    load_model,
    load_tokenizer,
    load_tuned,
)
from orchestrator.training.model.references import compute_references
from orchestrator.training.model.tied import merged_model
from orchestrator.training.worker_context import WorkerContext
from orchestrator.training.workers.quality import measure
from orchestrator.training.workers.setup import loss_of, prepare_model
from strategies.step import thread_waits
from strategies.step.out_of_memory import release_cache
from strategies.step.supervised_logits import inner_model
from strategies.train_setup import TrainSetup

_STORED = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def context_of(run: RunFolder, job: Job) -> WorkerContext:
    """This process as one that computes with a run's model: on the planned device, with all of the run's threads."""
    plan, folder = run.plan(), model_of(run)
    device = device_like(plan.nodes[0])
    thread_waits.use_threads(plan.threads_per_worker * plan.num_workers)
    # Without its events: notes on kernels stand there already.
    return WorkerContext(job, plan, plan.nodes[0], folder, device, run_path=run.path)


def evaluate(run: RunFolder, job: Job, held_out: Dataset) -> dict[str, Any]:
    """Held-out loss and metrics of what a run handed back, on this machine, in this process."""
    exported, context = exported_whole(run), context_of(run, job)
    techniques, loss = context.part.techniques, loss_of(context.plan)
    if loss and loss.needs_reference and not context.plan.build_method().starts_as_base:
        _compute_references(context, held_out)
    model = load_exported(context, exported, techniques, techniques.attn_implementation)
    if techniques.packing:
        techniques = without_leaks(inner_model(model), techniques, context)
    techniques = with_loss_that_runs(model, techniques, context)
    nothing: Any = None
    setup = TrainSetup(model, nothing, dict(model.named_parameters()), nothing, nothing, objective=loss)
    return measure(context, setup, techniques, load_tokenizer(str(exported), job), held_out)


def _compute_references(context: WorkerContext, held_out: Dataset) -> None:
    """The reference's log-probabilities by the model that training started from, which is freed again."""
    setup, techniques = prepare_model(context)
    held_out.references = compute_references(setup, held_out, techniques, context.group)
    setup.release()
    release_cache()


def merge(run: RunFolder, job: Job, output: Path) -> Agreement:
    """Write base + adapter as a plain transformers model into `output`, in the base's precision; whole or not at all.

    Returns how far the written model's logits are from those of base and adapter on one batch, or why they were not
    compared: writing needs the memory of one tensor, comparing that of the model.  Raises JobError when there is
    nothing to merge or `output` exists, RunFailed where the two differ by more than the precision explains.
    """
    if output.exists() or output.is_symlink():
        raise JobError(f"--output {output} exists already; choose a new folder")
    try:
        with new_folder(output) as folder:
            return write_merged(run, job, folder, output)
    except OSError as error:
        raise JobError(f"--output {output}: cannot be written: {error.strerror or error}") from error


def write_merged(run: RunFolder, job: Job, folder: Path, place: Path) -> Agreement:
    """The same into a new folder whose files will lie at `place`.  Raises OSError too."""
    result = merge_exported(run, job, exported_whole(run), folder)
    write_merged_card(run, job, folder, place, result.text)
    return result


def merge_exported(run: RunFolder, job: Job, exported: Path, folder: Path) -> Agreement:
    """The same of an exported folder, without a card."""
    require_text(run, "it is not merged here; PEFT's merge_and_unload() does it")
    require_mergeable(run)
    base = Path(model_of(run))
    try:
        is_written, dtype = True, merged.stream(exported, base, folder)
    except merged.NotStreamable:
        is_written, dtype = False, merged.stored_dtype(base)
    return _compare(run, job, exported, folder, dtype, is_written)


def _compare(run: RunFolder, job: Job, exported: Path, folder: Path, dtype: str, is_written: bool) -> Agreement:
    """Logits of base and adapter beside those of the merged model in `folder`, which is written here if it is not."""
    what, device = "the merged model", torch.device("cpu")
    needed_bytes = sum(file.stat().st_size for file in folder.glob("*.safetensors")) if is_written else 0
    if reason := agreement.no_room(needed_bytes, device):
        text = f"{what} is base + correction, tensor by tensor; logits not compared: {reason}"
        return Agreement(text, dtype, reason=reason)
    # Without quantisation: what is merged into is the model that is written.
    placing = Placing(dtype, device, "sdpa")
    model = load_tuned(partial(load_model, job=job, placing=placing), exported, model_of(run))
    data = None
    with contextlib.suppress(RunFailed, JobError):  # the cache was cleared: any tokens will do
        data = load_data(run)[0]
    ids_BT = agreement.probe(data, model.get_input_embeddings().weight.shape[0])
    tuned_BTV = agreement.logits_of(model, ids_BT, "sdpa", "float32")
    if not is_written:
        merged.write_whole(model, load_tokenizer(str(exported), job), exported, folder, _STORED[dtype])
    del model
    gc.collect()
    merged_BTV = agreement.logits_of(load_model(str(folder), job, placing), ids_BT, "sdpa", "float32")
    return agreement.judge(tuned_BTV, merged_BTV, dtype, what, rounded=dtype != "float32")


def variants(run: RunFolder, context: WorkerContext) -> Iterator[tuple[str, Any]]:
    """The model before, with its adapter, and merged; or before and after where all weights were trained.

    Each in the precision and the quantisation that the run trained in, one after the other: none is held while the next
    one is loaded.  A quantised base is not merged into: what `merge` writes is a model without quantisation.
    """
    require_text(run, "there is no speed of writing to measure")
    exported, techniques, method = exported_whole(run), context.part.techniques, context.plan.build_method()
    dtype, arguments = method.load_dtype(techniques), method.load_arguments(techniques)
    yield "base", load_model(context.model_folder, context.job, Placing(dtype, context.device, "sdpa", arguments))
    gc.collect()
    tuned = load_exported(context, exported, techniques, "sdpa")
    if not hasattr(tuned, "merge_and_unload"):
        yield "tuned", tuned
        return
    yield "adapter", tuned
    if not getattr(inner_model(tuned), "is_quantized", False):
        yield "merged", merged_model(tuned)


def model_of(run: RunFolder) -> str:
    """Where the model lies that a run started from.  Raises JobError where it is no longer that one."""
    check_model(run)
    return run.data().model
