"""Starts the workers with Ray Train: one trainer, one worker a slot, each given a run folder and its node's name.

PyTorch is loaded by the workers, and not by the process that starts one of them and waits.

Ray Train assigns any GPU, the same number to every worker; a plan names one GPU for some workers.  So GPUs are reserved
beside it (clusters/ray/gpu_reservation.py), and each worker sees its own before PyTorch is loaded.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import socket
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import ray.train
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.backend import Backend, BackendConfig
from ray.train.v2._internal.execution.controller.controller import TrainController
from ray.train.v2._internal.execution.worker_group import state, worker_group
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from clusters.hardware.interfaces import gloo_talks_at
from clusters.ray import gpu_reservation, resident
from clusters.ray.gpu_reservation import CannotReserve, GpuGone, Reservation, Wanted
from clusters.safe.masking import log_apart, masked_log
from orchestrator.errors import HardwareChanged, OrchestratorError, RunFailed
from orchestrator.planning.plan import NodePlan, Plan
from orchestrator.runs.events import Note, WorkerGroup, WorkerKilled
from orchestrator.runs.run_folder import RunFolder
from orchestrator.training.workers.connections import refuse_unreachable, store_at
from orchestrator.training.workers.failures import record_failure
from orchestrator.training.workers.gpu_locks import equivalent_gpus
from strategies.step import host_memory

_MIN_TIMEOUT_S = 60.0  # of a collective: a worker that is silent for longer has hung
_VANISHED = ("WorkerHealthCheckFailedError", "ActorDiedError", "RayActorError")
_START_TIMEOUT_S = 900  # until the slowest machine has loaded its model
# A hung worker is given up after this; Ray's own 10 minutes would be the longest wait of all.  It reads them here.
_ENVIRONMENT = {
    "RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING": "0",  # it would print into the driver's terminal
    "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "60",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "60",
}


def launch(
    run: RunFolder,
    plan: Plan,
    slot_resources: dict[str, float],
    node_ids: Mapping[str, str],
    work: Callable[..., None] | None = None,
) -> None:
    """Run the planned workers to their end, each on its GPU.  Raises RunFailed when one of them fails, its node is
    lost before, or a planned GPU is no longer there.

    `work` is what each does in place of `worker.work`.  `node_ids` maps the plan's nodes to Ray's ids; empty where
    there is one machine.  The caller restarts: it plans again with the remaining machines (lifecycle/recovery.py).
    """
    cluster = run.capability()
    wanted = [Wanted(_ray_node(part, node_ids), equivalent_gpus(part, cluster)) for part in _on_gpus(plan)]
    is_over = run.stop_file.exists
    try:
        reservation = gpu_reservation.reserve(wanted, lambda text: run.record(Note(text)), is_over)
    except GpuGone as error:
        raise HardwareChanged(str(error)) from error
    except CannotReserve as error:
        raise RunFailed(str(error)) from error
    if reservation is None:
        run.record_stop()
        return
    for text in notices(plan, reservation):
        run.record(Note(text))
    try:
        seen = environments(plan, reservation, node_ids)
        names = {node_id: name for name, node_id in node_ids.items()}
        _train(run, plan, slot_resources, node_ids, seen, {"run": str(run.path), "names": names, "work": work})
    finally:
        reservation.release()


def _on_gpus(plan: Plan) -> list[NodePlan]:
    return [part for part in plan.nodes if part.torch_device != "cpu"]


def _ray_node(part: NodePlan, node_ids: Mapping[str, str]) -> str:
    """Ray's id of the node of a part; of the only one where they have no names."""
    return node_ids[part.node] if node_ids else gpu_reservation.own_node_id()


def notices(plan: Plan, reservation: Reservation) -> list[str]:
    """Notes for the user on GPUs that are not reserved, or are not the planned ones."""
    texts = []
    for part, held in zip(_on_gpus(plan), reservation.held, strict=True):
        if held is None:
            texts.append(f"Ray does not assign {part.device} of {part.node}: nothing keeps other Ray users from it")
        elif part.uuid and held.id != part.uuid:
            texts.append(
                f"{held.id} of {part.node} trains in place of {part.uuid}: they are alike, and Ray assigned it first"
            )
    return texts


