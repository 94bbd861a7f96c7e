"""A job's way to Kubernetes: node classes from the API server, plan, objects, data onto the volume, RayJob."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from clusters.capability import ClusterCapability
from clusters.hardware import datasheet
from clusters.hardware.hardware_file import ImpossibleHardware, hardware_of
from clusters.kubernetes.messages import mapping
from clusters.safe.reading import BadInput, load_yaml, printable, read_text, record
from clusters.units import GIB, MIB, format_bytes
from orchestrator.errors import ClusterError, JobError
from orchestrator.job.job_file import Job
from orchestrator.job.spec import KubernetesSection
from orchestrator.lifecycle import machines
from orchestrator.remote import jobs, kube_objects, package
from orchestrator.runs.run_folder import RunFolder

_Say = Callable[[str], None]
_OTHERS_CORES, _OTHERS_FRACTION = 1, 0.1  # of a node, for what runs on every node
_BINARY = {f"{name}i": 2.0 ** (10 * power) for power, name in enumerate("KMGTPE", 1)}
_UNITS = {**_BINARY, "n": 1e-9, "u": 1e-6, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15, "E": 1e18}
_QUANTITY = re.compile(r"(\d{1,20}(?:\.\d{0,20})?|\.\d{1,20})(?:[eE]([+-]?\d{1,2}))?([A-Za-z]{0,2})", re.ASCII)


@dataclass(frozen=True)
class _Taint:
    key: str
    effect: str
    value: str | None = None


@dataclass(frozen=True)
class _Spec:
    unschedulable: bool | None = None
    taints: list[_Taint] | None = None


@dataclass(frozen=True)
class _Status:
    allocatable: dict[str, str]


@dataclass(frozen=True)
class _Node:
    """What is read of a node."""

    name: str
    labels: dict[str, str]
    spec: _Spec
    status: _Status


def submit(
    job: Job,
    address: str,
    output_dir: Path,
    say: _Say,
    hardware: Path | None = None,
    cluster: str | None = None,
    run_id: str | None = None,
    follow: bool = True,
) -> RunFolder:
    """Send a job as a RayJob and, with `follow`, stay until it ends; its result then lies in the run folder here.

    `cluster` is a RayCluster to run on instead of one of its own.  A `run_id` that was sent before goes on.
    Raises JobError, NothingFits before anything is created, ClusterError, RunFailed.
    """
    name = run_id or new_name(job)
    kube_objects.check_name(name)
    known = RunFolder(output_dir / name)
    if known.is_begun:
        return _go_on(known, say, follow)
    with jobs.in_our_words(address):
        door = jobs.opened_at(address)
        objects = objects_for(job, name, door, hardware, cluster, say)
        with RunFolder.take(output_dir, job.spec.name, name) as run:
            if run.is_begun:
                raise JobError(f"{name} was begun by another process meanwhile; the same command goes on with it")
            with jobs.begun(run, job):
                _send_new(run, door, objects, name, address, say)
    say(f"run {name} in {door.namespace}")
    if follow:
        jobs.attach(run, say)
    return run


def _send_new(run: RunFolder, door: Any, objects: kube_objects.Objects, name: str, address: str, say: _Say) -> None:
    """Create the objects of a run that is taken, and keep where they are."""
    run.write("kube.yaml", kube_objects.as_yaml(objects.job, *([objects.config] if objects.config else [])))
    uploads = objects.folder if objects.uploads or objects.texts else None
    jobs.say_sent(run, objects.sent, say)
    _send(door, objects, say)
    jobs.Remote(address, objects.runs, (name,), uploads=uploads).keep(run)


def _go_on(run: RunFolder, say: _Say, follow: bool) -> RunFolder:
    """The same command again: start what ended, wait for what runs."""
    if run.state_by_events() != "finished":
        jobs.start_again(run)
        if follow:
            jobs.attach(run, say)
    return run


def _send(door: Any, objects: kube_objects.Objects, say: _Say) -> None:
    door.rehearse(objects.job, objects.config)
    if objects.uploads or objects.texts:
        packed = package.archive(objects.uploads, objects.texts)
        say(f"sending {format_bytes(len(packed))} to the volume ...")
        door.put(objects.name, objects.job, objects.folder, packed)
    door.start(objects.name, objects.job, objects.config)


def create_again(door: Any, run: RunFolder) -> str:
    """The objects of a run once more, in place of those that ended."""
    job, config = _objects_of(run.path / "kube.yaml")
    door.tidy(run.run_id)
    door.wait_gone(run.run_id)
    door.start(run.run_id, job, config)
    return run.run_id


def _objects_of(file: Path) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The RayJob and the ConfigMap that a run was sent as.  Raises JobError."""
    try:
        objects = [load_yaml(part, str(file)) for part in read_text(file).split("\n---\n")]
    except BadInput as error:
        raise JobError(f"{error}. Submit the job again, under another --run-id") from None
    kinds = [one.get("kind") if isinstance(one, dict) else None for one in objects]
    if kinds not in (["RayJob"], ["RayJob", "ConfigMap"]):
        raise JobError(f"{file}: holds no RayJob and its ConfigMap. Submit the job again, under another --run-id")
    return objects[0], objects[1] if len(objects) > 1 else None


