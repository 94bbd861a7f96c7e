"""A node of one's own: the command that starts it, its token, its life; and two of them in earnest."""

import json
import os
import re
import signal
import socket
import stat
import sys
from pathlib import Path

import pytest

from clusters.capability import DeviceCapability, NodeCapability
from clusters.ray import node_daemon
from clusters.ray.connect import close_sessions
from clusters.ray.node_daemon import (
    CannotServe,
    OwnNode,
    address_of,
    check_address,
    check_port,
    check_reachable,
    environment,
    keep_running,
    ray_arguments,
    token_file,
)
from clusters.units import GIB
from tests.clusters.stranger import tries
from tests.processes import free_port, orchestrator, outcome, start, wait_for

CPU = DeviceCapability("cpu", "AMD EPYC 9754 (Zen 4c)", 16 * GIB)
CARD = DeviceCapability("cuda", "RTX 3060", 12 * GIB)


def own(**changed):
    values = {"name": "box", "address": "10.0.0.2", "head": None, "token_file": Path("t"), "num_slots": 1}
    return OwnNode(**values | changed)


def test_a_head_offers_its_devices_as_slots_and_not_as_gpus():
    command = ray_arguments(own(num_slots=2), NodeCapability("box", 8, 32 * GIB, (CARD, CARD, CPU)))

    assert {"--head", "--port=6379", "--node-ip-address=10.0.0.2", "--node-name=box", "--num-gpus=2"} <= set(command)
    assert '--resources={"train_slot": 2}' in command
    assert "--labels=device=cuda,device-name=RTX-3060" in command
    memory = next(int(part.removeprefix("--memory=")) for part in command if part.startswith("--memory="))
    assert memory == 32 * GIB - GIB - 100 * 2**20  # within what the machine may use


def test_who_joins_names_the_head_and_may_offer_nothing():
    command = ray_arguments(own(head="10.0.0.1:6379", num_slots=0), NodeCapability("box", 8, None, (CPU,)))

    assert "--address=10.0.0.1:6379" in command and "--head" not in command
    assert "--resources={}" in command
    assert "--labels=device=cpu,device-name=AMD-EPYC-9754-Zen-4c" in command
    assert not any(part.startswith("--memory") for part in command)


def test_a_token_is_made_once_and_only_its_owner_reads_it(tmp_path):
    path = tmp_path / "deep" / "token"
    with pytest.raises(CannotServe, match=r"there is no token in .* Copy the head's there"):
        token_file(path, make=False)

    assert token_file(path, make=True) == path
    first = path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert token_file(path, make=True).read_text() == first and len(first) == 64


