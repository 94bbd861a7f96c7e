"""The engine for quantised models without a GPU: llama.cpp, by the package xllamacpp.

The base is a GGUF file, an adapter the `adapter.gguf` in its folder or one that is written for it.  llama.cpp reads its
adapters when it starts, so one that is not among them waits until no answer is on its way, and a start with it.
Requests for one adapter are computed together; llama.cpp takes those for different ones in turn.
"""

from __future__ import annotations

import queue
import shutil
import tempfile
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from xllamacpp import (  # a C++ extension without types
    CommonAdapterLoraInfo,  # pyright: ignore[reportAttributeAccessIssue]
    CommonParams,  # pyright: ignore[reportAttributeAccessIssue]
    Server,  # pyright: ignore[reportAttributeAccessIssue]
)

from clusters.safe.reading import first_line
from orchestrator.errors import JobError
from orchestrator.job.model_files import read_config
from orchestrator.serving.engines.adapters import check_digest
from orchestrator.serving.engines.prompts import prompt_tokens
from orchestrator.serving.engines.protocol import Piece, Query, Refused
from orchestrator.serving.engines.weights import EngineSettings, Weights
from strategies.adapter_bank import gguf_adapter
from strategies.adapter_bank.adapter import Unusable

_ROWS = 4  # computed at a time
_WAIT_S = 0.05

Send = Callable[[int, Piece | Refused | None], None]


@dataclass(frozen=True)
class LlamaCppRequest:
    """The fields of llama.cpp's server."""

    prompt: list[int]
    temperature: float
    top_p: float
    top_k: int
    max_tokens: int  # -1: as many as there is room for
    stop: list[str]
    seed: int  # -1: another one each time
    ignore_eos: bool
    lora: list[dict[str, float]]  # the scale of every adapter that was loaded
    min_p: float = 0.0
    stream: bool = True
    stream_options: dict[str, bool] = field(default_factory=lambda: {"include_usage": True})


