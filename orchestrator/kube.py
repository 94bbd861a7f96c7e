"""A planned job as objects for Kubernetes: one RayJob, and a ConfigMap with the job file and its small data files."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from clusters.capability import ClusterCapability
from clusters.kuberay import Group, Wishes, config_map, mistakes, rayjob
from clusters.units import GIB
from orchestrator.errors import JobError
from orchestrator.jobfile import Job
from orchestrator.plan import NodePlan, Plan
from orchestrator.remote import document_with, packed_files

_LEAST_POD_BYTES = 4 * GIB
_BESIDE_BYTES = 2 * GIB  # Ray and the libraries of a pod whose plan counts its device's memory


def rendered(job: Job, plan: Plan, capability: ClusterCapability, namespace: str, run_id: str) -> list[dict[str, Any]]:
    """The objects to create, in order.  Raises JobError for what KubeRay would refuse or a ConfigMap cannot hold."""
    asked = job.spec.kubernetes
    wishes = Wishes(
        namespace=namespace,
        image=asked.image,
        gpu_image=asked.gpu_image,
        claim=asked.claim,
        storage=job.spec.cluster.storage if job.spec.cluster.storage.startswith("/") else "/storage",
        queue=asked.queue,
        secret=asked.secret,
        keep_s=asked.keep_s,
    )
    groups = groups_of(plan, capability)
    if asked.claim is None and sum(group.count for group in groups) > 0:
        raise JobError(
            "kubernetes.claim: name a ReadWriteMany volume claim; the run folder must be the same on every pod"
        )
    files = packed_files(job)
    document = document_with(job, files, storage=f"{wishes.storage}/runs")
    texts = {"job.yaml": yaml.safe_dump(document, sort_keys=False, allow_unicode=True)}
    for source, place in files.items():
        try:
            texts[place] = source.read_text(encoding="utf-8")
        except (UnicodeDecodeError, IsADirectoryError):
            raise JobError(
                f"{source} is not a text file: put it on the volume and name it in cluster.shared_paths"
            ) from None
    command = shlex.join(["python", "-m", "orchestrator", "submit", "/etc/orchestrator/job.yaml", "--run-id", run_id])
    try:
        config = config_map(run_id, namespace, texts)
    except ValueError as error:
        raise JobError(
            f"data: {error}; put the data on the volume and name its folder in cluster.shared_paths"
        ) from None
    made = rayjob(run_id, command, _ray_version(), groups, wishes)
    if wrong := mistakes(made):
        raise JobError([f"KubeRay would refuse it: {text}" for text in wrong])
    return [config, made]


def groups_of(plan: Plan, capability: ClusterCapability) -> list[Group]:
    """One group for each class of machine in the plan: CPUs, and GPUs by the memory on their box."""
    found: dict[str, Group] = {}
    for part in plan.nodes:
        vram = _memory_on_the_box(part, capability)
        name = "cpu" if vram is None else f"gpu-{round(vram / GIB)}g"
        needs = _pod_bytes(part)
        old = found.get(name)
        count, cores = (old.count + 1, max(old.cores, part.threads)) if old else (1, part.threads)
        found[name] = Group(name, count, cores, max(needs, old.memory_bytes if old else 0.0), vram)
    return list(found.values())


def _memory_on_the_box(part: NodePlan, capability: ClusterCapability) -> float | None:
    if part.torch_device == "cpu":
        return None
    for node in capability.nodes:
        for device in node.gpus:
            if node.name == part.node and device.name == part.device:
                return float(device.memory_total_bytes or device.memory_bytes or 0)
    return part.memory_usable_bytes


def _pod_bytes(part: NodePlan) -> float:
    """Host memory of a pod: on a CPU what the plan says at most, on a GPU what waits or is loaded in the host."""
    memory = part.memory
    if part.torch_device == "cpu":
        return max(_LEAST_POD_BYTES, memory.high_bytes + _BESIDE_BYTES)
    return max(_LEAST_POD_BYTES, memory.host_bytes + 1.2 * memory.weights_bytes + _BESIDE_BYTES)


def object_name(name: str) -> str:
    """A job's name as Kubernetes takes it: small letters, digits, hyphens, a letter first, 47 characters at most."""
    plain = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return (plain if plain[:1].isalpha() else f"job-{plain}")[:47].rstrip("-")


def _ray_version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("ray")
    except PackageNotFoundError:
        return "2.60.0"


def write(objects: list[dict[str, Any]], file: Path, say: Callable[[str], None]) -> None:
    """One YAML file to apply.  Raises JobError."""
    try:
        file.write_text(yaml.safe_dump_all(objects, sort_keys=False, allow_unicode=True), encoding="utf-8")
    except OSError as error:
        raise JobError(f"--render {file}: cannot be written: {error.strerror}") from None
    namespace, name = objects[-1]["metadata"]["namespace"], objects[-1]["metadata"]["name"]
    say(f"wrote {file}. Next: kubectl apply -f {file} && kubectl get rayjob -n {namespace} {name} --watch")
