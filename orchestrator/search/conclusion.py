"""The result of a search, written down: summary.json, and the job to submit."""

from __future__ import annotations

import json
from typing import Any

from clusters.units import format_bytes, format_s
from orchestrator.job.job_file import Job, text_with
from orchestrator.job.space import phrase
from orchestrator.runs.search_folder import SearchFolder
from orchestrator.search.advice import Planning
from orchestrator.search.recommend import Outcome, front, outcomes, recommend


def conclude(folder: SearchFolder, job: Job, planning: Planning) -> None:
    """Write the recommendation, and the job that carries it out."""
    trials = folder.trials()
    found = outcomes(trials, planning.real, job.spec.search.metric)
    chosen, why = recommend(job.spec, found)
    summary = {
        "why": why,
        "prefer": job.spec.goal.prefer,
        "recommended": _of_outcome(chosen, planning) if chosen else None,
        "outcomes": [_of_outcome(outcome, planning) for outcome in found],
        "front": [outcome.trial.number for outcome in front(found)],
        "failed": [trial.number for trial in trials if not trial.measured],
        "trial_seconds": sum(trial.seconds for trial in trials),
        "wasted_seconds": sum(trial.seconds for trial in trials if not trial.measured),
    }
    folder.keep("summary.json", json.dumps(summary, indent=1))
    if chosen is None:
        return
    point = {**chosen.trial.point, "train.global_batch_size": planning.global_batch_size}
    comment = (
        f"# Found by `orchestrator search` ({folder.run_id}): {why}.\n"
        f"# Predicted for this job, corrected by trial {chosen.trial.number}: {format_s(chosen.total_s)} of training,"
        f" {format_bytes(chosen.peak_bytes)}"
        + (f", {chosen.cost:.3g} {chosen.plan.price.currency}.\n" if chosen.cost is not None else ".\n")
    )
    folder.write("recommended.yaml", comment + text_with(folder.job("asked.yaml"), point))


def _of_outcome(outcome: Outcome, planning: Planning) -> dict[str, Any]:
    return {
        "trial": outcome.trial.number,
        "name": outcome.trial.name or phrase(outcome.trial.point),
        "point": outcome.trial.point,
        "status": outcome.trial.status,
        "total_s": outcome.total_s,
        "epoch_s": outcome.total_s / outcome.plan.num_steps * planning.steps_per_epoch,
        "predicted_total_s": outcome.plan.total_s,
        "peak_bytes": outcome.peak_bytes,
        "predicted_peak_bytes": outcome.plan.memory.total_bytes,
        "cost": outcome.cost,
        "currency": outcome.plan.price.currency,
        "eval_loss": outcome.trial.eval_loss,
        "lack": outcome.lack,
    }
