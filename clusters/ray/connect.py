"""Ways to reach a Ray cluster: embedded on this machine, kept on it by this user, or one that runs already.

An embedded one is this user's alone: it listens on loopback, wants a token of its own, and its folder with the token,
sockets and logs can be entered by nobody else.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import shutil
import signal
import socket
import stat
import sys
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clusters.capability import DeviceCapability
from clusters.hardware.interfaces import GLOO
from clusters.ray import resident as residents
from clusters.ray.gpu_reservation import by_uuid
from clusters.safe.reading import first_line

SLOT = "train_slot"  # one for each device that trains
_KNOCK_S = 5.0
_OBJECT_STORE_BYTES = 100 * 2**20  # nothing large travels through it: data and checkpoints go by path
_LOOPBACK, _LOOPBACK_DEVICE = "127.0.0.1", "lo0" if sys.platform == "darwin" else "lo"
_OF_ONE_MACHINE = {
    "RAY_enable_worker_prestart": "1",  # a process a slot is there before its worker
    "RAY_prestart_worker_first_driver": "0",  # and no second one
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # nobody drains this machine
}
_LONGEST_FOLDER = 30  # a socket's path has 107 characters, of which Ray's own names in the folder take 77


class CannotConnect(Exception):
    """No cluster at the address; the text says which and why."""


class RefusesToken(CannotConnect):
    """There is a cluster at the address, and it does not let this machine in."""


@dataclass(frozen=True)
class WorkerProcess:
    """How the processes of a cluster that is started here begin."""

    environment: Mapping[str, str] = field(default_factory=dict)
    nice: int | None = None  # None: what Ray sets, 15

    @property
    def variables(self) -> dict[str, str]:
        """Of the process that starts Ray, whose processes inherit them: those started ahead then fit every actor."""
        return {**self.environment, **({} if self.nice is None else {"RAY_worker_niceness": str(self.nice)})}


@dataclass(frozen=True)
class Connection:
    """A cluster that this process is connected to."""

    cores_per_slot: int  # where its nodes offer no slots

    @property
    def slot_resources(self) -> dict[str, float]:
        """What one training worker asks for.

        Looked up at each use: a node that offers slots may join after its head has let us in, as pods do.
        """
        import ray

        return {SLOT: 1.0} if ray.cluster_resources().get(SLOT) else {"CPU": float(self.cores_per_slot)}


def _resolved(address: str) -> str:
    """HOST:PORT for `auto`, so that it can be knocked at: Ray remembers a head that has ended and waits for it."""
    if address != "auto" or os.environ.get("RAY_ADDRESS"):
        return address
    from ray._private import services

    return services.find_bootstrap_address(None) or address


def _refuse_unreachable(address: str) -> None:
    """Knock at HOST:PORT first: Ray itself would try for minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_KNOCK_S).close()
    except (OSError, OverflowError, ValueError, TypeError) as error:
        raise CannotConnect(f"no Ray cluster at {address!r}: {error}") from error


@contextlib.contextmanager
def _send_token_if_wanted(address: str) -> Iterator[None]:
    """Show the token inside the block where the cluster at HOST:PORT wants one, and only there.

    Ray shows a token whenever this machine has one, and a cluster without tokens then starts no actor; with a wrong one
    it would try for 20 s and not say what is wrong.  Raises RefusesToken.
    """
    if "RAY_AUTH_MODE" in os.environ or "://" in address or ":" not in address:
        yield
        return
    from ray._raylet import Config, GcsClient  # pyright: ignore[reportAttributeAccessIssue]
    from ray.exceptions import AuthenticationError

    def is_let_in(mode: str) -> bool:
        os.environ["RAY_AUTH_MODE"] = mode
        Config.initialize("")  # Ray reads the mode once; so it does itself when it changes it
        try:
            with _silence():  # its C++ would warn of what is asked here
                GcsClient(address=address)
        except AuthenticationError:
            return False
        return True

    try:
        if not is_let_in("disabled") and not (has_token() and is_let_in("token")):
            raise RefusesToken(refusal(address))
        yield
    finally:
        os.environ.pop("RAY_AUTH_MODE", None)
        Config.initialize("")


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Nothing reaches standard error inside the block, from any writer."""
    kept = os.dup(2)
    with Path(os.devnull).open("wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def refusal(address: str) -> str:
    """What to do where a cluster wants a token that this machine does not have."""
    has = "this machine has another one" if has_token() else "this machine has none"
    return (
        f"the cluster at {address!r} requires its token, and {has}. Copy the head's ~/.ray/auth_token to"
        " ~/.ray/auth_token here (RAY_AUTH_TOKEN and RAY_AUTH_TOKEN_PATH take precedence over that file)"
    )


def has_token() -> bool:
    """Whether this machine has a token to show."""
    stated = "RAY_AUTH_TOKEN" in os.environ or "RAY_AUTH_TOKEN_PATH" in os.environ
    return stated or own_token().is_file()


def read_token() -> str:
    """The token that this machine shows, found as Ray finds it.  Raises OSError."""
    if token := os.environ.get("RAY_AUTH_TOKEN"):
        return token.strip()
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or own_token()).read_text().strip()


def own_token() -> Path:
    """Where Ray keeps the token of this user, and looks for the one of a cluster."""
    return Path.home() / ".ray" / "auth_token"


def close_own_token() -> None:
    """Nobody else may read this user's token: Ray and scp leave it readable by everyone."""
    with contextlib.suppress(OSError):  # there is none; a mounted secret has the mode its owner gave it
        if stat.S_IMODE(own_token().stat().st_mode) & 0o077:
            own_token().chmod(0o600)


