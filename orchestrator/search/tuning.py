"""The only door to Ray Tune: trials on every free slot, each where its combination fits.

A worker process lives as long as the search and takes one trial after the other: importing torch once a slot, not once
a trial, is most of what keeps Tune cheap here (numbers in LOG.md).  Trials that share a base model are threads of one
such process, since a trainable of Tune's is a process each; Tune's scheduler decides of them all the same.
"""

from __future__ import annotations

import logging
import os
import shutil
import uuid
from collections.abc import Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import ray
from ray import tune
from ray.exceptions import RayActorError, RayError
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler
from ray.tune.search import Searcher

from clusters.ray import gpu_reservation
from clusters.safe.reading import first_line
from orchestrator.planning.plan import Plan
from orchestrator.runs.search_folder import Trial
from orchestrator.search.resident import ResidentTrainer
from orchestrator.search.sharing import NextTrial
from orchestrator.search.together import TrainerLost
from orchestrator.search.trial_run import TrialRun, rungs, trial_of
from strategies.contract import MemoryEstimate
from strategies.step import host_memory

_ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_MAX_PENDING_TRIALS_PG": "1",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
}
REUSE_WORKERS = True  # tests/benchmarks/search.py says what it saves
_KILLED = "its process was killed: most likely the machine ran out of memory"


class Searching(Protocol):
    """What Tune needs of a search."""

    def next_trial(self) -> NextTrial | None:
        """The next point, with a plan for each node that could run it and each kind of its devices; None where all is
        tried."""
        ...

    def started(self, number: int) -> None: ...

    def ended(self, trial: Trial) -> None: ...

    def failed(self, number: int, reason: str) -> None:
        """A trial's process died or could not be started."""
        ...

    def enough(self) -> bool:
        """Whether the budget is spent or the search is to stop; called between reports."""
        ...


@dataclass(frozen=True)
class Slots:
    """Where trials run: how many at a time, what each takes of Ray, and Ray's ids of the nodes by their names."""

    by_node: Mapping[str, int]
    resources: dict[str, float]
    node_ids: Mapping[str, str]  # empty where there is one machine

    @property
    def count(self) -> int:
        return sum(self.by_node.values())

    def offers_gpus(self, node: str) -> bool:
        """Whether Ray gives GPUs of this node away."""
        return gpu_reservation.offers_gpus(self.node_ids[node] if self.node_ids else gpu_reservation.own_node_id())


def tune_trials(folder: Path, searching: Searching, slots: Slots, num_trials: int, decisions: Decisions) -> None:
    """Run trials, each in a process by itself, until there are enough; errors of Tune itself are raised."""
    node_ids = slots.node_ids
    os.environ.update({name: value for name, value in _ENVIRONMENT.items() if name not in os.environ})
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # failures are reported by the search, a line a trial
    storage = folder / ".ray" / uuid.uuid4().hex[:8]

    def resources(config: Mapping[str, Any]) -> tune.PlacementGroupFactory:
        plans = {name: Plan.from_json(texts[0]) for name, texts in config["plans"].items()}
        bundle, nodes = place_of(plans, slots.resources, {name for name in plans if slots.offers_gpus(name)})
        if not node_ids:
            return tune.PlacementGroupFactory([bundle])
        where = ",".join(sorted(node_ids[node] for node in nodes))
        return tune.PlacementGroupFactory([bundle], bundle_label_selector=[{"ray.io/node-id": f"in({where})"}])

    tuner = tune.Tuner(
        tune.with_resources(_Runner, resources),
        param_space={"names": {node_id: name for name, node_id in node_ids.items()}},
        tune_config=tune.TuneConfig(
            search_alg=_Adapter(searching, folder),
            scheduler=decisions.scheduler,
            num_samples=num_trials,
            max_concurrent_trials=slots.count,
            reuse_actors=REUSE_WORKERS,
        ),
        run_config=tune.RunConfig(
            name="trials",
            storage_path=str(storage),
            verbose=0,
            stop=_Enough(searching),
            callbacks=[_Callback(searching)],
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
        ),
    )
    try:
        tuner.fit()
    finally:
        shutil.rmtree(storage.parent, ignore_errors=True)


def place_of(
    plans: Mapping[str, Plan], slot_resources: Mapping[str, float], offering: Set[str]
) -> tuple[dict[str, float], set[str]]:
    """What a trial asks of Ray, and the nodes where it may run: those with GPUs where its plan is for one.

    Ray then shows its process that GPU and no other.  Nodes `offering` none to Ray give what was planned unreserved.
    """
    on_gpus = {name for name, plan in plans.items() if plan.nodes[0].torch_device != "cpu"} & offering
    return ({**slot_resources, gpu_reservation.GPU: 1.0}, on_gpus) if on_gpus else (dict(slot_resources), set(plans))


def _scheduler(name: str, num_steps: int) -> Any:
    first = rungs(num_steps)[0]
    if name == "asha":
        return ASHAScheduler(
            time_attr="step", metric="judged", mode="min", max_t=num_steps + 1, grace_period=first, reduction_factor=2
        )
    if name == "median":
        return MedianStoppingRule(time_attr="step", metric="judged", mode="min", grace_period=first)
    return FIFOScheduler()


