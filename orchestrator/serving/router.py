"""Models to engines: one engine for each base model, started when the server starts or when it is first needed."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

from clusters.safe.reading import printable
from orchestrator.errors import JobError
from orchestrator.serving.catalog import Catalog, ServedBase
from orchestrator.serving.engines.protocol import EngineState, Piece, Query, Refused, ServedModel, ServingEngine
from strategies.adapter_bank.card import BankError

_LOOK_S = 1.0  # between two looks at the bank
MOST_WAITING = 256  # queries at a time, those that are computed included

Build = Callable[[ServedBase], ServingEngine]


class Router:
    """Answers queries by the engine of their model's base, and keeps up with the bank."""

    def __init__(self, catalog: Catalog, build: Build) -> None:
        self._catalog, self._build = catalog, build
        self._models = catalog.models
        self._engines: dict[str, ServingEngine] = {}  # by folder of the base
        self._starting = asyncio.Lock()  # one after the other: each sees how much memory the others left
        self._follower: asyncio.Task[None] | None = None
        self._num_open = 0

    @property
    def models(self) -> list[ServedModel]:
        return list(self._models.values())

    @property
    def states(self) -> list[EngineState]:
        return [engine.state for engine in self._engines.values()]

    def model(self, name: str) -> ServedModel:
        """Raises Refused for a name that is not served."""
        if found := self._models.get(name):
            return found
        message = f"the model {printable(name[:200])!r} is not served here; GET /v1/models lists those that are"
        raise Refused(404, message, "model_not_found", "model")

    async def start(self) -> None:
        """Start an engine for every base.  Raises Refused where one cannot start."""
        for folder in dict.fromkeys(model.base for model in self._models.values()):
            await self._engine(folder)
        self._follower = asyncio.create_task(self._follow())

    async def stop(self) -> None:
        if self._follower:
            self._follower.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._follower
        for engine in self._engines.values():
            await engine.stop()

    async def generate(self, query: Query) -> AsyncIterator[Piece]:
        """Raises Refused."""
        if self._num_open >= MOST_WAITING:
            raise Refused(429, f"{MOST_WAITING} requests are on their way; try again later", "too_many_requests")
        self._num_open += 1
        try:
            engine = await self._engine(query.model.base)
            async with contextlib.aclosing(engine.generate(query)) as pieces:  # type: ignore[type-var]
                async for piece in pieces:
                    yield piece
        finally:
            self._num_open -= 1

    async def _engine(self, folder: str) -> ServingEngine:
        async with self._starting:
            if folder not in self._engines:
                base = next(base for base in self._catalog.bases.values() if base.folder == folder)
                engine = self._build(base)
                await engine.start()
                self._engines[folder] = engine
            return self._engines[folder]

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_S)
            try:
                gone = await asyncio.to_thread(self._catalog.refresh)
            except (BankError, JobError, OSError) as error:
                self._catalog.say(str(error))
                continue
            self._models = self._catalog.models
            for model in gone:
                if engine := self._engines.get(model.base):
                    await engine.unload(model)