def write_token(path: Path) -> None:
    """A new token that only its owner can read, at no moment anybody else."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as stream:
        os.fchmod(stream.fileno(), 0o600)  # an empty file that was there keeps its own mode
        stream.write(secrets.token_hex(32))


@contextlib.contextmanager
def _private_folder() -> Iterator[Path]:
    """A folder for an embedded cluster that others cannot enter; it stays, with Ray's logs, where the block fails.

    Raises CannotConnect where none can be made.
    """
    try:
        base = tempfile.gettempdir()
        folder = Path(tempfile.mkdtemp(prefix="ray-", dir=base if len(base) <= _LONGEST_FOLDER else "/tmp"))
        write_token(folder / "auth_token")
    except OSError as error:
        raise CannotConnect(f"there is no space for Ray's own files ({error}); TMPDIR names another folder") from error
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _token_of(file: Path) -> Iterator[None]:
    """Inside the block Ray wants and shows the token in the file, and workers talk to each other on loopback."""
    from ray._raylet import AuthenticationTokenLoader, Config  # pyright: ignore[reportAttributeAccessIssue]

    names = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", GLOO)
    before = {name: os.environ.pop(name, None) for name in names}
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(file), GLOO: before[GLOO] or _LOOPBACK_DEVICE}
    Config.initialize("")  # Ray reads the mode and the token once; so it does itself when it changes them
    AuthenticationTokenLoader.instance().reset_cache()
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        Config.initialize("")
        AuthenticationTokenLoader.instance().reset_cache()


@contextlib.contextmanager
def _on_loopback() -> Iterator[None]:
    """A cluster that is started inside the block listens on loopback, as Ray's do on Windows and macOS by default."""
    from ray._private import ray_constants

    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


@contextlib.contextmanager
def _without_idle_processes() -> Iterator[None]:
    """Start no autoscaler monitor, log monitor or dashboard for a cluster that is started inside the block.

    Nobody uses them there, and they take 2.6 s of computing.  Private names of Ray 2.60: where one is gone, it starts.
    """
    from ray._private.node import Node

    starts = ("start_monitor", "start_log_monitor", "start_api_server")
    before = {name: getattr(Node, name) for name in starts if hasattr(Node, name)}
    for name in before:
        setattr(Node, name, lambda self, **_: None)
    try:
        yield
    finally:
        for name, start in before.items():
            setattr(Node, name, start)


def _keep_quiet() -> None:
    """Ray prints what nodes say of dying workers to our standard output, where `--json` belongs."""
    from ray._private import worker

    def log_lines(data: dict[str, Any], **_: Any) -> None:
        logging.getLogger("ray.cluster").info("%s", data.get("lines"))

    if hasattr(worker, "print_to_stdstream"):  # a private name of Ray 2.60
        worker.print_to_stdstream = log_lines


def close_sessions(folders: Iterable[Path]) -> None:
    """Keep other users of the machine out of this user's logs and sockets: Ray lets everybody in, and write."""
    for session in {found for folder in folders for found in folder.glob("session_2*")}:
        with contextlib.suppress(OSError):  # it was removed meanwhile
            known = session.lstat()
            if stat.S_ISDIR(known.st_mode) and known.st_uid == os.getuid():
                session.chmod(0o700)


