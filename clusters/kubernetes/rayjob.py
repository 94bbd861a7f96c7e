"""A job as KubeRay's RayJob: plain objects, and the operator's own rules checked before anything is sent.

The API server checks the schema only; what the operator refuses (KubeRay 1.7: ray-operator/controllers/ray/utils/
validation.go) shows minutes later as an event of an object that never starts.  `mistakes` says it at once.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from clusters.safe.reading import first_line
from clusters.units import GIB

GROUP = "ray.io/v1"
HEAD, SUBMITTER = "ray-head", "ray-job-submitter"  # names of containers
CLUSTER, POOL = "ray.io/cluster", "orchestrator/pool"  # labels
_JOB_FOLDER = "/etc/orchestrator"
_MODES = ("K8sJobMode", "HTTPMode", "SidecarMode", "InteractiveMode")
_NAME = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")  # DNS-1035
_LONGEST = {"RayJob": 47, "RayCluster": 53}
_HEAD_CPU, _HEAD_BYTES = 2, 8 * GIB
_SHARED_MEMORY_BYTES = 2 * GIB
_USER = 1000
_LEAST_RAY_WITH_TOKENS = (2, 52)
MOST_CONFIG_BYTES = 900 * 1024  # of a ConfigMap's 1 MiB
_HELPER_S = 3600
_IDLE_S = 300  # after which the autoscaler takes a worker away


@dataclass(frozen=True)
class PodGroup:
    """Workers of one kind: one pod for each device that trains."""

    name: str
    count: int
    cores: int
    memory_bytes: float
    gpu_memory_bytes: float | None = None  # of its one GPU; None = the CPU trains

    @property
    def pool(self) -> str:
        return "gpu" if self.gpu_memory_bytes is not None else "cpu"


@dataclass(frozen=True)
class JobSettings:
    """The settings of a RayJob that are not part of a plan."""

    namespace: str = "default"
    image: str = "orchestrator:cpu"
    gpu_image: str = "orchestrator:cuda"
    claim: str = "runs"  # a ReadWriteMany volume claim that holds runs, models and data
    storage: str = "/storage"  # where it is mounted
    queue: str | None = None  # of Kueue
    secret: str | None = None  # whose keys become the workers' environment
    pull_secret: str | None = None  # a registry's login
    node_selector: Mapping[str, str] = field(default_factory=dict)
    tolerations: Sequence[Mapping[str, Any]] = ()
    runtime_class: str | None = None  # of pods with a GPU
    autoscale: bool = False  # workers come when the job asks for them and go when it is done
    retries: int = 1  # with a new cluster, where the driver or the head was lost
    keep_s: int = 600  # the finished job's cluster
    keep_failed_s: int | None = None  # a failed job's, where it should stay longer than another
    deadline_s: int | None = 7 * 86400  # after which the operator ends a job that hangs; None = never
    start_deadline_s: int = 1800  # for "no GPU ever came"


def rayjob(
    name: str, command: str, ray_version: str, groups: Sequence[PodGroup], settings: JobSettings
) -> dict[str, Any]:
    """The RayJob that runs `command` on pods of the groups.  The head trains nothing."""
    spec: dict[str, Any] = {
        **_common(command, settings),
        # A retry is a whole new cluster, on which the same command continues the run.
        "backoffLimit": settings.retries,
        **_deletion(settings),
        "rayClusterSpec": _cluster(name, ray_version, groups, settings),
    }
    return _job(name, spec, settings)


def rayjob_on(cluster: str, name: str, command: str, settings: JobSettings) -> dict[str, Any]:
    """The RayJob that runs `command` on a RayCluster that exists and stays."""
    spec = {**_common(command, settings), "shutdownAfterJobFinishes": False, "clusterSelector": {CLUSTER: cluster}}
    return _job(name, spec, settings)


def _common(command: str, settings: JobSettings) -> dict[str, Any]:
    pod = {**_pod(settings), "restartPolicy": "Never", "containers": [_submitter(settings)]}
    return {
        "entrypoint": command,
        "submissionMode": "K8sJobMode",
        **({"activeDeadlineSeconds": settings.deadline_s} if settings.deadline_s is not None else {}),
        "preRunningDeadlineSeconds": settings.start_deadline_s,
        "backoffLimit": 0,
        "submitterPodTemplate": {"spec": pod},
    }


def _job(name: str, spec: Mapping[str, Any], settings: JobSettings) -> dict[str, Any]:
    labels = {"app.kubernetes.io/managed-by": "orchestrator", "orchestrator/run": name}
    if settings.queue:
        labels["kueue.x-k8s.io/queue-name"] = settings.queue
    metadata = {"name": name, "namespace": settings.namespace, "labels": labels}
    return {"apiVersion": GROUP, "kind": "RayJob", "metadata": metadata, "spec": dict(spec)}


def _deletion(settings: JobSettings) -> dict[str, Any]:
    """When the cluster of an ended job goes: after one time, or by how the job ended."""
    if settings.keep_failed_s is None:
        return {"shutdownAfterJobFinishes": True, "ttlSecondsAfterFinished": settings.keep_s}
    times = {"SUCCEEDED": settings.keep_s, "FAILED": settings.keep_failed_s}
    rules = [
        {"policy": "DeleteCluster", "condition": {"jobStatus": status, "ttlSeconds": seconds}}
        for status, seconds in times.items()
    ]
    return {"deletionStrategy": {"deletionRules": rules}}


def helper_pod(job: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A pod that sees the volume of a RayJob and waits for commands; it ends by itself."""
    head = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    (container,) = head["containers"]
    keep = ("image", "securityContext", "envFrom")
    amounts = {"cpu": "100m", "memory": _quantity(GIB)}
    helper = {
        **{key: container[key] for key in keep if key in container},
        "name": "helper",
        "command": ["sleep", str(_HELPER_S)],
        "resources": {"requests": amounts, "limits": {"memory": amounts["memory"]}},
        "volumeMounts": [mount for mount in container["volumeMounts"] if mount["name"] == "storage"],
    }
    spec = {key: value for key, value in head.items() if key != "containers"}
    spec |= {
        "volumes": [volume for volume in head["volumes"] if volume["name"] == "storage"],
        "containers": [helper],
        "restartPolicy": "Never",
        "activeDeadlineSeconds": _HELPER_S,
    }
    labels = {"app.kubernetes.io/managed-by": "orchestrator", "orchestrator/helper": "true"}
    metadata = {"name": f"{name}-helper", "namespace": job["metadata"]["namespace"], "labels": labels}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}