def test_an_empty_token_file_that_anyone_reads_is_filled_and_closed(tmp_path):
    path = tmp_path / "token"
    path.touch(mode=0o644)

    assert len(token_file(path, make=True).read_text()) == 64
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_token_that_ray_left_for_all_to_read_is_closed_and_a_named_one_is_its_owners_affair(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    own_path, named = tmp_path / ".ray" / "auth_token", tmp_path / "named"
    own_path.parent.mkdir()
    for path in (own_path, named):
        path.write_text("secret")
        path.chmod(0o644)

    assert stat.S_IMODE(token_file(None, make=False).stat().st_mode) == 0o600
    assert stat.S_IMODE(token_file(named, make=False).stat().st_mode) == 0o644


def test_token_mode_is_on_whatever_the_shell_says():
    shell = {"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN": "another", "RAY_health_check_period_ms": "500"}
    told = environment(Path("/t"), shell)

    assert told["RAY_AUTH_MODE"] == "token" and told["RAY_AUTH_TOKEN_PATH"] == "/t"
    assert "RAY_AUTH_TOKEN" not in told  # Ray would prefer it to the file
    assert told["RAY_health_check_period_ms"] == "500"  # who set it meant it


def test_an_interface_has_an_address_or_the_others_are_named():
    assert address_of("lo") == "127.0.0.1"
    with pytest.raises(CannotServe, match=r"nosuch0: has no IPv4 address here; interfaces: .*lo"):
        address_of("nosuch0")


def test_a_silent_head_has_a_reason():
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert check_reachable(f"127.0.0.1:{server.getsockname()[1]}") is None
        port = server.getsockname()[1]
    assert "refused" in check_reachable(f"127.0.0.1:{port}")
    assert check_reachable("nowhere:port")


@pytest.mark.parametrize("where", ["127.0.0.1", "0.0.0.0", "127.0.0.5", "::1"])
def test_a_port_that_is_taken_on_any_address_is_refused_at_once(where):
    family = socket.AF_INET6 if ":" in where else socket.AF_INET
    try:
        taken = socket.create_server((where, 0), family=family)
    except OSError:
        pytest.skip("this machine has no IPv6")
    with taken:
        port = taken.getsockname()[1]
        with pytest.raises(CannotServe, match=f"port {port} is in use.*--dashboard-port takes another"):
            check_port(port, "--dashboard-port")
    check_port(port, "--port")


@pytest.mark.parametrize("address", ["203.0.113.7", "nowhere.invalid", "a" * 300, "..", "::1", "\ud800", "1.2.3.4\x1b"])
def test_an_address_that_is_not_this_machines_is_refused_at_once(address):
    check_address("127.0.0.1")
    with pytest.raises(CannotServe, match="is not an IPv4 address of this machine") as refused:
        check_address(address)
    assert "\x1b" not in str(refused.value)


def test_a_token_file_that_is_no_file_is_named(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    for path in (tmp_path, tmp_path / "fifo", Path("/dev/zero"), tmp_path / "bytes", Path("a\0b")):
        for make in (True, False):
            with pytest.raises(CannotServe, match="--token-file: "):
                token_file(path, make)
    with pytest.raises(CannotServe, match="cannot be written: File exists"):
        token_file(tmp_path / "bytes" / "token", make=True)


def test_sessions_that_ray_opened_to_everyone_are_closed_and_no_link_is_followed(tmp_path):
    session, other = tmp_path / "session_2026-01-01_00-00-00_1_2", tmp_path / "other"
    session.mkdir()
    other.mkdir()
    for path in (session, other):
        path.chmod(0o777)
    (tmp_path / "session_latest").symlink_to(session)
    (tmp_path / "session_2026-link").symlink_to(other)

    close_sessions([tmp_path, tmp_path / "nowhere"])

    assert [stat.S_IMODE(path.stat().st_mode) for path in (session, other)] == [0o700, 0o777]


class Clock:
    """Stands in for the time module: sleeping passes its time at once, and something may happen at a moment."""

    def __init__(self, happens=lambda now: None):
        self.now, self.happens = 0.0, happens

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds
        self.happens(self.now)


@pytest.fixture
def signals():
    """The handlers of before come back."""
    asked = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = [signal.getsignal(number) for number in asked]
    yield
    for number, handler in zip(asked, before, strict=True):
        signal.signal(number, handler)


def child(tmp_path, monkeypatch, script):
    """What is started in place of Python with Ray."""
    path = tmp_path / "child"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(path))


BOX = NodeCapability("box", 1, None, (CPU,))


def test_a_node_that_ends_is_started_again_after_pauses_that_grow(tmp_path, monkeypatch, signals):
    child(tmp_path, monkeypatch, "echo it fell; exit 1")
    said = []

    def end_after_eight(_):
        if len(said) == 8:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(node_daemon, "time", Clock(end_after_eight))
    keep_running(own(), BOX, said.append)

    assert [int(line.split()[-2]) for line in said] == [1, 2, 4, 8, 16, 30, 30, 30]
    assert said[0] == "the node ended (it fell); starting it again in 1 s"


def test_a_node_whose_process_failed_names_it(tmp_path, monkeypatch, signals):
    """Ray 2.60 names the process, then prints the end of its log, then that it ends the others."""
    stamp = "2026-11-29 15:48:35,459\tERR scripts.py:90 --"
    lines = ("Some Ray subprocesses exited unexpectedly:", "  gcs_server [exit code=-6]", "no space", "Remaining ...")
    child(tmp_path, monkeypatch, "".join(f"echo '{stamp} {line}'\n" for line in lines) + "exit 1")
    said = []
    monkeypatch.setattr(node_daemon, "time", Clock(lambda _: signal.raise_signal(signal.SIGTERM)))

    keep_running(own(), BOX, said.append)

    assert said == ["the node ended (gcs_server [exit code=-6]); starting it again in 1 s"]


def test_a_minute_of_life_makes_the_pauses_short_again(tmp_path, monkeypatch, signals):
    child(tmp_path, monkeypatch, "echo Ray runtime started; exit 1")
    clock, said, num_lives = Clock(), [], 0

    def say(line):
        nonlocal num_lives
        if "is up" in line:
            num_lives += 1
            clock.now += 61 if num_lives == 4 else 0  # the fourth lives long
        else:
            said.append(int(line.split()[-2]))
        if num_lives == 5:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(node_daemon, "time", clock)
    keep_running(own(), BOX, say)

    assert said == [1, 2, 4, 1]


def test_a_head_that_is_not_there_yet_is_waited_for_and_said_once(monkeypatch, signals):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    said = []
    monkeypatch.setattr(node_daemon, "time", Clock(lambda now: now > 100 and signal.raise_signal(signal.SIGTERM)))
    keep_running(own(head=f"127.0.0.1:{port}"), BOX, said.append)

    (line,) = said
    assert line.startswith(f"127.0.0.1:{port} does not answer yet")


def test_a_refused_token_ends_the_tries_and_a_head_refuses_nobody(tmp_path, monkeypatch, signals):
    child(tmp_path, monkeypatch, "echo InvalidAuthToken: Unauthenticated; exit 1")
    monkeypatch.setattr(node_daemon, "time", Clock(lambda now: now > 5 and signal.raise_signal(signal.SIGTERM)))
    with socket.create_server(("127.0.0.1", 0)) as server:
        where = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(CannotServe, match=f"{where} refuses the token in t"):
            keep_running(own(head=where), BOX, lambda line: None)

    keep_running(own(), BOX, lambda line: None)  # ends by the signal


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_child_that_hears_no_end_is_killed(tmp_path, monkeypatch, signals, number):
    child(tmp_path, monkeypatch, f"trap '' TERM; echo $$ > {tmp_path}/pid; echo Ray runtime started; exec sleep 60")
    monkeypatch.setattr(node_daemon, "_END_S", 0.2)
    keep_running(own(), BOX, lambda line: signal.raise_signal(number))

    assert not Path(f"/proc/{(tmp_path / 'pid').read_text().strip()}").exists()


def serve(home, *arguments):
    """A node that is up; its log lies beside its home."""
    log = home.with_name(f"{home.name}-{arguments[0]}.log")
    process = start(*arguments, cwd=home.parent, output=log, HOME=str(home))
    wait_for(lambda: " is up" in log.read_text(), process)
    return process


@pytest.mark.slow
def test_two_machines_are_a_cluster_and_a_stranger_is_not_let_in(tmp_path):
    friend, stranger = tmp_path / "friend", tmp_path / "stranger"
    port = free_port()
    where = f"127.0.0.1:{port}"
    head = serve(friend, "head", "--port", port, "--name", "first")
    second = serve(friend, "join", where, "--name", "second", "--slots", 2)

    told = orchestrator("nodes", "--cluster", where, "--json", cwd=tmp_path, HOME=str(friend)).stdout
    assert {(node["name"], node["state"], node["slots"]) for node in json.loads(told)} == {
        ("first", "alive", 1.0),
        ("second", "alive", 2.0),
    }
    session = session_of(port)
    assert stat.S_IMODE(session.stat().st_mode) == 0o700
    if os.getuid() == 0:
        found = tries(session, where, user="65534")
        assert (found["logs"], found["cluster"]) == ("closed", "closed")
    none = orchestrator("join", where, cwd=tmp_path, HOME=str(stranger), check=4)
    assert "there is no token" in none.output
    token_file(stranger / ".ray" / "auth_token", make=True)
    wrong = orchestrator("join", where, "--name", "third", cwd=tmp_path, HOME=str(stranger), check=4)
    assert "refuses the token" in wrong.output
    for process in (second, head):
        process.send_signal(signal.SIGTERM)
        assert outcome(process).returncode == 0
    wait_for(lambda: not [path for path in Path("/proc").glob("[0-9]*/cmdline") if f":{port}" in _text(path)])


def session_of(port):
    """The folder of the session whose processes name this port; `session_latest` may be of another cluster."""
    texts = map(_text, Path("/proc").glob("[0-9]*/cmdline"))
    return Path(next(found[0] for text in texts if f":{port}" in text and (found := _SESSION.search(text))))


_SESSION = re.compile(r"/tmp/ray/session_2[\w-]+")


def _text(path):
    try:
        return path.read_text()
    except OSError:
        return ""
