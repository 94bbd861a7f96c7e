"""Threads that wait spin while the cores are theirs, and sleep at once while other programs want them."""

import json
import os
import subprocess
import sys

import pytest

from strategies.step import thread_waits

OURS = {"GOMP_SPINCOUNT": "20000", "OMP_WAIT_POLICY": "passive"}
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="libgomp and /proc are Linux's")
on_cores = pytest.mark.skipif(
    sys.platform != "linux" or len(os.sched_getaffinity(0)) < 2, reason="a thread alone waits for none"
)
STAT = "cpu 9 9 9 9 9 9 9 9 0 0\ncpu0 100 10 30 5000 70 5 5 50 9 0\ncpu1 1 1 1 1 1 1 1 1 0 0\nintr 1 2 3\n"


def run(code, **environment):
    """What Python prints as JSON, in a process of its own with our settings unless the test gives others."""
    own = {name: value for name, value in os.environ.items() if name not in OURS}
    environment = {**own, **(environment or OURS), "OMP_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@on_linux
def test_threads_wait_as_the_user_wants_where_they_say_it(monkeypatch):
    for name in OURS:
        monkeypatch.delenv(name, raising=False)
    ours = thread_waits.environment()
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    theirs = thread_waits.environment()

    assert (ours, theirs) == (OURS, {"OMP_WAIT_POLICY": "active"})


def test_other_systems_have_another_openmp(monkeypatch):
    for name in OURS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "platform", "darwin")

    assert thread_waits.environment() == {}


@on_linux
def test_the_program_sets_it_before_torch_is_loaded():
    said = run(
        "import json, os, sys; from orchestrator.cli import app as cli\n"
        "cli.app = lambda **_: print(json.dumps([os.environ['GOMP_SPINCOUNT'], 'torch' in sys.modules]))\n"
        "cli.main()",
        NOTHING="",
    )

    assert said == ["20000", False]


def test_the_work_of_a_cpu_is_all_but_its_idle_time():
    ticks = os.sysconf("SC_CLK_TCK")

    assert thread_waits.busy_s(STAT, [0]) == (100 + 10 + 30 + 5 + 5 + 50) / ticks
    assert thread_waits.busy_s(STAT, [0, 1]) == (200 + 6) / ticks
    assert thread_waits.busy_s(STAT, [7]) == 0  # it was taken away


@pytest.mark.parametrize(
    ("threads", "others", "cores", "expected"),
    [
        (2, 0.1, 2, False),
        (2, 1.0, 2, True),
        (1, 2.0, 2, False),  # it waits for none
        (4, 3.9, 8, False),  # each has a core of its own still
        (4, 4.5, 8, True),
        (8, 0.2, 8, False),
        (8, 0.5, 8, True),
    ],
)
def test_threads_sleep_where_others_use_cores_that_they_would_need(threads, others, cores, expected):
    assert thread_waits.wants_sleep(threads, others, cores) is expected


# What the threads that wait compute while the main one works alone between parallel regions: seconds of spinning.
_WAITING = """
import json, time, torch
from strategies.step import thread_waits
x = torch.randn(512, 512)
openmp = thread_waits._libgomp()

def others_s():
    began, own = time.process_time(), time.thread_time()
    for _ in range(300):
        x + x
        until = time.perf_counter() + 2e-4
        while time.perf_counter() < until:
            pass
    return (time.process_time() - began) - (time.thread_time() - own)

others_s()
found = []
for _ in range(2):
    found.append(others_s())
    team = thread_waits.IdleTeam(openmp, 2 + len(__import__("os").sched_getaffinity(0)))
    found.append(others_s())
    team.end()
print(json.dumps(found))
"""


@on_cores
def test_a_team_that_sleeps_beside_them_makes_waiting_threads_sleep_until_it_ends():
    spinning, sleeping, again, asleep = run(_WAITING)

    assert sleeping < spinning / 2
    assert asleep < again / 2


_CROWDED = """
import json, os, subprocess, sys, time, torch
from strategies.step import thread_waits
cores = len(os.sched_getaffinity(0))
thread_waits.use_threads(cores)
thread_waits.report_change()
others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(cores)]
until = time.monotonic() + 60
while (said := thread_waits.report_change()) is None and time.monotonic() < until:
    time.sleep(0.2)
for other in others:
    other.kill()
    other.wait()
print(json.dumps([torch.get_num_threads() == cores, said, thread_waits.report_change()]))
"""


@on_cores
def test_programs_that_take_the_cores_are_noticed_and_said():
    threads, said, twice = run(_CROWDED)

    assert threads
    assert "threads that wait sleep at once" in said
    assert twice is None or "free again" in twice


@on_linux
def test_nothing_is_watched_where_the_user_says_how_threads_wait():
    code = (
        "import json; from strategies.step import thread_waits; thread_waits.use_threads(2); import torch\n"
        "print(json.dumps([thread_waits._watch() is None, torch.get_num_threads()]))"
    )

    assert run(code, GOMP_SPINCOUNT="1000") == [True, 2]