def config_map(name: str, namespace: str, files: Mapping[str, str]) -> dict[str, Any]:
    """The job's small files, mounted where the command runs.  Raises ValueError past what a ConfigMap holds."""
    size = sum(len(text.encode()) for text in files.values())
    if size > MOST_CONFIG_BYTES:
        raise ValueError(f"the job and its data have {size / 1024:.0f} KiB, a ConfigMap holds 1 MiB")
    metadata = {"name": name, "namespace": namespace, "labels": {"app.kubernetes.io/managed-by": "orchestrator"}}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": dict(files)}


_AUTOSCALER = {
    "enableInTreeAutoscaling": True,
    "autoscalerOptions": {
        "version": "v2",
        "upscalingMode": "Default",
        "idleTimeoutSeconds": _IDLE_S,
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
        "resources": {
            "requests": {"cpu": "500m", "memory": "1Gi"},
            "limits": {"cpu": "500m", "memory": "1Gi"},
        },
    },
}


def _cluster(name: str, ray_version: str, groups: Sequence[PodGroup], settings: JobSettings) -> dict[str, Any]:
    return {
        "rayVersion": ray_version,
        "authOptions": {"mode": "token"},
        **(_AUTOSCALER if settings.autoscale else {}),
        "headGroupSpec": {
            "rayStartParams": {"dashboard-host": "0.0.0.0"},
            "resources": {"CPU": "0"},
            "labels": {POOL: "head"},
            "template": {"spec": {**_pod(settings), **_volumes(name, settings), "containers": [_head(settings)]}},
        },
        "workerGroupSpecs": [_workers(name, group, settings) for group in groups],
    }


_GPU_TAINT = {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}