def _close_session() -> None:
    """A driver beside a node of its cluster opens the session's folder to everybody again."""
    from ray._private import worker

    if node := getattr(worker, "_global_node", None):  # a private name of Ray 2.60
        close_sessions([Path(node.get_session_dir_path()).parent])


@contextlib.contextmanager
def connect(
    address: str,
    num_slots: int,
    cores_per_slot: int,
    gpus: Sequence[DeviceCapability] = (),
    process: WorkerProcess | None = None,
    resident: residents.Resident | None = None,
) -> Iterator[Connection]:
    """Connect for the length of the block.

    `local` starts Ray here, with `gpus` to hand out, and ends it after, or uses a `resident` one.  Where it runs
    already, of `process` only the environment is used.  Raises CannotConnect.
    """
    import ray

    # Ray reads this when it starts its processes: nothing of a user's cluster is reported anywhere.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Workers learn their GPU from the plan; Ray must not hide it from who asked for a slot and for none of Ray's GPUs.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")  # how soon the end of the work is seen
    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False, "configure_logging": True}
    process = process or WorkerProcess()
    close_own_token()
    # Ray takes SIGTERM for itself and would end a driver that wants to save first.
    is_main = threading.current_thread() is threading.main_thread()
    on_sigterm = signal.getsignal(signal.SIGTERM)
    with contextlib.ExitStack() as until_the_end:
        is_embedded = address == "local" and not resident
        if is_embedded:
            begin = _embedded(until_the_end, num_slots, len(gpus))
            variables = {**by_uuid(gpus), **_OF_ONE_MACHINE, **process.variables}
            until_the_end.enter_context(_environment(variables))
        elif resident:
            address, begin = _kept(until_the_end, resident, process)
        else:
            address, begin = _running(until_the_end, address, process)
        try:
            with contextlib.ExitStack() as while_starting:
                if is_embedded:
                    while_starting.enter_context(_on_loopback())
                    while_starting.enter_context(_without_idle_processes())
                ray.init(**begin, **quiet)
        except Exception as error:  # ConnectionError, RuntimeError, TimeoutError ... by Ray's mood
            reason = first_line(error)
            raise CannotConnect(f"no Ray cluster at {address!r}: {reason}") from error
        if is_main and callable(on_sigterm):
            signal.signal(signal.SIGTERM, on_sigterm)
        _close_session()
        _keep_quiet()
        try:
            yield Connection(cores_per_slot)
        finally:
            ray.shutdown()


def _running(until_the_end: contextlib.ExitStack, address: str, process: WorkerProcess) -> tuple[str, dict[str, Any]]:
    """The address of a cluster that runs, and what connects to it."""
    address = _resolved(address)
    _refuse_unreachable(address)
    until_the_end.enter_context(_send_token_if_wanted(address))
    begin: dict[str, Any] = {"address": address}
    if process.environment:
        begin["runtime_env"] = {"env_vars": dict(process.environment)}
    return address, begin


def _kept(
    until_the_end: contextlib.ExitStack, resident: residents.Resident, process: WorkerProcess
) -> tuple[str, dict[str, Any]]:
    """The address of a head of this user, and what connects to it and gets the processes that wait there."""
    until_the_end.enter_context(_token_of(Path(resident.token_file)))
    environment = residents.loading_ahead(process.environment)
    return resident.address, {"address": resident.address, "runtime_env": {"env_vars": environment}}


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Processes that are started inside the block have these variables."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def _embedded(until_the_end: contextlib.ExitStack, num_slots: int, num_gpus: int) -> dict[str, Any]:
    """What starts a cluster here, with a token and a folder that last as long as it."""
    folder = until_the_end.enter_context(_private_folder())
    until_the_end.enter_context(_token_of(folder / "auth_token"))
    return {
        "address": "local",
        "num_cpus": num_slots,  # a worker asks for its slot; of its threads nobody else takes any
        "num_gpus": num_gpus,
        "resources": {SLOT: num_slots},
        "object_store_memory": _OBJECT_STORE_BYTES,
        "include_dashboard": False,
        "_temp_dir": str(folder / "r"),  # Ray opens it to everyone, in a folder that lets nobody through
        "_node_ip_address": _LOOPBACK,
    }
