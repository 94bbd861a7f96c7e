"""What an API server, the operator and pods say, as what to do about it.  No client is needed to read them.

Nothing of an answer is taken to be of its type: what is missing or of another one is empty.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from clusters.job_backend import RemoteJob
from clusters.safe.reading import BadInput, load_json

_IMAGE = ("ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull")


@dataclass(frozen=True)
class Trouble:
    """Why a job waits; `hopeless`: no waiting mends it."""

    text: str
    hopeless: bool = False


def object_of(value: Any, label: str) -> dict[str, Any]:
    """An object of the server with a name.  Raises BadInput for what is none."""
    if not mapping(value, "metadata").get("name"):
        raise BadInput(f"{label}: the answer is not an object with a name")
    metadata = mapping(value, "metadata")
    texts = {key: str(metadata.get(key) or "") for key in ("name", "uid", "resourceVersion", "creationTimestamp")}
    parts = {key: mapping(value, key) for key in ("status", "spec")}
    maps = {key: mapping(metadata, key) for key in ("labels", "annotations")}
    return {**value, **parts, "metadata": {**metadata, **texts, **maps}}


def objects_of(body: bytes | str, label: str) -> list[dict[str, Any]]:
    """The objects of a list that the server answered with.  Raises BadInput."""
    listed = load_json(body, label)
    if not isinstance(listed, dict) or not isinstance(listed.get("items"), list):
        raise BadInput(f"{label}: the answer is not a list")
    return [object_of(one, label) for one in listed["items"]]


def mapping(value: Any, key: str) -> dict[str, Any]:
    """A part of an answer that should be an object."""
    inner = value.get(key) if isinstance(value, Mapping) else None
    return inner if isinstance(inner, dict) else {}


def _mappings(value: Any, key: str) -> list[dict[str, Any]]:
    inner = value.get(key) if isinstance(value, Mapping) else None
    return [one for one in inner if isinstance(one, dict)] if isinstance(inner, list) else []


def _text(value: Mapping[str, Any], key: str) -> str:
    inner = value.get(key)
    return inner if isinstance(inner, str) else ""


def job_seen(job: Mapping[str, Any]) -> RemoteJob:
    """A RayJob's status.  Only jobDeploymentStatus decides: jobStatus may hold words of other objects at first."""
    status = mapping(job, "status")
    deployed, message, reason = (_text(status, key) for key in ("jobDeploymentStatus", "message", "reason"))
    if deployed == "Complete":
        ended = status.get("jobStatus")
        return RemoteJob(ended if ended in ("FAILED", "STOPPED") else "SUCCEEDED", message)
    if deployed in ("Failed", "ValidationFailed"):
        return RemoteJob("FAILED", _failure(deployed, reason, message))
    if deployed == "Running":
        return RemoteJob("RUNNING", "")
    if deployed == "Suspended":
        return RemoteJob("PENDING", "suspended: a queue (Kueue) holds it until there is room")
    return RemoteJob("PENDING", message or f"the operator reports {deployed or 'nothing yet'}")


def _failure(deployed: str, reason: str, message: str) -> str:
    if deployed == "ValidationFailed":
        return f"KubeRay's operator refuses the RayJob: {message}"
    known = {
        "DeadlineExceeded": "it ran past its deadline",
        "PreRunningDeadlineExceeded": "its pods did not start in time: kubectl get pods, kubectl describe pod",
        "SubmissionFailed": "it could not be submitted to its cluster",
        "AppFailed": "",
    }.get(reason, reason)
    return ": ".join(part for part in (known, message) if part)


def is_ended(pod: Mapping[str, Any]) -> bool:
    return mapping(pod, "status").get("phase") in ("Succeeded", "Failed")


def pod_troubles(pod: Mapping[str, Any]) -> Iterator[Trouble]:
    """Why a pod does not run."""
    name, status = _text(mapping(pod, "metadata"), "name"), mapping(pod, "status")
    for condition in _mappings(status, "conditions"):
        if condition.get("type") == "PodScheduled" and condition.get("status") == "False":
            yield Trouble(f"{name} cannot be scheduled: {_text(condition, 'message')}")
    for container in [*_mappings(status, "initContainerStatuses"), *_mappings(status, "containerStatuses")]:
        state = mapping(container, "state")
        waiting = mapping(state, "waiting")
        ended = mapping(state, "terminated") or mapping(mapping(container, "lastState"), "terminated")
        why, message = _text(waiting, "reason"), _text(waiting, "message")
        if why in _IMAGE:
            yield Trouble(
                f"{name} cannot pull the image {container.get('image')!r}: {message or why}. kubernetes.image and"
                " kubernetes.gpu_image name images that the nodes can pull, kubernetes.pull_secret a registry's login",
                hopeless=True,
            )
        elif why == "CreateContainerConfigError":
            yield Trouble(f"{name} cannot start: {message}. Create it, or change kubernetes.secret", hopeless=True)
        elif why == "CrashLoopBackOff":
            yield Trouble(f"{name} keeps crashing: kubectl logs --previous {name}")
        if ended.get("reason") == "OOMKilled":
            yield Trouble(
                f"{name} ran out of its memory limit: lower train.per_device_train_batch_size or data.max_length"
            )


def event_trouble(event: Mapping[str, Any]) -> Trouble:
    """A warning that the operator or the scheduler wrote."""
    message, reason = _text(event, "message"), _text(event, "reason")
    if "exceeded quota" in message:
        return Trouble(_quota(message))
    if "violates PodSecurity" in message:
        return Trouble(f"the namespace's PodSecurity refuses the pods: {message}", hopeless=True)
    if reason.startswith("Invalid"):
        return Trouble(f"KubeRay's operator refuses it: {message}", hopeless=True)
    about = mapping(event, "involvedObject")
    return Trouble(f"{_text(about, 'kind')} {_text(about, 'name')}: {reason}: {message}")


def explain_answer(status: int, body: str, doing: str, namespace: str, context: str) -> str:
    """An HTTP answer of the API server -> what is wrong and what to do."""
    try:
        message = str(load_json(body).get("message", body))
    except (BadInput, AttributeError):
        message = body
    message = " ".join(message.split())[:600]
    if status == 401:
        return f"the API server rejects your credentials: those of the context {context!r} are wrong or have expired"
    if status == 403 and "exceeded quota" in message:
        return _quota(message)
    if "admission webhook" in message or "ValidatingAdmissionPolicy" in message:
        return f"a policy of the cluster refuses it: {message}. Change the job accordingly, or ask an administrator"
    if status == 403:
        return f"you may not {doing} in {namespace}: {message}. k8s/base/rbac.yaml lists the rights that are needed"
    if status == 404 and "namespaces" in message:
        return f"there is no namespace {namespace}: kubectl create namespace {namespace}"
    if status == 409:
        return f"cannot {doing}: it exists already; choose another --run-id, or `orchestrator stop` it"
    if status == 400 and "unknown field" in message:
        return f"the cluster's KubeRay is not version 1.7: {message}"
    return f"cannot {doing}: the API server says {status}: {message}"


def _quota(message: str) -> str:
    return f"the namespace's quota does not allow it: {message}. Ask for a larger one, or use fewer or smaller machines"
