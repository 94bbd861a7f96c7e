"""A job trained to its end in this process: what `submit` does, without Ray around it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from orchestrator.job.job_file import Job, read_job
from orchestrator.lifecycle.prepare import prepare
from orchestrator.planning.plan import Plan
from orchestrator.runs.condition import model_digests
from orchestrator.runs.model_card import write_card
from orchestrator.runs.run_folder import RunFolder
from orchestrator.training.workers.worker import work

_QUICK = ("strategy.preflight=false", "cluster.num_workers=1", "tracking.report_to=[]", "eval.before=false")


def begun(
    job_file: Path, *overrides: str, name: str = "run", divide: Callable[[Plan], Plan] = lambda plan: plan
) -> tuple[RunFolder, Job, str]:
    """A run folder with all that a worker reads, its job, and the node that trains; `divide` makes a plan for more."""
    runs = job_file.parent / "runs"
    job = read_job(job_file, [f"checkpoint.output_dir={json.dumps(str(runs))}", *_QUICK, *overrides])
    ready = prepare(job, lambda text: None)
    texts = {
        "origin.json": json.dumps({"folder": str(job.folder)}),
        "capability.json": json.dumps(ready.capability.as_dict()),
        "plan.json": divide(ready.plan).to_json(),
        "data.json": replace(ready.data_files, statistics=ready.statistics).to_json(),
        "job.yaml": job.text,
    }
    with RunFolder.take(runs, job.spec.name, name) as run:
        run.begin(texts, model_digests(Path(ready.data_files.model)))
    return run, job, ready.plan.nodes[0].node


def trained(job_file: Path, *overrides: str, name: str = "run") -> tuple[RunFolder, Job]:
    """A finished run of a job file, and its job."""
    run, job, node = begun(job_file, *overrides, name=name)
    work(run, 0, 1, node, 0)
    write_card(run, job)
    return run, job
