"""A planned job as objects for Kubernetes: one RayJob, and a ConfigMap with the job file and its small data files."""

from __future__ import annotations

import hashlib
import re
import shlex
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from clusters.capability import ClusterCapability
from clusters.kubernetes.rayjob import MOST_CONFIG_BYTES, JobSettings, PodGroup, config_map, mistakes, rayjob, rayjob_on
from clusters.safe.reading import BadInput, load_yaml, read_text
from clusters.units import GIB, format_bytes, format_s
from orchestrator.errors import JobError
from orchestrator.job.job_file import Job
from orchestrator.job.secrets import refuse_written_out, secret_names
from orchestrator.planning.plan import NodePlan, Plan
from orchestrator.remote.package import Packed, find_files, make_document, size_of

_LEAST_POD_BYTES = 4 * GIB
_BESIDE_BYTES = 2 * GIB  # Ray and the libraries of a pod whose plan counts its device's memory
_JOB_FOLDER = "/etc/orchestrator"
_LEAST_DEADLINE_S, _MOST_DEADLINE_S = 7 * 86400, 2**31 - 1  # the second is what the field holds
_DEADLINE = 3  # times the longest that the job is meant to take: a prediction may be off, and a retry begins anew
_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")  # RFC 1123


@dataclass(frozen=True)
class Objects:
    """What is created for one job, and the files that must be on its volume first."""

    job: dict[str, Any]
    config: dict[str, Any] | None  # of a job whose pods are made for it
    storage: str  # where the volume is seen there
    uploads: dict[str, Path] = field(default_factory=dict)  # names in the folder -> files here
    texts: dict[str, str] = field(default_factory=dict)  # beside them
    sent: Packed = field(default_factory=Packed)  # all files of the job, on the volume or in the ConfigMap

    @property
    def name(self) -> str:
        return str(self.job["metadata"]["name"])

    @property
    def runs(self) -> str:
        return f"{self.storage}/runs"

    @property
    def ends(self) -> str:
        """When Kubernetes ends the job, whether it is done or not."""
        seconds = self.job["spec"].get("activeDeadlineSeconds")
        if seconds is None:
            return "Kubernetes ends the job at no time by itself: state goal.max_hours where it should"
        return (
            f"Kubernetes ends the job after {format_s(seconds)} (activeDeadlineSeconds): {_DEADLINE} times the longest"
            " that the plan or goal.max_hours says, and at least a week"
        )

    @property
    def folder(self) -> str:
        return folder_of(self.storage, self.name)


def folder_of(storage: str, name: str) -> str:
    """Where a job's files lie on the volume."""
    return f"{storage}/jobs/{name}"


def render(job: Job, plan: Plan, capability: ClusterCapability, namespace: str, name: str) -> Objects:
    """A RayJob with a cluster of its own.  Raises JobError for what KubeRay would reject or cannot be sent.

    Text files that fit into a ConfigMap go into it; others are `uploads`.
    """
    settings = _settings(job, namespace, plan.phases.total_s or plan.total_s)
    groups = make_groups(plan, capability)
    slots = sum(group.count for group in groups)  # a pod that runs has not joined yet, or an autoscaler brings it
    packed = find_files(job)
    texts = _texts(packed)
    on_volume = f"{folder_of(settings.storage, name)}/" if texts is None else ""
    there = {source: f"{on_volume}{place}" for source, place in packed.places.items()}
    document = make_document(job, there, f"{settings.storage}/runs", wait_for_slots=slots)
    beside = _modules(packed) if texts is None else texts
    config = config_map(name, namespace, {"job.yaml": document, **beside})
    made = rayjob(name, _command(f"{_JOB_FOLDER}/job.yaml", name), _ray_version(), groups, settings)
    return _check(Objects(made, config, settings.storage, {} if texts is not None else packed.files, sent=packed))


