"""Ray Serve LLM on a cluster with GPUs: deployed through its dashboard, asked at its HTTP address, removed at the end.

Ray loads adapters by name from a folder of an object store (`dynamic_lora_loading_path`); its nodes keep what they
loaded under that name, so an adapter's name there has its digest.
https://docs.ray.io/en/latest/serve/llm/
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import re
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from clusters.ray.connect import CannotConnect
from clusters.ray.serve_dashboard import (
    DashboardRefuses,
    DeployedApplication,
    ServeDashboard,
    application_in,
    http_addresses,
)
from clusters.safe.reading import first_line
from orchestrator.serving.engines.openai_client import (
    BASE,
    check_adapter,
    lora_limits,
    pieces_of,
    post,
    request_of,
)
from orchestrator.serving.engines.protocol import EngineState, Piece, Query, Refused, ServedModel
from strategies.adapter_bank.adapter import Unusable
from strategies.adapter_bank.object_store import ObjectStore, StoreError, path_part

_ENGINE = "Ray Serve"
_PATIENCE_S = 60.0  # with a dashboard that does not answer, an application that does not appear, and one that goes
_CONNECT_S = 5.0
_REQUESTS_A_REPLICA = 32  # under way at a time; with more, the next replica is started
# Where the store is; what opens it never goes along, as Ray shows an application's variables to everyone.
_STORE_VARIABLES = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION")
_MISSING = re.compile(r"No module named '(\w+)|(boto3) and botocore are required|(Neither vLLM nor SGLang)")
_NO_MODEL = re.compile(r"Hugging Face config|Repo id must|does not appear to have|Invalid repository ID|config\.json")


@dataclass(frozen=True)
class LlmApplication:
    """A base model to be deployed."""

    base: str  # its folder here
    source: str  # what a node loads: a name on the hub, or a folder that every node has
    revision: str | None = None  # of a name on the hub
    dtype: str | None = None
    most_rank: int = 16  # of its adapters
    max_adapters: int = 8
    replicas: int = 1  # the most
    gpus_per_replica: int = 1

    @property
    def label(self) -> str:
        """Names the base in paths, and tells it from others."""
        name = path_part(Path(self.source).name).lower().replace(".", "-")
        return f"{name[:40]}-{hashlib.sha256(self.base.encode()).hexdigest()[:6]}"

    def config(self, name: str, adapters: str | None) -> dict[str, Any]:
        """What Serve deploys (ServeApplicationSchema, LLMConfig); `adapters` is the address of their folder."""
        engine: dict[str, Any] = {"tensor_parallel_size": self.gpus_per_replica}
        model: dict[str, Any] = {
            "model_loading_config": {"model_id": BASE, "model_source": self.source},
            "engine_kwargs": engine,
            "deployment_config": {
                "autoscaling_config": {
                    "min_replicas": 1,
                    "max_replicas": self.replicas,
                    "target_ongoing_requests": _REQUESTS_A_REPLICA,
                }
            },
        }
        if self.dtype:
            engine["dtype"] = self.dtype
        if self.revision:
            engine |= {"revision": self.revision, "tokenizer_revision": self.revision}
        if adapters:
            engine |= {"enable_lora": True, **lora_limits(self.most_rank, self.max_adapters)}
            model["lora_config"] = {
                "dynamic_lora_loading_path": adapters,
                "max_num_adapters_per_replica": self.max_adapters,
            }
        found = {
            "name": name,
            "route_prefix": f"/{name}",
            "import_path": "ray.serve.llm:build_openai_app",
            "args": {"llm_configs": [model]},
        }
        variables = {one: os.environ[one] for one in _STORE_VARIABLES if adapters and os.environ.get(one)}
        return found | ({"runtime_env": {"env_vars": variables}} if variables else {})


class RayServeEngine:
    """Keeps one application on a cluster while it is served here."""

    def __init__(
        self,
        address: str,
        application: LlmApplication,
        store: ObjectStore | None = None,
        say: Callable[[str], None] = lambda text: None,
        poll_s: float = 2.0,
    ) -> None:
        """`address` is the dashboard's, http://HOST:PORT; without a store no adapters are served."""
        self._address, self._application, self._store = address, application, store
        self._say, self._poll_s = say, poll_s
        self._name = f"{_own_prefix()}{os.getpid()}-{application.label}"
        self._dashboard = ServeDashboard(address)
        self._session: aiohttp.ClientSession | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._url = ""
        self._is_deployed = False
        self._reason: str | None = "it is starting"
        self._restarts = 0
        self._copied: dict[str, tuple[str, str]] = {}  # model -> its folder here, its name there
        self._copying = asyncio.Lock()
        self._counts = {"adapter_hits": 0, "adapter_loads": 0}
        self._rows = 0

    @property
    def state(self) -> EngineState:
        counts = {**self._counts, "adapters_loaded": len(self._copied), "rows": self._rows}
        base = self._application.base
        return EngineState("ray-serve", base, self._reason is None, self._reason, self._restarts, counts)

    async def start(self) -> None:
        self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None, connect=_CONNECT_S))
        try:
            with _as_refusals(self._address):
                await self._deploy()
        except BaseException:  # a start that is cancelled leaves no application either
            await self.stop()
            raise
        self._reason = None
        self._watcher = asyncio.create_task(self._watch())

    async def generate(self, query: Query) -> AsyncIterator[Piece]:
        """Raises Refused."""
        assert self._session
        self._rows += 1
        try:
            path, body = request_of(await self._name_there(query.model), query)
            async with post(self._session, f"{self._url}{path}", body, _ENGINE) as reply:
                async for piece in pieces_of(reply, query.messages is not None, _ENGINE):
                    yield piece
        except Refused as refusal:
            if refusal.status not in (404, 503):
                raise
            await self._look()  # is it of the request, or of the whole application?
            raise Refused(503, self._reason, "engine_failed") if self._reason else refusal from None
        except (aiohttp.ClientError, OSError) as error:
            await self._look()
            reason = self._reason or f"{_ENGINE} at {self._url} does not answer: {first_line(error)}"
            raise Refused(503, reason, "engine_failed") from None
        finally:
            self._rows -= 1

    async def unload(self, model: ServedModel) -> None:
        """Its copy stays in the store, where others may use it; the cluster's nodes forget the least recently used."""
        self._copied.pop(model.name, None)

    async def stop(self) -> None:
        if self._watcher:
            self._watcher.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watcher
        if self._is_deployed:
            try:
                await self._remove(self._name)
            except (CannotConnect, DashboardRefuses) as error:
                self._say(f"the application {self._name} is still on the cluster: {error}")
        await self._dashboard.close()
        if self._session:
            await self._session.close()

    async def _deploy(self) -> None:
        await self._dashboard.open()
        await self._check_gpus()
        for name in (await self._dashboard.details()).get("applications", {}):
            if _is_left_over(name):
                self._say(f"{name} is removed from the cluster: the server that deployed it was killed")
                await self._remove(name)
        adapters = None
        if self._store:
            await asyncio.to_thread(self._store.connect)
            adapters = f"{self._store.address.rstrip('/')}/{self._application.label}"
        self._say(
            f"{self._application.source} is deployed on {self._address} (Ray {self._dashboard.version}) as {self._name}"
        )
        self._is_deployed = True  # also where the answer is lost
        await self._dashboard.apply(self._name, self._application.config(self._name, adapters))
        await self._wait_until_running()
        self._url = await self._find_url()
        self._say(f"{self._name} answers at {self._url}")

    async def _check_gpus(self) -> None:
        num_nodes, num_gpus = await self._dashboard.num_gpus()
        wanted = self._application.gpus_per_replica
        if num_gpus < wanted:
            raise Refused(
                503,
                f"the cluster has {num_gpus:g} GPUs on its {num_nodes} nodes, and Ray Serve LLM needs {wanted} for a"
                " replica. Add a node with GPUs; where an autoscaler adds them, have it start one first",
            )

    async def _wait_until_running(self) -> None:
        said, until = "", time.monotonic() + _PATIENCE_S
        while True:
            try:
                found = application_in(await self._dashboard.details(), self._name)
            except (CannotConnect, DashboardRefuses):  # a head that is busy; loading may take an hour
                if time.monotonic() > until:
                    raise
                found = None
            if found:
                until = time.monotonic() + _PATIENCE_S
                if found.status == "RUNNING":
                    return
                if found.status == "DEPLOY_FAILED":
                    raise Refused(503, f"{self._name} could not be deployed: {self._explain(found)}", "engine_failed")
                if found.progress != said:
                    said = found.progress
                    self._say(f"{self._name}: {said}")
            elif time.monotonic() > until:
                raise Refused(503, f"{self._name} was deployed and is not there: it was removed", "engine_failed")
            await asyncio.sleep(self._poll_s)

    def _explain(self, found: DeployedApplication) -> str:
        """Why it failed, and what to do."""
        source, text = self._application.source, found.text
        if missing := _MISSING.search(text):
            boto3 = "pip install boto3 on every node of the cluster"
            return f"{found.reason}. Type: {boto3 if 'boto' in missing[0] else self._dashboard.pip_line}"
        if Path(source).is_absolute() and (source in text or _NO_MODEL.search(text)):
            return (
                f"{found.reason}. Every node needs the model in {source}: put it there or into a folder that all"
                " share, or use a base that is named as on the hub"
            )
        return found.reason

    async def _find_url(self) -> str:
        """Where the application answers.  Raises Refused with what was tried."""
        assert self._session
        tried: dict[str, str] = {}
        until = time.monotonic() + _PATIENCE_S
        while True:
            for address in http_addresses(await self._dashboard.details(), self._address):
                url = f"{address}/{self._name}"
                try:
                    async with self._session.get(f"{url}/v1/models") as reply:
                        if reply.status == 200:
                            return url
                        tried[address] = f"answers {reply.status}: {first_line(await reply.text())}"
                except (aiohttp.ClientError, OSError) as error:
                    tried[address] = first_line(error)
            if time.monotonic() > until:
                seen = "; ".join(f"{address} {what}" for address, what in tried.items())
                raise Refused(503, f"{self._name} runs, and Serve's HTTP address is not reached from here: {seen}")
            await asyncio.sleep(self._poll_s)

    async def _name_there(self, model: ServedModel) -> str:
        """The model's name on the cluster, an adapter copied to the store first.  Raises Refused."""
        if model.folder is None:
            return BASE
        async with self._copying:
            folder, name = self._copied.get(model.name, ("", ""))
            if folder == model.folder:
                self._counts["adapter_hits"] += 1
                return name
            if self._store is None:
                raise Refused(400, refusal_without_store(model.name), "engine_cannot", "model")
            check_adapter(model, lora_limits(self._application.most_rank, 1)["max_lora_rank"])
            try:
                put, label = self._store.put, self._application.label
                copied = await asyncio.to_thread(put, Path(model.folder), label, model.name)
            except Unusable as error:
                raise Refused(500, f"{model.name} cannot be loaded: {error}", "model_damaged", "model") from None
            except StoreError as error:
                raise Refused(503, f"the adapter store: {error}", "engine_failed", "model") from None
            self._copied[model.name] = model.folder, f"{BASE}:{copied}"
            self._counts["adapter_loads"] += 1
            return f"{BASE}:{copied}"

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self._poll_s)
            await self._look()

    async def _look(self) -> None:
        """Ask the dashboard how the application is."""
        try:
            found = application_in(await self._dashboard.details(), self._name)
        except (CannotConnect, DashboardRefuses) as error:
            reason = str(error)
        else:
            gone = f"{self._name} was removed from the cluster. Start this server again to deploy it"
            reason = gone if found is None else None if found.status == "RUNNING" else f"{self._name}: {found.reason}"
        if reason != self._reason:
            self._restarts += reason is None
            self._say(reason or f"{self._name} answers again")
        self._reason = reason

    async def _remove(self, name: str) -> None:
        """Remove an application and wait until its GPUs are free."""
        await self._dashboard.apply(name, None)
        until = time.monotonic() + _PATIENCE_S
        while time.monotonic() < until and name in (await self._dashboard.details()).get("applications", {}):
            await asyncio.sleep(min(self._poll_s, 1.0))


