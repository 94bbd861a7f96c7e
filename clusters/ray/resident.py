"""The Ray that `orchestrator head` keeps running on this machine, for jobs of the same user and this machine alone.

A head leaves a record in the user's cache folder, which is nobody else's to write.  It names the process that wrote it
by its number and start, so that a killed head or a boot leaves nothing that is believed; who reads it knocks first.
One job at a time uses it, with the environment of whoever submits it, in processes that train once and end.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import stat
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from clusters.safe import locking
from clusters.safe.cache import cache_folder
from clusters.safe.reading import BadInput, read_json, record
from clusters.safe.writing import write_whole

_KNOCK_S = 1.0
_MAX_BYTES = 2**16
RAY_NICENESS = 15  # of workers, where nothing else is said
# Read by libraries when a process loads them: a process that has loaded them ahead is of its head's values.
_READ_AT_START = ("CUDA_", "GOMP_", "HIP_", "KMP_", "LD_", "MALLOC_", "MKL_", "OMP_", "PYTORCH_", "TORCH_")
_READ_AT_START += ("HF_HOME", "HF_HUB_", "LRU_CACHE_", "NVIDIA_", "ONEDNN_", "OPENBLAS_", "ROCR_", "TRANSFORMERS_")
_READ_AT_START += ("PYTHONHASHSEED", "PYTHONPATH")
_OF_RAY = ("RAY_", "__RAY")
_HOOK = "__RAY_WORKER_PROCESS_SETUP_HOOK_ENV_VAR"  # of Ray 2.60: a function that each new process calls


@dataclass(frozen=True)
class Resident:
    """A head that runs on this machine."""

    address: str  # HOST:PORT
    token_file: str
    pid: int
    started: str  # when its process began, as the kernel counts
    boot: str
    software: dict[str, str]
    environment: dict[str, str]  # what libraries read when they are loaded
    num_slots: int
    nice: int


def describe(address: str, token_file: Path, num_slots: int, environment: Mapping[str, str]) -> Resident:
    """This process, which keeps a head whose processes have this environment."""
    nice = environment.get("RAY_worker_niceness", "")
    return Resident(
        address=address,
        token_file=str(token_file.absolute()),
        pid=os.getpid(),
        started=_started(os.getpid()) or "",
        boot=_boot(),
        software=_software(),
        environment=_read_at_start(environment),
        num_slots=num_slots,
        nice=int(nice) if nice.isdecimal() else RAY_NICENESS,
    )


@contextlib.contextmanager
def announced(resident: Resident) -> Iterator[None]:
    """Inside the block jobs find it; a cache that cannot be written means that they do not."""
    with contextlib.suppress(OSError, RuntimeError):
        _file().parent.mkdir(parents=True, exist_ok=True)
        write_whole(_file(), json.dumps(asdict(resident)), 0o600)
    try:
        yield
    finally:
        with contextlib.suppress(OSError, RuntimeError):
            if _read() == resident:  # another head may have taken its place
                _file().unlink()


def find() -> Resident | None:
    """The head that this user runs on this machine; None where the one that was is gone."""
    with contextlib.suppress(OSError, RuntimeError):
        found = _read()
        if found and found.boot == _boot() and found.started and _started(found.pid) == found.started:
            return found
    return None


def why_not(resident: Resident, num_slots: int, nice: int | None) -> str | None:
    """Why a job of so many workers cannot use it; None where it can, as far as can be known before connecting."""
    if resident.software != _software():
        return "it runs other software: start it again"
    if resident.num_slots < num_slots:
        return f"it offers {resident.num_slots} slots, and the plan has {num_slots} workers"
    if nice is not None and nice != resident.nice:
        return f"its workers have niceness {resident.nice}, and cluster.nice is {nice}"
    own = _read_at_start(os.environ)
    if other := sorted(
        name for name in {*own, *resident.environment} if own.get(name) != resident.environment.get(name)
    ):
        return f"it was started with another value of {', '.join(other)}"
    host, _, port = resident.address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=_KNOCK_S).close()
    except (OSError, ValueError, OverflowError) as error:
        return f"it does not answer at {resident.address} ({error})"
    return None


@contextlib.contextmanager
def taken() -> Iterator[bool]:
    """Whether it is this process's inside the block; another job of this user may have it."""
    _file().parent.mkdir(parents=True, exist_ok=True)
    with locking.hold(_file().with_suffix(".lock"), wait=False) as is_ours:
        yield is_ours


def loading_ahead(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of processes that load the libraries before a job is there; those that wait fit no other."""
    return {**environment, _HOOK: "clusters.ray.preload.load"}


def inherited() -> dict[str, str]:
    """The environment of this process, for a worker that another process has started."""
    return {name: value for name, value in os.environ.items() if not name.startswith(_OF_RAY)}


def adopt(environment: Mapping[str, str]) -> None:
    """In a worker, before a job: the environment of whoever submits it."""
    os.environ.update(environment)


def _read_at_start(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name.startswith(_READ_AT_START)}


def _software() -> dict[str, str]:
    import importlib.metadata  # half of this module's time, and every verb imports it

    return {
        "python": sys.version,
        "environment": sys.prefix,
        "program": str(Path(__file__).resolve().parents[2]),
        "ray": importlib.metadata.version("ray"),
    }


def _file() -> Path:
    return cache_folder(f"head-{socket.gethostname()}.json")  # machines may share a home


def _read() -> Resident | None:
    """The record; None where there is none, or one that another user could have written."""
    file = _file()
    try:
        known = file.lstat()
        if not stat.S_ISREG(known.st_mode) or known.st_uid != os.getuid() or known.st_mode & 0o022:
            return None
        return record(Resident, read_json(file, _MAX_BYTES), str(file))
    except (OSError, BadInput):
        return None


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _started(pid: int) -> str | None:
    """When a process began, in the kernel's ticks; None where there is none (proc(5): field 22)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None
