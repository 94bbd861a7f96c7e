"""The baseline helper: evaluates the base model on an idle node while the others train."""

from __future__ import annotations

import json
from pathlib import Path

from orchestrator.runs.run_folder import RunFolder
from orchestrator.training.model import loading
from orchestrator.training.model.devices import device_like
from orchestrator.training.model.references import attach_references
from orchestrator.training.worker_context import WorkerContext
from orchestrator.training.workers import quality
from orchestrator.training.workers.setup import prepare_model
from strategies.step import thread_waits


def measure(folder: str) -> None:
    """Evaluate the run's base model on its held-out rows, on the node beside that measures, and write before.json."""
    run = RunFolder(Path(folder))
    job, plan = run.job(), run.plan()
    part = plan.measuring
    held_out = loading.load_data(run)[1]
    if part is None or held_out is None:
        return
    thread_waits.use_threads(part.threads)
    # Its events are the workers'.
    context = WorkerContext(job, plan, part, run.data().model, device_like(part), run_path=run.path)
    setup, techniques = prepare_model(context)
    attach_references(context, setup, techniques, None, held_out)
    tokenizer = loading.tokenizer_of(run, job)
    measured = quality.measure(context, setup, techniques, tokenizer, held_out)
    run.write("before.json", json.dumps({**measured, "node": part.node}))
