"""What `dashboard` takes beside 1,000 runs and one that trains: memory, and its part of a core while a page is open.

    python tests/benchmarks/dashboard.py
    python tests/benchmarks/dashboard.py --runs 10000 --seconds 60 --steps-per-s 10

The runs are made as in `reading.py`; the live one is held by a process of its own, which appends steps of two workers.
Two clients read as browsers do: the table's stream, and the live run's.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from urllib.request import urlopen

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a file

from orchestrator.planning.plan import Plan
from orchestrator.runs.events import Member, ModelReady, QualityReport, StateChange, WorkerGroup
from tests.benchmarks.reading import ROOT, copy_runs, make_run, one_step


def make_live(folder: Path, steps_per_s: float, num_steps: int = 100_000) -> None:
    """Hold a run and train it in appearance, until this process is ended."""
    run = make_run(folder, 4, 2)
    (folder / "events.jsonl").unlink()
    run.take_back("result.json")
    values = json.loads((folder / "plan.json").read_text()) | {"num_steps": num_steps}
    del values["hash"]
    run.keep("plan.json", Plan.from_json(json.dumps(values)).to_json())
    draw = random.Random(0)
    with run.lock():
        run.record(StateChange("running", pid=os.getpid()))
        run.record(WorkerGroup(step=0, members=[Member("a", "RTX 4090"), Member("b", "RTX 3060")]))
        run.record(ModelReady(3.0))
        run.record(QualityReport("before", 3.2, extra={"seconds": 4.0}))
        for step in range(1, num_steps + 1):
            run.record(one_step(step, num_steps, 2, draw, time.time()))
            time.sleep(1 / steps_per_s)


def used(pid: int) -> tuple[float, float, float]:
    """(CPU seconds, MiB now, MiB at most) of a process, by /proc."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    now, peak = (int(status[name].split()[0]) / 1024 for name in ("VmRSS", "VmHWM"))
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"), now, peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--steps-per-s", type=float, default=2.0)
    parser.add_argument("--live", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.live:
        make_live(asked.live, asked.steps_per_s)
        return
    with tempfile.TemporaryDirectory() as name:
        measure(Path(name), asked)


def measure(folder: Path, asked: argparse.Namespace) -> None:
    runs = folder / "runs"
    copy_runs(make_run(runs / "run-00000", 200, 2), asked.runs)
    python, here = sys.executable, {**os.environ, "PYTHONPATH": str(ROOT)}
    started: list[subprocess.Popen] = []

    def start(*command: str, **options: object) -> subprocess.Popen:
        started.append(subprocess.Popen([python, *command], env=here, text=True, **options))  # type: ignore[call-overload]
        return started[-1]

    try:
        start(__file__, "--live", str(runs / "live"), "--steps-per-s", str(asked.steps_per_s))
        began = time.perf_counter()
        dashboard = start(
            *("-m", "orchestrator", "dashboard", str(runs), "--port", "0", "--no-open", "--json"),
            stdout=subprocess.PIPE,
        )
        assert dashboard.stdout
        text = ""
        while not text.rstrip().endswith("}"):
            text += dashboard.stdout.readline()
        url = json.loads(text)["url"]
        listed = json.load(urlopen(f"{url}api/runs"))["runs"]
        print(f"{len(listed):,} runs listed {time.perf_counter() - began:.1f} s after the start")
        show("idle, nobody watches", dashboard.pid, asked.seconds / 4)
        for path in ("api/runs/events", "api/runs/live/events"):
            start("-c", f"from urllib.request import urlopen\nfor line in urlopen({url + path!r}): pass")
        time.sleep(5)
        show(f"a table and a run of {asked.steps_per_s:g} steps/s are watched", dashboard.pid, asked.seconds)
    finally:
        for process in reversed(started):
            process.terminate()
            process.wait()


def show(what: str, pid: int, seconds: float) -> None:
    before, began = used(pid)[0], time.perf_counter()
    time.sleep(seconds)
    cpu, now, peak = used(pid)
    share = (cpu - before) / (time.perf_counter() - began)
    print(f"{what}: {share:.1%} of a core over {seconds:.0f} s, {now:.0f} MiB, at most {peak:.0f}", flush=True)


if __name__ == "__main__":
    main()
