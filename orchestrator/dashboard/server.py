"""Answers at an address until it is asked to end."""

from __future__ import annotations

import secrets
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import uvicorn

from orchestrator.dashboard.board import Board
from orchestrator.dashboard.site import Site
from orchestrator.serving.address import is_loopback, url_of


@dataclass(frozen=True)
class Settings:
    """What the page is about, and who may see it."""

    folder: Path
    host: str = "127.0.0.1"
    cluster: str | None = None  # HOST:PORT, whose machines are shown
    lang: str = "en"

    def make_token(self) -> str | None:
        """A token for those who open the page; None where only this machine reaches it."""
        return None if is_loopback(self.host) else secrets.token_urlsafe(24)


async def serve(settings: Settings, listening: socket.socket, begun: Callable[[str], None]) -> None:
    """Until a signal.  `begun` gets the page's address when it answers."""
    token = settings.make_token()
    site = Site(Board(settings.folder), settings.cluster, settings.lang, token)
    config = uvicorn.Config(
        site.app(),
        log_config=None,  # uvicorn's own closes the handlers of this process
        log_level="warning",
        access_log=False,
        lifespan="off",
        timeout_graceful_shutdown=1,  # a stream ends only where somebody ends it
    )
    server = uvicorn.Server(config)
    begun(f"{url_of(settings.host, listening)}/{f'?token={token}' if token else ''}")
    try:
        await server.serve([listening])
    finally:
        listening.close()