def environments(plan: Plan, reservation: Reservation, node_ids: Mapping[str, str]) -> dict[str, list[dict[str, str]]]:
    """What each worker's process must see, by Ray's id of its node ("" where there is one) and in the plan's order.

    Where Ray does not assign it, the planned one is used: nothing keeps others from it.
    """
    held = iter(reservation.held)
    found: dict[str, list[dict[str, str]]] = {}
    for part in plan.nodes:
        own = next(held) if part.torch_device != "cpu" else None
        gpu = own.id if own else part.uuid
        found.setdefault(node_ids.get(part.node, ""), []).append(gpu_reservation.visible(part.kind, gpu))
    return found


@dataclass
class _WorkerSetup(BackendConfig):
    """How workers connect, and which GPU of its node each of them sees."""

    backend: str = "gloo"
    environments: dict[str, list[dict[str, str]]] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)  # Ray's id of a node -> its name
    inherited: dict[str, str] = field(default_factory=dict)  # the environment that all have

    @property
    def backend_cls(self) -> type[Backend]:
        return _Backend


class _Trainer(DataParallelTrainer):
    """Without those of Ray Train's actors that have nothing to do here: each is a process that loads Ray Train first.

    Measured: 1.3 s of computing for each, and the workers' start waits for two.  Private names of Ray 2.60: where one
    is gone, its actor starts again.
    """

    is_embedded = False  # whether the workers are for this machine alone, in a Ray of this user

    def _create_default_callbacks(self) -> list[Any]:
        idle = {"DatasetsCallback"}  # samples come from files
        if self.is_embedded:
            idle.add("PlacementGroupCleanerCallback")  # the group is the driver's, and ends with it
        return [one for one in super()._create_default_callbacks() if type(one).__name__ not in idle]

    def _initialize_and_run_controller(self, **parts: Any) -> Any:
        request_nothing(parts.get("scaling_policy"))
        if not self.is_embedded:
            return super()._initialize_and_run_controller(**parts)
        # No process for Ray Train's barriers either: our workers meet in a group of their own.
        worker_group.SynchronizationActor = _NoActor  # pyright: ignore[reportPrivateImportUsage]
        state._shutdown_sync_actor = _do_nothing
        controller = _OwnController(**parts)
        asyncio.run(controller.run())
        return controller.get_result()


class _OwnWorkerGroup(worker_group.WorkerGroup):
    """Of a controller that is no actor, so that workers have no handle of one: they ask it nothing.

    Workers have the environment of all processes, so that those that Ray has started ahead fit.
    """

    @staticmethod
    def _get_worker_runtime_env(custom_runtime_env: dict[str, Any]) -> dict[str, Any]:
        return custom_runtime_env

    def _init_train_context_on_workers(
        self, workers: list[Any], sync_actor: Any, train_context_args: dict[str, list[Any]]
    ) -> None:
        contexts = [
            worker.actor.init_train_context.remote(
                train_run_context=self._train_run_context,
                distributed_context=worker.distributed_context,
                synchronization_actor=sync_actor,
                storage_context=self._storage_context,
                worker_callbacks=self._worker_callbacks_to_propagate,
                controller_actor=None,
                **{name: values[index] for name, values in train_context_args.items()},
            )
            for index, worker in enumerate(workers)
        ]
        ray.get(contexts)
        self._decorate_worker_log_file_paths(workers)


class _OwnController(TrainController):
    """Ray Train's controller in the driver's process.

    As an actor it is a process that loads Ray Train first, and the workers' start waits for it: 7 of 26 s on two slow
    cores.  It is there to outlive its driver, with which an embedded cluster ends, and a run of this machine.
    """

    worker_group_cls = _OwnWorkerGroup


def request_nothing(policy: Any) -> None:
    """A scaling policy that asks no autoscaler for machines: the plan is for nodes that are there."""
    for name in ("_send_resource_request", "_maybe_send_resource_request", "_cancel_resource_request"):
        if hasattr(policy, name):
            setattr(policy, name, _do_nothing)


