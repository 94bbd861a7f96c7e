"""Evaluates the base model on an idle node while the others train."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from orchestrator.errors import JobError
from orchestrator.planning.plan import Plan
from orchestrator.runs.events import Note, QualityReport
from orchestrator.runs.run_folder import RunFolder


class BaselineHelper:
    """Starts once a run; training does not depend on it."""

    def __init__(self, run: RunFolder, plan: Plan, node_ids: Mapping[str, str]) -> None:
        self._run, self._call = run, None
        (run.path / "before-failed.json").unlink(missing_ok=True)  # of an earlier try
        part = plan.measuring
        if part is None or _is_measured(run):
            return
        if part.node not in node_ids:
            run.write("before-failed.json", json.dumps({"text": f"{part.node} is not in the cluster"}))
            return
        from clusters.ray import gpu_reservation
        from clusters.ray.nodes import CallOn
        from orchestrator.training.workers.baseline import measure

        node_id = node_ids[part.node]
        num_gpus = int(part.torch_device != "cpu" and gpu_reservation.offers_gpus(node_id))
        self._call: Any = CallOn(node_id, measure, str(run.path), num_gpus=num_gpus)

    def poll(self) -> None:
        """Record the result or the reason for its failure, once."""
        if self._call is None or not self._call.has_ended():
            return
        reason, found = self._call.error(), self._run.before()
        self._call = None
        if reason or found is None:
            reason = reason or "it ended without a result"
            self._run.write("before-failed.json", json.dumps({"text": reason}))
            self._run.record(Note(f"the baseline evaluation on an idle node failed: {reason}"))
        else:
            self._run.record(QualityReport.of("before", found.values))


def _is_measured(run: RunFolder) -> bool:
    """Whether an earlier try measured it; a damaged result is measured again."""
    try:
        return run.before() is not None
    except JobError as error:
        run.record(Note(f"{error}; it is measured again"))
        (run.path / "before.json").unlink()
        return False