def _workers(name: str, group: PodGroup, settings: JobSettings) -> dict[str, Any]:
    pod: dict[str, Any] = {**_pod(settings), **_volumes(name, settings), "containers": [_worker(group, settings)]}
    labels = {POOL: group.pool}
    if settings.autoscale:
        pod["restartPolicy"] = "Never"  # what the autoscaler v2 takes
    if group.gpu_memory_bytes is not None:
        gib = round(group.gpu_memory_bytes / GIB)
        labels["orchestrator/vram-gb"] = str(gib)
        pod["tolerations"] = [*pod.get("tolerations", []), _GPU_TAINT]
        if settings.runtime_class:
            pod["runtimeClassName"] = settings.runtime_class
        # The label of NVIDIA's feature discovery, in MiB: this class of card and not a larger one that others need.
        low, high = int(gib * 1024 * 0.9), int(gib * 1024 * 1.15)
        key = "nvidia.com/gpu.memory"
        expressions = [
            {"key": key, "operator": "Gt", "values": [str(low)]},
            {"key": key, "operator": "Lt", "values": [str(high)]},
        ]
        terms = {"nodeSelectorTerms": [{"matchExpressions": expressions}]}
        pod["affinity"] = {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": terms}}
    return {
        "groupName": group.name,
        "replicas": 0 if settings.autoscale else group.count,
        # A plan is for these machines: fewer would be another plan, unless they are still to come.
        "minReplicas": 0 if settings.autoscale else group.count,
        "maxReplicas": group.count,
        "rayStartParams": {},
        "resources": {"CPU": str(group.cores), "GPU": "0", "train_slot": "1"},  # the plan says who gets which device
        "labels": labels,
        "template": {"spec": pod},
    }


def _pod(settings: JobSettings) -> dict[str, Any]:
    asked: dict[str, Any] = {}
    if settings.node_selector:
        asked["nodeSelector"] = dict(settings.node_selector)
    if settings.tolerations:
        asked["tolerations"] = [dict(one) for one in settings.tolerations]
    if settings.pull_secret:
        asked["imagePullSecrets"] = [{"name": settings.pull_secret}]
    return {
        **asked,
        "automountServiceAccountToken": False,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": _USER,
            "fsGroup": _USER,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
    }


def _volumes(name: str, settings: JobSettings) -> dict[str, Any]:
    volumes: list[dict[str, Any]] = [
        {"name": "job", "configMap": {"name": name}},
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": _quantity(_SHARED_MEMORY_BYTES)}},
    ]
    claim = {"persistentVolumeClaim": {"claimName": settings.claim}}
    return {"volumes": [*volumes, {"name": "storage", **claim}]}


def _container(name: str, image: str, cores: float, memory_bytes: float, settings: JobSettings) -> dict[str, Any]:
    amounts = {"cpu": str(cores), "memory": _quantity(memory_bytes)}
    container: dict[str, Any] = {
        "name": name,
        "image": image,
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
        "resources": {"requests": dict(amounts), "limits": dict(amounts)},
        "volumeMounts": [
            {"name": "job", "mountPath": _JOB_FOLDER, "readOnly": True},
            {"name": "shm", "mountPath": "/dev/shm"},
            {"name": "storage", "mountPath": settings.storage},
        ],
    }
    if settings.secret:
        container["envFrom"] = [{"secretRef": {"name": settings.secret}}]
    return container


def _head(settings: JobSettings) -> dict[str, Any]:
    head = _container(HEAD, settings.image, _HEAD_CPU, _HEAD_BYTES, settings)
    head["ports"] = [
        {"containerPort": 6379, "name": "gcs-server"},
        {"containerPort": 8265, "name": "dashboard"},
        {"containerPort": 10001, "name": "client"},
    ]
    return head


def _worker(group: PodGroup, settings: JobSettings) -> dict[str, Any]:
    on_gpu = group.gpu_memory_bytes is not None
    image = settings.gpu_image if on_gpu else settings.image
    worker = _container("ray-worker", image, group.cores, group.memory_bytes, settings)
    if on_gpu:
        for amounts in worker["resources"].values():
            amounts["nvidia.com/gpu"] = "1"
    return worker


def _submitter(settings: JobSettings) -> dict[str, Any]:
    submitter = _container(SUBMITTER, settings.image, 0.5, GIB, settings)
    del submitter["volumeMounts"]
    return submitter


def _quantity(size_bytes: float) -> str:
    return f"{max(1, math.ceil(size_bytes / 2**20))}Mi"


def mistakes(thing: Mapping[str, Any]) -> list[str]:
    """What KubeRay's operator would refuse, each with its place; empty for what it takes."""
    kind, spec = thing.get("kind"), thing.get("spec") or {}
    found = list(_name_mistakes(str(kind), thing.get("metadata") or {}))
    if kind == "RayJob":
        found += _job_mistakes(spec)
        if "rayClusterSpec" in spec:
            found += [f"spec.rayClusterSpec.{text}" for text in _cluster_mistakes(spec["rayClusterSpec"])]
            if "upgradeStrategy" in spec["rayClusterSpec"]:
                found.append("spec.rayClusterSpec.upgradeStrategy: only a RayCluster of its own may have one")
    elif kind == "RayCluster":
        found += [f"spec.{text}" for text in _cluster_mistakes(spec)]
    return found


def _name_mistakes(kind: str, metadata: Mapping[str, Any]) -> list[str]:
    name, longest = str(metadata.get("name") or ""), _LONGEST.get(kind)
    if longest is None or not name:
        return []
    found = []
    if len(name) > longest:
        found.append(f"metadata.name: {name} has {len(name)} characters, a {kind} may have {longest}")
    if not _NAME.fullmatch(name):
        found.append(f"metadata.name: {name} must be lowercase letters, digits and hyphens, and begin with a letter")
    return found


def _job_mistakes(spec: Mapping[str, Any]) -> list[str]:
    found = []
    mode = spec.get("submissionMode", "K8sJobMode")
    shuts_down = spec.get("shutdownAfterJobFinishes", False)
    rules = (spec.get("deletionStrategy") or {}).get("deletionRules")
    if mode not in _MODES:
        found.append(f"spec.submissionMode: {mode} is none of {', '.join(_MODES)}")
    if not spec.get("rayClusterSpec") and not spec.get("clusterSelector"):
        found.append("spec: it needs rayClusterSpec or clusterSelector")
    if spec.get("ttlSecondsAfterFinished", 0) > 0 and not shuts_down:
        found.append("spec.ttlSecondsAfterFinished: needs shutdownAfterJobFinishes: true")
    if spec.get("suspend") and not shuts_down:
        found.append("spec.suspend: needs shutdownAfterJobFinishes: true")
    if rules and (shuts_down or spec.get("ttlSecondsAfterFinished")):
        found.append("spec.deletionStrategy.deletionRules: not beside shutdownAfterJobFinishes or a TTL")
    if mode == "SidecarMode" and (spec.get("submitterPodTemplate") or spec.get("submitterConfig")):
        found.append("spec.submissionMode: SidecarMode takes neither submitterPodTemplate nor submitterConfig")
    environment = spec.get("runtimeEnvYAML")
    if isinstance(environment, str) and environment:
        try:
            parsed = yaml.safe_load(environment)
        except yaml.YAMLError as error:
            found.append(f"spec.runtimeEnvYAML: is not YAML: {first_line(error)}")
        else:
            if not isinstance(parsed, dict):
                found.append("spec.runtimeEnvYAML: must be a mapping")
    return found


def _cluster_mistakes(spec: Mapping[str, Any]) -> list[str]:
    found = []
    version = _version(spec.get("rayVersion"))
    if (spec.get("authOptions") or {}).get("mode") == "token":
        if version is None:
            found.append("rayVersion: must be stated where authOptions.mode is token")
        elif version < _LEAST_RAY_WITH_TOKENS:
            found.append(f"authOptions.mode: token needs Ray 2.52, here is {spec['rayVersion']}")
    if "networkPolicy" in spec:
        found.append("networkPolicy: behind a feature gate that is off; ship a NetworkPolicy of your own")
    by_v2 = spec.get("enableInTreeAutoscaling") and (spec.get("autoscalerOptions") or {}).get("version", "v2") == "v2"
    groups = [("headGroupSpec", spec.get("headGroupSpec") or {})]
    groups += [(f"workerGroupSpecs[{place}]", group) for place, group in enumerate(spec.get("workerGroupSpecs") or [])]
    for where, group in groups:
        found += [f"{where}.{text}" for text in _group_mistakes(group, bool(by_v2))]
    return found


def _group_mistakes(group: Mapping[str, Any], by_v2: bool) -> list[str]:
    found, start = [], group.get("rayStartParams") or {}
    if "labels" in start:
        found.append("rayStartParams.labels: write them under the group's labels")
    twice = sorted({"num-cpus", "num-gpus", "memory", "resources"} & set(start)) if group.get("resources") else []
    if twice:
        found.append(f"rayStartParams: {', '.join(twice)} and the group's resources say the same; keep one")
    low, high = group.get("minReplicas"), group.get("maxReplicas")
    if isinstance(low, int) and isinstance(high, int) and low > high:
        found.append(f"minReplicas: {low} is more than maxReplicas, {high}")
    restart = ((group.get("template") or {}).get("spec") or {}).get("restartPolicy")
    if by_v2 and restart not in (None, "", "Never"):
        found.append(f"template.spec.restartPolicy: {restart}; the autoscaler v2 needs Never")
    return found


def _version(text: Any) -> tuple[int, int] | None:
    match = re.match(r"(\d+)\.(\d+)", str(text or ""))
    return (int(match[1]), int(match[2])) if match else None
