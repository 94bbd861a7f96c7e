"""Workers that cannot connect to each other are named, with address and port, within seconds."""

import socket
import threading
import time

import pytest

from clusters.hardware.interfaces import GLOO
from orchestrator.errors import RunFailed
from orchestrator.training.workers import connections
from orchestrator.training.workers.connections import refuse_unreachable, try_connections


def loopback():
    return "127.0.0.1"


def every(size):
    """In place of Ray's worker group, whose workers are all in this process."""

    def execute(function, *arguments):
        return [function(*arguments) for _ in range(size)]

    return execute


def full_queue():
    """A port whose queue of connections is full: what comes next has no answer, as behind a firewall that drops it."""
    server = socket.create_server(("127.0.0.1", 0), backlog=0)
    waiting = []
    for _ in range(8):
        one = socket.socket()
        one.setblocking(False)
        one.connect_ex(server.getsockname())
        waiting.append(one)
    return server, waiting


def test_workers_that_reach_each_other_leave_nothing_behind():
    before = threading.active_count()

    refuse_unreachable(every(3), loopback, ["a", "a", "b"])

    assert connections._listening == [] and threading.active_count() == before


def test_a_single_worker_connects_to_nobody():
    refuse_unreachable(every(0), loopback, ["a"])


def test_a_worker_that_nobody_reaches_is_named_with_its_address_and_port():
    with socket.create_server(("127.0.0.1", 0)) as closed:
        refusing = closed.getsockname()

    def execute(function, *arguments):
        found = every(2)(function, *arguments)
        return [found[0], refusing] if function is connections._listen else found

    with pytest.raises(RunFailed) as caught:
        refuse_unreachable(execute, loopback, ["desktop", "laptop"])

    text = str(caught.value)
    assert text.count("cannot connect") == 1
    assert f"desktop cannot connect to laptop at 127.0.0.1, port {refusing[1]} (Connection refused)" in text
    assert "open the firewall" in text and GLOO in text and "\n" not in text
    assert connections._listening == []


def test_a_machine_that_does_not_answer_is_given_up_after_seconds(monkeypatch):
    monkeypatch.setattr(connections, "PATIENCE_S", 1.0)
    server, waiting = full_queue()
    began = time.monotonic()

    reasons = try_connections([server.getsockname()] * 5)

    assert reasons == dict.fromkeys(range(5), "no answer within 1 s")
    assert time.monotonic() - began < 4  # all at once
    for one in (server, *waiting):
        one.close()


def test_many_pairs_are_counted():
    def execute(function, *arguments):
        found = every(6)(function, *arguments)
        return [("127.0.0.1", 1)] * 6 if function is connections._listen else found

    with pytest.raises(RunFailed, match="and 26 more pairs"):
        refuse_unreachable(execute, loopback, list("abcdef"))


def test_they_listen_where_gloo_does(monkeypatch):
    monkeypatch.setenv(GLOO, "lo")

    refuse_unreachable(every(2), lambda: "192.0.2.1", ["a", "b"])