def render_on(cluster: str, job: Job, namespace: str, name: str) -> Objects:
    """A RayJob for an existing RayCluster, which plans there for what it finds; all its files are `uploads`."""
    settings = _settings(job, namespace)
    if not _LABEL.fullmatch(cluster):
        raise JobError(f"--attach {cluster}: is not a RayCluster name; use lowercase letters, digits and hyphens")
    storage = job.spec.cluster.storage
    if not storage.startswith("/"):
        raise JobError(
            f"cluster.storage: {storage}; with --attach, set it to the folder (e.g. /storage) that every pod of"
            f" {cluster} mounts"
        )
    packed = find_files(job)
    folder = folder_of(storage, name)
    there = {source: f"{folder}/{place}" for source, place in packed.places.items()}
    made = rayjob_on(cluster, name, _command(f"{folder}/job.yaml", name), settings)
    document = make_document(job, there, f"{storage}/runs")
    return _check(Objects(made, None, storage, packed.files, {"job.yaml": document}, packed))


def _check(objects: Objects) -> Objects:
    refuse_written_out(objects.job, "the RayJob, which others of the cluster may read,")
    if wrong := mistakes(objects.job):
        raise JobError([f"KubeRay would reject it: {text}" for text in wrong])
    return objects


def deadline_s(job: Job, predicted_s: float | None) -> int | None:
    """Seconds after which Kubernetes ends the job, at least a week; None where neither plan nor goal says how long."""
    goal_s = 3600 * job.spec.goal.max_hours if job.spec.goal.max_hours else None
    known = [seconds for seconds in (predicted_s, goal_s) if seconds is not None]
    if not known:
        return None
    return int(min(_MOST_DEADLINE_S, max(_LEAST_DEADLINE_S, _DEADLINE * max(known))))


def _settings(job: Job, namespace: str, predicted_s: float | None = None) -> JobSettings:
    refuse_written_out(yaml.safe_load(job.text), "the ConfigMap, which others of the cluster may read,")
    if (names := secret_names(job.spec)) and not job.spec.kubernetes.secret:
        raise JobError(
            f"{', '.join(names)}: on Kubernetes, secrets come from a Secret; name it in kubernetes.secret (kubectl"
            " create secret generic tokens --from-literal=HF_TOKEN=...)"
        )
    asked = {name: getattr(job.spec.kubernetes, name) for name in type(job.spec.kubernetes).model_fields}
    storage = job.spec.cluster.storage
    storage = storage if storage.startswith("/") else "/storage"
    return JobSettings(namespace=namespace, storage=storage, deadline_s=deadline_s(job, predicted_s), **asked)


def _texts(packed: Packed) -> dict[str, str] | None:
    """Files as texts of a ConfigMap, which has no folders; None when they are too large or not text."""
    if any("/" in place for place in packed.files) or packed.num_bytes > MOST_CONFIG_BYTES:
        return None
    try:
        return {place: file.read_text(encoding="utf-8") for place, file in packed.files.items()}
    except UnicodeDecodeError:
        return None


def _modules(packed: Packed) -> dict[str, str]:
    """Modules of the job's own metrics, which lie beside the job file wherever its data are.  Raises JobError."""
    if any("/" in place for place in packed.modules):
        raise JobError(
            "eval.metrics: a ConfigMap has no folders, so of a package's functions none would be found. Put them into"
            " one module beside the job file"
        )
    return {place: file.read_text(encoding="utf-8") for place, file in packed.modules.items()}


def _command(file: str, run_id: str) -> str:
    return shlex.join(["python", "-m", "orchestrator", "submit", file, "--run-id", run_id, "--supervised"])


def make_groups(plan: Plan, capability: ClusterCapability) -> list[PodGroup]:
    """One group per class of machine in the plan: CPUs, and GPUs by their nominal memory."""
    found: dict[str, PodGroup] = {}
    for part in plan.nodes:
        vram = _nominal_memory(part, capability)
        name = "cpu" if vram is None else f"gpu-{round(vram / GIB)}g"
        needs = _pod_bytes(part)
        old = found.get(name)
        count, cores = (old.count + 1, max(old.cores, part.threads)) if old else (1, part.threads)
        found[name] = PodGroup(name, count, cores, max(needs, old.memory_bytes if old else 0.0), vram)
    return list(found.values())


