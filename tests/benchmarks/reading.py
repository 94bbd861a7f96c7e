"""What the verbs that read runs take: seconds of user time and peak memory, each in a process of its own.

    python tests/benchmarks/reading.py                 10,000 runs; one run of 1,000,000 steps
    python tests/benchmarks/reading.py --runs 1000 --steps 100000
    python tests/benchmarks/reading.py light           --help, validate, list, plan and inspect of one small job

Every run is a copy of tests/fixtures/earlier/results/finished with events of its own, written by the event classes:
steps, evaluations, checkpoints, notes, and a resume that trains some steps again.  `first` has no summary to start
from, `again` is the same command once more.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a file

from orchestrator.runs import record
from orchestrator.runs.events import (
    CheckpointReport,
    Evaluation,
    Event,
    Member,
    ModelReady,
    Note,
    QualityReport,
    StateChange,
    StepReport,
    WorkerGroup,
)
from orchestrator.runs.run_folder import RunFolder

ROOT = Path(__file__).resolve().parents[2]
EARLIER = ROOT / "tests" / "fixtures" / "earlier"
TEMPLATE = EARLIER / "results" / "finished"


def events_of_run(num_steps: int, num_workers: int = 1) -> Iterator[Event]:
    """What a run of so many steps reports; a kill after the first half trains a hundredth of the steps again."""
    draw = random.Random(num_steps)
    members = [Member(f"node-{rank}", "RTX 4090") for rank in range(num_workers)]
    half = num_steps // 2
    now = 1.7e9
    for first, last in ((1, half), (max(1, half - num_steps // 100), num_steps)):
        yield StateChange("running", pid=7, time=now)
        yield WorkerGroup(step=first - 1, members=members, time=now + 20)
        yield ModelReady(12.0, time=now + 30)
        now += 30
        if first == 1:
            yield QualityReport("before", 3.2, time=now)
        for step in range(first, last + 1):
            now += 0.5
            yield one_step(step, num_steps, num_workers, draw, now)
            if step % 1000 == 0:
                yield Evaluation(step, 2.0 * num_steps / (num_steps + step), time=now)
                yield CheckpointReport(step, f"step-{step:08}", time=now)
            if step % 10_000 == 0:
                yield Note(f"shares moved at {step}", time=now)
    yield QualityReport("after", 1.1, time=now)
    yield StateChange("finished", step=num_steps, time=now)


def one_step(step: int, num_steps: int, num_workers: int, draw: random.Random, now: float) -> StepReport:
    loss = 3.0 / (1 + 10 * step / num_steps) + 0.2 * draw.random()
    by_worker = (
        {}
        if num_workers == 1
        else {
            "worker_tokens": [512.0] * num_workers,
            "worker_s": [0.4 + 0.05 * draw.random() for _ in range(num_workers)],
            "worker_peak_bytes": [2.0e9] * num_workers,
            "step_bytes_sent": 1.0e6,
            "slowest": 0,
        }
    )
    return StepReport(
        step=step,
        epoch=round(step / 1000, 4),
        loss=loss,
        grad_norm=draw.random(),
        learning_rate=1e-4 * (1 - step / (num_steps + 1)),
        tokens=512 * num_workers,
        supervised_tokens=400 * num_workers,
        seconds=0.4 + 0.1 * draw.random(),
        tokens_per_s=1000 + 100 * draw.random(),
        peak_bytes=2_000_000_000,
        samples=f"{draw.getrandbits(64):016x}",
        time=round(now, 3),
        **by_worker,
    )


def make_run(folder: Path, num_steps: int, num_workers: int = 1) -> RunFolder:
    """A finished run: the template's files, recorded as its own, and events of its own."""
    shutil.copytree(TEMPLATE, folder, ignore=shutil.ignore_patterns(".summary*"))
    (folder / record.NAME).unlink(missing_ok=True)
    run = RunFolder(folder)
    names = ("origin.json", "capability.json", "plan.json", "data.json", "result.json", "job.yaml")
    run.begin({name: (folder / name).read_text() for name in names})
    write_events(run, events_of_run(num_steps, num_workers))
    with run.lock():  # as a driver did
        return run


