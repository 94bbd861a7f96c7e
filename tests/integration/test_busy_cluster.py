"""A cluster whose processors another program holds: the job names what it waits for and trains when it is free."""

import re
from pathlib import Path

import pytest

from tests.integration.test_mistakes import CACHE
from tests.processes import end, free_port, listens, outcome, start, start_python, wait_for

OPEN = "disabled"  # this cluster wants no token
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
def cluster(tmp_path):
    """A Ray head of two processors; it is the machine's own, started and ended by its id."""
    port = free_port()
    asked = ("--head", f"--port={port}", "--num-cpus=2", "--include-dashboard=false", "--block")
    head = start_python(
        "-m", "ray.scripts.scripts", "start", *asked, cwd=tmp_path, output=tmp_path / "head.log", RAY_AUTH_MODE=OPEN
    )
    wait_for(lambda: listens(port), head)
    yield f"127.0.0.1:{port}"
    end(head)


@pytest.mark.slow
def test_the_job_names_what_it_waits_for_and_who_holds_it(job_text, tmp_path, cluster):
    free = tmp_path / "free"
    (tmp_path / "job.yaml").write_text(job_text + f"cluster: {{address: '{cluster}'}}\n")
    (tmp_path / "hog.py").write_text(HOG)
    hog = start_python("hog.py", cluster, free, cwd=tmp_path, RAY_AUTH_MODE=OPEN)
    assert hog.stdout.readline() == "held\n"
    log = tmp_path / "job.log"
    job = start("submit", "job.yaml", cwd=tmp_path, output=log, XDG_CACHE_HOME=CACHE)

    wait_for(lambda: "waiting for" in log.read_text(), job)
    waiting = log.read_text()
    free.touch()
    code = outcome(job).returncode

    waiting = " ".join(waiting.split())
    assert re.search(r"waiting for .* CPU of .*, where 0 of 2 are free\. Also connected: .*hog\.py", waiting), waiting
    assert code == 0, log.read_text()
    assert Path(tmp_path / "runs").exists()
