"""The routes, who may ask, and the two streams of server-sent events.

A stream's ids say all that a client has: of the table the number of the last change, of a run the byte up to which its
events were sent.  A client that comes back with its last id gets what followed, and one whose id means nothing any more
gets everything; so nothing is kept for clients, and nothing is missed, also after this server was started again.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, RedirectResponse, Response
from starlette.responses import StreamingResponse as Streaming
from starlette.routing import Route

from orchestrator.dashboard import run_page
from orchestrator.dashboard.board import Board
from orchestrator.dashboard.verbs import ClusterView, Reports, VerbError
from orchestrator.dashboard.words import words_in
from orchestrator.errors import JobError
from orchestrator.language.catalogue import translator
from orchestrator.language.choice import LANGUAGES
from orchestrator.runs.run_folder import RunFolder
from orchestrator.serving.address import is_foreign, names_this_machine

_HERE = Path(__file__).parent
_FILES = {"page.css": "text/css", "page.js": "text/javascript", "chart.js": "text/javascript"}
_COOKIE = "orchestrator-dashboard"
_TABLE_S, _RUN_S = 2.0, 1.0  # between two looks
_QUIET_S = 15.0  # after which a stream says that it is alive
_PIECE_BYTES = 2**20  # of events that are read at a time
_MOST_BEHIND_BYTES = 2**23  # a client that lacks more gets the curve as a whole
_OWN = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:"
_STILL = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"  # a report: no script runs in it
_NO_FRAMES = "; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
    "Content-Security-Policy": _OWN + _NO_FRAMES,
}

Handler = Callable[[Request], Awaitable[Response]]
Message = tuple[str, Any, str | None]  # kind, values, id


class Site:
    """Answers requests about a board's runs.  Only GET: nothing here changes anything."""

    def __init__(self, board: Board, cluster: str | None, lang: str, token: str | None) -> None:
        self._board, self._lang, self._token = board, lang, token
        self._cluster = ClusterView(cluster) if cluster else None
        self._reports = Reports()
        self._life = secrets.token_hex(4)  # of this server: numbers of changes mean nothing to another

    def app(self) -> Starlette:
        routes = {
            "/": self._page,
            "/run/{run}": self._page,
            "/static/{name}": self._file,
            "/api/runs": self._table,
            "/api/runs/events": self._table_events,
            "/api/runs/{run}/events": self._run_events,
            "/api/nodes": self._nodes,
            "/report/{run}": self._report,
        }
        return Starlette(routes=[Route(path, self._guarded(handler)) for path, handler in routes.items()])

    def _guarded(self, handler: Handler) -> Handler:
        async def answer(request: Request) -> Response:
            refusal = self._refusal(request) or await handler(request)
            for name, value in _HEADERS.items():
                refusal.headers.setdefault(name, value)
            return refusal

        return answer

    def _refusal(self, request: Request) -> Response | None:
        """An answer to who may not ask: a page of another site, a name that was bent to this address, no token."""
        host, origin = request.headers.get("host", ""), request.headers.get("origin")
        if is_foreign(origin, host) or _is_read_by_another_site(request):
            return PlainTextResponse("pages of other sites may not read this one", 403)
        if self._token is None:
            return None if names_this_machine(host) else PlainTextResponse(f"{host} is no name of this machine", 403)
        if _same(request.cookies.get(_COOKIE), self._token):
            return None
        if not _same(request.query_params.get("token"), self._token):
            return PlainTextResponse("open the address that `orchestrator dashboard` printed, with its token", 401)
        answer = RedirectResponse(request.url.path, 303)  # the token leaves the address bar
        answer.set_cookie(_COOKIE, self._token, httponly=True, samesite="lax")
        return answer

    def _lang_of(self, request: Request) -> str:
        asked = request.query_params.get("lang")
        return asked if asked in LANGUAGES else self._lang

    def _run(self, request: Request) -> RunFolder | None:
        return self._board.run(request.path_params["run"])

    async def _page(self, request: Request) -> Response:
        lang = self._lang_of(request)
        found = {
            "lang": lang,
            "own": self._lang,
            "folder": str(self._board.folder),
            "cluster": self._cluster.address if self._cluster else None,
            "words": words_in(translator(lang)),
        }
        text = json.dumps(found, ensure_ascii=False).replace("<", "\\u003c")
        page = (_HERE / "page.html").read_text(encoding="utf-8")
        return HTMLResponse(page.replace("{{ lang }}", lang).replace("{{ settings }}", text))

    async def _file(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name not in _FILES:
            return _nothing_here()
        return Response((_HERE / name).read_bytes(), media_type=_FILES[name], headers={"Cache-Control": "no-cache"})

    async def _table(self, request: Request) -> Response:
        rows, _ = await asyncio.to_thread(self._board.since, 0)
        while self._board.is_behind:
            rows, _ = await asyncio.to_thread(self._board.since, 0)
        return JSONResponse({"folder": str(self._board.folder), "runs": rows})

    async def _table_events(self, request: Request) -> Response:
        return _stream(self._table_messages(_last_id(request)))

    async def _table_messages(self, last_id: str) -> AsyncIterator[Message]:
        life, _, number = last_id.partition("-")
        is_known = life == self._life and number.isdecimal()
        serial, first = (int(number) if is_known else 0), not is_known
        while True:
            rows, latest = await asyncio.to_thread(self._board.since, serial)
            if rows or first:
                yield "all" if first else "rows", rows, f"{self._life}-{latest}"
            serial, first = latest, False
            if self._board.is_behind:
                continue
            await asyncio.sleep(_TABLE_S)
            yield "", None, None

    async def _run_events(self, request: Request) -> Response:
        run = self._run(request)
        if run is None or run.kind != "run":
            return _nothing_here()
        return _stream(self._run_messages(run, _last_id(request), self._lang_of(request)))

    async def _run_messages(self, run: RunFolder, last_id: str, lang: str) -> AsyncIterator[Message]:
        reader = _RunReader(self._board, run, lang, int(last_id) if last_id.isdecimal() else None)
        while True:
            for message in await asyncio.to_thread(reader.read):
                yield message
            if reader.is_behind:
                continue
            await asyncio.sleep(_RUN_S)
            yield "", None, None

    async def _nodes(self, request: Request) -> Response:
        return JSONResponse(await self._cluster.nodes()) if self._cluster else _nothing_here()

    async def _report(self, request: Request) -> Response:
        run = self._run(request)
        if run is None:
            return _nothing_here()
        try:
            page = await self._reports.html(run.path.absolute(), self._lang_of(request))
        except VerbError as error:
            return PlainTextResponse(str(error), 409)
        return HTMLResponse(page, headers={"Content-Security-Policy": _STILL + _NO_FRAMES})


class _RunReader:
    """Reads for one client what a run's page shows, from where that client is."""

    def __init__(self, board: Board, run: RunFolder, lang: str, offset: int | None) -> None:
        self._board, self._run, self._w, self._offset = board, run, translator(lang), offset
        self._last: dict[str, Any] = {}  # what was sent of what changes
        self._logs: dict[str, int] = {}  # file -> offset
        self.is_behind = False

    def read(self) -> list[Message]:
        """What is to be sent now; `is_behind` afterwards where there is more."""
        try:
            found = self._board.follow(self._run)
            plan = self._board.plan(self._run)
            messages, end = list[Message](), found.num_bytes
            if self._offset is None or not self._follows(end):
                messages.append(("whole", run_page.whole(self._run, found.summary, plan, self._w), str(end)))
                self._offset = end
            elif self._offset < end:
                events, self._offset = self._run.events(self._offset, min(_PIECE_BYTES, end - self._offset))
                last_step = found.summary.last_step.step if found.summary.last_step else 0
                messages.append(("more", run_page.since(events, last_step), str(self._offset)))
            self.is_behind = self._offset < end
            now = {
                "row": self._board.row(self._run),
                **run_page.now(found.summary, plan, self._w),
            }
        except JobError as error:
            self.is_behind, messages, now = False, [], {"row": {"state": "damaged", "damage": str(error)}}
        if now != self._last:
            messages.append(("now", now, None))
            self._last = now
        return messages + self._new_logs()

    def _follows(self, end: int) -> bool:
        """Whether what the client has are the first bytes of the events, or may be."""
        offset = self._offset or 0
        if offset > end or end - offset > _MOST_BEHIND_BYTES:
            return False
        if offset == 0:
            return True
        with (self._run.path / "events.jsonl").open("rb") as stream:
            stream.seek(offset - 1)
            return stream.read(1) == b"\n"

    def _new_logs(self) -> list[Message]:
        found = list[Message]()
        for file in run_page.log_files(self._run):
            known = self._logs.get(file.name)
            text, self._logs[file.name] = run_page.log_tail(file, known)
            if text:
                found.append(("log", {"file": file.name, "text": text, "is_first": known is None}, None))
        return found


def _stream(messages: AsyncIterator[Message]) -> Response:
    return Streaming(_encoded(messages), media_type="text/event-stream", headers={"X-Accel-Buffering": "no"})


async def _encoded(messages: AsyncIterator[Message]) -> AsyncIterator[bytes]:
    """https://html.spec.whatwg.org/multipage/server-sent-events.html; a message without an id leaves the last one."""
    yield b"retry: 2000\n\n"
    quiet_since = time.monotonic()
    async for kind, values, number in messages:
        if kind:
            head = f"event: {kind}\n" + (f"id: {number}\n" if number is not None else "")
            yield f"{head}data: {json.dumps(values, ensure_ascii=False)}\n\n".encode("utf-8", "replace")
        elif time.monotonic() - quiet_since < _QUIET_S:
            continue
        else:
            yield b": alive\n\n"
        quiet_since = time.monotonic()


def _last_id(request: Request) -> str:
    """The last id that a client got: the browser's header, or of a page that opens its stream again the parameter."""
    return request.headers.get("last-event-id") or request.query_params.get("after", "")


def _is_read_by_another_site(request: Request) -> bool:
    """Whether the browser says so; a link that somebody follows, as in a terminal that is a page, is none."""
    fetch = {name: request.headers.get(f"sec-fetch-{name}") for name in ("site", "mode", "dest")}
    return fetch["site"] == "cross-site" and (fetch["mode"], fetch["dest"]) != ("navigate", "document")


def _same(given: str | None, token: str) -> bool:
    return given is not None and hmac.compare_digest(given.encode(), token.encode())


def _nothing_here() -> Response:
    return PlainTextResponse("nothing is here", 404)
