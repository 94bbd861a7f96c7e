"""A head that this user keeps on this machine: found while it lives, believed for nothing that is gone, used by one."""

import os
import socket
import stat
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from clusters.ray import resident, spares


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("RAY_worker_niceness", raising=False)  # of the tests' own workers


@pytest.fixture
def head():
    """A head of this process, at an address that answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield resident.describe(f"127.0.0.1:{server.getsockname()[1]}", Path("token"), 1, os.environ)


def test_a_head_is_found_while_it_runs_and_its_record_is_its_owners(head):
    with resident.announced(head):
        found = resident.find()
        mode = stat.S_IMODE(resident._file().stat().st_mode)

    assert found == head and mode == 0o600 and resident.why_not(head, 1, None) is None
    assert resident.find() is None and not resident._file().exists()


@pytest.mark.parametrize(
    "gone",
    [
        {"pid": 2**22 + 1},  # beyond the kernel's largest
        {"started": "1"},  # another process has the number now
        {"boot": "of last week"},
    ],
)
def test_a_head_that_was_killed_or_ran_before_the_boot_is_not_found(head, gone):
    with resident.announced(replace(head, **gone)):
        assert resident.find() is None


def test_a_record_that_others_could_have_written_is_not_believed(head):
    with resident.announced(head):
        resident._file().chmod(0o666)

        assert resident.find() is None


@pytest.mark.parametrize("text", ["", "{", "[]", '{"address": 1}'])
def test_a_damaged_record_is_no_head(head, text):
    with resident.announced(head):
        resident._file().write_text(text)

        assert resident.find() is None


def test_the_record_of_a_later_head_stays(head):
    with resident.announced(head):
        later = replace(head, num_slots=2)
        with resident.announced(later):
            pass
        assert resident.find() is None
        resident._file().write_text("another's")

    assert resident._file().read_text() == "another's"


@pytest.mark.parametrize(
    ("changed", "num_slots", "nice", "reason"),
    [
        ({"software": {"ray": "1.0"}}, 1, None, "other software: start it again"),
        ({}, 2, None, "offers 1 slots, and the plan has 2 workers"),
        ({}, 1, 0, "niceness 15, and cluster.nice is 0"),
        ({"environment": {"OMP_NUM_THREADS": "7"}}, 1, None, "another value of .*OMP_NUM_THREADS"),
        ({"address": "127.0.0.1:1"}, 1, None, "does not answer at 127.0.0.1:1 .*refused"),
        ({"address": "nonsense"}, 1, None, "does not answer"),
    ],
)
def test_a_head_that_does_not_fit_the_job_is_not_used_and_the_reason_is_said(head, changed, num_slots, nice, reason):
    found = resident.why_not(replace(head, **changed), num_slots, nice)

    assert found is not None
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(found)


def test_one_job_at_a_time_uses_it():
    with resident.taken() as first, resident.taken() as second:
        assert first and not second
    with resident.taken() as again:
        assert again


def test_a_worker_has_the_environment_of_who_submits_and_rays_own_stays(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "of the job")
    monkeypatch.setenv("RAY_JOB", "of the driver")
    sent = resident.inherited()
    monkeypatch.setenv("HF_TOKEN", "of the head")
    monkeypatch.setenv("RAY_JOB", "of the worker")

    resident.adopt(sent)

    assert os.environ["HF_TOKEN"] == "of the job" and os.environ["RAY_JOB"] == "of the worker"


def test_spares_are_started_once_while_no_job_computes_and_again_after_each_job(monkeypatch):
    services = ["raylet", "ray::DashboardAgent"]
    looks = iter(
        [
            [*services],  # started
            [*services],  # asked for, and not there yet
            [*services, "ray::IDLE"],
            [*services, "ray::RayTrainWorker.run"],  # taken by a job
            [*services],  # the job is over
            [*services, "ray::IDLE"],
        ]
    )
    left, asked = [6], []
    monkeypatch.setattr(spares, "titles_below", lambda node: next(looks))

    def is_over():
        left[0] -= 1
        return left[0] < 0

    spares.keep_spares(1, 0, lambda count: asked.append((5 - left[0], count)), is_over, look_every_s=0)

    assert asked == [(0, 1), (4, 1)]


def test_what_runs_below_a_process_is_seen_whichever_thread_started_it():
    started = []

    def start():
        started.append(subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE))

    thread = threading.Thread(target=start)
    thread.start()
    thread.join()
    with started[0] as child:
        until = time.monotonic() + 10
        while sys.executable not in (titles := spares.titles_below(os.getpid())) and time.monotonic() < until:
            time.sleep(0.01)  # it has no title before its program has begun
        child.kill()

    assert sys.executable in titles
