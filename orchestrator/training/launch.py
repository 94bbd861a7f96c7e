"""The only door to Ray Train: one TorchTrainer, one worker a slot, each handed a run folder and its node's name."""

from __future__ import annotations

import logging
import os
import shutil
import socket
import traceback
import uuid
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import ray.train
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from clusters.masking import MaskedFormatter
from orchestrator.errors import OrchestratorError, RunFailed
from orchestrator.plan import Plan
from orchestrator.rundir import RunFolder
from strategies.techniques import host_memory, thread_waits

_LEAST_PATIENCE_S = 60.0  # of a collective: a worker that is silent for longer has hung
_VANISHED = ("WorkerHealthCheckFailedError", "ActorDiedError", "RayActorError")
_START_TIMEOUT_S = 900  # until the slowest machine has loaded its model
# A hung worker is given up after this; Ray's own 10 minutes would be the longest wait of all.  It reads them here.
_ENVIRONMENT = {
    "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "60",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "60",
}


def launch(run: RunFolder, plan: Plan, slot_resources: dict[str, float], node_ids: Mapping[str, str]) -> None:
    """Run the planned workers to their end.  Raises RunFailed when one of them fails.

    `node_ids` names the plan's nodes as Ray knows them; empty where there is one machine.  Restarts are the caller's:
    it plans again with the machines that are left (recovery.py).  Ray's own bookkeeping goes into a throw-away folder:
    what a restart needs is our checkpoint, which verifies.
    """
    storage = run.path / ".ray" / uuid.uuid4().hex[:8]
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    of_cpu = {"env_vars": host_memory.ENVIRONMENT | thread_waits.environment()}
    chosen = sorted({node_ids[part.node] for part in plan.nodes}) if node_ids else []
    trainer = TorchTrainer(
        _on_worker,
        train_loop_config={"run": str(run.path), "names": {node_id: name for name, node_id in node_ids.items()}},
        scaling_config=ScalingConfig(
            num_workers=plan.num_workers,
            resources_per_worker=slot_resources,
            label_selector={"ray.io/node-id": f"in({','.join(chosen)})"} if chosen else None,
        ),
        run_config=RunConfig(
            name=run.run_id,
            storage_path=str(storage),
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=1),
            worker_runtime_env=of_cpu if plan.nodes[0].torch_device == "cpu" else None,
        ),
        torch_config=TorchConfig(backend=collective_backend(plan), timeout_s=_START_TIMEOUT_S),
    )
    try:
        trainer.fit()
    except ray.train.TrainingFailedError as error:
        for rank in _dead(error):
            run.record("killed", rank=rank, node=plan.nodes[rank].node if plan.num_workers == 1 else _node(run, rank))
        raise RunFailed(_last_line(error)) from error
    finally:
        shutil.rmtree(storage.parent, ignore_errors=True)


def collective_backend(plan: Plan) -> str:
    """Who carries tensors between workers: NCCL between GPUs alone; one worker sends nothing and needs no NCCL."""
    on_gpus = all(part.torch_device == "cuda" for part in plan.nodes)
    return "nccl" if on_gpus and plan.num_workers > 1 else "gloo"


def _on_worker(config: dict[str, Any]) -> None:
    """Runs on each worker: set up logging, find out where it is, then hand over to `worker.work`."""
    from orchestrator.training.worker import work

    run, context = RunFolder(Path(config["run"])), ray.train.get_context()
    node = config["names"].get(ray.get_runtime_context().get_node_id(), "")
    plan = run.plan()
    rank, slot = _in_plan_order(plan, node, context.get_world_size())
    _log_to(run.logs / f"worker-{rank}.log")
    try:
        work(run, rank, context.get_world_size(), node, slot)
    except OrchestratorError as error:
        run.record("error", text=str(error), exit_code=error.exit_code, again=error.again)
        raise
    except BaseException as error:
        logging.getLogger("orchestrator.worker").exception("worker %d failed", rank)
        run.record(
            "error",
            text=_said(error),
            traceback=traceback.format_exc(),
            exit_code=5,
            again=True,
            node=node,
        )
        raise


def _in_plan_order(plan: Plan, node: str, size: int) -> tuple[int, int]:
    """Give the workers ranks in the order of the plan's nodes; this one's rank, and which of its node's it is.

    Ray's ranks change with every restart and its local ranks count by address, which nodes of one machine share; sums
    are bit-equal only in the same order.  The group made here is also as impatient as training needs: Ray's waited for
    the slowest machine to start.  Its store listens on the address the machines know this one by, where Ray's listens
    on all.
    """
    import torch
    import torch.distributed as dist

    if size == 1:
        dist.destroy_process_group()
        return 0, 0
    backend = dist.get_backend()
    if backend == "nccl":  # objects travel through a GPU, which must be one's own
        torch.cuda.set_device(ray.train.get_context().get_local_rank())
    listener = socket.create_server((ray.util.get_node_ip_address(), 0))
    me = (ray.train.get_context().get_world_rank(), node, *listener.getsockname())
    told: list[Any] = [None] * size
    dist.all_gather_object(told, me)
    places = [(part.node, index) for index, part in enumerate(plan.nodes)]
    ranks: dict[int, int] = {}
    slots: dict[int, int] = {}
    for ray_rank, name, _, _ in sorted(told):
        left = [index for own, index in places if own == name or not name]
        if not left:
            raise RunFailed(f"the plan has no more work for {name}, and a worker was started there")
        ranks[ray_rank] = left[0]
        slots[ray_rank] = sum(plan.nodes[index].node == plan.nodes[left[0]].node for index in range(left[0]))
        places.remove((plan.nodes[left[0]].node, left[0]))
    first = next(entry for entry in told if ranks[entry[0]] == 0)
    dist.destroy_process_group()
    patience = timedelta(seconds=max(_LEAST_PATIENCE_S, 20 * plan.step_s))
    store = store_at(first[2], first[3], size, patience, listener if me == first else None)
    listener.close()
    dist.init_process_group(backend, store=store, rank=ranks[me[0]], world_size=size, timeout=patience)
    return ranks[me[0]], slots[me[0]]


def store_at(address: str, port: int, size: int, patience: timedelta, listener: socket.socket | None = None) -> Any:
    """Where `size` workers meet; who has the `listener` at that address serves it, there and on no other address."""
    from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

    own = listener.detach() if listener else None
    return TCPStore(address, port, size, listener is not None, patience, master_listen_fd=own)


def _said(error: BaseException) -> str:
    """What went wrong; the network library's own words help nobody."""
    text = str(error)
    if "gloo" in text or "NCCL" in text or "store" in text.lower():
        return "another worker stopped answering"
    return f"{type(error).__name__}: {text}"


def _log_to(file: Path) -> None:
    file.parent.mkdir(exist_ok=True)
    handler = logging.FileHandler(file, encoding="utf-8")
    handler.setFormatter(MaskedFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logger = logging.getLogger()
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    logging.captureWarnings(True)


def _dead(error: Exception) -> list[int]:
    """Ranks of workers that vanished without a word: killed, or their machine is gone."""
    failures = getattr(error, "worker_failures", {})
    return [rank for rank, failure in failures.items() if type(failure).__name__ in _VANISHED]


def _node(run: RunFolder, rank: int) -> str | None:
    """Where a rank was, as the workers told each other."""
    groups = [event for event in run.events()[0] if event["event"] == "group"]
    members = groups[-1]["members"] if groups else []
    return members[rank]["node"] if rank < len(members) else None


def _last_line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