class _InProcess:
    """Lives in this process only: Tune pickles what it is given, to resume by itself, which no search asks of it."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class _Adapter(_InProcess, Searcher):
    """Our next trial as Tune's searcher."""

    def __init__(self, searching: Searching, folder: Path) -> None:
        super().__init__(metric="judged", mode="min")
        self._searching, self._folder = searching, folder

    def suggest(self, trial_id: str) -> Any:
        wanted = None if self._searching.enough() else self._searching.next_trial()
        if wanted is None:
            return Searcher.FINISHED
        return trial_config(self._folder, wanted)

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        """Left to `_Callback`, which knows why a trial failed."""

    def save(self, checkpoint_path: str) -> None:
        """A search resumes from its own folder, not from Tune's."""

    def restore(self, checkpoint_path: str) -> None: ...


class _Enough(_InProcess, tune.Stopper):
    def __init__(self, searching: Searching) -> None:
        self._searching = searching

    def __call__(self, trial_id: str, result: Any) -> bool:
        return False

    def stop_all(self) -> bool:
        return self._searching.enough()


class _Callback(_InProcess, tune.Callback):
    """Reports to the search how each trial ended."""

    def __init__(self, searching: Searching) -> None:
        self._searching = searching

    def on_trial_start(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        self._searching.started(trial.config["number"])

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        values = (trial.last_result or {}).get("trial")
        if values is None:  # stopped before its first report
            return
        self._searching.ended(trial_of(trial.last_result))

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        self._searching.failed(trial.config["number"], _failure_reason(trial))


def _failure_reason(trial: Any) -> str:
    """A process that vanished was killed, on most machines because memory ran out."""
    try:
        text = Path(trial.error_file).read_text(encoding="utf-8", errors="replace").strip()
    except (OSError, TypeError):
        text = ""
    last = text.splitlines()[-1].strip() if text else ""
    if not last or "ActorDied" in text or "actor died" in text.lower():
        return _KILLED
    return last


class _Runner(tune.Trainable):
    """A worker process: takes trials one after the other."""

    def setup(self, config: dict[str, Any]) -> None:
        import orchestrator.training.workers.experiment  # noqa: F401  what trials need

        host_memory.freeze_imports()
        self._take(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._take(new_config)
        return True

    def _take(self, config: dict[str, Any]) -> None:
        self._trial = None  # freed before the next one is made
        name = config["names"].get(ray.get_runtime_context().get_node_id())
        self._trial = TrialRun(config, name if name is not None else next(iter(config["plans"])))

    def step(self) -> dict[str, Any]:
        """Train to the next rung and report."""
        assert self._trial
        return self._trial.step()


@dataclass(frozen=True)
class _Seated:
    """A trial that shares its base model, as Tune's schedulers know trials."""

    trial_id: str


class _NoOthers:
    """In place of Tune's controller, of which a scheduler may ask what else is running, to pause a trial for it."""

    def get_live_trials(self) -> list[Any]:
        return []


class Decisions:
    """Tune's scheduler, for trials that share a base model and for those that Tune runs."""

    def __init__(self, name: str, num_steps: int) -> None:
        self.scheduler = _scheduler(name, num_steps)
        self._known: dict[int, _Seated] = {}

    def stops(self, number: int, report: dict[str, Any]) -> bool:
        """Whether a trial that is at a rung is to stop there."""
        controller: Any = _NoOthers()
        trial: Any = self._known.get(number)
        if trial is None:
            trial = self._known[number] = _Seated(f"shared-{number}")
            self.scheduler.on_trial_add(controller, trial)
        if report["done"]:
            self.scheduler.on_trial_complete(controller, trial, report)
            return False
        return self.scheduler.on_trial_result(controller, trial, report) == TrialScheduler.STOP


class RayTrainer:
    """A process of Ray's that holds a resident trainer, on the node of its first trial's plans."""

    def __init__(self, folder: Path, slots: Slots, first: NextTrial, places: int, memory: MemoryEstimate) -> None:
        node, (plan, *_) = next(iter(first.plans.items()))
        bundle, _ = place_of({node: plan}, slots.resources, {node} if slots.offers_gpus(node) else set())
        own = {name: value for name, value in bundle.items() if name not in ("CPU", gpu_reservation.GPU)}
        options: dict[str, Any] = {
            "num_cpus": bundle.get("CPU", 0.0),
            "num_gpus": bundle.get(gpu_reservation.GPU, 0.0),
            "resources": own,
            "max_restarts": 0,
        }
        if slots.node_ids:
            options["label_selector"] = {"ray.io/node-id": slots.node_ids[node]}
        self._folder = folder
        self._actor: Any = ray.remote(ResidentTrainer).options(**options).remote(places, memory, plan.nodes[0].threads)
        self._call: Any = None

    def advance(self, begin: list[NextTrial], proceed: list[int], leave: list[int]) -> None:
        self._call = self._actor.advance.remote([trial_config(self._folder, one) for one in begin], proceed, leave)

    def poll(self, timeout_s: float) -> tuple[list[dict[str, Any]], list[str]] | None:
        ready, _ = ray.wait([self._call], timeout=timeout_s)
        try:
            return ray.get(ready[0]) if ready else None
        except RayActorError:
            raise TrainerLost(_KILLED) from None
        except RayError as error:
            raise TrainerLost(first_line(error)) from None

    def end(self) -> None:
        ray.kill(self._actor)


def trial_config(folder: Path, one: NextTrial) -> dict[str, Any]:
    """A trial as its process gets it."""
    texts = {node: [plan.to_json() for plan in found] for node, found in one.plans.items()}
    return {"folder": str(folder), "number": one.number, "point": one.point, "plans": texts}