def write_events(run: RunFolder, found: Iterator[Event]) -> None:
    with (run.path / "events.jsonl").open("w") as stream:
        stream.writelines(json.dumps(event.to_json()) + "\n" for event in found)


def copy_runs(first: RunFolder, count: int) -> None:
    """More runs like the first, beside it."""
    for number in range(1, count):
        shutil.copytree(first.path, first.path.with_name(f"run-{number:05}"))


def measure(command: Sequence[str], folder: Path) -> tuple[float, float, float]:
    """(seconds of user time, of system time, peak MiB) of `orchestrator COMMAND`."""
    code = (
        "import resource, sys\n"
        "from orchestrator.cli.app import main\n"
        "sys.argv[0] = 'orchestrator'\n"
        "try:\n"
        "    main()\n"
        "except SystemExit as end:\n"
        "    if end.code: raise\n"
        "used = resource.getrusage(resource.RUSAGE_SELF)\n"
        "print('USED', used.ru_utime, used.ru_stime, used.ru_maxrss / 1024, file=sys.stderr)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HOME": str(folder), "COLUMNS": "120"}
    done = subprocess.run(
        [sys.executable, "-c", code, *command], capture_output=True, text=True, cwd=folder, env=environment, check=False
    )
    used = [line for line in done.stderr.splitlines() if line.startswith("USED ")]
    if not used:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    user, system, peak = map(float, used[0].split()[1:])
    return user, system, peak


def show(name: str, command: Sequence[str], folder: Path) -> None:
    user, system, peak = measure(command, folder)
    print(f"{name:44} {user:7.2f} {system:7.2f} {peak:9.0f}", flush=True)


def measure_many(folder: Path, num_runs: int) -> None:
    first = make_run(folder / "many" / "run-00000", 8)
    copy_runs(first, num_runs)
    subprocess.run(["sleep", "3"], check=True)  # a summary keeps no file that was written in this moment
    for when in ("first", "again", "again"):
        show(f"list, {num_runs:,} runs, {when}", ["list", "--runs", "many"], folder)
    show(f"list --json, {num_runs:,} runs, again", ["list", "--runs", "many", "--json"], folder)
    show(f"status latest of {num_runs:,} runs", ["status", "latest", "--runs", "many"], folder)


def measure_long(folder: Path, num_steps: int, num_workers: int) -> None:
    run = make_run(folder / "long" / "run", num_steps, num_workers)
    subprocess.run(["sleep", "3"], check=True)
    size = (run.path / "events.jsonl").stat().st_size / 2**20
    print(f"{num_steps:,} steps of {num_workers}: {size:.0f} MiB of events")
    for when in ("first", "again"):
        show(f"status, {when}", ["status", "run", "--runs", "long"], folder)
    show("status --json, again", ["status", "run", "--runs", "long", "--json"], folder)
    show("list, again", ["list", "--runs", "long"], folder)
    for file in run.path.glob(".summary*"):
        file.unlink()
    for when in ("first", "again"):
        show(f"report, {when}", ["report", "run", "--runs", "long"], folder)
    run.record(Note("one more line"))
    for when in ("after an event more", "again"):
        show(f"status, {when}", ["status", "run", "--runs", "long"], folder)


def measure_light(folder: Path) -> None:
    shutil.copytree(EARLIER, folder / "light")
    job = str(folder / "light" / "job.yaml")
    for command in (["--help"], ["validate", job], ["list"], ["plan", job], ["inspect", job]):
        for _ in range(3):
            show(" ".join([command[0]]), command, folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", default=["many", "long"], help="many, long, light")
    parser.add_argument("--runs", type=int, default=10_000)
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--workers", type=int, default=1)
    asked = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    print(f"{'':44} {'user s':>7} {'system':>7} {'peak MiB':>9}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if "many" in asked.what:
            measure_many(folder, asked.runs)
        if "long" in asked.what:
            measure_long(folder, asked.steps, asked.workers)
        if "light" in asked.what:
            measure_light(folder)


if __name__ == "__main__":
    main()