def refusal_without_store(names: str) -> str:
    """Why adapters are not served without a store, and the ways out."""
    return (
        f"{names}: a cluster's nodes load adapters from an object store; give one with --adapter-store"
        " s3://BUCKET/FOLDER, or serve the plain model that `orchestrator merge` makes"
    )


@contextlib.contextmanager
def _as_refusals(address: str) -> Iterator[None]:
    try:
        yield
    except Refused as refusal:
        raise Refused(refusal.status, f"--cluster {address}: {refusal.message}", refusal.code) from None
    except (CannotConnect, DashboardRefuses) as error:
        raise Refused(503, f"--cluster {address}: {error}", "engine_failed") from None
    except StoreError as error:
        raise Refused(503, f"--adapter-store {error}", "engine_failed") from None


def _own_prefix() -> str:
    """Of the applications that servers on this machine deploy: each has its process's number behind it."""
    return f"orchestrator-{path_part(socket.gethostname()).lower().replace('.', '-')}-"


def _is_left_over(name: str) -> bool:
    """Whether a server of this machine that is no longer there deployed it."""
    found = re.match(rf"{re.escape(_own_prefix())}(\d{{1,10}})-", name)
    if not found:
        return False
    try:
        os.kill(int(found[1]), 0)
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):  # it is another user's, or no number of a process
        pass
    return False
