"""vLLM as a foreign process: found on PATH or in a Python of its own, spoken to by HTTP, never imported.

Its pins of torch and transformers are not ours, so it lives in an environment of its own.  Adapters are loaded while it
runs (https://docs.vllm.ai/en/stable/features/lora/, VLLM_ALLOW_RUNTIME_LORA_UPDATING).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import tempfile
from collections import OrderedDict
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import aiohttp

from clusters.safe.reading import BadInput, first_line
from orchestrator.serving.engines.kinds import kind_of_adapter
from orchestrator.serving.engines.protocol import EngineState, Piece, Query, Refused, ServedModel

_BASE = "base"  # what the process calls the model that was not tuned
_LOOK_S, _PAUSE_S, _ENDING_S = 0.2, 2.0, 20.0
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that --max-lora-rank takes


class VllmEngine:
    """Keeps one vLLM server alive and its adapters loaded."""

    def __init__(self, base: str, command: Sequence[str], max_adapters: int, most_rank: int) -> None:
        """`command` starts `vllm serve`; adapters of a higher rank than `most_rank` are refused."""
        self._base, self._command, self._max_adapters = base, list(command), max_adapters
        self._rank = next((rank for rank in _RANKS if rank >= most_rank), _RANKS[-1])
        self._process: asyncio.subprocess.Process | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._session: aiohttp.ClientSession | None = None
        self._url = ""
        self._is_ready = asyncio.Event()
        self._reason: str | None = "it is starting"
        self._restarts = 0
        self._loaded: OrderedDict[str, str] = OrderedDict()  # name -> folder, the least recently used first
        self._in_use: list[str] = []  # a name for each answer on its way
        self._loading = asyncio.Lock()
        self._counts = {"adapter_hits": 0, "adapter_loads": 0, "adapter_evictions": 0}
        self._log: Any = None  # what the process prints

    @property
    def state(self) -> EngineState:
        ready, now = self._is_ready.is_set(), {"adapters_loaded": len(self._loaded), "rows": len(self._in_use)}
        reason = None if ready else self._reason
        return EngineState("vllm", self._base, ready, reason, self._restarts, {**self._counts, **now})

    async def start(self) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115
        self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None))
        try:
            await self._launch()
        except Refused:
            await self.stop()
            raise
        self._keeper = asyncio.create_task(self._keep())

    async def generate(self, query: Query) -> AsyncIterator[Piece]:
        """Raises Refused."""
        await self._is_ready.wait()
        name = query.model.name if query.model.folder else _BASE
        self._in_use.append(name)
        try:
            await self._load(query.model)
            path, body = _request(name, query)
            async with self._post(path, body) as reply:
                async for piece in _pieces(reply, query.messages is not None):
                    yield piece
        except (aiohttp.ClientError, OSError) as error:
            if self._process and self._process.returncode is None:
                raise Refused(503, f"vLLM does not answer: {first_line(error)}", "engine_failed") from None
            raise Refused(
                503, f"{self._end()}; it is started again. Send the request once more", "engine_failed"
            ) from None
        finally:
            self._in_use.remove(name)

    async def unload(self, model: ServedModel) -> None:
        if self._loaded.pop(model.name, None) and self._is_ready.is_set():
            with contextlib.suppress(Refused, aiohttp.ClientError, OSError):
                await self._tell("/v1/unload_lora_adapter", {"lora_name": model.name})

    async def stop(self) -> None:
        if self._keeper:
            self._keeper.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._keeper
        if self._process and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGTERM)  # with its workers
            try:
                await asyncio.wait_for(self._process.wait(), _ENDING_S)
            except TimeoutError:
                os.killpg(self._process.pid, signal.SIGKILL)
                await self._process.wait()
        if self._session:
            await self._session.close()
            self._log.close()

    async def _keep(self) -> None:
        """Start it again when it ends."""
        while True:
            assert self._process
            await self._process.wait()
            self._is_ready.clear()
            self._reason = self._end()
            while not self._is_ready.is_set():
                await asyncio.sleep(_PAUSE_S)
                self._restarts += 1
                try:
                    await self._launch()
                except Refused as refusal:
                    self._reason = refusal.message

    async def _launch(self) -> None:
        """Start a process and wait until it answers.  Raises Refused."""
        port = _free_port()
        self._url, self._loaded = f"http://127.0.0.1:{port}", OrderedDict()
        options = ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", _BASE, "--enable-lora"]
        options += ["--max-lora-rank", str(self._rank), "--max-cpu-loras", str(self._max_adapters)]
        options += ["--max-loras", str(min(self._max_adapters, 8))]
        self._process = await asyncio.create_subprocess_exec(
            *(*self._command, self._base, *options),
            env={**os.environ, "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"},
            stdin=asyncio.subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,
        )
        while self._process.returncode is None:
            assert self._session
            with contextlib.suppress(aiohttp.ClientError, OSError):
                async with self._session.get(f"{self._url}/health") as reply:
                    if reply.status == 200:
                        self._is_ready.set()
                        return
            await asyncio.sleep(_LOOK_S)
        raise Refused(503, self._end(), "engine_failed")

    async def _load(self, model: ServedModel) -> None:
        """Have an adapter loaded, in the place of the least recently used one.  Raises Refused."""
        if model.folder is None:
            return
        async with self._loading:
            if self._loaded.get(model.name) == model.folder:
                self._loaded.move_to_end(model.name)
                self._counts["adapter_hits"] += 1
                return
            _check(model)
            idle = [name for name in self._loaded if name not in self._in_use or name == model.name]
            if model.name in self._loaded or (len(self._loaded) >= self._max_adapters and idle):
                oldest = model.name if model.name in self._loaded else idle[0]
                await self._tell("/v1/unload_lora_adapter", {"lora_name": oldest})
                del self._loaded[oldest]
                self._counts["adapter_evictions"] += 1
            await self._tell("/v1/load_lora_adapter", {"lora_name": model.name, "lora_path": model.folder})
            self._loaded[model.name] = model.folder
            self._counts["adapter_loads"] += 1

    async def _tell(self, path: str, body: dict[str, Any]) -> None:
        async with self._post(path, body) as reply:
            await reply.read()

    @contextlib.asynccontextmanager
    async def _post(self, path: str, body: dict[str, Any]) -> AsyncIterator[aiohttp.ClientResponse]:
        """Raises Refused with what vLLM says."""
        assert self._session
        async with self._session.post(f"{self._url}{path}", json=body) as reply:
            if reply.status >= 400:
                text = (await reply.content.read(4096)).decode("utf-8", "replace")
                status = reply.status if reply.status in (400, 404, 422) else 503
                raise Refused(status, f"vLLM: {_said(text)}", "engine_refused")
            yield reply

    def _end(self) -> str:
        """How it ended, with the last that it said."""
        code = self._process.returncode if self._process else None
        self._log.seek(max(0, self._log.seek(0, os.SEEK_END) - 2000))
        lines = [line.strip() for line in self._log.read().decode("utf-8", "replace").splitlines() if line.strip()]
        return f"vLLM ended (exit code {code})" + (f": {lines[-1][:300]}" if lines else "")


def _check(model: ServedModel) -> None:
    """Raises Refused for an adapter that vLLM does not load."""
    folder = Path(model.folder or "")
    try:
        kind = kind_of_adapter(folder)
    except BadInput as error:
        raise Refused(500, f"{model.name} cannot be loaded: {error}", "model_damaged", "model") from None
    if kind != "shared":
        message = f"{model.name}: vLLM takes pairs of A and B alone. `orchestrator merge` makes a plain model of it"
        raise Refused(400, f"{message}; --engine transformers serves it as it is", "engine_cannot", "model")


def _request(name: str, query: Query) -> tuple[str, dict[str, Any]]:
    """The path and the body of a query."""
    body: dict[str, Any] = {"model": name, "stream": True, "stream_options": {"include_usage": True}}
    body |= {"temperature": query.temperature, "top_p": query.top_p, "stop": list(query.stop)}
    body |= {key: value for key, value in (("max_tokens", query.max_tokens), ("seed", query.seed)) if value is not None}
    if query.ignore_eos:
        body["ignore_eos"] = True
    if query.logprobs is not None:
        raise Refused(400, "logprobs: not passed on to vLLM; --engine transformers gives them", param="logprobs")
    if query.messages is None:
        return "/v1/completions", body | {"prompt": query.tokens if query.tokens is not None else query.prompt}
    system = query.model.system
    has_own = not system or any(message["role"] == "system" for message in query.messages)
    first = [] if has_own else [{"role": "system", "content": system}]
    return "/v1/chat/completions", body | {"messages": [*first, *query.messages]}


async def _pieces(reply: aiohttp.ClientResponse, is_chat: bool) -> AsyncIterator[Piece]:
    """A stream as pieces; the last one has the counts.  Raises Refused."""
    finish, counts = "stop", (0, 0)
    async for line in reply.content:
        kind, _, data = line.strip().partition(b":")
        if kind != b"data" or data.strip() == b"[DONE]":
            continue
        chunk = json.loads(data)
        if "error" in chunk:
            raise Refused(500, f"vLLM: {_said(json.dumps(chunk))}", "engine_failed")
        for choice in chunk.get("choices", ()):
            finish = choice.get("finish_reason") or finish
            if text := choice["delta"].get("content") if is_chat else choice.get("text"):
                yield Piece(text)
        if usage := chunk.get("usage"):
            counts = usage["prompt_tokens"], usage["completion_tokens"]
    yield Piece("", [], finish, *counts)


def _said(text: str) -> str:
    """The message of an error's body."""
    with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError):
        body = json.loads(text)
        return str(body.get("message") or body["error"]["message"])[:500]
    return text[:500]


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]
