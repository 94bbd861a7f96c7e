"""The HTTP side of a server: the OpenAI API, the chat page, health and metrics.

Without an API key only pages of this server and programs of this machine are answered: a page of another site that
runs in the user's browser is known by its Origin, or by a Host that is no name of this machine.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from orchestrator.language.catalogue import Translator, translator
from orchestrator.serving.address import is_foreign, names_this_machine
from orchestrator.serving.engines.protocol import Piece, Refused
from orchestrator.serving.metrics import ServerMetrics
from orchestrator.serving.openai_api import Answer, error_body, model_body, models_body, parse_request
from orchestrator.serving.router import Router

MOST_BYTES = 10 * 2**20  # of a body
_MOST_READ = 4 * MOST_BYTES  # of one that is too large: a client that still sends does not see the answer
_BODY_S = 30.0  # that a client may take to send it
_PAGE = Path(__file__).with_name("page.html")
_OPEN = ("/", "/health")  # without a key

Handler = Callable[[Request], Awaitable[Response]]


class Door:
    """Answers requests from the models of a router."""

    def __init__(self, router: Router, api_key: str | None) -> None:
        self._router, self._key = router, api_key
        self._metrics = ServerMetrics()

    def app(self) -> Starlette:
        routes = [
            Route("/", self._answering(self._page)),
            Route("/health", self._answering(self._health)),
            Route("/metrics", self._answering(self._show_metrics)),
            Route("/v1/models", self._answering(self._models)),
            Route("/v1/models/{name:path}", self._answering(self._model)),
            Route("/v1/chat/completions", self._answering(self._chat), methods=["POST"]),
            Route("/v1/completions", self._answering(self._complete), methods=["POST"]),
        ]
        return Starlette(routes=routes, exception_handlers={HTTPException: _not_here, Exception: _bug})

    def _answering(self, handler: Handler) -> Handler:
        """A handler whose refusals become answers in the API's form."""

        async def answer(request: Request) -> Response:
            try:
                self._check_caller(request)
                return await handler(request)
            except Refused as refusal:
                path = request.scope["route"].path
                self._metrics.request("", path, refusal.status)
                return _refusal(refusal, request)

        return answer

    def _check_caller(self, request: Request) -> None:
        """Raises Refused for a missing key, and without keys for pages of other sites."""
        host, origin = request.headers.get("host", ""), request.headers.get("origin")
        if is_foreign(origin, host):
            raise Refused(403, f"pages of {origin} may not use this server", "foreign_origin")
        if self._key is None:
            if not names_this_machine(host):
                raise Refused(403, f"{host} is no name of this machine: set an API key", "foreign_host")
        elif request.url.path not in _OPEN:
            scheme, _, key = request.headers.get("authorization", "").partition(" ")
            if scheme.lower() != "bearer" or not hmac.compare_digest(key.strip().encode(), self._key.encode()):
                raise Refused(401, "give the API key: Authorization: Bearer KEY", "invalid_api_key")

    async def _page(self, request: Request) -> Response:
        only_own = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'"
        headers = {"Content-Security-Policy": f"{only_own}; img-src data:; base-uri 'none'; frame-ancestors 'none'"}
        return HTMLResponse(_PAGE.read_text(encoding="utf-8"), headers=headers)

    async def _health(self, request: Request) -> Response:
        states = self._router.states
        down = [state.reason for state in states if not state.is_ready]
        body = {"status": "unavailable" if down else "ok", "models": len(self._router.models)}
        return JSONResponse({**body, "reasons": down} if down else body, 503 if down else 200)

    async def _show_metrics(self, request: Request) -> Response:
        return Response(self._metrics.text(self._router.states), media_type="text/plain; version=0.0.4")

    async def _models(self, request: Request) -> Response:
        return JSONResponse(models_body(self._router.models))

    async def _model(self, request: Request) -> Response:
        return JSONResponse(model_body(self._router.model(request.path_params["name"])))

    async def _chat(self, request: Request) -> Response:
        return await self._generate(request, True)

    async def _complete(self, request: Request) -> Response:
        return await self._generate(request, False)

    async def _generate(self, request: Request, is_chat: bool) -> Response:
        asked = parse_request(await _body(request), is_chat, self._router.model)
        path, name = request.scope["route"].path, asked.query.model.name
        pieces = self._measured(name, _while_connected(request, self._router.generate(asked.query)))
        answer = Answer(asked)
        try:
            if not asked.streams:
                found = [piece async for piece in pieces]
                self._metrics.request(name, path, 200)
                return JSONResponse(answer.whole(found))
            first = await anext(pieces)  # a refusal is still an answer of its own
        except Refused as refusal:
            self._metrics.request(name, path, refusal.status)
            return _refusal(refusal, request)
        except ClientDisconnect:
            self._metrics.request(name, path, 499)
            return Response(status_code=499)
        self._metrics.request(name, path, 200)
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        events = _events(answer, first, pieces, _translator(request))
        return StreamingResponse(events, media_type="text/event-stream", headers=headers)

    async def _measured(self, name: str, pieces: AsyncIterator[Piece]) -> AsyncIterator[Piece]:
        began, is_first = time.perf_counter(), True
        async for piece in pieces:
            if is_first:
                self._metrics.first_piece(name, time.perf_counter() - began)
                is_first = False
            if piece.finish:
                self._metrics.answer(name, [piece], time.perf_counter() - began)
            yield piece


