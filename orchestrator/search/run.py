"""The whole path of a search: predict every combination, try few of them, recommend one.

job -> space -> advice (what cannot run, what cannot win, where to start) -> trials -> recommended.yaml
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

from clusters.capability import ClusterCapability, NodeCapability
from clusters.ray.connect import WorkerProcess, connect
from clusters.safe.reading import first_line
from orchestrator.errors import OrchestratorError, RunFailed
from orchestrator.job.job_file import Job
from orchestrator.job.space import Point, Space, space_of
from orchestrator.lifecycle import calibration, machines
from orchestrator.lifecycle.background import run_in_background
from orchestrator.lifecycle.hooks import NO_BANK, BankHooks
from orchestrator.lifecycle.prepare import Ready, output_dir, prepare
from orchestrator.planning import planner, price
from orchestrator.runs.events import StateChange
from orchestrator.runs.search_folder import SearchFolder
from orchestrator.search.advice import Forecast, Planning, advice_json, advise
from orchestrator.search.conclusion import conclude
from orchestrator.search.prepare import check_budget, files_of, nodes_of, planning_in, planning_of, with_held_out_rows
from orchestrator.search.session import SearchObserver, Session
from orchestrator.search.sharing import time_sensitive_keys, why_none_share
from orchestrator.search.together import SharedTrials
from orchestrator.training.workers.gpu_locks import hold_one_each
from strategies.step import host_memory

if TYPE_CHECKING:  # it loads Ray Tune, which waits for the first trial
    from orchestrator.search.tuning import Slots

_POINTS_LOOKED_AT = 200  # whether they fit a part of a machine


def search(
    job: Job,
    watcher: SearchObserver,
    study: Callable[[Job], list[tuple[str, Point]]] | None = None,
    bank: BankHooks = NO_BANK,
) -> SearchFolder:
    """Search for the best combination within the job's budget.  Raises OrchestratorError.

    `study` gives a list of points instead.  Mistakes are raised before anything is written.
    """
    original, job = job, with_held_out_rows(job, watcher.say)
    named = study(job) if study else []
    ready, files, planning, space = _prepare(job, named, watcher.say, bank)
    nodes = nodes_of(job.spec, planning.capability, ready.plan)
    advised = None if named else _advised(planning, space, nodes, watcher)
    texts = {
        "origin.json": json.dumps({"folder": str(job.folder)}),
        "capability.json": json.dumps(planning.capability.as_dict(), indent=1),
        "data.json": json.dumps({length: one.as_dict() for length, one in files.items()}, indent=1),
        "plan.json": ready.plan.to_json(),
        "study.json": json.dumps(named),
        **({"advice.json": json.dumps(advice_json(space, advised), indent=1)} if advised else {}),
        "asked.yaml": original.text,
        "search.yaml": job.text,
    }
    with SearchFolder.take(output_dir(job), f"search-{job.spec.name}") as folder:
        folder.begin(texts)
        return _try_rest(Session(folder, job, planning, space, nodes, watcher, advised, named))


def _prepare(
    job: Job, named: list[tuple[str, Point]], say: Callable[[str], None], bank: BankHooks
) -> tuple[Ready, dict[str, Any], Planning, Space]:
    """A search's base plan, its data by max_length, its planner and what it may try."""
    ready = prepare(job, say, bank=bank)
    batch = ready.plan.global_batch_size
    # As they are known now: they stay so for the whole search.
    capability = price.priced(job.spec, calibration.calibrated(ready.capability, output_dir(job)))
    space = _space_of(job, capability, batch, named)
    files = files_of(job, ready, space, named, say)
    planning = planning_of(job, files, capability, batch)
    _describe_trials(planning, space, named, 0)
    return ready, files, planning, space


def _describe_trials(planning: Planning, space: Space, named: list[tuple[str, Point]], num_done: int) -> None:
    """Tell the planner what decides how many trials a CPU takes at a time."""
    planning.compares_times = bool(time_sensitive_keys(planning.spec, space, named))
    planning.points = [point for _, point in named] or list(islice(space.points(), _POINTS_LOOKED_AT))
    planning.num_trials = max(1, (len(named) or planning.spec.search.budget.trials) - num_done)


def _space_of(job: Job, capability: ClusterCapability, batch: int, named: list[tuple[str, Point]]) -> Space:
    """What a sampler may try; nothing beside the points of a study."""
    devices = [slot.device for slot in planner.slots_of(job.spec, capability)]
    return Space({}) if named else space_of(job.spec, devices, batch)


def predict(job: Job, say: Callable[[str], None], bank: BankHooks = NO_BANK) -> tuple[Space, Forecast]:
    """What a search would know before its first trial; nothing is started.  Raises OrchestratorError."""
    job = with_held_out_rows(job, say)
    _, _, planning, space = _prepare(job, [], say, bank)
    return space, advise(planning, space)


