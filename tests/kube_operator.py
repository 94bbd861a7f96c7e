"""KubeRay's operator and a kubelet in one, for the double of an API server: pods are Ray processes of this machine.

A pod of a RayCluster is the `ray start` line of its group, run here; a mounted volume claim is a folder at the same
path here; a ConfigMap is a folder whose path replaces the mountPath in commands.  States are written as by KubeRay 1.7.
"""

from __future__ import annotations

import contextlib
import json
import shlex
import subprocess
import threading
import time
import uuid
from pathlib import Path
from typing import Any

import psutil

from tests.kube_api import KubeApi, pod_environment
from tests.processes import PATIENCE_S, free_port, listens, wait_for


class Operator:
    """KubeRay's operator and a kubelet in one: RayJobs become processes, their states are written as KubeRay does."""

    def __init__(self, api: KubeApi, missing_images: tuple[str, ...] = ()) -> None:
        self.api, self.missing_images = api, missing_images
        self._running: dict[str, list[subprocess.Popen[bytes]]] = {}
        self._tokens: dict[str, str] = {}
        self._addresses: dict[str, dict[str, str]] = {}  # environment of whoever speaks to a cluster's dashboard
        self._known: set[str] = set()
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []
        self._loop = threading.Thread(target=self._watch, daemon=True)
        self._loop.start()

    def close(self) -> None:
        self._stop.set()
        self._loop.join(10)
        for name in list(self._running):
            self.kill(name)
        for thread in self._threads:
            thread.join(20)

    def kill(self, cluster: str) -> None:
        """End every process of a cluster, as a node that burns down does; Ray's children have sessions of their own."""
        token = self._tokens.pop(cluster, None)
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if token and process.environ().get("RAY_AUTH_TOKEN") == token:
                    process.kill()
        for process in self._running.pop(cluster, []):
            process.wait(PATIENCE_S)

    def _watch(self) -> None:
        while not self._stop.wait(0.1):
            jobs = {job["metadata"]["uid"]: job for job in self.api.named("rayjobs").values()}
            for uid, job in jobs.items():
                if uid not in self._known:
                    self._known.add(uid)
                    thread = threading.Thread(target=self._job, args=(job,), daemon=True)
                    self._threads.append(thread)
                    thread.start()
            for pod in self.api.named("pods").values():  # helper pods: nobody but the kubelet sees to them
                if (
                    "orchestrator/helper" in (pod["metadata"].get("labels") or {})
                    and pod["status"]["phase"] == "Pending"
                ):
                    self._pod_state(pod, "Running")
            clusters = self.api.named("rayclusters")
            for name, cluster in clusters.items():
                if not cluster["metadata"].get("ownerReferences") and name not in self._known:
                    self._known.add(name)
                    self._bring_up(cluster, lambda: not self._stop.is_set())
            for cluster in [name for name in self._running if name not in clusters]:
                self.kill(cluster)

    def _there(self, job: dict[str, Any]) -> bool:
        found = self.api.named("rayjobs").get(job["metadata"]["name"])
        return not self._stop.is_set() and found is not None and found["metadata"]["uid"] == job["metadata"]["uid"]

    def _say(self, job: dict[str, Any], **fields: Any) -> None:
        if self._there(job):
            self.api.set_status("rayjobs", job["metadata"]["namespace"], job["metadata"]["name"], **fields)

    def _job(self, job: dict[str, Any]) -> None:
        spec = job["spec"]
        for attempt in range(spec.get("backoffLimit", 0) + 1):
            if attempt:
                self._say(job, jobDeploymentStatus="Retrying", jobStatus="")
            cluster = f"{job['metadata']['name']}-{uuid.uuid4().hex[:5]}"
            self._say(job, jobDeploymentStatus="Initializing", rayClusterName=cluster)
            code = self._attempt(job, cluster)
            if code is None:
                return
            if code == 0:
                self._say(
                    job, jobStatus="SUCCEEDED", jobDeploymentStatus="Complete", message="Job finished successfully."
                )
                break
            if attempt < spec.get("backoffLimit", 0):
                self.api.delete("rayclusters", job["metadata"]["namespace"], cluster)
                self.kill(cluster)
        else:
            self._say(
                job,
                jobStatus="FAILED",
                jobDeploymentStatus="Failed",
                reason="AppFailed",
                message=f"Job entrypoint command failed with exit code {code}",
            )
        until = time.monotonic() + spec.get("ttlSecondsAfterFinished", 1e9)
        while self._there(job) and time.monotonic() < until:
            time.sleep(0.1)
        if "rayClusterSpec" in spec:
            self.api.delete("rayclusters", job["metadata"]["namespace"], cluster)

    def _attempt(self, job: dict[str, Any], cluster: str) -> int | None:
        """Make the cluster, run the job; its exit code, None when it was deleted or its pods cannot start."""
        existing = (job["spec"].get("clusterSelector") or {}).get("ray.io/cluster")
        if existing:
            self._say(job, rayClusterName=existing)
            made, cluster = self.api.named("rayclusters")[existing], existing
        else:
            owner = {"kind": "RayJob", "name": job["metadata"]["name"], "uid": job["metadata"]["uid"]}
            metadata = {"name": cluster, "namespace": job["metadata"]["namespace"], "ownerReferences": [owner]}
            made = {"kind": "RayCluster", "metadata": metadata, "spec": job["spec"]["rayClusterSpec"]}
            if not self._bring_up(self.api.store("rayclusters", made), lambda: self._there(job)):
                return None
        self._say(job, jobDeploymentStatus="Running", jobStatus="PENDING")
        return self._submit(job, cluster, made)

    def _bring_up(self, made: dict[str, Any], is_wanted: Any) -> bool:
        """Start the pods of a RayCluster; whether they run."""
        cluster, spec = made["metadata"]["name"], made["spec"]
        pods = [self._pod(made, "head", f"{cluster}-head", spec["headGroupSpec"])]
        for group in spec["workerGroupSpecs"]:
            names = [f"{cluster}-{group['groupName']}-worker-{uuid.uuid4().hex[:5]}" for _ in range(group["replicas"])]
            pods += [self._pod(made, "worker", name, group) for name in names]
        while not all(self._can_start(pod) for pod, _ in pods):
            if not is_wanted():
                return False
            time.sleep(0.1)
        port, dashboard, token = free_port(), free_port(), uuid.uuid4().hex * 2
        home = self.api.folder / "home"
        home.mkdir(exist_ok=True)
        environment = pod_environment(home, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=token)
        self._running[cluster], self._tokens[cluster] = [], token
        submitter = {"RAY_ADDRESS": f"http://127.0.0.1:{dashboard}", "PYTHONUNBUFFERED": "1"}  # as KubeRay sets it
        self._addresses[cluster] = environment | submitter
        for pod, group in pods:
            name = pod["metadata"]["name"]
            is_head = pod["metadata"]["labels"]["ray.io/node-type"] == "head"
            self.api.environment[name] = environment | {"RAY_ADDRESS": f"127.0.0.1:{port}"}
            line = start_line(group, f"127.0.0.1:{port}", dashboard if is_head else None)
            line += ["--node-name", name]  # a pod's host name, by which its node is known
            own = self.api.environment[name] if is_head else environment
            self._running[cluster].append(self._process(line, own, self.api.folder / f"{name}.log"))
            self._pod_state(pod, "Running")
            if is_head:
                self._wait_port(dashboard, is_wanted)
        return True

    def _submit(self, job: dict[str, Any], cluster: str, made: dict[str, Any]) -> int | None:
        """The submitter's pod: `ray job submit`, whose output is the pod's log."""
        name, namespace = job["metadata"]["name"], job["metadata"]["namespace"]
        pod_name = f"{name}-{uuid.uuid4().hex[:5]}"
        metadata = {
            "name": pod_name,
            "namespace": namespace,
            "labels": {"job-name": name},
            "ownerReferences": [{"uid": made["metadata"]["uid"]}],
        }
        pod = self.api.store("pods", {"kind": "Pod", "metadata": metadata, "spec": {}, "status": {"phase": "Pending"}})
        folder = self.api.folder / "config" / name
        command = job["spec"]["entrypoint"]
        for config in self.api.named("configmaps").values():
            if config["metadata"]["name"] == name:
                folder.mkdir(parents=True, exist_ok=True)
                for file, text in config["data"].items():
                    (folder / file).write_text(text)
                command = command.replace("/etc/orchestrator", str(folder))
        log = self.api.folder / f"{pod_name}.log"
        line = [
            "ray",
            "job",
            "submit",
            "--submission-id",
            pod_name,
            "--entrypoint-num-cpus",
            "0",
            "--log-style",
            "record",
        ]
        process = self._process([*line, "--", *shlex.split(command)], self._addresses[cluster], log)
        self._running.setdefault(cluster, []).append(process)
        self.api.logs[pod_name] = log
        self._pod_state(pod, "Running")
        self._say(job, jobStatus="RUNNING", jobId=pod_name)
        code = process.wait()
        if not self._there(job):
            return None
        self._pod_state(pod, "Failed" if code else "Succeeded")
        return code

    def _process(self, line: list[str], environment: dict[str, str], log: Path) -> subprocess.Popen[bytes]:
        with log.open("wb") as stream:
            return subprocess.Popen(line, env=environment, stdout=stream, stderr=stream, start_new_session=True)

    def _pod(self, cluster: dict[str, Any], kind: str, name: str, group: dict[str, Any]) -> tuple[dict[str, Any], Any]:
        metadata = {
            "name": name,
            "namespace": cluster["metadata"]["namespace"],
            "labels": {"ray.io/cluster": cluster["metadata"]["name"], "ray.io/node-type": kind},
            "ownerReferences": [{"uid": cluster["metadata"]["uid"]}],
        }
        pod = {"kind": "Pod", "metadata": metadata, "spec": group["template"]["spec"], "status": {"phase": "Pending"}}
        return self.api.store("pods", pod), group

    def _can_start(self, pod: dict[str, Any]) -> bool:
        image = pod["spec"]["containers"][0]["image"]
        if image in self.missing_images:
            waiting = {"reason": "ImagePullBackOff", "message": f'Back-off pulling image "{image}": not found'}
            containers = [{"name": "ray", "image": image, "state": {"waiting": waiting}}]
            if not pod["status"].get("containerStatuses"):
                metadata = pod["metadata"]
                self.api.set_status("pods", metadata["namespace"], metadata["name"], containerStatuses=containers)
            return False
        return True

    def _pod_state(self, pod: dict[str, Any], phase: str) -> None:
        self.api.set_status("pods", pod["metadata"]["namespace"], pod["metadata"]["name"], phase=phase)

    def _wait_port(self, port: int, is_wanted: Any) -> None:
        wait_for(lambda: listens(port) or not is_wanted())


def start_line(group: dict[str, Any], address: str, dashboard: int | None) -> list[str]:
    """The `ray start` of a group as KubeRay 1.7 writes it (common/pod.go), with ports that are free on one machine."""
    resources = dict(group.get("resources") or {})
    asked = {"num-cpus": resources.pop("CPU", "0"), "num-gpus": resources.pop("GPU", "0")}
    labels = ",".join(f"{key}={value}" for key, value in (group.get("labels") or {}).items())
    line = [
        "ray",
        "start",
        "--block",
        "--node-ip-address",
        "127.0.0.1",
        *(f"--{key}={value}" for key, value in asked.items()),
    ]
    if resources:
        line.append("--resources=" + json.dumps({key: float(value) for key, value in resources.items()}))
    if labels:
        line.append(f"--labels={labels}")
    line += ["--dashboard-agent-listen-port", str(free_port()), "--metrics-export-port", str(free_port())]
    if dashboard is None:
        return [*line, "--address", address]
    port = address.rpartition(":")[2]
    line += ["--head", "--port", port, "--dashboard-host", "127.0.0.1", "--dashboard-port", str(dashboard)]
    return [*line, "--ray-client-server-port", str(free_port()), "--disable-usage-stats"]
