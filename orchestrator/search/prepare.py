"""What a search needs before its first trial: held-out rows, samples for the trials, machines, a budget that holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from clusters.capability import ClusterCapability, NodeCapability
from orchestrator.data.prepare import datasets
from orchestrator.errors import JobError, NothingFits
from orchestrator.job import model_files
from orchestrator.job.job_file import Job, parse_job, spec_with
from orchestrator.job.space import Point, Space
from orchestrator.lifecycle.prepare import Ready, prepare, sizes_of
from orchestrator.planning import workload
from orchestrator.planning.plan import Plan
from orchestrator.runs.search_folder import Samples, SearchFolder
from orchestrator.search.advice import Forecast, Planning
from orchestrator.search.subset import representative

_SET_UP_S = 3.0  # of a trial beside its steps: loading the model


def planning_in(folder: SearchFolder, job: Job) -> Planning:
    """The planner with a search's machines and data."""
    return planning_of(job, folder.samples(), folder.capability(), folder.plan().global_batch_size)


def planning_of(job: Job, files: dict[str, Samples], capability: ClusterCapability, global_batch_size: int) -> Planning:
    """The planner for a search's points; sizes are those of the longest max_length, others are cut from it."""
    longest = files[max(files, key=int)]
    data, held_out = datasets(longest)
    config = model_files.read_config(Path(longest.model))
    held = held_out.select(longest.eval_rows) if held_out is not None else None
    sample = sizes_of(data.select(longest.train_rows), held)
    shape, whole = workload.model_shape(config), sizes_of(data, held_out)
    return Planning(job.spec, config, shape, capability, whole, sample, global_batch_size)


def nodes_of(spec: Any, capability: ClusterCapability, base: Plan) -> list[NodeCapability]:
    """Machines that may take trials."""
    if spec.search.nodes == "all":
        return list(capability.nodes)
    busy = {part.node for part in base.nodes}
    idle = [node for node in capability.nodes if node.name not in busy]
    if not idle:
        raise NothingFits("search.nodes: the job itself would use every machine; set it to all")
    return idle


def check_budget(planning: Planning, nodes: Sequence[NodeCapability], space: Space, advised: Forecast | None) -> None:
    """Raises JobError for a budget that not even one trial fits in."""
    budget = planning.spec.search.budget
    limits = {
        "minutes": budget.minutes and 60 * budget.minutes,
        "node_hours": budget.node_hours and 3600 * budget.node_hours,
    }
    known = {key: seconds for key, seconds in limits.items() if seconds is not None}
    if not known:
        return
    point = advised.worth[0].point if advised else next(space.points())
    seconds = []
    for node in nodes:
        try:
            plan = planning.trial(point, node)
        except (JobError, NothingFits):
            continue
        seconds.append(plan.step_s * plan.num_steps + _SET_UP_S)
    for key, limit in known.items():
        if seconds and limit < min(seconds):
            raise JobError(
                f"search.budget.{key}: one trial takes about {min(seconds):.0f} s, more than the budget of {limit:.0f};"
                " raise it, or lower search.trial_steps"
            )


def with_held_out_rows(job: Job, say: Callable[[str], None]) -> Job:
    """Trials are compared by a held-out loss: a job without held-out rows lends a tenth of its training rows."""
    metric = job.spec.search.metric
    if job.spec.data.eval is not None:
        if metric != "eval_loss" and job.spec.eval.metrics != "auto" and metric not in job.spec.eval.metrics:
            raise JobError(f"search.metric: {metric} is never measured; add it to eval.metrics, or set that to auto")
    else:
        say("the job has no held-out rows: a tenth of the training rows is held out to compare trials")
        job = parse_job(job.text, job.folder, "job", ['data.eval={"split": 0.1}'])
    if metric != "eval_loss":
        job = parse_job(job.text, job.folder, "job", [f'eval.metrics=["{metric}"]'])
    return job


def files_of(
    job: Job, ready: Ready, space: Space, named: list[tuple[str, Point]], say: Callable[[str], None]
) -> dict[str, Samples]:
    """By max_length: where the samples lie, and which of them the trials see."""
    listed = {point.get("data.max_length") for _, point in named} | set(space.choices.get("data.max_length", ()))
    lengths = [length for length in listed if length is not None]
    spec, batch = job.spec, ready.plan.global_batch_size
    files: dict[str, Samples] = {}
    chosen: tuple[list[int], list[int]] | None = None
    sizes = None
    for length in sorted(lengths or [ready.plan.max_length], reverse=True):
        one = ready.data_files
        if length != ready.plan.max_length:
            other = Job(spec_with(spec, {"data.max_length": length}), job.folder, job.text)
            one = prepare(other, say).data_files
        assert one is not None  # a search is prepared
        data, held_out = datasets(one)
        assert held_out is not None  # with_held_out_rows made sure
        if chosen is None or sizes != (len(data), len(held_out)):  # cut or dropped otherwise, they are other samples
            sizes = len(data), len(held_out)
            chosen = (
                representative(data.lengths.tolist(), spec.search.trial_steps * batch, spec.train.seed),
                representative(held_out.lengths.tolist(), spec.search.eval_rows, spec.train.seed),
            )
        files[str(length)] = Samples(**asdict(one), train_rows=chosen[0], eval_rows=chosen[1])
    return files
