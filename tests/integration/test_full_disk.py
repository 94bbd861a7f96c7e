"""A disk that fills up: the run stops cleanly, keeps its last checkpoint, and resumes when there is room."""

import contextlib
import subprocess

import pytest

from orchestrator.runs.events import Note
from orchestrator.runs.run_folder import RunFolder
from orchestrator.training import checkpoint
from tests.conftest import rows, write_jsonl
from tests.processes import outcome, start, wait_for

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


@pytest.mark.slow
def test_a_full_disk_stops_the_run_and_harms_no_checkpoint(small_disk, model_folder, tmp_path):
    write_jsonl(tmp_path / "train.jsonl", rows(40))
    (tmp_path / "job.yaml").write_text(JOB.format(model=model_folder, disk=small_disk))
    process = start("submit", "job.yaml", "--json", cwd=tmp_path)
    wait_for(lambda: RunFolder.all(small_disk) and len(RunFolder.all(small_disk)[0].steps()) > 30, process)
    (run,) = RunFolder.all(small_disk)
    filler = small_disk / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as stream:
        while True:
            stream.write(b"x" * 4096)
    done = outcome(process)

    assert done.returncode == 5, done.output
    assert "No space left on device" in done.output and "Free some space" in done.output
    assert "Traceback" not in done.output
    whole = checkpoint.newest(run.checkpoints, lambda text: None)
    assert whole is not None and whole.step >= 20
    assert not list(run.checkpoints.glob("*.tmp-*"))

    filler.unlink()
    again = start("resume", run.run_id, "--runs", small_disk, "--json", cwd=tmp_path)
    wait_for(lambda: max(run.steps()) > whole.step + 25, again)
    run.stop_file.touch()
    done = outcome(again)
    assert done.returncode == 5 and run.state() == "stopped", done.output
    resumed = [e for e in run.events_of(Note) if "resumed from checkpoint" in e.text]
    assert f"step-{whole.step:08d}" in str(resumed)
