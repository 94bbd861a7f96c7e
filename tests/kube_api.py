"""A double of a Kubernetes API server on loopback; kube_operator.py gives it pods that do something.

What it keeps to: paths, answers and `Status` objects of API server 1.36; strict validation by kube_fields.py;
resourceVersions, watches with 410; ownerReferences; logs with follow; exec over WebSocket (v4.channel.k8s.io).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import sys
import threading
import time
import uuid
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml
from aiohttp import WSMsgType, web

from tests.kube_schema import verdict
from tests.processes import free_port

TOKEN = "let-me-in"
_PLURALS = {
    "RayJob": "rayjobs",
    "RayCluster": "rayclusters",
    "ConfigMap": "configmaps",
    "Pod": "pods",
    "Event": "events",
}


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
        self._thread = threading.Thread(target=self._serve, args=(ready,), daemon=True)
        self._thread.start()
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
        self._loop.close()

    def close(self) -> None:
        async def stop() -> None:
            await self._runner.cleanup()
            self._loop.stop()

        asyncio.run_coroutine_threadsafe(stop(), self._loop)
        self._thread.join(10)

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
        if wrong := verdict(thing):
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
