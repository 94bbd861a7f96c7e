"""Measure the network between two machines with one plain TCP stream: its round trip and its bandwidth."""

from __future__ import annotations

import hmac
import secrets
import socket
import statistics
import time

_PATIENCE_S = 10.0  # for the other end
_ROUND_TRIPS, _ROUND_TRIPS_S = 50, 2.0  # whichever comes first
_WARM_UP_BYTES, _WARM_UP_S = 8 * 2**20, 1.0  # likewise: TCP starts slowly
_STREAM_S = 0.3
_BLOCK_BYTES = 2**20


class Peer:
    """One end of a link: a server does `listen` then `receive`, a client `send`."""

    _server: socket.socket
    _token: bytes

    def listen(self) -> tuple[int, bytes]:
        """A free port, and the word by which the client is known: anybody may knock at an open port."""
        self._token = secrets.token_bytes(16)
        self._server = socket.create_server(("", 0))
        self._server.settimeout(_PATIENCE_S)
        return self._server.getsockname()[1], self._token

    def receive(self) -> float:
        """Bytes a second that arrived from the client.  Hanging up is how the client learns that it is enough."""
        with self._server, self._accept() as stream:
            for _ in range(_ROUND_TRIPS):
                mark = _read_exactly(stream, 1)
                stream.sendall(mark)
                if mark == b"!":  # the last one
                    break
            block = bytearray(_BLOCK_BYTES)
            start, warm = time.perf_counter(), 0
            while warm < _WARM_UP_BYTES and time.perf_counter() - start < _WARM_UP_S:
                warm += _receive_into(stream, block)
            start, received = time.perf_counter(), 0
            while (elapsed := time.perf_counter() - start) < _STREAM_S:
                received += _receive_into(stream, block)
            return received / elapsed

    def send(self, host: str, port: int, token: bytes) -> float:
        """Stream to a server until it hangs up.  Returns seconds of a round trip: the median of small ones before."""
        with socket.create_connection((host, port), timeout=_PATIENCE_S) as stream:
            stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            stream.sendall(token)
            trips: list[float] = []
            end = time.perf_counter() + _ROUND_TRIPS_S
            last = False
            while not last:
                last = len(trips) + 1 == _ROUND_TRIPS or time.perf_counter() > end
                start = time.perf_counter()
                stream.sendall(b"!" if last else b".")
                _read_exactly(stream, 1)
                trips.append(time.perf_counter() - start)
            block = bytes(_BLOCK_BYTES)
            try:
                while True:
                    stream.sendall(block)
            except (BrokenPipeError, ConnectionResetError):  # the server has seen enough
                return statistics.median(trips)

    def _accept(self) -> socket.socket:
        """The client that knows the word; others are sent away."""
        end = time.perf_counter() + _PATIENCE_S
        while time.perf_counter() < end:
            stream, _ = self._server.accept()
            stream.settimeout(_PATIENCE_S)
            try:
                if hmac.compare_digest(_read_exactly(stream, len(self._token)), self._token):
                    stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    return stream
            except OSError:  # a stranger who said nothing
                pass
            stream.close()
        raise TimeoutError("the other node did not connect")


def _read_exactly(stream: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        part = stream.recv(count - len(data))
        if not part:
            raise ConnectionResetError("the other end closed the connection")
        data += part
    return data


def _receive_into(stream: socket.socket, block: bytearray) -> int:
    count = stream.recv_into(block)
    if not count:
        raise ConnectionResetError("the other end closed the connection")
    return count