def _do_nothing(*_: Any) -> None:
    """In the controller's process, in place of what starts an actor or ends it."""


class _NoActor:
    """Stands where the controller would start an actor."""

    options = classmethod(lambda cls, **_: cls)
    remote = staticmethod(lambda **_: "none")


class _Backend(Backend):
    share_cuda_visible_devices = True  # as Ray Train's own of PyTorch

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        """Before CUDA starts in the workers: each sees its own GPU; of several, allocators are set, gloo is bound to
        the node's address, and all can connect to each other."""
        worker_group.execute(resident.adopt, backend_config.inherited)
        nodes = worker_group.execute(gpu_reservation.own_node_id)
        for index, own in enumerate(in_order(nodes, backend_config.environments)):
            worker_group.execute_single(index, gpu_reservation.see, own)
        if len(nodes) == 1:  # nobody to connect to
            return
        worker_group.execute(_prepare_for_group)
        names = [backend_config.names.get(node, node) for node in nodes]
        refuse_unreachable(worker_group.execute, ray.util.get_node_ip_address, names)
        backend, config = _groups_of_pytorch(backend_config.backend)
        backend.on_start(worker_group, config)

    def on_shutdown(self, worker_group: Any, backend_config: Any) -> None:
        if len(worker_group) > 1:
            backend, config = _groups_of_pytorch(backend_config.backend)
            backend.on_shutdown(worker_group, config)


def _groups_of_pytorch(name: str) -> tuple[Any, Any]:
    """Ray Train's way to connect several workers, which loads PyTorch here, too."""
    from ray.train.torch import TorchConfig
    from ray.train.torch.config import _TorchBackend

    return _TorchBackend(), TorchConfig(backend=name, timeout_s=_START_TIMEOUT_S)


def _prepare_for_group() -> None:
    from strategies.step import device_memory

    device_memory.grow_segments()  # a group's first messages are tensors of nccl
    gloo_talks_at(ray.util.get_node_ip_address())


def in_order(nodes: Sequence[str], environments: Mapping[str, Sequence[dict[str, str]]]) -> list[dict[str, str]]:
    """The environment of each worker: those of a node go to its workers in the order of Ray's ranks.

    `_in_plan_order` gives out the plan's parts in the same order.
    """
    left = {node_id: list(own) for node_id, own in environments.items()}
    of_nodes = (left.get(node_id, left.get("", [])) for node_id in nodes)
    return [own.pop(0) if own else {} for own in of_nodes]  # a worker too many is refused there


def _train(
    run: RunFolder,
    plan: Plan,
    slot_resources: dict[str, float],
    node_ids: Mapping[str, str],
    environments: dict[str, list[dict[str, str]]],
    config: dict[str, Any],
) -> None:
    """Run the trainer with the `config` of `_on_worker`; Ray's own files serve no restart."""
    storage = run.path / ".ray" / uuid.uuid4().hex[:8]
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    is_embedded = not node_ids  # its processes have the environment already
    of_cpu = {"env_vars": host_memory.process_environment()}
    chosen = sorted({node_ids[part.node] for part in plan.nodes}) if node_ids else [gpu_reservation.own_node_id()]
    trainer = _Trainer(
        _on_worker,
        train_loop_config=config,
        scaling_config=ScalingConfig(
            num_workers=plan.num_workers,
            resources_per_worker=slot_resources,
            label_selector={"ray.io/node-id": f"in({','.join(chosen)})"},
        ),
        run_config=RunConfig(
            name=run.run_id if run.run_id.isascii() else storage.name,  # a label of Ray's metrics, which take ASCII
            storage_path=str(storage),
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=1),
            worker_runtime_env=of_cpu if plan.nodes[0].torch_device == "cpu" and not is_embedded else None,
        ),
        backend_config=_WorkerSetup(
            backend=plan.backend,
            environments=environments,
            names=config["names"],
            inherited=resident.inherited() if is_embedded else {},
        ),
    )
    trainer.is_embedded = is_embedded
    try:
        with log_apart("ray.train", run.logs / "ray-train.log"):
            trainer.fit()
    except ray.train.TrainingFailedError as error:
        for rank in _dead(error):
            run.record(WorkerKilled(rank, plan.nodes[rank].node if plan.num_workers == 1 else _node(run, rank)))
        refused = getattr(error, "controller_failure", None)  # before the workers started
        raise RunFailed(str(refused) if isinstance(refused, RunFailed) else _last_line(error)) from error
    finally:
        shutil.rmtree(storage.parent, ignore_errors=True)


