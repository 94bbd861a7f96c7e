"""Whether workers can connect to each other directly, as gloo and NCCL do for every pair before training starts.

Behind NAT or a firewall a machine reaches the cluster's head and no other machine reaches it.  PyTorch then waits for
as long as the slowest machine may take to start, a quarter of an hour, and names no machine.  Here every worker listens
on the address that the others will use, all try all within seconds, and what failed is named.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

from clusters.hardware.interfaces import GLOO, address_of
from clusters.safe.reading import first_line
from orchestrator.errors import RunFailed

PATIENCE_S = 5.0
_AT_ONCE = 32
_MOST_NAMED = 4
_listening: list[socket.socket] = []

Address = tuple[str, int]


def refuse_unreachable(execute: Callable[..., list[Any]], address: Callable[[], str], names: Sequence[str]) -> None:
    """Raises RunFailed where a worker cannot connect to another one, with both names, the address and the port.

    `execute` runs a function on every worker, by rank, as Ray Train's worker group does; `address` gives the one by
    which the cluster knows a worker's machine; `names` are the workers' nodes.
    """
    if len(names) < 2:
        return
    try:
        places: list[Address] = execute(_listen, address)
        failed: list[dict[int, str]] = execute(try_connections, places)
    finally:
        execute(_stop_listening)
    found = [(one, other, why) for one, reasons in enumerate(failed) for other, why in reasons.items() if one != other]
    if not found:
        return
    texts = [
        f"{names[one]} cannot connect to {names[other]} at {places[other][0]}, port {places[other][1]} ({why})"
        for one, other, why in found[:_MOST_NAMED]
    ]
    more = f"; and {len(found) - _MOST_NAMED} more pairs" if len(found) > _MOST_NAMED else ""
    raise RunFailed(
        f"{'; '.join(texts)}{more}. Workers connect to each other directly, at any port: open the firewall between"
        f" these machines, join them by a VPN whose addresses the cluster is started with, or set {GLOO} to the network"
        " interface that the others reach"
    )


def try_connections(places: Sequence[Address]) -> dict[int, str]:
    """Try to connect to each of the places; the number of each that failed, and why."""
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        reasons = list(pool.map(_why_not, places))
    return {number: reason for number, reason in enumerate(reasons) if reason is not None}


def _why_not(place: Address) -> str | None:
    try:
        socket.create_connection(place, timeout=PATIENCE_S).close()
    except TimeoutError:
        return f"no answer within {PATIENCE_S:.0f} s"
    except OSError as error:
        return error.strerror or first_line(error)
    return None


def _listen(address: Callable[[], str]) -> Address:
    """Listen where the other workers will connect to this one.  The kernel answers; nobody has to accept."""
    chosen = address_of(os.environ.get(GLOO, "").split(",")[0])
    listener = socket.create_server((chosen or address(), 0), backlog=1024)
    _listening.append(listener)
    return listener.getsockname()[:2]


def _stop_listening() -> None:
    while _listening:
        _listening.pop().close()


def store_at(address: str, port: int, size: int, timeout: timedelta, listener: socket.socket | None = None) -> Any:
    """The store through which `size` workers connect; the worker with the `listener` serves it, on its address only."""
    from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

    own = listener.detach() if listener else None
    return TCPStore(address, port, size, listener is not None, timeout, master_listen_fd=own)
