"""Network interfaces of this machine and their addresses."""

from __future__ import annotations

import os
import socket
import struct

_INTERFACE_ADDRESS = 0x8915  # Linux's SIOCGIFADDR
GLOO = "GLOO_SOCKET_IFNAME"


def address_of(interface: str) -> str | None:
    """The IPv4 address of a network interface; None where it has none, or there is no such interface."""
    import fcntl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            answer = fcntl.ioctl(probe.fileno(), _INTERFACE_ADDRESS, struct.pack("256s", interface.encode()[:15]))
        except (OSError, UnicodeError):
            return None
    return socket.inet_ntoa(answer[20:24])


def names() -> list[str]:
    return [name for _, name in socket.if_nameindex()]


def interface_at(address: str) -> str | None:
    """The interface that has an address; None where it is no first address of one, as on other systems than Linux."""
    return next((name for name in names() if address_of(name) == address), None)


def gloo_talks_at(address: str) -> None:
    """Let gloo talk over the interface of this address, by which a cluster knows this node; runs in a worker.

    By itself gloo takes the address that the machine's own name leads to, on Debian 127.0.1.1, where no other machine
    comes in.  What the user has set stays.
    """
    if GLOO not in os.environ and (found := interface_at(address)):
        os.environ[GLOO] = found