class LlamaCppEngine:
    """Queries by number; each gets pieces through `send`, the last with a `finish`, or a refusal."""

    def __init__(self, settings: EngineSettings, send: Send) -> None:
        """Raises Refused where llama.cpp does not take the file."""
        self._settings, self._send = settings, send
        self._tokenizer = Weights(settings).tokenizer(Path(settings.base))
        self._waiting: dict[int, Query] = {}
        self._running: set[int] = set()
        self._cancelled: set[int] = set()
        self._answers: queue.Queue[tuple[int, Piece | Refused]] = queue.Queue()
        self._adapters: list[str] = []  # folders, the least recently used one first
        self._counts = {"adapter_hits": 0, "adapter_loads": 0, "adapter_evictions": 0}
        self._written = Path(tempfile.mkdtemp(prefix="adapters-"))
        weakref.finalize(self, shutil.rmtree, self._written, ignore_errors=True)
        self._files: list[str] = []
        self._server: Any = self._start([])

    @property
    def is_busy(self) -> bool:
        return bool(self._waiting or self._running)

    @property
    def counts(self) -> dict[str, float]:
        now = {"adapters_loaded": len(self._files), "rows": len(self._running), "waiting": len(self._waiting)}
        return {**self._counts, **now}

    def submit(self, number: int, query: Query) -> None:
        self._waiting[number] = query

    def cancel(self, number: int) -> None:
        """Nobody waits for this answer any more."""
        if not self._waiting.pop(number, None) and number in self._running:
            self._cancelled.add(number)

    def forget(self, folder: str) -> None:
        """It is left out at the next start."""
        self._adapters = [one for one in self._adapters if one != folder]

    def step(self) -> None:
        """Begin what can begin, and pass on what has come."""
        for number, query in list(self._waiting.items()):
            if len(self._running) >= _ROWS:
                break
            try:
                if not self._has_adapter(query.model.folder):
                    break  # nobody overtakes it: it waits for those before it to end
                body = self._body(query)
            except Refused as refusal:
                del self._waiting[number]
                self._send(number, refusal)
                continue
            del self._waiting[number]
            self._running.add(number)
            self._send(number, None)
            threading.Thread(target=self._compute, args=(number, body), daemon=True).start()
        self._pass_on()

    def _pass_on(self) -> None:
        try:
            number, answer = self._answers.get(timeout=_WAIT_S)
        except queue.Empty:
            return
        if isinstance(answer, Refused) or answer.finish:
            self._running.discard(number)
        if number not in self._cancelled:
            self._send(number, answer)
        elif number not in self._running:
            self._cancelled.discard(number)

    def _has_adapter(self, folder: str | None) -> bool:
        """Whether llama.cpp holds an adapter; loaded here where nothing runs.  Raises Refused."""
        if folder is None:
            return True
        if folder in self._files and folder in self._adapters:
            self._adapters.append(self._adapters.pop(self._adapters.index(folder)))
            self._counts["adapter_hits"] += 1
            return True
        if self._running:
            return False
        _check(Path(folder))
        self._file(Path(folder))
        kept = self._adapters[-self._settings.max_adapters + 1 :] if self._settings.max_adapters > 1 else []
        self._counts["adapter_evictions"] += len(self._adapters) - len(kept)
        self._adapters = [*kept, folder]
        self._server = None  # its memory first
        try:
            self._server = self._start(self._adapters)
        except Refused as refusal:
            self._adapters = kept
            self._server = self._start(kept)
            raise Refused(500, f"{Path(folder).name}: {refusal.message}", "model_damaged", "model") from None
        self._counts["adapter_loads"] += 1
        return True

    def _start(self, folders: Sequence[str]) -> Any:
        params = CommonParams()
        params.model.path = self._settings.gguf or ""
        params.n_parallel = _ROWS
        params.n_ctx = 0  # the model's own
        params.port = 0
        params.lora_adapters = [_adapter(self._file(Path(folder))) for folder in folders]
        try:
            server = Server(params)
        except (RuntimeError, ValueError, OSError) as error:
            raise Refused(503, f"llama.cpp does not start: {first_line(error)}", "engine_failed") from error
        self._files = list(folders)
        return server

    def _file(self, folder: Path) -> Path:
        """An adapter as GGUF, written where there is no such file.  Raises Refused for what llama.cpp cannot add."""
        own = folder / gguf_adapter.FILE
        if own.is_file():
            return own
        made = self._written / f"{sha256(str(folder).encode()).hexdigest()}.gguf"
        if not made.is_file():
            base = Path(self._settings.base)
            try:
                gguf_adapter.write(folder, read_config(base), base.name, made)
            except (Unusable, JobError) as error:
                way = "Serve it with --engine transformers, or `orchestrator merge` it"
                raise Refused(400, f"{folder.name}: {error}. {way}", "engine_cannot", "model") from None
        return made

    def _body(self, query: Query) -> dict[str, Any]:
        """As llama.cpp's server reads it.  Raises Refused."""
        if query.logprobs is not None:
            raise Refused(400, "logprobs: this engine gives none; --engine transformers does", param="logprobs")
        chosen = query.model.folder
        body = LlamaCppRequest(
            prompt=prompt_tokens(self._tokenizer, query),
            temperature=query.temperature,
            top_p=query.top_p,
            top_k=0 if query.temperature else 1,
            max_tokens=-1 if query.max_tokens is None else query.max_tokens,
            stop=list(query.stop),
            seed=-1 if query.seed is None else query.seed % 2**32,
            ignore_eos=query.ignore_eos,
            lora=[{"id": place, "scale": float(one == chosen)} for place, one in enumerate(self._files)],
        )
        return asdict(body)

    def _compute(self, number: int, body: dict[str, Any]) -> None:
        """In a thread of its own: the call returns at the end of the answer."""
        finish, counts = "stop", (0, 0)

        def take(chunk: Any) -> bool:
            nonlocal finish, counts
            for choice in chunk.get("choices", ()):
                finish = choice.get("finish_reason") or finish
                if text := choice.get("text"):
                    self._answers.put((number, Piece(text)))
            if usage := chunk.get("usage"):
                counts = usage["prompt_tokens"], usage["completion_tokens"]
            return number in self._cancelled  # true ends it

        try:
            self._server.handle_completions(body, take)
            self._answers.put((number, Piece("", [], finish, *counts)))
        except Exception as error:  # whatever the library raises ends this answer and no other
            self._answers.put((number, Refused(500, f"llama.cpp failed: {first_line(error)}", "engine_failed")))


def _check(folder: Path) -> None:
    """Raises Refused for an adapter of a bank that is not what was added."""
    try:
        check_digest(folder)
    except ValueError as error:
        raise Refused(500, f"{folder.name} cannot be loaded: {first_line(error)}", "model_damaged", "model") from error


def _adapter(file: Path) -> Any:
    info = CommonAdapterLoraInfo()
    info.path, info.scale = str(file), 1.0
    return info
