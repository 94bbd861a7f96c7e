"""An engine of ours in a process of its own, spoken to in JSON lines.

When the process dies, queries whose computation had begun are refused with the reason, those that still waited are
sent again, and it is started anew: at once, then less and less often while it dies before it answers anything.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from orchestrator.serving.engines.protocol import EngineState, Piece, Query, Refused, ServedModel, scores_of
from strategies.step import host_memory

_ROOT = Path(__file__).resolve().parents[3]
_LINE_BYTES = 2**26
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.2, 60.0
_ENDING_S = 5.0


@dataclass
class _Asked:
    """A query on its way, and where its pieces go."""

    query: Query
    pieces: asyncio.Queue[Piece | Refused] = field(default_factory=asyncio.Queue)
    is_begun: bool = False


class ProcessEngine:
    """Keeps one engine process alive."""

    def __init__(self, settings: Mapping[str, Any], say: Callable[[str], None] = lambda text: None) -> None:
        """`settings` are those of `EngineSettings`."""
        self._settings, self._say = settings, say
        self._asked: dict[int, _Asked] = {}
        self._next = 0
        self._process: asyncio.subprocess.Process | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._is_ready = asyncio.Event()
        self._reason: str | None = "it is starting"
        self._restarts, self._counts = 0, {}
        self._pause_s = _FIRST_PAUSE_S

    @property
    def state(self) -> EngineState:
        ready = self._is_ready.is_set()
        reason = None if ready else self._reason
        kind = self._settings.get("engine", "transformers")
        return EngineState(kind, self._settings["base"], ready, reason, self._restarts, self._counts)

    @property
    def process_id(self) -> int | None:
        return self._process.pid if self._process else None

    async def start(self) -> None:
        """Raises Refused where it does not come up."""
        begun = asyncio.get_running_loop().create_future()
        self._keeper = asyncio.create_task(self._keep(begun))
        await begun

    async def generate(self, query: Query) -> AsyncIterator[Piece]:
        self._next += 1
        number, asked = self._next, _Asked(query)
        self._asked[number] = asked
        if self._is_ready.is_set():
            self._write({"number": number, "query": asdict(query)})
        try:
            while True:
                answer = await asked.pieces.get()
                if isinstance(answer, Refused):
                    raise answer
                yield answer
                if answer.finish:
                    return
        finally:
            if self._asked.pop(number, None) and self._is_ready.is_set():
                self._write({"cancel": number})  # does nothing where it has ended

    async def unload(self, model: ServedModel) -> None:
        if model.folder and self._is_ready.is_set():
            self._write({"forget": model.folder})

    async def stop(self) -> None:
        if self._keeper:
            self._keeper.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._keeper
        await self._end_process()

    async def _end_process(self) -> None:
        process = self._process
        if process and process.returncode is None:
            if process.stdin:
                process.stdin.close()  # which ends it
            try:
                await asyncio.wait_for(process.wait(), _ENDING_S)
            except TimeoutError:
                process.kill()
                await process.wait()

    async def _keep(self, begun: asyncio.Future[None]) -> None:
        """Run the process, again and again."""
        while True:
            try:
                failure = await self._run(begun)
            except (OSError, ValueError) as error:  # it cannot be started; it writes what is no message
                failure = f"the engine's process does not answer: {error}"
                await self._end_process()
            self._is_ready.clear()
            self._reason = failure
            if not begun.done():
                begun.set_exception(Refused(503, failure, "engine_failed"))
                return
            self._say(f"{failure}; it is started again")
            self._refuse_begun(f"{failure}; it is started again. Send the request once more")
            await asyncio.sleep(self._pause_s)
            self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)
            self._restarts += 1

    async def _run(self, begun: asyncio.Future[None]) -> str:
        """One process from its start to its end; why it ended."""
        paths = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH"))))
        process = self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "orchestrator.serving.engines.host"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env={**host_memory.process_environment(), **os.environ, "PYTHONPATH": paths},
            start_new_session=True,  # Ctrl-C is the server's, which then ends it
            limit=_LINE_BYTES,
        )
        self._write({"settings": dict(self._settings)})
        assert process.stdout
        failure = None
        async for line in process.stdout:
            message = json.loads(line)
            if "failed" in message:
                failure = message["failed"]
            elif "ready" in message:
                self._take_up(begun)
            else:
                self._receive(message)
        code = await process.wait()
        if failure:
            self._refuse_all(failure)
        return failure or f"the engine's process ended ({_cause(code)})"

    def _take_up(self, begun: asyncio.Future[None]) -> None:
        """It can answer: send what waited meanwhile."""
        self._is_ready.set()
        if not begun.done():
            begun.set_result(None)
        for number, asked in self._asked.items():
            if not asked.is_begun:
                self._write({"number": number, "query": asdict(asked.query)})

    def _receive(self, message: dict[str, Any]) -> None:
        if "counts" in message:
            self._counts = message["counts"]
            return
        asked = self._asked.get(message.pop("number"))
        if asked is None:
            return  # nobody waits for it any more
        if "begun" in message:
            asked.is_begun = True
        elif "refused" in message:
            asked.pieces.put_nowait(Refused(**message["refused"]))
        else:
            self._pause_s = _FIRST_PAUSE_S
            message["scores"] = scores_of(message["scores"])
            asked.pieces.put_nowait(Piece(**message))

    def _refuse_begun(self, reason: str) -> None:
        for asked in self._asked.values():
            if asked.is_begun:
                asked.pieces.put_nowait(Refused(503, reason, "engine_failed"))

    def _refuse_all(self, reason: str) -> None:
        """It cannot even start: nobody waits for it."""
        for asked in self._asked.values():
            asked.pieces.put_nowait(Refused(503, reason, "engine_failed"))

    def _write(self, message: Mapping[str, Any]) -> None:
        if self._process and self._process.stdin and not self._process.stdin.is_closing():
            self._process.stdin.write(json.dumps(message).encode() + b"\n")


def _cause(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else str(-code)
    return f"{name}: the system ends what takes too much memory so" if name == "SIGKILL" else name