def _nominal_memory(part: NodePlan, capability: ClusterCapability) -> float | None:
    if part.torch_device == "cpu":
        return None
    for node in capability.nodes:
        for device in node.gpus:
            if node.name == part.node and device.name == part.device:
                return float(device.memory_total_bytes or device.memory_bytes or 0)
    return part.memory_usable_bytes


def _pod_bytes(part: NodePlan) -> float:
    """Host memory of a pod: the plan's upper bound on a CPU; offloaded and loading weights on a GPU."""
    memory = part.memory
    if part.torch_device == "cpu":
        return max(_LEAST_POD_BYTES, memory.high_bytes + _BESIDE_BYTES)
    return max(_LEAST_POD_BYTES, memory.host_bytes + 1.2 * memory.weights_bytes + _BESIDE_BYTES)


def object_name(name: str) -> str:
    """A job's name as Kubernetes accepts it: lowercase letters, digits, hyphens, a letter first, at most 47 characters.

    Names that differ in other letters alone (日本, 中国) stay different: a digest of them is a part of it.
    """
    known = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    plain = re.sub(r"[^a-z0-9]+", "-", known.lower()).strip("-")
    if not name.isascii():
        plain = f"{plain[:36].rstrip('-')}-{hashlib.sha256(name.encode()).hexdigest()[:8]}".strip("-")
    return (plain if plain[:1].isalpha() else f"job-{plain}")[:47].rstrip("-")


def _ray_version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("ray")
    except PackageNotFoundError:
        return "2.60.0"


def check_name(name: str) -> None:
    """Raises JobError for what cannot be the name of a RayJob."""
    if wrong := mistakes({"kind": "RayJob", "metadata": {"name": name}, "spec": {"clusterSelector": {"a": "b"}}}):
        raise JobError([f"--run-id: {text.removeprefix('metadata.name: ')}" for text in wrong])


def write(objects: Objects, file: Path, say: Callable[[str], None]) -> None:
    """Write one YAML file to apply.  Raises JobError."""
    if objects.texts:
        raise JobError(
            "--render does not work with --attach: the job file must lie on the volume, where `submit` puts it"
        )
    if objects.uploads:
        size = format_bytes(sum(map(size_of, objects.uploads.values())))
        raise JobError(
            f"data: {size} do not fit into a ConfigMap (900 KiB of text). Put them on the volume and name their"
            " folder in cluster.shared_paths; or submit without --render, which sends them"
        )
    made = [part for part in (objects.config, objects.job) if part]
    for line in objects.sent.lines():
        say(line)
    say(objects.ends)
    try:
        file.write_text(f"# {objects.ends}\n{to_yaml(*made)}", encoding="utf-8")
    except OSError as error:
        raise JobError(f"--render {file}: cannot be written: {error.strerror}") from None
    namespace = objects.job["metadata"]["namespace"]
    say(f"wrote {file}. Next: kubectl apply -f {file} && kubectl get rayjob -n {namespace} {objects.name} --watch")


def to_yaml(*objects: dict[str, Any]) -> str:
    return yaml.safe_dump_all(objects, sort_keys=False, allow_unicode=True)


def read(file: Path) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The RayJob and the ConfigMap of a `kube.yaml`.  Raises JobError."""
    try:
        objects = [load_yaml(part, str(file)) for part in read_text(file).split("\n---\n")]
    except BadInput as error:
        raise JobError(f"{error}. Submit the job again with another --run-id") from None
    kinds = [one.get("kind") if isinstance(one, dict) else None for one in objects]
    if kinds not in (["RayJob"], ["RayJob", "ConfigMap"]):
        raise JobError(f"{file}: holds no RayJob with its ConfigMap. Submit the job again with another --run-id")
    return objects[0], objects[1] if len(objects) > 1 else None
