"""A Kubernetes cluster with KubeRay, through its API server alone: create, watch, read logs, run verbs, delete.

What the server or the operator refuses becomes an error that says what to do about it.
"""

from __future__ import annotations

import contextlib
import copy
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from clusters.job_backend import ENDED, JobGone, JobLost, RemoteJob
from clusters.kubernetes.connect import load_kubernetes, open_client, talk
from clusters.kubernetes.messages import (
    Trouble,
    event_trouble,
    explain_answer,
    is_ended,
    job_seen,
    mapping,
    object_of,
    objects_of,
    pod_troubles,
)
from clusters.kubernetes.rayjob import HEAD, SUBMITTER, helper_pod
from clusters.ray.connect import CannotConnect
from clusters.safe.reading import first_line

_RAYJOBS = ("ray.io", "v1")
_TIMEOUT_S = (5.0, 30.0)  # to connect, between two bytes
_SILENT_S = (5.0, 300.0)  # a job that prints nothing for so long is asked for its log again
_WINDOW_S = 10  # of one watch; between two of them the pods are looked at
_PATIENCE_S = 60.0  # with what cannot mend itself: an image that is not there
_HELPER_S = 300.0  # that a helper pod may take to start
_SUBMISSION = "orchestrator/submission"


class KubeClient:
    """One namespace of one cluster."""

    def __init__(self, context: str | None, namespace: str | None, patience_s: float = _PATIENCE_S) -> None:
        """The current context and its namespace where none is named.  Raises CannotConnect."""
        self._kube = load_kubernetes()
        api, self.namespace, self._context = open_client(self._kube, context, namespace)
        client = self._kube.client
        self.address = str(api.configuration.host)
        self._custom, self._core = client.CustomObjectsApi(api), client.CoreV1Api(api)
        self._apis, self._patience_s = client.ApisApi(api), patience_s
        self._printed: dict[str, int] = {}  # lines by pod
        self._api = api
        try:
            self._check_kuberay()
        except (CannotConnect, JobLost) as error:
            self.close()
            if isinstance(error, CannotConnect):
                raise
            raise CannotConnect(f"no Kubernetes API server at {self.address}: {error}") from error

    def close(self) -> None:
        """Let go of its connections."""
        self._api.rest_client.pool_manager.clear()

    def nodes(self) -> list[dict[str, Any]]:
        """Every node as the server describes it.  Raises CannotConnect where it may not be asked."""
        with self._line("list nodes"):
            listed = self._core.list_node(_request_timeout=_TIMEOUT_S, _preload_content=False)
            return objects_of(listed.data, "the list of nodes")

    def rehearse(self, job: Mapping[str, Any], config: Mapping[str, Any] | None) -> None:
        """Let the server judge what is to be created, and create nothing.  Raises CannotConnect."""
        with self._line(f"create the RayJob {job['metadata']['name']}"):
            self._create_job(job, dry_run="All")
            if config:
                self._create_config(config, dry_run="All")

    def start(self, name: str, job: Mapping[str, Any], config: Mapping[str, Any] | None) -> None:
        """Create a RayJob and the ConfigMap that it owns: both or nothing.  Raises CannotConnect."""
        mark = uuid.uuid4().hex
        job = copy.deepcopy(dict(job))
        job["metadata"].setdefault("annotations", {})[_SUBMISSION] = mark
        try:
            with self._line(f"create the RayJob {name}"):
                made = self._create_job(job)
        except JobLost:  # whether it arrived is not known: the mark tells
            made = self._get(name)
            if made["metadata"]["annotations"].get(_SUBMISSION) != mark:
                raise
        if config is None:
            return
        owner = {"apiVersion": job["apiVersion"], "kind": "RayJob", "name": name, "uid": made["metadata"]["uid"]}
        owned = {**config, "metadata": {**config["metadata"], "ownerReferences": [owner]}}
        try:
            with self._line(f"create the ConfigMap {name}"):
                self._create_config(owned)
        except BaseException:
            self.tidy(name)  # its pods would wait for the files for ever
            raise

    def look(self, name: str) -> RemoteJob:
        return job_seen(self._get(name))

    def logs(self, name: str) -> str:
        return "".join(f"{line}\n" for pod in self._submitters(name) for line in self._lines(pod, follow=False))

    def follow(self, name: str, notice: Callable[[str], None]) -> Iterator[str]:
        """Raises CannotConnect, after deleting it, for a job whose pods cannot start however long one waits."""
        reported: set[str] = set()
        hopeless_since: float | None = None

        def tell(text: str) -> None:
            if text and text not in reported:
                reported.add(text)
                notice(text)

        while True:
            for job in self._changes(name, _WINDOW_S):
                seen = job_seen(job)
                if seen.state in ENDED:
                    yield from self._new_lines(name, follow=False)
                    return
                if seen.state == "RUNNING":
                    tell("the cluster is ready; the job runs")
                    yield from self._new_lines(name, follow=True)
                    time.sleep(0.5)  # the submitter has ended; the operator says so a moment later
                    break
                tell(f"waiting: {seen.message}")
            else:
                troubles = self._troubles(name)
                for trouble in troubles:
                    tell(trouble.text)
                hopeless = [trouble.text for trouble in troubles if trouble.hopeless]
                hopeless_since = (hopeless_since or time.monotonic()) if hopeless else None
                if hopeless_since and time.monotonic() - hopeless_since >= self._patience_s:
                    self.tidy(name)
                    raise CannotConnect(f"{hopeless[0]}. The job was cancelled")

    def ask(self, name: str, arguments: list[str]) -> str:
        """Runs in the head's pod; where the cluster is gone, in a helper pod that sees the same volume."""
        command = ["python", "-m", "orchestrator", *arguments]
        with self._beside(name) as (pod, container):
            return self._run(pod, container, command).decode("utf-8", "replace")

    def put(self, name: str, job: Mapping[str, Any], folder: str, archive: bytes) -> None:
        """Unpack a .tar.gz into a folder of the volume that the job will see."""
        command = ["sh", "-c", f'mkdir -p "$0" && head -c {len(archive)} | tar xz -C "$0"', folder]
        with self._beside(name, job) as (pod, container):
            self._run(pod, container, command, archive)

    def remove(self, name: str, folder: str) -> None:
        with self._beside(name) as (pod, container):
            self._run(pod, container, ["rm", "-rf", folder])

    def tidy(self, name: str) -> bool:
        with self._line(f"delete the RayJob {name}"):
            try:
                self._custom.delete_namespaced_custom_object(
                    *_RAYJOBS, self.namespace, "rayjobs", name, propagation_policy="Background"
                )
            except self._kube.client.ApiException as error:
                if error.status != 404:
                    raise
        return True

    def wait_gone(self, name: str, timeout_s: float = 120.0) -> None:
        """Until a deleted job's name is free again.  Raises JobLost after the time."""
        until = time.monotonic() + timeout_s
        while time.monotonic() < until:
            try:
                self._get(name)
            except JobGone:
                return
            time.sleep(0.5)
        raise JobLost(f"{name} is still being deleted after {timeout_s:.0f} s")

    def _check_kuberay(self) -> None:

        with self._line("look for KubeRay"):
            try:
                served = self._custom.get_api_resources(*_RAYJOBS, _request_timeout=_TIMEOUT_S)
                if any(one.name == "rayjobs" for one in served.resources):
                    return
            except self._kube.client.ApiException as error:
                if error.status != 404:
                    raise
            groups = self._apis.get_api_versions(_request_timeout=_TIMEOUT_S).groups
        versions = [version.version for group in groups if group.name == "ray.io" for version in group.versions]
        if versions:
            raise CannotConnect(
                f"KubeRay on {self.address} serves ray.io/{', '.join(versions)} and no RayJob of ray.io/v1:"
                " upgrade it to 1.7 (k8s/README.md)"
            )
        raise CannotConnect(
            f"KubeRay is not installed on {self.address}: see k8s/README.md (helm install, version 1.7)"
        )

    def _create_job(self, job: Mapping[str, Any], **options: Any) -> dict[str, Any]:
        made = self._custom.create_namespaced_custom_object(
            *_RAYJOBS, self.namespace, "rayjobs", job, field_validation="Strict", _request_timeout=_TIMEOUT_S, **options
        )
        return object_of(made, "the RayJob")

    def _create_config(self, config: Mapping[str, Any], **options: Any) -> None:
        self._core.create_namespaced_config_map(
            self.namespace, config, field_validation="Strict", _request_timeout=_TIMEOUT_S, **options
        )

    def _get(self, name: str) -> dict[str, Any]:

        with self._line(f"look at the RayJob {name}"):
            try:
                found = self._custom.get_namespaced_custom_object(
                    *_RAYJOBS, self.namespace, "rayjobs", name, _request_timeout=_TIMEOUT_S
                )
                return object_of(found, f"the RayJob {name}")
            except self._kube.client.ApiException as error:
                if error.status == 404:
                    raise JobGone(f"there is no RayJob {name} in {self.namespace}: somebody deleted it") from error
                raise

    def _changes(self, name: str, seconds: int) -> Iterator[dict[str, Any]]:
        """The job now, then at each change for so long; ends early where the server forgot where the watch began."""

        job = self._get(name)
        yield job
        with self._line(f"watch the RayJob {name}"):
            try:
                for event in self._kube.watch.Watch().stream(
                    self._custom.list_namespaced_custom_object,
                    *_RAYJOBS,
                    self.namespace,
                    "rayjobs",
                    field_selector=f"metadata.name={name}",
                    resource_version=job["metadata"]["resourceVersion"],
                    timeout_seconds=seconds,
                    _request_timeout=(_TIMEOUT_S[0], seconds + _TIMEOUT_S[1]),
                ):
                    if event["type"] == "DELETED":
                        raise JobGone(f"the RayJob {name} was deleted")
                    if event["type"] != "BOOKMARK":
                        yield object_of(event["object"], f"the RayJob {name}")
            except self._kube.client.ApiException as error:
                if error.status != 410:
                    raise

    def _pods(self, selector: str) -> list[dict[str, Any]]:
        with self._line("list pods"):
            listed = self._core.list_namespaced_pod(
                self.namespace, label_selector=selector, _request_timeout=_TIMEOUT_S, _preload_content=False
            )
            pods = objects_of(listed.data, "the list of pods")
        return sorted(pods, key=lambda pod: pod["metadata"]["creationTimestamp"])

    def _submitters(self, name: str) -> list[dict[str, Any]]:
        return self._pods(f"job-name={name}")

    def _new_lines(self, name: str, follow: bool) -> Iterator[str]:
        for pod in self._submitters(name):
            yield from self._lines(pod, follow, once=True)

    def _lines(self, pod: Mapping[str, Any], follow: bool, once: bool = False) -> Iterator[str]:
        """What a submitter printed; `once`: only what this client has not yielded yet."""

        name, uid = pod["metadata"]["name"], pod["metadata"]["uid"]
        follow = follow and not is_ended(pod)
        with self._line(f"read the log of {name}"):
            try:
                answer = self._core.read_namespaced_pod_log(
                    name,
                    self.namespace,
                    container=SUBMITTER,
                    follow=follow,
                    _preload_content=False,
                    _request_timeout=_SILENT_S,
                )
                with contextlib.closing(answer):
                    for place, line in enumerate(self._kube.watch.watch.iter_resp_lines(answer)):
                        if once and place < self._printed.get(uid, 0):
                            continue
                        if once:
                            self._printed[uid] = place + 1
                        yield str(line)
            except self._kube.client.ApiException as error:
                if error.status not in (400, 404):  # it has not started yet, or was deleted with its cluster
                    raise

    def _troubles(self, name: str) -> list[Trouble]:
        cluster = self._get(name)["status"].get("rayClusterName")
        pods = [*(self._pods(f"ray.io/cluster={cluster}") if cluster else []), *self._submitters(name)]
        found = [trouble for pod in pods for trouble in pod_troubles(pod)]
        with self._line("list events"):
            listed = self._core.list_namespaced_event(
                self.namespace, field_selector="type=Warning", _request_timeout=_TIMEOUT_S, _preload_content=False
            )
            events = objects_of(listed.data, "the list of events")
        about = {name, cluster, *(pod["metadata"]["name"] for pod in pods)}
        return [*found, *(event_trouble(event) for event in events if event["involvedObject"].get("name") in about)]

    @contextlib.contextmanager
    def _beside(self, name: str, job: Mapping[str, Any] | None = None) -> Iterator[tuple[str, str]]:
        """A running pod that sees the job's volume, and its container: the head's, or a helper for the while."""
        if head := self._head(name, job):
            yield head, HEAD
            return
        with self._line(f"read the RayJob {name}"):
            pod = helper_pod(job or self._get(name), f"{name}-{uuid.uuid4().hex[:5]}")
        helper = pod["metadata"]["name"]
        with self._line(f"create the pod {helper}"):
            self._core.create_namespaced_pod(
                self.namespace, pod, field_validation="Strict", _request_timeout=_TIMEOUT_S
            )
        try:
            self._wait_running(helper)
            yield helper, "helper"
        finally:
            with self._line(f"delete the pod {helper}"):
                self._core.delete_namespaced_pod(helper, self.namespace, _request_timeout=_TIMEOUT_S)

    def _head(self, name: str, job: Mapping[str, Any] | None) -> str | None:
        """The pod of the head that runs now: of the cluster the operator made, or of the one that was there."""
        with contextlib.suppress(JobGone):
            job = self._get(name)
        job = job or {}
        cluster = mapping(job, "status").get("rayClusterName")
        cluster = cluster or mapping(mapping(job, "spec"), "clusterSelector").get("ray.io/cluster")
        heads = self._pods(f"ray.io/cluster={cluster},ray.io/node-type=head") if cluster else []
        running = [pod["metadata"]["name"] for pod in heads if pod["status"].get("phase") == "Running"]
        if not running and "clusterSelector" in mapping(job, "spec"):
            raise CannotConnect(
                f"no head of the RayCluster {cluster} runs in {self.namespace}: kubectl get rayclusters"
            )
        return running[-1] if running else None

    def _wait_running(self, name: str) -> None:
        until = time.monotonic() + _HELPER_S
        while time.monotonic() < until:
            pod = next((one for one in self._pods("orchestrator/helper") if one["metadata"]["name"] == name), None)
            if pod is None:
                raise CannotConnect(f"the pod {name} was deleted before it ran")
            if pod["status"].get("phase") == "Running":
                return
            if hopeless := [trouble.text for trouble in pod_troubles(pod) if trouble.hopeless]:
                raise CannotConnect(hopeless[0])
            time.sleep(0.5)
        raise CannotConnect(f"the pod {name} did not start in {_HELPER_S:.0f} s: kubectl describe pod {name}")

    def _run(self, pod: str, container: str, command: list[str], stdin: bytes | None = None) -> bytes:
        from websocket import WebSocketException

        with self._line(f"run a command in {pod}"):
            try:
                line = self._kube.stream.stream(
                    self._core.connect_get_namespaced_pod_exec,
                    pod,
                    self.namespace,
                    container=container,
                    command=command,
                    stdin=stdin is not None,
                    stdout=True,
                    stderr=True,
                    tty=False,
                    binary=True,
                    _preload_content=False,
                )
                try:
                    return talk(line, pod, command, stdin or b"")
                finally:
                    line.sock.shutdown()  # its own close() leaves the socket open once the server has closed
            except WebSocketException as error:
                raise JobLost(f"the connection to {pod} broke: {error}") from error

    @contextlib.contextmanager
    def _line(self, doing: str) -> Iterator[None]:
        """Errors of the client inside the block in our words."""
        import urllib3

        try:
            yield
        except self._kube.client.ApiException as error:
            text = explain_answer(
                error.status, str(error.body or error.reason or ""), doing, self.namespace, self._context
            )
            if error.status in (0, 429) or error.status >= 500:
                raise JobLost(text) from error
            raise CannotConnect(text) from error
        except (urllib3.exceptions.HTTPError, OSError) as error:
            text = first_line(error, 200)
            raise JobLost(f"the connection to {self.address} broke: {text}") from error
        except (ValueError, TypeError, LookupError, AttributeError) as error:  # what it sent is not what a server sends
            raise JobLost(f"cannot {doing}: {self.address} sent an answer that could not be read ({error})") from error
