"""Where workers meet before they train."""

import socket
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest

from orchestrator.training.launch import store_at


def test_the_store_of_the_workers_listens_on_the_address_that_was_named_alone():
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]

    with ThreadPoolExecutor(2) as both:  # each waits for the other
        first = both.submit(store_at, "127.0.0.1", port, 2, timedelta(seconds=20), listener)
        second = both.submit(store_at, "127.0.0.1", port, 2, timedelta(seconds=20))
        served, joined = first.result(), second.result()

    joined.set("a", "1")
    assert served.get("a") == b"1"
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", port), timeout=5).close()
