"""The emulated machines behave like machines, and leave nothing behind."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cluster.emulator import EmulatedCluster, Machine, unavailable

pytestmark = [pytest.mark.cluster, pytest.mark.skipif(unavailable() is not None, reason=unavailable() or "")]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    machines = [Machine("one"), Machine("two", rate_bits_per_s=20e6, delay_s=0.01), Machine("three")]
    with EmulatedCluster(machines, tmp_path_factory.mktemp("machines")) as cluster:
        yield cluster


def said(cluster, name, *code, **popen):
    process = cluster.run(name, [sys.executable, "-c", *code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          text=True, **popen)  # fmt: skip
    out, _ = process.communicate(timeout=60)
    return process.returncode, out


KNOCK = """
import socket, sys, time
began = time.perf_counter()
try:
    socket.create_connection((sys.argv[1], 9), timeout=float(sys.argv[2]))
except ConnectionRefusedError:  # an answer: nobody listens
    print(time.perf_counter() - began)
except TimeoutError:
    print("silence")
"""
RECEIVE = """
import socket, time
server = socket.create_server(("", 7000)); print("listening", flush=True)
other, _ = server.accept(); count, began = 0, time.perf_counter()
while part := other.recv(1 << 20):
    count += len(part)
print(8 * count / (time.perf_counter() - began))
"""
SEND = "import socket, sys; s = socket.create_connection((sys.argv[1], 7000)); s.sendall(bytes(5_000_000)); s.close()"


def answer_s(cluster, source, target, timeout_s=1.0):
    """Seconds to an answer, None for silence."""
    _, out = said(cluster, source, KNOCK, cluster.address(target), str(timeout_s))
    return None if "silence" in out else float(out)


def test_an_answer_takes_the_delay_of_both_sides(cluster):
    assert 0.020 <= min(answer_s(cluster, "one", "two") for _ in range(5)) < 0.035
    assert min(answer_s(cluster, "one", "three") for _ in range(5)) < 0.010


def test_a_transfer_runs_at_the_slower_rate(cluster):
    receiver = cluster.run("two", [sys.executable, "-c", RECEIVE], stdout=subprocess.PIPE, text=True)
    assert receiver.stdout.readline()
    assert said(cluster, "one", SEND, cluster.address("two"))[0] == 0
    rate = float(receiver.communicate(timeout=60)[0])

    assert 14e6 < rate < 22e6


def test_a_pulled_cable_is_silent_and_heals(cluster):
    cluster.set_link("two", up=False)
    assert answer_s(cluster, "one", "two") is None
    cluster.set_link("two", up=True)

    assert answer_s(cluster, "one", "two") is not None


def test_a_cut_parts_two_machines_and_no_others(cluster):
    cluster.cut("one", "three")

    assert answer_s(cluster, "one", "three") is None
    assert answer_s(cluster, "two", "three") is not None
    cluster.cut("one", "three", is_cut=False)
    assert answer_s(cluster, "one", "three") is not None


def test_each_has_its_name_its_processes_and_its_temporary_folder(cluster):
    code = "import os, pathlib, socket; pathlib.Path('/tmp/ray/mine').touch(); print(socket.gethostname(), os.getpid())"
    _, out = said(cluster, "one", code)
    name, pid = out.split()

    assert name == "one" and int(pid) < 1000
    assert said(cluster, "two", "import os; print(os.path.exists('/tmp/ray/mine'))")[1].strip() == "False"


def test_without_power_nothing_is_left_and_it_boots_again(cluster):
    sleeper = cluster.run("three", ["sleep", "100"])
    assert len(cluster.pids("three")) >= 2
    cluster.power_off("three")

    assert cluster.pids("three") == []
    assert sleeper.wait(timeout=10) != 0
    cluster.boot("three")
    assert answer_s(cluster, "one", "three") is not None


def test_a_frozen_machine_stands_still(cluster):
    ticking = cluster.run("three", [sys.executable, "-uc", "import time\nwhile True: time.sleep(.05); print()"],
                          stdout=subprocess.PIPE)  # fmt: skip
    ticking.stdout.readline()
    cluster.freeze("three")
    time.sleep(0.2)
    import os

    os.set_blocking(ticking.stdout.fileno(), False)
    ticking.stdout.read()
    time.sleep(0.5)
    assert not ticking.stdout.read()
    cluster.thaw("three")
    time.sleep(0.5)

    assert ticking.stdout.read()
    ticking.kill()
    ticking.communicate()


def test_who_takes_more_than_its_memory_is_killed(cluster):
    cluster.limit_memory("three", 100 * 2**20)
    code, _ = said(cluster, "three", "print(len(bytes(1) * (300 * 2**20)))")
    cluster.limit_memory("three", 2**40)

    assert code in (-9, 137)


def test_a_slow_machine_has_its_share(cluster):
    code = "import time; a = time.process_time(); b = time.time()\nwhile time.time() < b + 1: pass\n"
    code += "print(time.process_time() - a)"
    cluster.slow_down("three", 0.25)
    _, out = said(cluster, "three", code)
    cluster.slow_down("three", 0)

    assert 0.1 < float(out) < 0.4


def test_nothing_is_left_after_it(tmp_path):
    with EmulatedCluster([Machine("left"), Machine("right")], tmp_path / "home") as cluster:
        sleeper = cluster.run("left", ["sleep", "100"])
        tag = cluster._tag

    sleeper.wait(timeout=10)
    left = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout.split()
    assert f"{tag}-left" not in left
    assert not (Path("/sys/fs/cgroup/memory") / f"{tag}-left").exists()
