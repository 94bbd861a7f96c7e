"""A node of one's own: the command that starts it, its token, its life; and two of them in earnest."""

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from clusters.capability import DeviceCapability, NodeCapability
from clusters.own_node import CannotServe, OwnNode, address_of, environment, knock, ray_arguments, token_file
from clusters.units import GIB

ROOT = Path(__file__).resolve().parents[2]
CPU = DeviceCapability("cpu", "AMD EPYC 9754 (Zen 4c)", 16 * GIB)
CARD = DeviceCapability("cuda", "RTX 3060", 12 * GIB)


def own(**changed):
    values = {"name": "box", "address": "10.0.0.2", "head": None, "token_file": Path("t"), "num_slots": 1}
    return OwnNode(**values | changed)


def test_a_head_offers_its_devices_as_slots_and_not_as_gpus():
    command = ray_arguments(own(num_slots=2), NodeCapability("box", 8, 32 * GIB, (CARD, CARD, CPU)))

    assert {"--head", "--port=6379", "--node-ip-address=10.0.0.2", "--node-name=box", "--num-gpus=0"} <= set(command)
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


def test_token_mode_is_on_whatever_the_shell_says():
    told = environment(Path("/t"), {"RAY_AUTH_MODE": "disabled", "RAY_health_check_period_ms": "500"})

    assert told["RAY_AUTH_MODE"] == "token" and told["RAY_AUTH_TOKEN_PATH"] == "/t"
    assert told["RAY_health_check_period_ms"] == "500"  # who set it meant it


def test_an_interface_has_an_address_or_the_others_are_named():
    assert address_of("lo") == "127.0.0.1"
    with pytest.raises(CannotServe, match=r"nosuch0: has no IPv4 address here; interfaces: .*lo"):
        address_of("nosuch0")


def test_a_silent_head_has_a_reason():
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert knock(f"127.0.0.1:{server.getsockname()[1]}") is None
        port = server.getsockname()[1]
    assert "refused" in knock(f"127.0.0.1:{port}")
    assert knock("nowhere:port")


def started(home, *arguments):
    return subprocess.Popen(
        [sys.executable, "-m", "orchestrator", *arguments],
        env={**os.environ, "HOME": str(home), "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def until_said(process, words):
    told = []
    for line in process.stdout:
        told.append(line)
        if words in line:
            return
    pytest.fail("".join(told))


def test_two_machines_are_a_cluster_and_a_stranger_is_not_let_in(tmp_path):
    friend, stranger = tmp_path / "friend", tmp_path / "stranger"
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    head = started(friend, "head", "--port", str(port), "--name", "first")
    try:
        until_said(head, "first is up")
        where = f"127.0.0.1:{port}"
        second = started(friend, "join", where, "--name", "second", "--slots", "2")
        until_said(second, "second is up")
        told = started(friend, "nodes", "--cluster", where, "--json").communicate(timeout=60)[0]

        assert {(node["name"], node["state"], node["slots"]) for node in json.loads(told)} == {
            ("first", "alive", 1.0),
            ("second", "alive", 2.0),
        }
        none = started(stranger, "join", where)
        assert "there is no token" in none.communicate(timeout=60)[0] and none.returncode == 4
        token_file(stranger / ".ray" / "auth_token", make=True)
        wrong = started(stranger, "join", where, "--name", "third")
        assert "refuses the token" in wrong.communicate(timeout=90)[0] and wrong.returncode == 4
        second.send_signal(signal.SIGTERM)
        assert second.wait(timeout=40) == 0
    finally:
        head.send_signal(signal.SIGTERM)
        assert head.wait(timeout=40) == 0
    for process in (head, second):
        process.stdout.close()
    time.sleep(0.5)
    left = [path for path in Path("/proc").glob("[0-9]*/cmdline") if f":{port}" in _text(path)]
    assert left == []


def _text(path):
    try:
        return path.read_text()
    except OSError:
        return ""