def resume(folder: SearchFolder, watcher: SearchObserver) -> SearchFolder:
    """Continue a search that was stopped or killed, with what its trials taught."""
    with folder.lock():
        folder.restore(watcher.say)
        return _try_rest(_restore(folder, watcher))


def _restore(folder: SearchFolder, watcher: SearchObserver) -> Session:
    """A search as it is in its files."""
    job = folder.job()
    planning = planning_in(folder, job)
    named = [(name, point) for name, point in folder.study()]
    space = _space_of(job, planning.capability, planning.global_batch_size, named)
    _describe_trials(planning, space, named, len(folder.trials()))
    nodes = nodes_of(job.spec, planning.capability, folder.plan())
    advised = None if named else _advised(planning, space, nodes, watcher)
    return Session(folder, job, planning, space, nodes, watcher, advised, named)


def _try_rest(search: Session) -> SearchFolder:
    """Try what is left; the caller holds the folder."""
    folder, job = search.folder, search.job
    folder.stop_file.unlink(missing_ok=True)
    folder.record(StateChange("running", pid=os.getpid()))
    try:
        _tune(search)
    except OrchestratorError as error:
        folder.record(StateChange("failed", text=str(error)))
        raise
    conclude(folder, job, search.planning)
    folder.record(StateChange("stopped" if search.stopped else "finished"))
    if search.stopped:
        raise RunFailed(f"stopped. `orchestrator resume {folder.run_id}` continues with the remaining trials")
    return folder


def _advised(
    planning: Planning, space: Space, nodes: Sequence[NodeCapability], watcher: SearchObserver
) -> Forecast | None:
    """The plan's advice, for samplers that take it; and that the budget holds at least one trial."""
    advised = None
    if planning.spec.search.sampler == "planned":
        watcher.say(f"planning {len(space)} combinations ...")
        advised = advise(planning, space)
        watcher.advised(space, advised)
    check_budget(planning, nodes, space, advised)
    return advised


def _tune(search: Session) -> None:
    """Run the trials, pass Ctrl-C on, and wait for the end."""
    from orchestrator.search.tuning import Slots

    spec = search.job.spec
    if search.num_left <= 0:
        return
    why_none = why_none_share(spec, search.space, search.named)
    search.may_share = why_none is None
    if why_none:
        search.note(why_none)
    address = spec.cluster.address
    search.watcher.say("starting Ray ..." if address == "local" else f"connecting to {address} ...")
    names = {node.name for node in search.nodes}
    places = search.planning.slots(search.nodes)
    threads = max(slot.threads for slot in places)
    _, gain = search.planning.workers_on(search.nodes[0])
    if gain > 1:
        search.note(
            f"{len(places)} trials at a time, or groups that share a base model, with {threads} of"
            f" {search.nodes[0].num_cores} cores each: predicted {gain:.2f} x the steps of one after the other"
            " (cluster.num_workers: 1 keeps them so)"
        )
    gpus = [slot.device for slot in places if slot.device.kind != "cpu"] if address == "local" else []
    process = WorkerProcess(host_memory.process_environment(), spec.cluster.nice)
    uuids = [[gpu.uuid] for gpu in gpus if gpu.uuid]
    with machines.cluster_errors(), hold_one_each(uuids, search.watcher.say, search.folder.stop_file.exists) as held:
        if held is None:
            search.stopped = True
            return
        with connect(address, len(places), threads, gpus, process) as cluster:
            by_node = Counter(slot.node.name for slot in places)
            slots = Slots(by_node, cluster.slot_resources, _node_ids(address, names))
            error = run_in_background(partial(_run_trials, search, slots), search.poll, search.interrupt)
    if error is None:
        return
    if isinstance(error, OrchestratorError):
        raise error
    raise RunFailed(
        f"Ray Tune ended with {type(error).__name__}: {first_line(error)}. `orchestrator resume"
        f" {search.folder.run_id}` continues"
    ) from error


def _run_trials(search: Session, slots: Slots) -> None:
    """Those that can share a base model, then the others, each by itself; one scheduler decides of all."""
    from orchestrator.search.tuning import Decisions, RayTrainer, tune_trials

    spec, path = search.job.spec.search, search.folder.path
    decisions = Decisions(spec.scheduler if search.sampler is not None else "none", spec.trial_steps)
    if search.may_share:
        start = partial(RayTrainer, path, slots)
        SharedTrials(search, start, decisions.stops, slots.by_node, search.note).run()
    if not search.enough() and search.has_next():
        tune_trials(path, search, slots, search.num_left, decisions)


def _node_ids(address: str, names: set[str]) -> dict[str, str]:
    """Ray's id of each node by the name the plan knows; empty where there is one machine."""
    if address == "local":
        return {}
    from clusters.ray.nodes import present

    return {name: node_id for name, node_id in present().items() if name in names}
