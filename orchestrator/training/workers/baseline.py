"""What a machine that does not train does meanwhile: it measures the untuned model, so that the others need not."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from orchestrator.runs.run_folder import RunFolder
from orchestrator.training.model import loading
from orchestrator.training.model.devices import device_like
from orchestrator.training.parallel import Group
from orchestrator.training.workers import quality, worker


def measure(folder: str) -> None:
    """Measure the run's model on its held-out rows, with what the plan says of `helper`, and write before.json."""
    run = RunFolder(Path(folder))
    job, plan = run.job(), run.plan()
    part = plan.helper
    held_out = loading.load_data(run)[1]
    if part is None or held_out is None:
        return
    torch.set_num_threads(part.threads)
    location = run.data()["model"]
    setup, techniques = worker.prepare(job, plan, part, location, device_like(part), _ignore)
    tokenizer = loading.tokenizer_of(run, job)
    measured = quality.measure(job, plan, setup, tokenizer, held_out, techniques, Group())
    run.write("before.json", json.dumps({**measured, "node": part.node}))


def _ignore(*_: object, **__: object) -> None:
    """Its events would be told among the workers'."""
