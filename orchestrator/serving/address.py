"""Where a server listens, and which requests come from elsewhere."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import socket
from urllib.parse import urlsplit

from orchestrator.errors import JobError

_LOCAL = ("localhost", "127.0.0.1", "::1")


def listen(host: str, port: int) -> socket.socket:
    """The socket; port 0 is any free one.  Raises JobError for an address that cannot be had."""
    try:
        # With its protocol: of a socket without one asyncio does not switch Nagle's algorithm off, and each answer on a
        # connection that is kept open waits 40 ms for the client's delayed acknowledgement.
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP)
        family, kind, protocol, _, place = found[0]
        listening = socket.socket(family, kind, protocol)
    except OSError as error:
        raise JobError(f"--host {host}: {error.strerror or error}") from None
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind(place)
        listening.listen(128)
    except OSError as error:
        listening.close()
        if error.errno == errno.EADDRINUSE:
            raise JobError(f"--port {port}: another program listens there; choose another, or 0 for any") from None
        raise JobError(f"--host {host} --port {port}: {error.strerror or error}") from None
    return listening


def url_of(host: str, listening: socket.socket) -> str:
    """The address of a server's page, without a slash behind it."""
    return f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}"


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a host's address."""
    if host == "localhost":
        return True
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return False


def names_this_machine(host: str) -> bool:
    """Whether a Host header is a name of this machine: a page of another site that had its own name resolved to the
    loopback address (DNS rebinding) sends that name.
    """
    with contextlib.suppress(ValueError):
        return urlsplit(f"//{host}").hostname in _LOCAL
    return False


def is_foreign(origin: str | None, host: str) -> bool:
    """Whether a request comes from a page of another site, by its Origin and Host headers."""
    return bool(origin) and urlsplit(origin).netloc != host
