"""Ways to reach a Ray cluster: embedded on this machine, or one that runs already."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SLOT = "train_slot"  # one for each device that trains
_KNOCK_S = 5.0
_OBJECT_STORE_BYTES = 100 * 2**20  # nothing large travels through it: data and checkpoints go by path


class CannotConnect(Exception):
    """No cluster at the address; the text says which and why."""


@dataclass(frozen=True)
class Connection:
    """What one training worker asks the cluster for."""

    slot_resources: dict[str, float]


def _refuse_unreachable(address: str) -> None:
    """Knock at HOST:PORT first: Ray itself would try for minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_KNOCK_S).close()
    except (OSError, OverflowError) as error:
        raise CannotConnect(f"no Ray cluster at {address!r}: {error}") from error


def _show_token() -> None:
    """Clusters of `orchestrator head` let in who has their token; Ray itself looks for it only when told to."""
    known = "RAY_AUTH_TOKEN" in os.environ or (Path.home() / ".ray" / "auth_token").is_file()
    if known or "RAY_AUTH_TOKEN_PATH" in os.environ:
        os.environ.setdefault("RAY_AUTH_MODE", "token")


def _keep_quiet() -> None:
    """Ray prints what nodes say of dying workers to our standard output, where `--json` belongs."""
    from ray._private import worker

    def to_the_log(data: dict[str, Any], **_: Any) -> None:
        logging.getLogger("ray.cluster").info("%s", data.get("lines"))

    if hasattr(worker, "print_to_stdstream"):  # a private name of Ray 2.60
        worker.print_to_stdstream = to_the_log


@contextlib.contextmanager
def connect(address: str, num_slots: int, cores_per_slot: int) -> Iterator[Connection]:
    """Connect for the length of the block; `local` starts Ray here and ends it after.

    Raises CannotConnect.
    """
    if address != "local":
        _show_token()  # before Ray is loaded: it looks once
    import ray

    # Ray reads this when it starts its processes: nothing of a user's cluster is reported anywhere.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Workers learn their device from the plan; Ray must not hide GPUs from a worker that asked for a slot.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")  # how soon the end of the work is seen
    quiet = {"logging_level": logging.ERROR, "log_to_driver": False, "configure_logging": True}
    _refuse_unreachable(address)
    try:
        if address == "local":
            ray.init(
                address="local",
                num_cpus=num_slots * cores_per_slot,
                num_gpus=0,
                resources={SLOT: num_slots},
                object_store_memory=_OBJECT_STORE_BYTES,
                include_dashboard=False,
                **quiet,
            )
        else:
            ray.init(address=address, **quiet)
    except Exception as error:  # ConnectionError, RuntimeError, TimeoutError ... by Ray's mood
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if address != "local" and os.environ.get("RAY_AUTH_MODE") != "token":
            reason += ". If it was started by `orchestrator head`, copy its token to ~/.ray/auth_token first"
        raise CannotConnect(f"no Ray cluster at {address!r}: {reason}") from error
    _keep_quiet()
    try:
        slots = {SLOT: 1.0} if ray.cluster_resources().get(SLOT) else {}
        yield Connection(slots or {"CPU": float(cores_per_slot)})
    finally:
        ray.shutdown()
