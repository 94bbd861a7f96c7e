"""The only door to Ray Train: one TorchTrainer, one worker a slot, each handed a run folder."""

from __future__ import annotations

import logging
import shutil
import traceback
import uuid
from pathlib import Path
from typing import Any

import ray.train
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from orchestrator.errors import OrchestratorError, RunFailed
from orchestrator.planner import Plan
from orchestrator.rundir import RunFolder
from strategies.techniques import host_memory

_GROUP_TIMEOUT_S = 600  # a collective that waits longer has lost a worker


def launch(run: RunFolder, plan: Plan, slot_resources: dict[str, float], max_failures: int) -> None:
    """Run the planned workers to their end.  Raises RunFailed when they fail more than `max_failures` times.

    Ray's own bookkeeping goes into a throw-away folder: what a restart needs is our checkpoint, which verifies.
    """
    storage = run.path / ".ray" / uuid.uuid4().hex[:8]
    trainer = TorchTrainer(
        _on_worker,
        train_loop_config={"run": str(run.path), "device": plan.device},
        scaling_config=ScalingConfig(num_workers=plan.num_workers, resources_per_worker=slot_resources),
        run_config=RunConfig(
            name=run.run_id,
            storage_path=str(storage),
            failure_config=FailureConfig(max_failures=max_failures),
            worker_runtime_env={"env_vars": host_memory.ENVIRONMENT} if plan.device == "cpu" else None,
        ),
        torch_config=TorchConfig(backend="nccl" if plan.device == "cuda" else "gloo", timeout_s=_GROUP_TIMEOUT_S),
    )
    try:
        trainer.fit()
    except ray.train.TrainingFailedError as error:
        raise RunFailed(_reason(run, error)) from error
    finally:
        shutil.rmtree(storage.parent, ignore_errors=True)


def _on_worker(config: dict[str, Any]) -> None:
    """Runs on each worker: set up logging and the device, then hand over to `worker.work`."""
    import torch

    from orchestrator.training.parallel import Group
    from orchestrator.training.worker import work

    run, context = RunFolder(Path(config["run"])), ray.train.get_context()
    group = Group(context.get_world_rank(), context.get_world_size())
    _log_to(run.logs / f"worker-{group.rank}.log")
    device = torch.device("cpu" if config["device"] == "cpu" else f"cuda:{context.get_local_rank()}")
    try:
        work(run, group, device)
    except OrchestratorError as error:
        run.record("error", text=str(error), exit_code=error.exit_code)
        raise
    except BaseException as error:
        logging.getLogger("orchestrator.worker").exception("worker %d failed", group.rank)
        run.record("error", text=f"{type(error).__name__}: {error}", traceback=traceback.format_exc(), exit_code=5)
        raise


def _log_to(file: Path) -> None:
    file.parent.mkdir(exist_ok=True)
    handler = logging.FileHandler(file, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logger = logging.getLogger()
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    logging.captureWarnings(True)


def _reason(run: RunFolder, error: Exception) -> str:
    """What the workers wrote down, else the last line of what Ray says."""
    errors = [event["text"] for event in run.events()[0] if event["event"] == "error"]
    return errors[-1] if errors else str(error).strip().splitlines()[-1]
