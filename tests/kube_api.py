"""A double of a Kubernetes API server on loopback, with a KubeRay operator whose pods are processes here.

What it keeps to: paths, answers and `Status` objects of API server 1.36; strict validation by KubeRay's real schemas;
resourceVersions, watches with 410; ownerReferences; logs with follow; exec over WebSocket (v4.channel.k8s.io); the
states that KubeRay 1.7 writes.  A pod of a RayCluster is the `ray start` line of its group, run here; a mounted volume
claim is a folder at the same path here; a ConfigMap is a folder whose path replaces the mountPath in commands.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shlex
import socket
import subprocess
import sys
import threading
import time
import uuid
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import yaml
from aiohttp import WSMsgType, web

from tests.kube_schema import SHARED, verdict

TOKEN = "let-me-in"
_PLURALS = {
    "RayJob": "rayjobs",
    "RayCluster": "rayclusters",
    "ConfigMap": "configmaps",
    "Pod": "pods",
    "Event": "events",
}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def status(code: int, reason: str, message: str) -> web.Response:
    body = {
        "kind": "Status",
        "apiVersion": "v1",
        "status": "Failure",
        "reason": reason,
        "message": message,
        "code": code,
    }
    return web.json_response(body, status=code)


class KubeApi:
    """The server.  `objects` is (plural, namespace, name) -> object; `faults` are answers to be given instead."""

    def __init__(self, folder: Path, nodes: list[dict[str, Any]] | None = None) -> None:
        self.folder, self.nodes = folder, nodes or []
        self.objects: dict[tuple[str, str, str], dict[str, Any]] = {}
        self.events: list[tuple[int, str, dict[str, Any]]] = []  # resourceVersion, type, object
        self.faults: list[dict[str, Any]] = []
        self.asked: list[tuple[str, str]] = []
        self.logs: dict[str, Path] = {}  # by pod
        self.environment: dict[str, dict[str, str]] = {}  # by pod
        self.served = ["rayjobs", "rayclusters"]
        self.oldest = 0  # resourceVersion a watch may begin at
        self.namespaces = {"default", "team"}
        self._version, self._lock, self._loop = 0, threading.RLock(), asyncio.new_event_loop()
        self.port = free_port()
        ready = threading.Event()
        threading.Thread(target=self._serve, args=(ready,), daemon=True).start()
        assert ready.wait(10)

    def kubeconfig(self, token: str = TOKEN, namespace: str = "team") -> Path:
        """A kubeconfig with the contexts `here` (current) and `gone`, where nobody answers."""
        file = self.folder / "kubeconfig"
        clusters = {"here": f"http://127.0.0.1:{self.port}", "gone": f"http://127.0.0.1:{free_port()}"}
        document = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "here",
            "clusters": [{"name": name, "cluster": {"server": server}} for name, server in clusters.items()],
            "users": [{"name": "me", "user": {"token": token}}],
            "contexts": [
                {"name": name, "context": {"cluster": name, "user": "me", "namespace": namespace}} for name in clusters
            ],
        }
        file.write_text(yaml.safe_dump(document))
        return file

    def fail(self, method: str, path: str, code: int = 0, reason: str = "", message: str = "", times: int = 1) -> None:
        """Answer the next `times` requests whose path matches with an error; code 0 cuts the line."""
        fault = {"method": method, "path": path, "code": code, "reason": reason, "message": message, "times": times}
        self.faults.append(fault)

    def named(self, plural: str) -> dict[str, dict[str, Any]]:
        with self._lock:
            return {name: thing for (kind, _, name), thing in self.objects.items() if kind == plural}

    def store(self, plural: str, thing: dict[str, Any], change: str = "ADDED") -> dict[str, Any]:
        with self._lock:
            self._version += 1
            metadata = thing["metadata"]
            metadata.setdefault("uid", str(uuid.uuid4()))
            metadata.setdefault("creationTimestamp", datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ"))
            metadata["resourceVersion"] = str(self._version)
            key = (plural, metadata["namespace"], metadata["name"])
            if change == "DELETED":
                self.objects.pop(key, None)
            else:
                self.objects[key] = thing
            self.events.append((self._version, change, {"plural": plural, "object": json.loads(json.dumps(thing))}))
            return thing

    def set_status(self, plural: str, namespace: str, name: str, **fields: Any) -> None:
        with self._lock:
            thing = self.objects.get((plural, namespace, name))
            if thing is not None:
                thing["status"] = {**(thing.get("status") or {}), **fields}
                self.store(plural, thing, "MODIFIED")

    def delete(self, plural: str, namespace: str, name: str) -> bool:
        """Remove an object and, as the garbage collector does, everything it owns."""
        with self._lock:
            thing = self.objects.get((plural, namespace, name))
            if thing is None:
                return False
            self.store(plural, thing, "DELETED")
            uid = thing["metadata"]["uid"]
            for (kind, space, other), owned in list(self.objects.items()):
                if any(owner["uid"] == uid for owner in owned["metadata"].get("ownerReferences", [])):
                    self.delete(kind, space, other)
            return True

    def _serve(self, ready: threading.Event) -> None:
        asyncio.set_event_loop(self._loop)

        async def start() -> None:
            app = web.Application(client_max_size=2**30, middlewares=[self._gate])
            app.add_routes(
                [
                    web.get("/apis/", self._groups),
                    web.get("/apis/ray.io/v1", self._resources),
                    web.get("/api/v1/nodes", self._nodes),
                    web.get("/api/v1/namespaces/{ns}/pods/{name}/log", self._log),
                    web.get("/api/v1/namespaces/{ns}/pods/{name}/exec", self._exec),
                ]
            )
            for root in ("/apis/ray.io/v1", "/api/v1"):
                app.add_routes(
                    [
                        web.get(root + "/namespaces/{ns}/{plural}", self._list),
                        web.post(root + "/namespaces/{ns}/{plural}", self._create),
                        web.get(root + "/namespaces/{ns}/{plural}/{name}", self._read),
                        web.delete(root + "/namespaces/{ns}/{plural}/{name}", self._remove),
                    ]
                )
            runner = web.AppRunner(app, shutdown_timeout=0.1)
            await runner.setup()
            await web.TCPSite(runner, "127.0.0.1", self.port).start()
            self._runner = runner
            ready.set()

        self._loop.run_until_complete(start())
        self._loop.run_forever()

    def close(self) -> None:
        async def stop() -> None:
            await self._runner.cleanup()
            self._loop.stop()

        asyncio.run_coroutine_threadsafe(stop(), self._loop)

    @web.middleware
    async def _gate(self, request: web.Request, handler: Any) -> web.StreamResponse:
        self.asked.append((request.method, request.path_qs))
        if request.headers.get("authorization") != f"Bearer {TOKEN}":
            return status(401, "Unauthorized", "Unauthorized")
        for fault in self.faults:
            if fault["times"] > 0 and fault["method"] == request.method and re.search(fault["path"], request.path_qs):
                fault["times"] -= 1
                if fault["code"] == 0:
                    assert request.transport is not None
                    request.transport.abort()
                return status(fault["code"], fault["reason"], fault["message"])
        namespace = request.match_info.get("ns")
        if request.method == "POST" and namespace not in self.namespaces:
            return status(404, "NotFound", f'namespaces "{namespace}" not found')
        return await handler(request)

    async def _groups(self, _: web.Request) -> web.Response:
        versions = [{"groupVersion": "ray.io/v1alpha1", "version": "v1alpha1"}] if self.served == ["old"] else []
        if "rayjobs" in self.served:
            versions = [{"groupVersion": "ray.io/v1", "version": "v1"}]
        group = {"name": "ray.io", "versions": versions, "preferredVersion": versions[0]} if versions else None
        return web.json_response({"kind": "APIGroupList", "apiVersion": "v1", "groups": [group] if group else []})

    async def _resources(self, _: web.Request) -> web.Response:
        if "rayjobs" not in self.served:
            return status(404, "NotFound", "the server could not find the requested resource")
        kinds = [
            {"name": name, "singularName": "", "namespaced": True, "kind": name, "verbs": []} for name in self.served
        ]
        return web.json_response({"kind": "APIResourceList", "groupVersion": "ray.io/v1", "resources": kinds})

    async def _nodes(self, _: web.Request) -> web.Response:
        return web.json_response({"kind": "NodeList", "apiVersion": "v1", "metadata": {}, "items": self.nodes})

    async def _create(self, request: web.Request) -> web.Response:
        plural, namespace = request.match_info["plural"], request.match_info["ns"]
        thing = await request.json()
        if request.query.get("fieldValidation") != "Strict":
            return status(400, "BadRequest", "the double takes nothing without fieldValidation=Strict")
        if (SHARED / "crds").is_dir() and (wrong := verdict(thing)):
            unknown = [text for text in wrong if "Additional properties" in text]
            kind = f'{thing["kind"]}.ray.io "{thing["metadata"]["name"]}" is invalid'
            code, reason = (400, "BadRequest") if unknown else (422, "Invalid")
            return status(code, reason, f"{kind}: {wrong[0]}" + (": unknown field" if unknown else ""))
        name = thing["metadata"]["name"]
        thing["metadata"].setdefault("namespace", namespace)
        if thing["kind"] == "Pod":
            thing["status"] = {"phase": "Pending"}
        with self._lock:
            if (plural, namespace, name) in self.objects:
                return status(409, "AlreadyExists", f'{plural}.ray.io "{name}" already exists')
            if request.query.get("dryRun") != "All":
                thing = self.store(plural, thing)
        return web.json_response(thing, status=201)

    async def _read(self, request: web.Request) -> web.Response:
        key = tuple(request.match_info[part] for part in ("plural", "ns", "name"))
        with self._lock:
            found = self.objects.get(key)  # type: ignore[arg-type]
        return web.json_response(found) if found else status(404, "NotFound", f'{key[0]} "{key[2]}" not found')

    async def _remove(self, request: web.Request) -> web.Response:
        plural, namespace, name = (request.match_info[part] for part in ("plural", "ns", "name"))
        if not self.delete(plural, namespace, name):
            return status(404, "NotFound", f'{plural} "{name}" not found')
        return web.json_response({"kind": "Status", "apiVersion": "v1", "status": "Success"})

    def _selected(self, thing: dict[str, Any], query: Any) -> bool:
        labels = thing["metadata"].get("labels") or {}
        for part in filter(None, query.get("labelSelector", "").split(",")):
            key, equals, value = part.partition("=")
            if key not in labels or (equals and labels[key] != value):
                return False
        for part in filter(None, query.get("fieldSelector", "").split(",")):
            key, _, value = part.partition("=")
            found: Any = thing
            for step in key.split("."):
                found = (found or {}).get(step)
            if found != value:
                return False
        return True

    async def _list(self, request: web.Request) -> web.StreamResponse:
        plural, namespace, query = request.match_info["plural"], request.match_info["ns"], request.query
        if query.get("watch") in ("true", "True", "1"):
            return await self._watch(request, plural, namespace)
        with self._lock:
            items = [thing for (kind, space, _), thing in self.objects.items() if (kind, space) == (plural, namespace)]
            items = [thing for thing in items if self._selected(thing, query)]
            metadata = {"resourceVersion": str(self._version)}
        return web.json_response({"kind": "List", "apiVersion": "v1", "metadata": metadata, "items": items})

    async def _watch(self, request: web.Request, plural: str, namespace: str) -> web.StreamResponse:
        answer = web.StreamResponse(headers={"Content-Type": "application/json"})
        await answer.prepare(request)
        since = int(request.query.get("resourceVersion") or 0)
        until = time.monotonic() + float(request.query.get("timeoutSeconds", 300))
        if since < self.oldest:
            gone = {"kind": "Status", "code": 410, "reason": "Expired", "message": "too old resource version"}
            await answer.write(json.dumps({"type": "ERROR", "object": gone}).encode() + b"\n")
            return answer
        while time.monotonic() < until:
            with self._lock:
                new = [event for event in self.events if event[0] > since]
            for version, change, body in new:
                since, thing = version, body["object"]
                mine = body["plural"] == plural and thing["metadata"]["namespace"] == namespace
                if mine and self._selected(thing, request.query):
                    await answer.write(json.dumps({"type": change, "object": thing}).encode() + b"\n")
            await asyncio.sleep(0.03)
        return answer

    async def _log(self, request: web.Request) -> web.StreamResponse:
        name = request.match_info["name"]
        pod = self.objects.get(("pods", request.match_info["ns"], name))
        if pod is None:
            return status(404, "NotFound", f'pods "{name}" not found')
        if name not in self.logs:
            return status(400, "BadRequest", f'container in pod "{name}" is waiting to start: ContainerCreating')
        answer = web.StreamResponse(headers={"Content-Type": "text/plain"})
        await answer.prepare(request)
        with self.logs[name].open("rb") as stream:
            while True:
                has_ended = (pod.get("status") or {}).get("phase") in ("Succeeded", "Failed")
                await answer.write(stream.read())
                if request.query.get("follow") not in ("true", "True") or has_ended:
                    return answer
                await asyncio.sleep(0.05)

    async def _exec(self, request: web.Request) -> web.StreamResponse:
        line = web.WebSocketResponse(protocols=("v4.channel.k8s.io",), max_msg_size=0)
        await line.prepare(request)
        process = await asyncio.create_subprocess_exec(
            *request.query.getall("command"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=self.environment.get(request.match_info["name"], pod_environment(self.folder)),
        )

        async def pump(stream: asyncio.StreamReader | None, channel: int) -> None:
            assert stream is not None
            while data := await stream.read(8192):
                await line.send_bytes(bytes([channel]) + data)

        async def feed() -> None:
            assert process.stdin is not None
            async for message in line:
                if message.type == WSMsgType.BINARY and message.data[0] == 0:
                    with contextlib.suppress(ConnectionError):
                        process.stdin.write(message.data[1:])
                        await process.stdin.drain()

        feeding = asyncio.ensure_future(feed())
        await asyncio.gather(pump(process.stdout, 1), pump(process.stderr, 2))
        code = await process.wait()
        cause = {"causes": [{"reason": "ExitCode", "message": str(code)}]}
        word = {"status": "Failure", "reason": "NonZeroExitCode", "details": cause} if code else {"status": "Success"}
        await line.send_bytes(b"\x03" + json.dumps(word).encode())
        feeding.cancel()
        await line.close()
        return line


def pod_environment(home: Path, **more: str) -> dict[str, str]:
    """What a process of a pod starts with: nothing of the caller but where programs are."""
    scripts = str(Path(sys.executable).parent)
    root = str(Path(__file__).resolve().parents[1])
    kept = {
        key: os.environ[key] for key in ("LANG", "LD_LIBRARY_PATH", "HF_HOME", "HF_HUB_OFFLINE") if key in os.environ
    }
    return {"PATH": f"{scripts}:{os.environ['PATH']}", "HOME": str(home), "PYTHONPATH": root, **kept, **more}


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
            process.wait(20)

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
        until = time.monotonic() + 90
        while time.monotonic() < until and is_wanted():
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                return
            time.sleep(0.3)


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
