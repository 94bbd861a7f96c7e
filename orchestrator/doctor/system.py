"""This machine: GPUs against the installed torch, ports, disks, shared memory, the clock.  Reads only."""

from __future__ import annotations

import ctypes
import datetime
import shutil
import socket
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from clusters.capability import DeviceCapability
from clusters.hardware.torch_build import TorchBuild, installed_build, why_unusable
from clusters.probe.machine import look_at_this_node
from clusters.safe.cache import cache_folder
from clusters.units import GIB, format_bytes

State = Literal["ok", "absent", "attention"]  # absent: works without it; attention: something will not work
_PORTS = {
    6379: "`orchestrator head`",
    8265: "Ray's dashboard, which takes jobs over HTTP",
    8000: "`orchestrator serve`",
}
_FEW_BYTES = 10 * GIB  # of a disk: a model of 3 GB, its checkpoints and its export
_SHARED_BYTES = 2 * GIB  # Ray keeps objects there, and moves to a disk where it is too small
_UNSYNCHRONISED = 5  # TIME_ERROR of adjtimex(2)
_OLDEST = datetime.date(2026, 1, 1)  # this program is younger


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    name: str
    state: State
    found: str
    fix: str | None = None  # what to type or do
    brings: str | None = None  # what is possible then


def system() -> Iterator[Finding]:
    """What Python and the system are, and whether they train."""
    yield Finding("Python", "ok", ".".join(map(str, sys.version_info[:3])))
    if sys.platform == "linux":
        yield Finding("system", "ok", "Linux")
    else:
        way = "in WSL2 (wsl --install)" if sys.platform == "win32" else "on a Linux machine: submit --cluster"
        yield Finding(
            "system", "absent", f"{sys.platform}: jobs are checked and planned, runs are read", f"train {way}"
        )


def devices() -> Iterator[Finding]:
    """GPUs, their driver against what torch was built for, and what the machine has beside them."""
    node, build = look_at_this_node(), installed_build()
    yield from judge_gpus(node.gpus, build)
    for problem in node.problems:
        yield Finding("GPU", "attention", problem)
    memory = format_bytes(node.memory_bytes) if node.memory_bytes else "of unknown size"
    yield Finding("memory", "ok", f"{memory} usable, {node.num_cores:g} cores")


def judge_gpus(gpus: tuple[DeviceCapability, ...], build: TorchBuild | None) -> Iterator[Finding]:
    """Whether torch as it is built can use each GPU by its driver."""
    if not gpus:
        yield Finding("GPU", "absent", "none is seen: training runs on the CPU")
    for gpu in gpus:
        driver = f"{gpu.name}, driver {gpu.driver_version or 'unknown'}"
        if build is None:
            yield Finding("GPU", "absent", f"{driver}; torch is not installed")
            continue
        what, _, fix = (why_unusable(gpu, build) or "").partition(": ")
        made_for = f"torch {build.version} for CUDA {build.cuda}" if build.cuda else f"torch {build.version}"
        if what:
            yield Finding("GPU", "attention", f"{driver}: {what}", fix)
        else:
            yield Finding("GPU", "ok", f"{driver}, {made_for}")


def ports(of: Mapping[int, str] = _PORTS) -> Iterator[Finding]:
    """The ports that machines meet at."""
    for port, who in of.items():
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                found = f"in use, so {who} cannot take it"
                yield Finding(f"port {port}", "attention", found, "end what holds it, or name another port there")
            else:
                yield Finding(f"port {port}", "ok", f"free for {who}")


def disks(here: Path) -> Iterator[Finding]:
    """Free space where runs and fetched models go, and of Ray's shared memory."""
    for name, folder in (("disk of runs", here), ("disk of the cache", cache_folder())):
        place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        free = shutil.disk_usage(place).free
        fix = f"free some: a model, its checkpoints and its export take up to {format_bytes(_FEW_BYTES)}"
        short = free < _FEW_BYTES
        yield Finding(
            name, "attention" if short else "ok", f"{format_bytes(free)} free in {place}", fix if short else None
        )
    shared = Path("/dev/shm")
    if shared.is_dir() and (size := shutil.disk_usage(shared).total) < _SHARED_BYTES:
        fix = "docker run --shm-size=4g, or leave it: Ray uses a disk instead, more slowly"
        yield Finding("shared memory", "absent", f"{format_bytes(size)} in {shared}", fix)


def clock(today: datetime.date, synchronised: bool | None) -> Finding:
    """Whether the clock is right: tokens, certificates and the order of several machines' events hang on it."""
    if today < _OLDEST:
        return Finding("clock", "attention", f"says {today}, which is past", "set it: sudo timedatectl set-ntp true")
    if synchronised is False:
        return Finding(
            "clock", "absent", "is not synchronised", "sudo timedatectl set-ntp true keeps machines together"
        )
    return Finding("clock", "ok", "synchronised" if synchronised else "whether it is synchronised is not known here")


def is_synchronised() -> bool | None:
    """What Linux knows of its clock; None elsewhere."""
    if sys.platform != "linux":
        return None
    try:
        state = ctypes.CDLL(None).adjtimex(ctypes.create_string_buffer(512))  # struct timex, 208 bytes: asks alone
    except (OSError, AttributeError):
        return None
    return None if state < 0 else state != _UNSYNCHRONISED
