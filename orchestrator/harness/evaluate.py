"""A finished run and tasks -> scores of base and tuned model, computed by an idle machine where there is one."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Mapping
from typing import Any

from orchestrator.errors import MissingExtra, RunFailed
from orchestrator.harness.wish import TaskWish
from orchestrator.job.job_file import Job
from orchestrator.lifecycle import machines
from orchestrator.lifecycle.finish import mirror_again
from orchestrator.runs.condition import require_finished
from orchestrator.runs.run_folder import RunFolder
from orchestrator.runs.tasks.task_score import TaskScore, scores_of_tasks, write_tasks

_POLL_S = 1.0


def evaluate_tasks(run: RunFolder, wish: TaskWish, say: Callable[[str], None]) -> list[TaskScore]:
    """Measure, keep in lm_eval.json and the run's events, send to MLflow; the scores of these tasks.

    Raises JobError for unknown tasks, MissingExtra where the harness is not installed, RunFailed where the machine that
    computes fails.
    """
    finished = require_finished(run)
    address = finished.job.spec.cluster.address
    if address == "local":
        say("computing on this machine: the job names no cluster")
        found = _here(run, wish, say)
    else:
        with machines.cluster_errors():
            found = _on_cluster(run, finished.job, wish, say)
    for score in found:
        run.record(score)
    write_tasks(run)
    mirror_again(run, finished.job, say)
    wanted = {(one.task, one.metric) for one in found}
    return [one for one in scores_of_tasks(run) if (one.task, one.metric) in wanted]


def _here(run: RunFolder, wish: TaskWish, say: Callable[[str], None]) -> list[TaskScore]:
    if importlib.util.find_spec("lm_eval") is None:
        raise MissingExtra("lm_eval")
    from orchestrator.harness.measure import measure

    say(f"{', '.join(wish.tasks)}: the base model, then the tuned one ...")
    return measure(str(run.path), wish)


def _on_cluster(run: RunFolder, job: Job, wish: TaskWish, say: Callable[[str], None]) -> list[TaskScore]:
    from clusters.ray import nodes
    from clusters.ray.connect import connect

    with connect(job.spec.cluster.address, 1, 1):
        name = idle_node(nodes.inventory())
        if name is None:
            say("computing on this machine: no machine of the cluster is idle")
            return _here(run, wish, say)
        say(f"computing on {name}, which is idle: the base model, then the tuned one ...")
        return _on_node(nodes.present()[name], str(run.path), wish, name)


def _on_node(node_id: str, folder: str, wish: TaskWish, name: str) -> list[TaskScore]:
    from clusters.ray import gpu_reservation
    from clusters.ray.nodes import CallOn
    from orchestrator.harness.measure import measure

    call = CallOn(node_id, measure, folder, wish, name, num_gpus=int(gpu_reservation.offers_gpus(node_id)))
    while not call.has_ended():
        time.sleep(_POLL_S)
    if reason := call.error():
        raise RunFailed(f"{name}: {reason}")
    return call.result()


def idle_node(nodes: list[Mapping[str, Any]] | list[dict[str, Any]]) -> str | None:
    """The name of a machine that does nothing, one with a slot to train on first; None where all are at work."""
    idle = [node for node in nodes if node["state"] == "alive" and not node["slots_in_use"] and not node["does"]]
    idle.sort(key=lambda node: -node["slots"])
    return str(idle[0]["name"]) if idle else None
