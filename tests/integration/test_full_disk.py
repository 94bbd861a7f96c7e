"""A disk that fills up: the run stops cleanly, keeps its last checkpoint, says so, and goes on when there is room."""

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from orchestrator.runs.run_folder import RunFolder
from orchestrator.training import checkpoint
from tests.conftest import rows, write_jsonl

ROOT = Path(__file__).resolve().parents[2]
JOB = """\
name: full
model: {{model_name_or_path: {model}, dtype: float32}}
data: {{train: train.jsonl, max_length: 64}}
method: {{type: full}}
train: {{global_batch_size: 8, max_steps: 3000, learning_rate: 1e-5}}
checkpoint: {{save_steps: 20, output_dir: {disk}}}
tracking: {{report_to: []}}
"""


@pytest.fixture
def small_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip("a small file system can only be mounted by root")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def started(place, *verb):
    return subprocess.Popen(
        [sys.executable, "-m", "orchestrator", *verb, "--json"],
        cwd=place,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def until(process, is_so):
    limit = time.monotonic() + 120
    while not is_so():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < limit
        time.sleep(0.05)


@pytest.mark.slow
def test_a_full_disk_stops_the_run_and_harms_no_checkpoint(small_disk, model_folder, tmp_path):
    write_jsonl(tmp_path / "train.jsonl", rows(40))
    (tmp_path / "job.yaml").write_text(JOB.format(model=model_folder, disk=small_disk))
    process = started(tmp_path, "submit", "job.yaml")
    until(process, lambda: RunFolder.all(small_disk) and len(RunFolder.all(small_disk)[0].steps()) > 30)
    (run,) = RunFolder.all(small_disk)
    filler = small_disk / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as stream:
        while True:
            stream.write(b"x" * 4096)
    told, _ = process.communicate(timeout=120)

    assert process.returncode == 5, told
    assert "No space left on device" in told and "Free some space" in told and "Traceback" not in told
    whole = checkpoint.newest(run.checkpoints, lambda text: None)
    assert whole is not None and whole.step >= 20
    assert not list(run.checkpoints.glob("*.tmp-*"))

    filler.unlink()
    again = started(tmp_path, "resume", run.run_id, "--runs", str(small_disk))
    until(again, lambda: max(run.steps()) > whole.step + 25)
    run.stop_file.touch()
    told, _ = again.communicate(timeout=120)
    assert again.returncode == 5 and run.state() == "stopped", told
    resumed = [e for e in run.events()[0] if e["event"] == "note" and "resumed from checkpoint" in e["text"]]
    assert f"step-{whole.step:08d}" in json.dumps(resumed)