async def _events(
    answer: Answer, first: Piece, pieces: AsyncIterator[Piece], translate: Translator
) -> AsyncIterator[bytes]:
    """The stream of an answer; a failure on the way is an event, as its status was sent long ago."""
    try:
        for chunk in [*answer.opening(), *answer.chunks(first)]:
            yield _event(chunk)
        async for piece in pieces:
            for chunk in answer.chunks(piece):
                yield _event(chunk)
    except Refused as refusal:
        yield _event(error_body(refusal, translate))
    except ClientDisconnect:
        return
    yield b"data: [DONE]\n\n"


def _event(body: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(body, ensure_ascii=False).encode() + b"\n\n"


async def _while_connected(request: Request, pieces: AsyncIterator[Piece]) -> AsyncIterator[Piece]:
    """The pieces, as long as somebody waits for them.  Raises ClientDisconnect; then they are computed no further."""
    gone = asyncio.ensure_future(_disconnected(request))
    coming: asyncio.Future[Piece | None] | None = None
    try:
        while True:
            coming = asyncio.ensure_future(anext(pieces, None))
            await asyncio.wait({gone, coming}, return_when=asyncio.FIRST_COMPLETED)
            if not coming.done():
                raise ClientDisconnect
            piece = coming.result()
            if piece is None:
                return
            yield piece
    finally:
        gone.cancel()
        if coming and not coming.done():
            coming.cancel()
            await asyncio.wait({coming})
        await pieces.aclose()  # type: ignore[attr-defined]


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _body(request: Request) -> bytes:
    """Raises Refused for a body that is too large, or that does not come."""
    parts, size = [], 0
    try:
        async with asyncio.timeout(_BODY_S):
            async for part in request.stream():
                size += len(part)
                if size <= MOST_BYTES:
                    parts.append(part)
                elif size > _MOST_READ:
                    break
    except TimeoutError:
        raise Refused(408, f"the body did not come within {_BODY_S:.0f} s", "timeout") from None
    except ClientDisconnect:
        raise Refused(400, "the body is cut", "invalid_json") from None
    if size > MOST_BYTES:
        raise Refused(413, f"the body is larger than {MOST_BYTES} bytes", "request_too_large")
    return b"".join(parts)


def _translator(request: Request) -> Translator:
    """Translates messages for a browser whose first language is Japanese; programs ask for none and read English."""
    return translator("ja" if request.headers.get("accept-language", "").lower().startswith("ja") else "en")


def _refusal(refusal: Refused, request: Request) -> Response:
    headers = {"WWW-Authenticate": "Bearer"} if refusal.status == 401 else {}
    headers |= {"Retry-After": "1"} if refusal.status in (429, 503) else {}
    headers |= {"Connection": "close"} if refusal.status in (408, 413) else {}  # the rest of the body is not read
    return JSONResponse(error_body(refusal, _translator(request)), refusal.status, headers)


async def _not_here(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _refusal(Refused(error.status_code, f"{request.method} {request.url.path}: {error.detail}"), request)


async def _bug(request: Request, error: Exception) -> Response:
    """Ours: the client gets an answer, the server's output the traceback."""
    failed = f"{request.method} {request.url.path}: the server failed ({type(error).__name__})"
    return _refusal(Refused(500, failed), request)
