"""Runs a server: binds its address, starts its engines, answers until it is asked to end."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import uvicorn

from orchestrator.errors import ClusterError, JobError
from orchestrator.serving.address import is_loopback, listen
from orchestrator.serving.catalog import Catalog
from orchestrator.serving.door import Door
from orchestrator.serving.engines.protocol import Refused
from orchestrator.serving.router import Build, Router

_ENDING_S = 5  # that answers on their way may still take


@dataclass(frozen=True)
class Address:
    """Where a server listens, and the key it asks for."""

    host: str = "127.0.0.1"
    port: int = 8000  # 0: any free one
    api_key: str | None = None


def bind(address: Address) -> socket.socket:
    """The socket.  Raises JobError for an address that cannot be had, or one that needs a key."""
    if address.api_key is None and not is_loopback(address.host):
        raise JobError(
            f"--host {address.host}: other machines could use this server, so it needs a key: give one with"
            " --api-key-file FILE or the variable ORCHESTRATOR_API_KEY, or leave --host out"
        )
    return listen(address.host, address.port)


async def serve(
    catalog: Catalog, build: Build, listening: socket.socket, api_key: str | None, begun: Callable[[], None]
) -> None:
    """Until a signal, or the task is cancelled.  `begun` is called when it answers.  Raises ClusterError."""
    router = Router(catalog, build)
    app = Door(router, api_key).app()
    config = uvicorn.Config(
        app,
        log_config=None,  # uvicorn's own closes the handlers of this process, and absl's then closes standard error
        log_level="warning",
        access_log=False,
        lifespan="off",
        timeout_graceful_shutdown=_ENDING_S,
    )
    server = uvicorn.Server(config)
    try:
        await router.start()
        begun()
        await server.serve([listening])
    except asyncio.CancelledError:
        if server.started:
            await server.shutdown([listening])  # answers on their way end first
        raise
    except Refused as refusal:
        raise ClusterError(refusal.message) from None
    finally:
        listening.close()  # uvicorn does it where it ends by itself, not where the task is cancelled
        await router.stop()


@contextlib.contextmanager
def serving(catalog: Catalog, build: Build) -> Iterator[Address]:
    """A server in a thread of this process inside the block, for it alone: it has a key that nobody else knows.

    Raises ClusterError where it does not start.
    """
    key, began, loop = secrets.token_urlsafe(), threading.Event(), asyncio.new_event_loop()
    listening = bind(Address(port=0, api_key=key))
    failures: list[BaseException] = []
    task = loop.create_task(serve(catalog, build, listening, key, began.set))

    def run() -> None:
        asyncio.set_event_loop(loop)
        try:
            loop.run_until_complete(task)
        except asyncio.CancelledError:
            pass
        except BaseException as error:
            failures.append(error)
        finally:
            began.set()
            loop.close()

    thread = threading.Thread(target=run, name="server")
    thread.start()
    try:
        began.wait()
        if failures:
            raise failures[0]
        yield Address("127.0.0.1", listening.getsockname()[1], key)
    finally:
        with contextlib.suppress(RuntimeError):  # it has ended by itself
            loop.call_soon_threadsafe(task.cancel)
        thread.join()
