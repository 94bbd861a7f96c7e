"""Processes of a head that wait with the libraries loaded, started again while no job computes.

Ray gives an actor a process that waits if its environment is the one asked for.  Each trains once and ends, so nothing
of a job is left for the next.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_LOOK_EVERY_S = 1.0
_PATIENCE_S = 60.0  # until one that was asked for is counted as missing again
_KEEP_S = 365 * 24 * 3600  # Ray ends a process that waits longer
_ASK_S = 20.0
_IDLE, _OF_RAY = "ray::IDLE", "ray::"
_SERVICES = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Spares:
    """Processes that a head keeps waiting for jobs of its machine."""

    count: int
    environment: Mapping[str, str]
    manager_port: int  # of the head's raylet, which starts them


def free_port() -> int:
    """A port that nobody has now."""
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


def keep_spares(
    count: int, node: int, ask: Callable[[int], None], is_over: Callable[[], bool], look_every_s: float = _LOOK_EVERY_S
) -> None:
    """Keep `count` processes waiting below the process `node` until it is over; `ask` starts so many more."""
    asked_at = -_PATIENCE_S
    while not is_over():
        titles = [one for one in titles_below(node) if one.startswith(_OF_RAY) and one not in _SERVICES]
        missing = count - titles.count(_IDLE)
        if len(titles) > titles.count(_IDLE):  # a job computes
            asked_at = -_PATIENCE_S
        elif missing > 0 and time.monotonic() - asked_at > _PATIENCE_S:
            asked_at = time.monotonic()
            ask(missing)
        time.sleep(look_every_s)


def titles_below(pid: int) -> list[str]:
    """What the descendants of a process call themselves."""
    found = []
    for thread in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            for child in thread.read_text().split():
                title = Path(f"/proc/{child}/cmdline").read_bytes().split(b"\0")[0].decode(errors="replace")
                found += [title, *titles_below(int(child))]
    return found


def start_spares(node_manager: str, token: Path, environment: Mapping[str, str], count: int) -> None:
    """Ask the raylet at HOST:PORT for processes with this environment.  What fails costs time, and is logged."""
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    try:
        from ray._private.grpc_utils import init_grpc_channel
        from ray.core.generated import common_pb2, node_manager_pb2, node_manager_pb2_grpc
        from ray.runtime_env import RuntimeEnv

        messages: Any = node_manager_pb2
        languages: Any = common_pb2
        wanted = messages.PrestartWorkersRequest(
            language=languages.PYTHON, num_workers=count, keep_alive_duration_secs=_KEEP_S
        )
        wanted.runtime_env_info.serialized_runtime_env = RuntimeEnv(env_vars=dict(environment)).serialize()
        opened: Any = init_grpc_channel(node_manager)
        with opened as channel:
            node_manager_pb2_grpc.NodeManagerServiceStub(channel).PrestartWorkers(wanted, timeout=_ASK_S)
    except Exception as error:  # private names of Ray 2.60; the raylet is ending
        _log.warning("no process waits for jobs of this machine: %s", error)
