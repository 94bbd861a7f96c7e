"""A Ray node of one's own: what `orchestrator head` and `orchestrator join` start and keep running.

Only who has the token gets in.  Ray's own servers listen on every interface whatever address they are given, so the
token is what keeps others out; an interface decides which address the machines use among themselves.  Devices are
offered as slots: one `train_slot` each, so that nobody else is put on them.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from clusters.capability import DeviceCapability, NodeCapability
from clusters.hardware import interfaces
from clusters.ray import resident
from clusters.ray.connect import SLOT, close_own_token, close_sessions, own_token, write_token
from clusters.ray.gpu_reservation import by_uuid
from clusters.ray.spares import Spares, keep_spares, start_spares
from clusters.safe.reading import BadInput, checked_path, kind_of, printable, read_text
from clusters.units import GIB

PORT = 6379
_ELSEWHERE = "192.0.2.1"  # an address of nobody (RFC 5737): which way the machine looks out
_OBJECT_STORE_BYTES = 100 * 2**20
_SYSTEM_BYTES = 1 * GIB  # of a machine's memory: Ray itself and what else runs there
_PAUSES_S = (1.0, 2.0, 4.0, 8.0, 16.0, 30.0)
_STEADY_S = 60.0  # a node that lived so long begins again with the shortest pause
_END_S = 10.0
_LONGEST_TOKEN = 64 * 2**10  # bytes
_PROCESS_FAILED = re.compile(r" -- +(\S+ \[exit code=[^\]]*\])")  # a process of the node, as Ray prints its end
_TOKEN_REFUSED = re.compile(
    r"unauthenticated|invalid.*token|token.*(invalid|mismatch)|authentication", flags=re.IGNORECASE
)
# Ray's defaults see a node that fell silent after a minute; these after about 15 seconds.
_SETTINGS = {
    "RAY_health_check_initial_delay_ms": "3000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "3000",
    "RAY_health_check_failure_threshold": "4",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "20",  # after which a node without its head ends, and is started anew
    "RAY_prestart_worker_first_driver": "0",  # a process a core, for which the first driver would wait
}


class CannotServe(Exception):
    """The node cannot be started as asked; the text says why and what to do."""


@dataclass(frozen=True)
class OwnNode:
    """How this machine takes part in a cluster."""

    name: str  # what plans are keyed by: the same after every restart
    address: str  # its own
    head: str | None  # HOST:PORT to join; None = it is the head
    token_file: Path
    num_slots: int
    port: int = PORT  # of a head
    dashboard_port: int | None = None  # of a head that takes jobs over HTTP
    temp_dir: str | None = None
    spares: Spares | None = None  # of a head


def _dashboard(own: OwnNode) -> list[str]:
    if own.dashboard_port is None:
        return ["--include-dashboard=false"]
    return ["--include-dashboard=true", f"--dashboard-host={own.address}", f"--dashboard-port={own.dashboard_port}"]


def token_file(path: Path | None, make: bool) -> Path:
    """The file with the cluster's token, readable by its owner only; made where `make` allows.  Raises CannotServe."""
    own = own_token()
    try:
        path = checked_path(path) if path else own
        kind = kind_of(path)
        if kind is not None and read_text(path, _LONGEST_TOKEN).strip():
            if path == own:
                close_own_token()
            return path
    except BadInput as error:
        raise CannotServe(f"--token-file: {error}") from None
    if not make:
        raise CannotServe(
            f"there is no token in {path}. Copy the head's there (the head prints where it is), or give --token-file"
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_token(path)
    except OSError as error:
        raise CannotServe(f"--token-file: {path} cannot be written: {error.strerror}") from None
    return path


def address_of(interface: str) -> str:
    """The IPv4 address of a network interface.  Raises CannotServe with the names there are."""
    address = interfaces.address_of(interface)
    if address is None:
        known = ", ".join(interfaces.names())
        raise CannotServe(f"--interface {printable(interface)}: has no IPv4 address here; interfaces: {known}")
    return address


def address_towards(host: str = _ELSEWHERE) -> str:
    """The own address from which a host is reached.  Nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, 9))
        except (OSError, UnicodeError, TypeError) as error:
            raise CannotServe(f"{printable(host)} cannot be reached: {error}") from None
        return probe.getsockname()[0]


def check_address(address: str) -> None:
    """Raises CannotServe where the address is not this machine's: Ray would try without end."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        try:
            probe.bind((address, 0))
        except (OSError, UnicodeError, TypeError) as error:
            reason = f"is not an IPv4 address of this machine ({error})"
            raise CannotServe(f"--address {printable(address)}: {reason}") from None


def check_port(port: int, option: str) -> None:
    """Raises CannotServe where a port cannot be had on every address, as Ray's servers take it."""
    for family, anywhere in ((socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")):
        try:
            probe = socket.socket(family, socket.SOCK_STREAM)
        except OSError:  # a machine without IPv6
            continue
        with probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # what an ended head left does not count
            if family == socket.AF_INET6:
                probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            try:
                probe.bind((anywhere, port))
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    reason = f"port {port} is in use: is a head running here already? {option} takes another"
                elif error.errno == errno.EACCES:
                    reason = f"port {port} needs root: give {option} one of 1024 or more"
                elif family == socket.AF_INET6:  # switched off
                    continue
                else:
                    reason = f"port {port} cannot be used: {error.strerror}"
                raise CannotServe(reason) from None


def ray_arguments(own: OwnNode, capability: NodeCapability) -> list[str]:
    """The command that starts the node and stays."""
    where = [f"--address={own.head}"] if own.head else ["--head", f"--port={own.port}", *_dashboard(own)]
    kinds = sorted({device.kind for device in capability.devices if device.kind != "cpu"}) or ["cpu"]
    names = [device.name for device in capability.gpus] or [device.name for device in capability.devices[:1]]
    labels = {"device": kinds[0], "device-name": _label(names[0] if names else "unknown")}
    command = [
        *(
            sys.executable,
            "-m",
            "ray.scripts.scripts",
            "start",
            *where,
            "--block",
            "--disable-usage-stats",
            "--log-color=false",
        ),
        *(f"--node-ip-address={own.address}", f"--node-name={own.name}"),
        *(f"--num-cpus={capability.num_cores}", f"--num-gpus={len(offered_gpus(own, capability))}"),
        f"--resources={json.dumps({SLOT: own.num_slots} if own.num_slots else {})}",
        f"--object-store-memory={_OBJECT_STORE_BYTES}",
        f"--labels={','.join(f'{key}={value}' for key, value in labels.items())}",
    ]
    if capability.memory_bytes:
        command.append(f"--memory={max(GIB, capability.memory_bytes - _SYSTEM_BYTES - _OBJECT_STORE_BYTES)}")
    if own.spares:
        command.append(f"--node-manager-port={own.spares.manager_port}")
    if own.temp_dir and not own.head:
        command.append(f"--temp-dir={own.temp_dir}")
    return command


def offered_gpus(own: OwnNode, capability: NodeCapability) -> tuple[DeviceCapability, ...]:
    """The GPUs that Ray hands out: those of one maker, since Ray counts no others together.

    All of them, though fewer slots may be given: how many train at a time is the slots' to say, which ones the plan's.
    """
    kinds = [gpu.kind for gpu in capability.gpus]
    return tuple(gpu for gpu in capability.gpus if own.num_slots and gpu.kind == kinds[0])


def environment(token: Path, inherited: Mapping[str, str]) -> dict[str, str]:
    """What Ray's processes must know: who may come in, and when a silent node is lost."""
    own = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_USAGE_STATS_ENABLED": "0"}
    kept = {name: value for name, value in inherited.items() if name != "RAY_AUTH_TOKEN"}  # Ray prefers it to the file
    own["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), kept.get("PATH", os.defpath)])  # of jobs: `python`
    return {**_SETTINGS, **kept, **own}


def check_reachable(head: str, timeout_s: float = 3.0) -> str | None:
    """Why HOST:PORT does not answer, None where it does."""
    host, _, port = head.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=timeout_s).close()
    except (OSError, ValueError, OverflowError, TypeError) as error:
        return str(error)
    return None


def keep_running(own: OwnNode, capability: NodeCapability, say: Callable[[str], None]) -> None:
    """Start the node, and again whenever it ends, until this process gets a signal to end.

    A partition that heals leaves a node that Ray has given up and that ends itself: it must come back by itself.
    Raises CannotServe when the head refuses the token.
    """
    node = _RayNode(own, capability, say)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):  # HUP: the terminal is closed
        signal.signal(number, node.end)
    tries = 0
    while not node.is_over:
        if own.head and (silent := check_reachable(own.head)):
            if tries == 0:
                say(f"{own.head} does not answer yet ({silent}); trying until it does")
            tries += 1
            _sleep(_PAUSES_S[min(tries, len(_PAUSES_S)) - 1], lambda: node.is_over)
            continue
        began = time.monotonic()
        reason = node.run_once()
        if node.is_over:
            break
        tries = 0 if time.monotonic() - began > _STEADY_S else tries + 1
        pause_s = _PAUSES_S[min(tries, len(_PAUSES_S)) - 1] if tries else _PAUSES_S[0]
        say(f"the node ended ({reason or 'without a message'}); starting it again in {pause_s:.0f} s")
        _sleep(pause_s, lambda: node.is_over)
    node.end_group()


class _RayNode:
    """The process of Ray's node, and whether it is to end for good."""

    def __init__(self, own: OwnNode, capability: NodeCapability, say: Callable[[str], None]) -> None:
        self.own, self.capability, self.say = own, capability, say
        self.is_over = False
        self._child: subprocess.Popen[str] | None = None

    def end(self, *_: object) -> None:
        """A signal's handler: end the node, by force after a while."""
        self.is_over = True
        if self._child and self._child.poll() is None:
            self._child.terminate()
            killer = threading.Timer(_END_S, _end_group, (self._child.pid, 0.0))
            killer.daemon = True
            killer.start()

    def run_once(self) -> str | None:
        """Start the node and wait for its end; why it ended, by its output.  Raises CannotServe for a refused token."""
        self._child = child = subprocess.Popen(
            ray_arguments(self.own, self.capability),
            env={**environment(self.own.token_file, os.environ), **by_uuid(offered_gpus(self.own, self.capability))},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        if self.is_over:  # the signal came while it was starting
            self.end()
        with contextlib.ExitStack() as while_up:
            lines, was_up = self._read(child, while_up)
        child.wait()
        if child.stdout:
            child.stdout.close()
        self.end_group()
        # What a node that was up printed is its log, where such words may stand for other reasons.
        if self.own.head and not was_up and not self.is_over and _TOKEN_REFUSED.search("\n".join(lines)):
            token = self.own.token_file
            raise CannotServe(f"{self.own.head} refuses the token in {token}: copy the head's token file there")
        failed = [found[1] for line in lines if (found := _PROCESS_FAILED.search(line))]
        return ", ".join(failed) or (lines[-1] if lines else None)

    def end_group(self) -> None:
        """End what the node left."""
        if self._child:
            _end_group(self._child.pid)

    def _read(self, child: subprocess.Popen[str], while_up: contextlib.ExitStack) -> tuple[list[str], bool]:
        """The last lines the node prints until it ends, and whether it was up."""
        lines: list[str] = []
        was_up = False
        for line in child.stdout or ():
            lines = [*lines[-40:], line.rstrip()]
            if "Ray runtime started" in line:
                was_up = True
                close_sessions(_folders(self.own))
                self.say(f"{self.own.name} is up at {self.own.address}")
                if not self.own.head:
                    self._serve_this_machine(child, while_up)
        return lines, was_up

    def _serve_this_machine(self, child: subprocess.Popen[str], while_up: contextlib.ExitStack) -> None:
        """Let jobs of this machine find the head, and keep processes waiting for them."""
        own = self.own
        here = resident.describe(f"{own.address}:{own.port}", own.token_file, own.num_slots, os.environ)
        while_up.enter_context(resident.announced(here))
        if own.spares:
            wanted = resident.loading_ahead(own.spares.environment)
            manager = f"{own.address}:{own.spares.manager_port}"
            ask = partial(start_spares, manager, own.token_file, wanted)
            keep = partial(keep_spares, own.spares.count, child.pid, ask, lambda: child.poll() is not None)
            threading.Thread(target=keep, daemon=True).start()


def _folders(own: OwnNode) -> list[Path]:
    """Where the sessions of a node may lie: where its Ray puts them, and where its head's does."""
    named = own.temp_dir or Path(os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp") / "ray"
    return [Path(named), Path("/tmp/ray")]


def _sleep(seconds: float, is_over: Callable[[], bool]) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until and not is_over():
        time.sleep(0.1)


def _end_group(group: int, patience_s: float = _END_S) -> None:
    """End what a node may have left: its processes share a group."""
    for signal_number, wait_s in ((signal.SIGTERM, patience_s), (signal.SIGKILL, 2.0)):
        try:
            os.killpg(group, signal_number)
            until = time.monotonic() + wait_s
            while time.monotonic() < until:
                os.killpg(group, 0)
                time.sleep(0.1)
        except ProcessLookupError:
            return


def _label(name: str) -> str:
    """As Ray allows labels: letters, digits, - _ . and no more than 63 of them."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-._")[:63] or "unknown"
