"""Jobs that name no cluster start in the head of their user, and without it as ever."""

import json
import os
from pathlib import Path

import pytest

from clusters.ray.spares import titles_below
from orchestrator.runs.run_folder import RunFolder
from tests.conftest import rows, write_jsonl
from tests.processes import free_port, kill, orchestrator, start, wait_for

JOB = """\
name: tiny
model: {{model_name_or_path: {model}, dtype: float32}}
data: {{train: train.jsonl, max_length: 64}}
method: {{lora_r: 4, lora_dropout: 0.1}}
train: {{global_batch_size: 8, max_steps: 5, learning_rate: 3e-3}}
tracking: {{report_to: []}}
"""


@pytest.fixture
def place(model_folder, tmp_path, monkeypatch):
    """A folder with a job, whose user has a cache of their own."""
    write_jsonl(tmp_path / "train.jsonl", rows(40))
    (tmp_path / "job.yaml").write_text(JOB.format(model=model_folder))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in [name for name in os.environ if name.startswith("RAY_")]:
        monkeypatch.delenv(name)
    return tmp_path


def submit(place, *options):
    """The losses of a job, and what was said."""
    done = orchestrator("submit", "job.yaml", "--json", *options, cwd=place, check=0)
    run = RunFolder(Path(json.loads(done.stdout)["path"]))
    return [report.loss for report in run.steps().values()], done.stderr


@pytest.mark.slow
def test_jobs_of_a_machine_use_its_head_one_after_the_other_and_compute_what_they_compute_without(place):
    options = ("--address", "127.0.0.1", "--port", free_port())
    head = start("head", *options, cwd=place, output=place / "head.log", HOME=str(place))
    wait_for(lambda: "ray::IDLE" in titles_below(head.pid), head)

    first, said = submit(place)
    wait_for(lambda: "ray::IDLE" in titles_below(head.pid), head)
    second, said_again = submit(place)
    stated, said_of_stated = submit(place, "--set", "cluster.nice=3")
    kill(head)
    alone, said_alone = submit(place)

    assert len(first) == 5 and first == second == stated == alone
    assert "using the Ray of `orchestrator head` at 127.0.0.1:" in said and "starting Ray" not in said
    assert "using the Ray of" in said_again
    assert "its workers have niceness 15, and cluster.nice is 3" in said_of_stated and "starting Ray" in said_of_stated
    assert "orchestrator head" not in said_alone and "starting Ray" in said_alone
