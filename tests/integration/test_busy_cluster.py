"""A cluster whose processors another program holds: the job says what it waits for, and trains when they are free."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.integration.test_mistakes import CACHE, ROOT

PORT = 6399
HOG = """
import os, sys, time, ray
from ray.util.placement_group import placement_group, remove_placement_group
ray.init(address=sys.argv[1], namespace="other", log_to_driver=False)
group = placement_group([{"CPU": ray.cluster_resources()["CPU"]}])
ray.get(group.ready())
print("held", flush=True)
while not os.path.exists(sys.argv[2]):
    time.sleep(0.2)
"""


@pytest.fixture
def cluster():
    """A Ray head of two processors; it is the machine's own, started and ended by its id."""
    command = [sys.executable, "-m", "ray.scripts.scripts"]
    start = [*command, "start", "--head", f"--port={PORT}", "--num-cpus=2", "--include-dashboard=false", "--block"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    head = subprocess.Popen(start, **quiet, start_new_session=True, env={**os.environ, "RAY_AUTH_MODE": "disabled"})
    try:
        time.sleep(10)
        assert head.poll() is None
        yield f"127.0.0.1:{PORT}"
    finally:
        os.killpg(head.pid, signal.SIGKILL)
        head.wait(30)


@pytest.mark.slow
def test_what_is_waited_for_and_who_holds_it_is_said(job_text, tmp_path, cluster):
    free = tmp_path / "free"
    (tmp_path / "job.yaml").write_text(job_text + f"cluster: {{address: '{cluster}'}}\n")
    (tmp_path / "hog.py").write_text(HOG)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": CACHE}
    hog = subprocess.Popen(
        [sys.executable, "hog.py", cluster, str(free)],
        cwd=tmp_path, stdout=subprocess.PIPE, text=True, env={**os.environ, "RAY_AUTH_MODE": "disabled"},
    )  # fmt: skip
    assert hog.stdout.readline() == "held\n"
    log = tmp_path / "told"
    with log.open("w") as told:
        job = subprocess.Popen(
            [sys.executable, "-m", "orchestrator", "submit", "job.yaml"],
            cwd=tmp_path, stdout=told, stderr=subprocess.STDOUT, env=environment,
        )  # fmt: skip
        try:
            until = time.monotonic() + 150
            while "waiting for" not in log.read_text() and job.poll() is None and time.monotonic() < until:
                time.sleep(0.5)
            waiting = log.read_text()
            free.touch()
            job.wait(240)
        finally:
            job.kill()
            free.touch()
            hog.wait(30)
            hog.stdout.close()

    waiting = " ".join(waiting.split())
    assert re.search(r"waiting for .* CPU of .*, where 0 of 2 are free\. Also connected: .*hog\.py", waiting), waiting
    assert job.returncode == 0, log.read_text()
    assert Path(tmp_path / "runs").exists()
