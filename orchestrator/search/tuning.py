"""The only door to Ray Tune: trials on every free slot, each where its combination fits.

A worker process lives as long as the search and takes one trial after the other: importing torch once a slot, not once
a trial, is most of what keeps Tune cheap here (numbers in LOG.md).
"""

from __future__ import annotations

import gc
import logging
import math
import os
import shutil
import time
import uuid
from collections.abc import Mapping, Sequence, Set
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, MedianStoppingRule
from ray.tune.search import Searcher

from clusters.hardware.gpus import look_at_gpus
from clusters.ray import gpu_reservation
from orchestrator.errors import OrchestratorError
from orchestrator.job.job_file import Job, spec_with
from orchestrator.job.space import Point
from orchestrator.planning.plan import Plan
from orchestrator.runs.search_folder import Samples, SearchFolder, Trial
from orchestrator.search.advice import plan_for
from strategies.step import host_memory

_ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_MAX_PENDING_TRIALS_PG": "1",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
}
REUSE_WORKERS = True  # tests/benchmarks/search.py says what it saves
_WHAT_TRIALS_RAISE = (OrchestratorError, RuntimeError, ValueError, MemoryError, NotImplementedError)


class Searching(Protocol):
    """What Tune needs of a search."""

    def next_trial(self) -> tuple[int, Point, Mapping[str, Sequence[Plan]]] | None:
        """A number, the point and, for each node that could run it, a plan for each kind of its devices; None where all
        is tried."""
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

    count: int
    resources: dict[str, float]
    node_ids: Mapping[str, str]  # empty where there is one machine


def tune_trials(
    folder: Path, searching: Searching, slots: Slots, num_trials: int, num_steps: int, scheduler: str
) -> None:
    """Run trials of `num_steps` steps until there are enough; errors of Tune itself are raised."""
    node_ids = slots.node_ids
    os.environ.update({name: value for name, value in _ENVIRONMENT.items() if name not in os.environ})
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # failures are reported by the search, a line a trial
    storage = folder / ".ray" / uuid.uuid4().hex[:8]

    def offers_gpus(name: str) -> bool:
        return gpu_reservation.offers_gpus(node_ids[name] if node_ids else gpu_reservation.own_node_id())

    def resources(config: Mapping[str, Any]) -> tune.PlacementGroupFactory:
        plans = {name: Plan.from_json(texts[0]) for name, texts in config["plans"].items()}
        bundle, nodes = place_of(plans, slots.resources, {name for name in plans if offers_gpus(name)})
        if not node_ids:
            return tune.PlacementGroupFactory([bundle])
        where = ",".join(sorted(node_ids[node] for node in nodes))
        return tune.PlacementGroupFactory([bundle], bundle_label_selector=[{"ray.io/node-id": f"in({where})"}])

    tuner = tune.Tuner(
        tune.with_resources(_Runner, resources),
        param_space={"folder": str(folder), "names": {node_id: name for name, node_id in node_ids.items()}},
        tune_config=tune.TuneConfig(
            search_alg=_Adapter(searching),
            scheduler=_scheduler(scheduler, num_steps),
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


def rungs(num_steps: int) -> list[int]:
    """Steps at which a trial is measured and may be stopped: a quarter, half, all."""
    return sorted({math.ceil(num_steps / 4), math.ceil(num_steps / 2), num_steps})


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

    def __init__(self, searching: Searching) -> None:
        super().__init__(metric="judged", mode="min")
        self._searching = searching

    def suggest(self, trial_id: str) -> Any:
        wanted = None if self._searching.enough() else self._searching.next_trial()
        if wanted is None:
            return Searcher.FINISHED
        number, point, plans = wanted
        texts = {node: [plan.to_json() for plan in found] for node, found in plans.items()}
        return {"number": number, "point": point, "plans": texts}

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
        self._searching.ended(Trial(**{**values, "curve": [tuple(point) for point in values["curve"]]}))

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
        return "its process was killed: most likely the machine ran out of memory"
    return last


class _Runner(tune.Trainable):
    """A worker process: takes trials one after the other."""

    def setup(self, config: dict[str, Any]) -> None:
        self._take(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._take(new_config)
        return True

    def _take(self, config: dict[str, Any]) -> None:
        self._now, self._experiment, self._began = config, None, time.perf_counter()
        gc.collect()
        host_memory.trim()

    def step(self) -> dict[str, Any]:
        """Train to the next rung and report."""
        try:
            experiment = self._experiment = self._experiment or self._experiment_of()
            done = experiment.progress.step
            target = next(rung for rung in rungs(experiment.plan.num_steps) if rung > done)
            loss = experiment.train_to(target)
            ended = target == experiment.plan.num_steps
            metric = self._job.spec.search.metric
            quality = experiment.quality() if ended and metric != "eval_loss" else {}
        except _WHAT_TRIALS_RAISE as error:
            lines = str(error).strip().splitlines()
            return self._report(None, {}, True, lines[0] if lines else type(error).__name__)
        return self._report(loss, quality, ended, None)

    def _experiment_of(self) -> Any:
        from orchestrator.data.prepare import datasets
        from orchestrator.training.workers.experiment import Experiment

        folder = Path(self._now["folder"])
        job = SearchFolder(folder).job()
        self._job = Job(spec_with(job.spec, self._now["point"]), job.folder, job.text)
        plan = plan_for([Plan.from_json(text) for text in self._now["plans"][self._node()]], look_at_gpus()[0])
        files = _data_of(folder, plan.max_length)
        data, held_out = datasets(files)
        assert held_out is not None  # the search made sure
        return Experiment(self._job, plan, files.model, data.select(files.train_rows), held_out.select(files.eval_rows))

    def _node(self) -> str:
        import ray

        name = self._now["names"].get(ray.get_runtime_context().get_node_id())
        return name if name is not None else next(iter(self._now["plans"]))

    def _report(self, loss: float | None, quality: dict[str, float], ended: bool, reason: str | None) -> dict[str, Any]:
        experiment, seconds = self._experiment, time.perf_counter() - self._began
        trial = Trial(
            number=self._now["number"],
            point=self._now["point"],
            status="failed" if reason else "finished" if ended else "stopped",
            node=self._node(),
            reason=reason,
            seconds=round(seconds, 3),
            eval_loss=loss,
            quality=quality,
        )
        values = asdict(trial)
        if experiment is not None and reason is None:
            values |= {
                "steps": experiment.progress.step,
                "curve": experiment.curve,
                "step_s": experiment.times()["measured_step_s"],
                "tokens_per_s": experiment.tokens_per_s,
                "tensors_bytes": experiment.tensors_bytes,
                "predicted_step_s": experiment.plan.step_s,
                "predicted_tensors_bytes": experiment.plan.memory.tensors_bytes,
                "time": experiment.times(),
            }
        judged = math.inf if loss is None else _rounded(loss, self._job.spec.search.quality_tolerance)
        return {"step": values["steps"], "judged": judged, "trial": values, "done": ended or reason is not None}


def _rounded(loss: float, tolerance: float) -> float:
    """To steps of the tolerance: what is as good must not be stopped for a difference that does not count."""
    if loss <= 0 or not math.isfinite(loss):
        return loss
    step = math.log1p(max(tolerance, 1e-3))
    return math.exp(step * round(math.log(loss) / step))


def _data_of(folder: Path, max_length: int) -> Samples:
    return SearchFolder(folder).samples()[str(max_length)]
