"""A network in user space: one TUN device a machine, one process that passes packets on at a rate and with a delay.

    python netemu.py CONFIG.json       {"socket": path, "machines": [{"namespace", "address", ...}]}

Kernels without netem can limit a rate but neither delay, lose nor cut.  Rates are bits a second each way, delays
seconds on each side.  Commands are JSON objects on a unix datagram socket: {"op": "set", "address": a, "up": false},
{"op": "cut", "between": [a, b], "is_cut": true}.
"""

import contextlib
import fcntl
import heapq
import json
import os
import random
import select
import socket
import struct
import subprocess
import sys
import time
from dataclasses import dataclass

_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
_QUEUE_BYTES = 8 * 2**20  # at a sender; what comes on top is dropped
_RECEIVER_QUEUE_S = 1.0
_MTU = 9000


@dataclass
class Port:
    """One machine's end of the network."""

    namespace: str
    address: str
    rate: float = 1e9
    delay: float = 0.0
    jitter: float = 0.0
    loss: float = 0.0
    up: bool = True
    fd: int = -1
    sent_until: float = 0.0  # when the last packet will have left, or have arrived
    received_until: float = 0.0

    def plug_in(self) -> None:
        """Make the device and move it into the machine's namespace; the file stays with this process."""
        device = f"ne{os.getpid() % 10000}-{self.address.rsplit('.', 1)[1]}"
        self.fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(self.fd, _TUNSETIFF, struct.pack("16sH", device.encode(), _IFF_TUN | _IFF_NO_PI))
        inside = ["ip", "-n", self.namespace]
        for command in (
            ["ip", "link", "set", device, "netns", self.namespace],
            [*inside, "link", "set", device, "name", "eth0"],
            [*inside, "link", "set", "lo", "up"],
            [*inside, "link", "set", "eth0", "mtu", str(_MTU), "txqueuelen", "4000", "up"],
            [*inside, "addr", "add", f"{self.address}/24", "dev", "eth0"],
        ):
            subprocess.run(command, check=True)


class Router:
    """Passes packets on when their time has come."""

    def __init__(self, ports: list[Port], control: socket.socket) -> None:
        self._ports = {socket.inet_aton(port.address): port for port in ports}
        self._by_name = {port.address: port for port in ports}
        self._control = control
        self._cut: set[frozenset[str]] = set()
        self._due: list[tuple[float, int, Port, bytes]] = []
        self._count = 0

    def run(self) -> None:
        by_fd = {port.fd: port for port in self._ports.values()}
        while True:
            wait = max(0.0, self._due[0][0] - time.monotonic()) if self._due else None
            # Not epoll: it rounds to milliseconds.
            ready, _, _ = select.select([self._control, *by_fd], [], [], wait)
            for source in ready:
                if source is self._control:
                    self._obey(json.loads(self._control.recv(65536)))
                else:
                    self._read(by_fd[source])
            while self._due and self._due[0][0] <= time.monotonic():
                _, _, target, packet = heapq.heappop(self._due)
                if target.up:
                    with contextlib.suppress(OSError):  # the machine is down
                        os.write(target.fd, packet)

    def _obey(self, command: dict) -> None:
        if command["op"] == "set":
            port = self._by_name[command["address"]]
            for name in ("rate", "delay", "jitter", "loss", "up"):
                if command.get(name) is not None:
                    setattr(port, name, command[name])
        else:
            pair = frozenset(command["between"])
            (self._cut.add if command["is_cut"] else self._cut.discard)(pair)

    def _read(self, source: Port) -> None:
        for _ in range(64):
            try:
                packet = os.read(source.fd, 70_000)
            except BlockingIOError:
                return
            target = self._ports.get(packet[16:20]) if packet[0] >> 4 == 4 else None
            if target is not None:
                self._send(source, target, packet)

    def _send(self, source: Port, target: Port, packet: bytes) -> None:
        is_cut = frozenset((source.address, target.address)) in self._cut
        lost = random.random() < source.loss + target.loss
        now, bits = time.monotonic(), 8 * len(packet)
        is_full = (source.sent_until - now) * source.rate / 8 > _QUEUE_BYTES
        if is_cut or lost or is_full or not (source.up and target.up):
            return
        source.sent_until = left = max(now, source.sent_until) + bits / source.rate
        if target.received_until - left > _RECEIVER_QUEUE_S:
            return
        target.received_until = max(left - bits / target.rate, target.received_until) + bits / target.rate
        jitter = random.random() * (source.jitter + target.jitter)
        self._count += 1
        due = target.received_until + source.delay + target.delay + jitter
        heapq.heappush(self._due, (due, self._count, target, packet))


def main() -> None:
    with open(sys.argv[1]) as file:  # noqa: PTH123
        config = json.load(file)
    ports = [Port(**machine) for machine in config["machines"]]
    for port in ports:
        port.plug_in()
    control = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    control.bind(config["socket"])
    print("ready", flush=True)
    Router(ports, control).run()


if __name__ == "__main__":
    main()