def objects_for(
    job: Job, name: str, door: Any, hardware: Path | None, cluster: str | None, say: _Say, namespace: str = "default"
) -> kube_objects.Objects:
    """Plan and render.  Without a door, `hardware` must tell of the nodes."""
    from orchestrator.lifecycle.run import plan_without_data

    namespace = door.namespace if door else namespace
    if cluster:
        return kube_objects.rendered_on(cluster, job, namespace, name)
    capability = machines.declared(hardware) if hardware else nodes_of(door.nodes(), job.spec.kubernetes)
    ready = plan_without_data(job, capability, say)
    return kube_objects.rendered(job, ready.plan, capability, namespace, name)


def nodes_of(listed: list[dict[str, Any]], asked: KubernetesSection) -> ClusterCapability:
    """What the API server says of its nodes, as a hardware file would; those that take no pods of ours are left out.

    GPUs are known by the labels of NVIDIA's feature discovery.  Raises JobError where no node is left.
    """
    declared, unknown = [], []
    for node in map(_node, listed):
        spec, labels, allocatable = node.spec, node.labels, node.status.allocatable
        if spec.unschedulable or any(labels.get(key) != value for key, value in asked.node_selector.items()):
            continue
        if any(_keeps_off(taint, asked.tolerations) for taint in spec.taints or []):
            continue
        cores = int(_amount(allocatable.get("cpu", "0"))) - _OTHERS_CORES
        memory_gib = _amount(allocatable.get("memory", "0")) * (1 - _OTHERS_FRACTION) / GIB
        entry: dict[str, Any] = {"name": node.name, "cores": max(1, cores), "memory_gib": round(memory_gib, 2)}
        count = int(_amount(allocatable.get("nvidia.com/gpu", "0")))
        if count:
            product = labels.get("nvidia.com/gpu.product", "").replace("-", " ")
            memory = _amount(labels.get("nvidia.com/gpu.memory", "0")) * MIB
            card = datasheet.find(product, int(memory) or None) if product else None
            if card is None:
                unknown.append(f"{entry['name']} ({product or 'no nvidia.com/gpu.product label'})")
                continue
            entry["gpus"] = [{"name": card.name, "count": count, "memory_gib": round(card.memory_bytes / GIB)}]
        declared.append(entry)
    if not declared:
        why = f"; their GPUs are unknown: {', '.join(unknown)}" if unknown else ""
        raise JobError(f"no node of the cluster takes pods{why}. --hardware FILE declares its node classes")
    try:
        return hardware_of({"nodes": declared})
    except ImpossibleHardware as error:
        raise JobError(f"the cluster's nodes cannot be planned for: {error}. --hardware FILE declares them") from None


def _node(values: dict[str, Any]) -> _Node:
    metadata = mapping(values, "metadata")
    known = {"name": metadata.get("name"), "labels": metadata.get("labels") or {}, "spec": values.get("spec") or {}}
    try:
        return record(_Node, {**known, "status": values.get("status")}, f"the node {metadata.get('name')}")
    except BadInput as error:
        raise ClusterError(f"{error}, says the API server. --hardware FILE declares the nodes instead") from None


def _keeps_off(taint: _Taint, tolerations: list[dict[str, Any]]) -> bool:
    """https://kubernetes.io/docs/concepts/scheduling-eviction/taint-and-toleration/; every GPU pod bears NVIDIA's."""

    def bears(toleration: dict[str, Any]) -> bool:
        if toleration.get("effect") not in (None, taint.effect):
            return False
        if toleration.get("operator") == "Exists":
            return toleration.get("key") in (None, taint.key)
        return (toleration.get("key"), toleration.get("value")) == (taint.key, taint.value)

    if taint.effect not in ("NoSchedule", "NoExecute") or taint.key == "nvidia.com/gpu":
        return False
    return not any(bears(toleration) for toleration in tolerations)


def _amount(quantity: str) -> float:
    """A Kubernetes quantity: 16, 500m, 65Gi, 1e3."""
    match = _QUANTITY.fullmatch(quantity)
    if match is None or (match[3] and match[3] not in _UNITS):
        raise ClusterError(f"the API server says {printable(quantity[:40])!r}, which is no quantity of Kubernetes")
    return float(match[1]) * 10.0 ** int(match[2] or 0) * _UNITS.get(match[3], 1)


def new_name(job: Job) -> str:
    """A name for a run that Kubernetes takes; the moment at its end stays whole however long the job's name."""
    stamp = f"{datetime.now():%m%d-%H%M%S}"
    return f"{kube_objects.object_name(job.spec.name)[: 46 - len(stamp)].rstrip('-')}-{stamp}"