def _on_worker(config: dict[str, Any]) -> None:
    """Runs on each worker: set up logging, find its place in the plan, call `worker.work`."""
    from orchestrator.training.workers.worker import work

    host_memory.freeze_imports()
    run, context = RunFolder(Path(config["run"])), ray.train.get_context()
    node = config["names"].get(ray.get_runtime_context().get_node_id(), "")
    rank, slot = _in_plan_order(run.plan(), node, context.get_world_size())
    _log_to(run.logs / f"worker-{rank}.log")
    try:
        (config["work"] or work)(run, rank, context.get_world_size(), node, slot)
    except BaseException as error:
        if not isinstance(error, OrchestratorError):
            logging.getLogger("orchestrator.worker").exception("worker %d failed", rank)
        record_failure(run, error, node)
        raise


def _in_plan_order(plan: Plan, node: str, size: int) -> tuple[int, int]:
    """Give the workers ranks in the order of the plan's nodes; this one's rank, and which of its node's it is.

    Ray's ranks change with every restart and its local ranks count by address, which nodes of one machine share; sums
    are bit-equal only in the same order.  The group made here also has the timeout that training needs: Ray's had to
    wait for the slowest machine to start.  Its store listens on the address the machines know this one by, where
    Ray's listens on all.
    """
    if size == 1:
        return 0, 0
    import torch
    import torch.distributed as dist

    backend = dist.get_backend()
    if backend == "nccl":  # objects travel through a GPU, which must be one's own
        torch.cuda.set_device(0)
    listener = socket.create_server((ray.util.get_node_ip_address(), 0))
    me = (ray.train.get_context().get_world_rank(), node, *listener.getsockname())
    members: list[Any] = [None] * size
    dist.all_gather_object(members, me)
    places = [(part.node, index) for index, part in enumerate(plan.nodes)]
    ranks: dict[int, int] = {}
    slots: dict[int, int] = {}
    for ray_rank, name, _, _ in sorted(members):
        left = [index for own, index in places if own == name or not name]
        if not left:
            raise RunFailed(f"the plan has no more work for {name}, and a worker was started there")
        ranks[ray_rank] = left[0]
        slots[ray_rank] = sum(plan.nodes[index].node == plan.nodes[left[0]].node for index in range(left[0]))
        places.remove((plan.nodes[left[0]].node, left[0]))
    first = next(entry for entry in members if ranks[entry[0]] == 0)
    dist.destroy_process_group()
    timeout = timedelta(seconds=max(_MIN_TIMEOUT_S, 20 * plan.step_s))
    store = store_at(first[2], first[3], size, timeout, listener if me == first else None)
    listener.close()
    dist.init_process_group(backend, store=store, rank=ranks[me[0]], world_size=size, timeout=timeout)
    return ranks[me[0]], slots[me[0]]


def _log_to(file: Path) -> None:
    handler = masked_log(file)
    logger = logging.getLogger()
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    logging.captureWarnings(True)


def _dead(error: Exception) -> list[int]:
    """Ranks of workers that vanished without an error: killed, or their machine is gone."""
    failures = getattr(error, "worker_failures", {})
    return [rank for rank, failure in failures.items() if type(failure).__name__ in _VANISHED]


def _node(run: RunFolder, rank: int) -> str | None:
    """The node of a rank, from the newest `group` event."""
    groups = run.events_of(WorkerGroup)
    members = groups[-1].members if groups else []
    return members[rank].node if rank < len(members) else None


def _last_line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
