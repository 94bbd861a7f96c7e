"""Several machines on one: each a network namespace, a cgroup and namespaces of its own for processes and mounts.

Its own address, host name, /tmp/ray and /dev/shm; it can lose its power, hang, run out of memory or be slow, and its
cable can be pulled (netemu.py).  Needs root on Linux with cgroup v1.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

_CGROUPS = Path("/sys/fs/cgroup")
_CONTROLLERS = ("cpu", "memory", "freezer")
_PERIOD_US = 20_000
HEALTH = {  # Ray's defaults see a silent node after a minute
    "RAY_health_check_initial_delay_ms": "3000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "3000",
    "RAY_health_check_failure_threshold": "4",
}


def unavailable() -> str | None:
    """Why machines cannot be emulated here; None where they can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "needs root on Linux"
    if not Path("/dev/net/tun").exists():
        return "there is no /dev/net/tun"
    missing = [tool for tool in ("ip", "unshare", "nsenter") if not shutil.which(tool)]
    if missing:
        return f"there is no {', '.join(missing)}"
    for controller in _CONTROLLERS:
        if not os.access(_CGROUPS / controller / "tasks", os.W_OK):
            return f"cgroup v1's {controller} cannot be written"
    try:
        subprocess.run(["unshare", "-m", "-u", "-p", "-n", "-f", "true"], check=True, capture_output=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return "namespaces cannot be made"
    return None


@dataclass(frozen=True)
class Machine:
    """What an emulated machine is like; `delay_s` is one way, on its side."""

    name: str
    num_cpus: int = 1
    rate_bits_per_s: float = 1e9
    delay_s: float = 1e-4
    memory_bytes: int | None = None
    env: dict[str, str] = field(default_factory=dict)


class EmulatedCluster:
    """Machines that are up between `with` and its end."""

    def __init__(self, machines: list[Machine], home: Path) -> None:
        self.machines = {machine.name: machine for machine in machines}
        self.home = home
        self._subnet = f"10.{100 + os.getpid() % 100}.{os.getpid() // 100 % 250}"
        self._tag = f"em{os.getpid()}"
        self._holders: dict[str, subprocess.Popen[bytes]] = {}
        self._router: subprocess.Popen[bytes] | None = None
        self._socket = f"/tmp/{self._tag}.sock"  # a unix address is short

    def __enter__(self) -> EmulatedCluster:
        try:
            self._wire()
            for name in self.machines:
                self.boot(name)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def address(self, name: str) -> str:
        return f"{self._subnet}.{list(self.machines).index(name) + 1}"

    def _wire(self) -> None:
        self.home.mkdir(parents=True, exist_ok=True)
        ports = []
        for name, machine in self.machines.items():
            subprocess.run(["ip", "netns", "add", self._namespace(name)], check=True)
            ports.append(
                {
                    "namespace": self._namespace(name),
                    "address": self.address(name),
                    "rate": machine.rate_bits_per_s,
                    "delay": machine.delay_s,
                }
            )
        config = self.home / "network.json"
        config.write_text(json.dumps({"socket": self._socket, "machines": ports}))
        log = (self.home / "network.log").open("wb")
        router = Path(__file__).with_name("netemu.py")
        self._router = subprocess.Popen([sys.executable, str(router), str(config)], stdout=log, stderr=log)
        log.close()
        _until(lambda: "ready" in (self.home / "network.log").read_text(), 10, "the network did not come up")

    def boot(self, name: str) -> None:
        """Power on: the machine's first process, which holds its namespaces."""
        folder = self.home / name
        shutil.rmtree(folder, ignore_errors=True)
        for part in ("ray", "shm"):
            (folder / part).mkdir(parents=True)
        Path("/tmp/ray").mkdir(exist_ok=True)
        for controller in _CONTROLLERS:
            self.cgroup(name, controller).mkdir(exist_ok=True)
        if self.machines[name].memory_bytes:
            self.limit_memory(name, self.machines[name].memory_bytes or 0)
        inside = (
            f"hostname {name}; mount --bind {folder}/ray /tmp/ray; mount --bind {folder}/shm /dev/shm;"
            # `ip netns exec` hides the cgroups, and with them how much memory the machine has.
            " mount -t tmpfs tmpfs /sys/fs/cgroup; mkdir /sys/fs/cgroup/memory;"
            " mount -t cgroup -o memory cgroup /sys/fs/cgroup/memory;"
            f" touch {folder}/up; exec sleep infinity"
        )
        joins = "; ".join(f"echo $$ > {self.cgroup(name, c)}/tasks" for c in _CONTROLLERS)
        command = (
            f"{joins}; exec ip netns exec {self._namespace(name)} unshare -m -u -p -f --mount-proc --kill-child=KILL"
            f" bash -c {shlex.quote(inside)}"
        )
        self._holders[name] = subprocess.Popen(["bash", "-c", command], start_new_session=True)
        _until((folder / "up").exists, 10, f"{name} did not boot")

    def run(
        self, name: str, argv: list[str], env: dict[str, str] | None = None, cwd: Path = Path("/"), **popen: Any
    ) -> subprocess.Popen[Any]:
        """Start a process on a machine."""
        variables = {
            **os.environ,
            **HEALTH,
            "GLOO_SOCKET_IFNAME": "eth0",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_memory_monitor_refresh_ms": "0",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            **self.machines[name].env,
            **(env or {}),
        }
        joins = "; ".join(f"echo $$ > {self.cgroup(name, c)}/tasks" for c in _CONTROLLERS)
        enter = ["nsenter", "-t", str(self._first(name)), "-m", "-u", "-n", "-p", "--", "env", "-C", str(cwd), *argv]
        return subprocess.Popen(
            ["bash", "-c", f"{joins}; exec {shlex.join(enter)}"], env=variables, start_new_session=True, **popen
        )

    def power_off(self, name: str) -> None:
        """Everything on the machine vanishes at once; nobody is told."""
        with contextlib.suppress(ProcessLookupError, FileNotFoundError, IndexError):
            self.thaw(name)
            os.kill(self._first(name), signal.SIGKILL)
        self._holders.pop(name).wait()
        _until(lambda: not self._kill_rest(name), 10, f"{name} still has processes")

    def freeze(self, name: str) -> None:
        """The machine hangs: its processes stand still, its connections stay open."""
        (self.cgroup(name, "freezer") / "freezer.state").write_text("FROZEN")

    def thaw(self, name: str) -> None:
        (self.cgroup(name, "freezer") / "freezer.state").write_text("THAWED")

    def set_link(self, name: str, **changes: Any) -> None:
        """rate (bits/s), delay (s), jitter (s), loss (0..1), up: what is given changes."""
        self._tell({"op": "set", "address": self.address(name), **changes})

    def cut(self, first: str, second: str, is_cut: bool = True) -> None:
        """The way between two machines, and no other."""
        self._tell({"op": "cut", "between": [self.address(first), self.address(second)], "is_cut": is_cut})

    def limit_memory(self, name: str, num_bytes: int) -> None:
        (self.cgroup(name, "memory") / "memory.limit_in_bytes").write_text(str(num_bytes))

    def slow_down(self, name: str, fraction: float) -> None:
        """Of one core; 0 lifts the limit."""
        group = self.cgroup(name, "cpu")
        (group / "cpu.cfs_period_us").write_text(str(_PERIOD_US))
        (group / "cpu.cfs_quota_us").write_text(str(int(fraction * _PERIOD_US)) if fraction else "-1")

    def pids(self, name: str) -> list[int]:
        """Processes of a machine, by the numbers of this one."""
        with contextlib.suppress(FileNotFoundError):
            return [int(pid) for pid in (self.cgroup(name, "freezer") / "cgroup.procs").read_text().split()]
        return []

    def _kill_rest(self, name: str) -> list[int]:
        """Processes that were just entering when the machine went down."""
        rest = self.pids(name)
        for pid in rest:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return rest

    def close(self) -> None:
        """Power off, and leave nothing behind."""
        for name in list(self._holders):
            self.power_off(name)
        if self._router:
            self._router.kill()
            self._router.wait()
        for name in self.machines:
            subprocess.run(["ip", "netns", "del", self._namespace(name)], check=False, capture_output=True)
            for controller in _CONTROLLERS:
                _until(partial(_removed, self.cgroup(name, controller)), 10, f"{name}'s cgroup is busy")
        Path(self._socket).unlink(missing_ok=True)

    def _tell(self, command: dict[str, Any]) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as control:
            control.connect(self._socket)
            control.send(json.dumps(command).encode())

    def _first(self, name: str) -> int:
        """The machine's first process: the child of `unshare`."""
        holder = self._holders[name].pid
        return int(Path(f"/proc/{holder}/task/{holder}/children").read_text().split()[0])

    def _namespace(self, name: str) -> str:
        return f"{self._tag}-{name}"

    def cgroup(self, name: str, controller: str) -> Path:
        """The folder of a machine's control group."""
        return _CGROUPS / controller / f"{self._tag}-{name}"


def _removed(folder: Path) -> bool:
    with contextlib.suppress(OSError):  # the last process is still on its way out
        folder.rmdir()
    return not folder.exists()


def _until(is_so: Any, limit_s: float, otherwise: str) -> None:
    until = time.monotonic() + limit_s
    while not is_so():
        if time.monotonic() > until:
            raise TimeoutError(otherwise)
        time.sleep(0.05)
