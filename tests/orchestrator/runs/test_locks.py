"""Who holds a folder, with real processes: the kernel decides, asking takes nothing, and one of two takers wins."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from orchestrator.errors import JobError
from orchestrator.runs import locks
from orchestrator.runs.events import StateChange
from orchestrator.runs.run_folder import RunFolder

ROOT = Path(__file__).resolve().parents[3]
JOB = "name: {name}\nmodel: {{model_name_or_path: a}}\ndata: {{train: b.jsonl}}\n"


def python(code, *arguments):
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def close(*processes):
    for process in processes:
        process.stdin.close()
        process.stdout.close()
        process.wait()


def test_asking_whether_a_folder_is_held_never_makes_a_driver_fail(tmp_path):
    (tmp_path / locks.NAME).touch()
    asker = python(
        "import sys; from pathlib import Path; from orchestrator.runs.locks import is_held\n"
        "print('ready', flush=True)\nwhile True: is_held(Path(sys.argv[1]))",
        tmp_path,
    )
    over, answers = threading.Event(), []

    def ask():
        while not over.is_set():
            answers.append(locks.is_held(tmp_path))

    threads = [threading.Thread(target=ask) for _ in range(2)]
    asker.stdout.readline()
    for thread in threads:
        thread.start()
    try:
        for _ in range(300):  # Held would end the test
            with locks.hold(tmp_path):
                pass
    finally:
        over.set()
        asker.kill()
        for thread in threads:
            thread.join()
        close(asker)

    assert len(answers) > 100


def test_a_holder_that_is_killed_holds_no_more(tmp_path):
    holder = python(
        "import sys, time; from pathlib import Path; from orchestrator.runs.locks import hold\n"
        "with hold(Path(sys.argv[1])): print('held', flush=True); time.sleep(600)",
        tmp_path,
    )
    holder.stdout.readline()

    held = locks.is_held(tmp_path)
    with pytest.raises(locks.FolderLocked, match=f"process {holder.pid} on "), locks.hold(tmp_path):
        pass
    os.kill(holder.pid, signal.SIGKILL)
    close(holder)

    assert held and not locks.is_held(tmp_path)
    with locks.hold(tmp_path):
        assert locks.is_held(tmp_path)  # asking does not let go of one's own


TAKER = """
import sys, json
from pathlib import Path
from orchestrator.errors import JobError
from orchestrator.runs.run_folder import RunFolder
for line in sys.stdin:
    name, text = json.loads(line)
    try:
        with RunFolder.take(Path(sys.argv[1]), "x", name) as run:
            if run.has_started:
                print("late", flush=True)
                continue
            run.begin({"origin.json": json.dumps({"folder": "/"}), "job.yaml": text})
        print("taken", flush=True)
    except JobError:
        print("refused", flush=True)
"""


def test_of_two_that_take_a_name_at_once_one_begins_it_and_every_file_is_its_own(tmp_path):
    both = [python(TAKER, tmp_path) for _ in range(2)]
    tries = 60
    try:
        for number in range(tries):
            for place, process in enumerate(both):
                job = JOB.format(name=f"job-{place}")
                process.stdin.write(json.dumps([f"run-{number}", job]) + "\n")
                process.stdin.flush()
            said = [process.stdout.readline().strip() for process in both]

            assert sorted(said)[-1] == "taken" and said.count("taken") == 1, said
            run = RunFolder.at(tmp_path / f"run-{number}")
            assert run.job().spec.name == f"job-{said.index('taken')}"
            assert not run.differences()
    finally:
        close(*both)

    assert len(RunFolder.all(tmp_path)) == tries


def test_a_folder_with_files_of_ones_own_is_no_run_and_is_not_written_into(tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "job.yaml").write_text(JOB.format(name="mine"))

    with pytest.raises(JobError, match=r"holds files that are no run's \(job.yaml\)"):
        RunFolder.create(tmp_path, "x", "mine")

    assert RunFolder.all(tmp_path) == []
    with pytest.raises(JobError, match="no such run"):
        RunFolder.find("mine", tmp_path)
    assert (mine / "job.yaml").read_text() == JOB.format(name="mine")
    assert [path.name for path in mine.iterdir()] == ["job.yaml"]


def test_a_start_that_was_killed_leaves_a_name_that_can_be_taken_again(tmp_path):
    RunFolder.create(tmp_path, "x", "again")

    with RunFolder.take(tmp_path, "x", "again") as run:
        assert not run.has_started
        with pytest.raises(JobError, match=f"again is running \\(process {os.getpid()} on"):
            RunFolder.create(tmp_path, "x", "again")


def test_a_run_of_an_earlier_version_is_still_a_run(tmp_path):
    old = tmp_path / "old"
    old.mkdir()
    (old / "job.yaml").write_text(JOB.format(name="old"))
    (old / "origin.json").write_text(json.dumps({"folder": str(tmp_path)}))
    said = []

    run = RunFolder.find("old", tmp_path)
    run.restore(said.append)

    assert run.job().spec.name == "old" and run.state() == "interrupted"
    assert "earlier version" in said[0]


@pytest.mark.parametrize("name", ["", "..", "a/b", "x" * 70, "a\nb", "-x"])
def test_names_that_no_run_can_have_are_refused(tmp_path, name):
    if name:
        with pytest.raises(JobError, match="--run-id"):
            RunFolder.create(tmp_path / "runs", "x", name)
    with pytest.raises(JobError):
        RunFolder.find(name or "\0", tmp_path / "runs")


def test_states_are_read_while_a_driver_lives(tmp_path):
    with RunFolder.take(tmp_path, "x", "here") as run:
        run.begin({"origin.json": json.dumps({"folder": "/"}), "job.yaml": JOB.format(name="x")})
        run.record(StateChange("running"))
        began = time.monotonic()
        states = {RunFolder.find("here", tmp_path).state() for _ in range(20)}

    assert states == {"running"} and time.monotonic() - began < 30
    assert run.state() == "interrupted"
