"""`plan --trace`: the plan's memory checked against the real model code run on fake tensors."""

from __future__ import annotations

from typing import Any

from clusters.safe.reading import first_line, printable
from clusters.units import format_bytes
from orchestrator.errors import JobError
from orchestrator.job import model_files
from orchestrator.job.job_file import Job
from orchestrator.planning.plan import Plan
from strategies.workload import Workload

_AGREES = 0.10


def trace_plan(job: Job, plan: Plan, workload: Workload) -> dict[str, Any]:
    """Traced and predicted bytes of the first device's tensors, and what to make of them.  Needs torch, no weights."""
    from orchestrator.training.workers.setup import train_settings
    from strategies.measure import trace

    if plan.device != "cpu" and plan.techniques.attn_implementation.startswith("flash"):
        return {"text": "flash-attn's kernels cannot be traced; set model.attn_implementation: sdpa to trace it"}
    if not plan.build_objective().writes_text:
        return {"text": "a model with a score in place of its output matrix is not traced; its tests are"}
    if plan.techniques.streams_weights:
        return {"text": "weights that come and go are not traced; set strategy.offload: none to trace the rest"}
    config = model_files.config_of(job.spec.model.model_name_or_path, job.folder, job.spec.model.model_revision)
    techniques = plan.techniques
    length = min(workload.longest_sample, techniques.max_length)
    rows = techniques.per_device_train_batch_size
    if techniques.packing:
        tokens = min(techniques.micro_batch_tokens, workload.share * workload.tokens_per_step)
        length = max(1, round(min(workload.mean_length, tokens)))
        rows = max(1, round(tokens / length))
    try:
        found = trace.trace(
            config,
            plan.build_method(),
            train_settings(job, plan, techniques),
            trace.even(rows, length, workload.supervised_fraction),
        )
    except Exception as error:  # the model's code runs, and raises whatever it likes
        reason = printable(first_line(error)[:300])
        raise JobError(f"plan --trace: this model or method cannot be traced: {reason}") from error
    predicted = plan.memory.tensors_bytes
    apart = predicted / found.peak_bytes - 1
    verdict = "they agree" if abs(apart) <= _AGREES else "they DISAGREE by more than 10 %: trust the traced figure"
    return {
        "traced_bytes": found.peak_bytes,
        "predicted_bytes": predicted,
        "apart": apart,
        "phases": found.phases,
        "text": f"tensors take {format_bytes(found.peak_bytes)} traced, {format_bytes(predicted)} by formula"
        f" ({apart:+.1%}); {verdict}",
    }
