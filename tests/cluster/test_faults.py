"""The fault matrix: machines lose power, cables, memory and time while one job trains over them.

Every fault: the same samples in every step as the undisturbed run, at most one checkpoint interval trained again, equal
losses (bit by bit where the plan stays the same, to 1e-5 where it changes), no process left; times to detect and to
go on are printed.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from orchestrator.runs.run_folder import RunFolder
from tests.cluster.emulator import EmulatedCluster, Machine, unavailable
from tests.conftest import rows, write_jsonl
from tests.processes import PATIENCE_S, ROOT, outcome, wait_for

pytestmark = [pytest.mark.cluster, pytest.mark.skipif(unavailable() is not None, reason=unavailable() or "")]
EVERY = 10  # steps between checkpoints
SMALL_MEMORY_BYTES = 550 * 2**20  # of a node: enough for Ray's own processes, not for a worker
JOB = """\
name: faults
model: {{model_name_or_path: {model}, dtype: float32}}
data: {{train: train.jsonl, max_length: 64}}
method: {{lora_r: 4}}
train: {{global_batch_size: 8, max_steps: {steps}, learning_rate: 1e-4, lr_scheduler_type: constant}}
strategy: {{shares: {shares}, mode: {mode}}}
cluster: {{address: "{address}:6379", num_workers: 2, wait_for_nodes_s: {wait}}}
checkpoint: {{save_steps: {every}}}
tracking: {{report_to: []}}
"""


class Lab:
    """Machines, a head without a device among them, and jobs on them."""

    def __init__(self, cluster, folder, model):
        self.cluster, self.folder, self.model = cluster, folder, model
        self.home = folder / "home"
        self.agents = {}
        self.jobs = []

    def start(self, name):
        """The product's own verbs; they come back by themselves."""
        where = ["head", "--address", self.cluster.address("head"), "--slots", "0"]
        if name != "head":
            where = ["join", self.cluster.address("head")]
        with (self.folder / f"{name}.log").open("ab") as log:
            self.agents[name] = self.cluster.run(
                name,
                [sys.executable, "-m", "orchestrator", *where, "--name", name],
                env={"HOME": str(self.home), "PYTHONPATH": str(ROOT)},
                stdout=log,
                stderr=log,
                cwd=self.folder,
            )

    def power_off(self, name):
        self.cluster.power_off(name)
        self.agents.pop(name).wait()

    def signal_driver(self, number):
        """To the process that was told to submit."""
        for pid in self.cluster.pids("head"):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                command = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
                if command[1:3] == ["-m", "orchestrator"] and command[3] in ("submit", "resume"):
                    os.kill(pid, number)

    def until_up(self, names):
        until = time.monotonic() + PATIENCE_S
        while set(names) - self.up():
            assert time.monotonic() < until, (names, self.up())
            time.sleep(1)

    def up(self):
        done = self.cluster.run(
            "head",
            [
                sys.executable,
                "-m",
                "orchestrator",
                "nodes",
                "--json",
                "--cluster",
                f"{self.cluster.address('head')}:6379",
            ],
            env={"HOME": str(self.home), "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        out, _ = done.communicate(timeout=60)
        return {node["name"] for node in json.loads(out) if node["state"] == "alive"} if done.returncode == 0 else set()

    def submit(self, *verb, steps=120, shares="planned", wait=40, mode="auto"):
        values = {"steps": steps, "shares": shares, "wait": wait, "mode": mode, "every": EVERY}
        text = JOB.format(model=self.model, address=self.cluster.address("head"), **values)
        (self.folder / "job.yaml").write_text(text)
        return self.start_job(*(verb or ("submit", "job.yaml")), is_new=not verb)

    def start_job(self, *verb, is_new=True):
        """A verb that makes or continues a run, on the head: its process and the run's folder."""
        before = {run.run_id for run in RunFolder.all(self.folder / "runs")}
        process = self.cluster.run(
            "head",
            [sys.executable, "-m", "orchestrator", *verb, "--json"],
            env={"HOME": str(self.home), "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=self.folder,
        )
        self.jobs.append(process)
        while process.poll() is None:
            new = [run for run in RunFolder.all(self.folder / "runs") if run.run_id not in before or not is_new]
            if new:
                return process, new[-1]
            time.sleep(0.1)
        pytest.fail(process.communicate()[0])


@contextlib.contextmanager
def started_lab(machines, folder, model_folder):
    """A lab whose machines are up, the head first."""
    write_jsonl(folder / "train.jsonl", rows(40))
    names = [machine.name for machine in machines]
    with EmulatedCluster(machines, folder / "machines") as cluster:
        lab = Lab(cluster, folder, model_folder)
        for name in names:
            lab.start(name)
            if name == "head":
                lab.until_up(("head",))  # it makes the token
        lab.until_up(names)
        yield lab
        for process in lab.jobs:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            process.stdout.close()
        for name in list(lab.agents):
            lab.power_off(name)


@pytest.fixture(scope="module")
def lab(tmp_path_factory, model_folder):
    machines = [Machine("head"), Machine("fast"), Machine("slow", rate_bits_per_s=1e8, delay_s=2e-3)]
    with started_lab(machines, tmp_path_factory.mktemp("lab"), model_folder) as lab:
        yield lab


@pytest.fixture(scope="module")
def reference(lab):
    """The losses and samples of each step when nothing happens."""
    process, run = lab.submit()
    return finished(process, run)


def events(run, name):
    return [event for event in run.events()[0] if event.kind == name]


def wait_for_step(run, step, process):
    wait_for(lambda: max(run.steps(), default=0) >= step, process)


def finished(process, run):
    done = outcome(process)
    assert done.returncode == 0, done.output[-3000:]
    return run


def compare(run, reference, exact=True, most_again=EVERY, rel=1e-5):
    """The assertions of every row of the matrix."""
    mine, theirs = run.steps(), reference.steps()
    assert [mine[step].samples for step in sorted(mine)] == [theirs[step].samples for step in sorted(theirs)]
    losses = [mine[step].loss for step in sorted(mine)]
    expected = [theirs[step].loss for step in sorted(theirs)]
    assert losses == (expected if exact else pytest.approx(expected, rel=rel))
    trained = [event.step for event in events(run, "step")]
    assert len(trained) - len(set(trained)) <= most_again


def tell(fault, run, began):
    """Seconds until the fault was noticed, and until steps were made again."""
    after = [event for event in run.events()[0] if event.time > began]
    noticed = next((e.time - began for e in after if e.kind in ("error", "failure", "killed")), None)
    index = next((i for i, e in enumerate(after) if e.kind == "replanned"), None)
    resumed = next((e.time - began for e in after[index or 0 :] if e.kind == "step"), None)
    text = {"fault": fault, "noticed_s": noticed, "resumed_s": resumed}
    print(json.dumps({key: round(value, 1) if isinstance(value, float) else value for key, value in text.items()}))
    return noticed, resumed


def training_pid(lab, run, name):
    """The worker on a machine, by this machine's numbers."""
    groups = events(run, "group")
    inner = next(member.extra["pid"] for member in groups[-1].members if member.node == name)
    for pid in lab.cluster.pids(name):
        status = Path(f"/proc/{pid}/status").read_text()
        numbers = next(line for line in status.splitlines() if line.startswith("NSpid")).split()[1:]
        if numbers[-1] == str(inner):
            return pid
    raise LookupError(name)


def test_a_killed_worker(lab, reference):
    process, run = lab.submit()
    wait_for_step(run, 25, process)
    began = time.time()
    os.kill(training_pid(lab, run, "slow"), signal.SIGKILL)
    finished(process, run)

    compare(run, reference)
    assert tell("worker killed", run, began)[0] < 10


def test_a_node_without_power_that_comes_back(lab, reference):
    process, run = lab.submit(wait=60)
    wait_for_step(run, 25, process)
    began = time.time()
    lab.power_off("slow")
    time.sleep(10)
    lab.cluster.boot("slow")
    lab.start("slow")
    finished(process, run)

    compare(run, reference)
    assert tell("power off, back after 10 s", run, began)[0] < 10


def test_a_node_without_power_for_good_and_one_that_joins(lab, reference):
    process, run = lab.submit(wait=5, steps=12_000)
    wait_for_step(run, 25, process)
    began = time.time()
    lab.power_off("slow")
    wait_for_step(run, 60, process)
    assert events(run, "replanned")[-1].nodes == ["fast"]
    tell("power off for good", run, began)
    began = time.time()
    lab.cluster.boot("slow")
    lab.start("slow")
    until = time.monotonic() + PATIENCE_S
    while events(run, "replanned")[-1].nodes != ["fast", "slow"]:
        assert time.monotonic() < until and process.poll() is None, run.events()[0][-4:]
        time.sleep(0.2)
    wait_for_step(run, max(run.steps()) + 20, process)
    tell("joined", run, began)
    run.stop_file.touch()
    process.communicate(timeout=100)

    mine, theirs = run.steps(), reference.steps()
    common = [step for step in mine if step in theirs]
    assert [mine[s].samples for s in common] == [theirs[s].samples for s in common]
    assert [mine[s].loss for s in common] == pytest.approx([theirs[s].loss for s in common], rel=1e-5)


def test_a_pulled_cable(lab, reference):
    process, run = lab.submit(wait=90)
    wait_for_step(run, 25, process)
    began = time.time()
    lab.cluster.set_link("slow", up=False)
    time.sleep(30)
    lab.cluster.set_link("slow", up=True)
    finished(process, run)

    compare(run, reference, exact=False)
    assert tell("cable pulled for 30 s", run, began)[0] < 30
    lab.until_up(("fast", "slow"))


@pytest.mark.parametrize("what", ["blip", "loss", "jitter"])
def test_a_bad_line_is_borne(lab, reference, what):
    process, run = lab.submit(steps=120)
    wait_for_step(run, 25, process)
    worse = {"blip": {"up": False}, "loss": {"loss": 0.01}, "jitter": {"jitter": 0.2}}[what]
    lab.cluster.set_link("slow", **worse)
    time.sleep(3)
    lab.cluster.set_link("slow", up=True, loss=0.0, jitter=0.0)
    finished(process, run)

    compare(run, reference, most_again=0)
    assert not events(run, "failure")


def test_a_straggler_gets_less(lab, reference):
    process, run = lab.submit(shares="measured", steps=400)
    wait_for_step(run, 25, process)
    lab.cluster.slow_down("slow", 0.15)
    until = time.monotonic() + PATIENCE_S
    while not [event for event in events(run, "shares") if min(event.shares) < 0.35]:
        assert time.monotonic() < until and process.poll() is None, events(run, "shares")
        time.sleep(0.1)
    lab.cluster.slow_down("slow", 0)
    finished(process, run)

    mine, theirs = run.steps(), reference.steps()
    assert [mine[s].samples for s in theirs] == [theirs[s].samples for s in theirs]
    assert [mine[s].loss for s in theirs] == pytest.approx([theirs[s].loss for s in theirs], rel=1e-5)


def test_a_machine_that_hangs(lab, reference):
    process, run = lab.submit(wait=5)
    wait_for_step(run, 25, process)
    began = time.time()
    lab.cluster.freeze("slow")
    finished(process, run)
    lab.cluster.thaw("slow")

    compare(run, reference, exact=False)
    assert tell("machine hangs", run, began)[0] < 60
    lab.until_up(("fast", "slow"))


def test_a_killed_driver_and_the_same_run_again(lab, reference):
    process, run = lab.submit()
    wait_for_step(run, 25, process)
    began = time.time()
    lab.signal_driver(signal.SIGKILL)
    process.communicate()
    again, _ = lab.submit("resume", run.run_id)
    finished(again, run)

    compare(run, reference)
    tell("driver killed", run, began)


def test_asked_to_end_it_saves_first(lab, reference):
    process, run = lab.submit()
    wait_for_step(run, 25, process)
    lab.signal_driver(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert (process.returncode, run.state()) == (5, "stopped"), out
    again, _ = lab.submit("resume", run.run_id)
    finished(again, run)

    compare(run, reference, most_again=0)


def test_a_lost_head_and_a_cluster_begun_anew(lab, reference):
    process, run = lab.submit()
    wait_for_step(run, 25, process)
    lab.power_off("head")
    process.communicate()
    lab.cluster.boot("head")
    lab.start("head")
    lab.until_up(("head", "fast", "slow"))
    if run.state() != "finished":  # the workers may come to the end before they miss their head
        again, _ = lab.submit("resume", run.run_id)
        finished(again, run)

    compare(run, reference)


def test_a_damaged_checkpoint_and_rays_own_snapshot_cut_in_half(lab, reference):
    process, run = lab.submit()
    wait_for_step(run, 35, process)
    lab.signal_driver(signal.SIGKILL)
    process.communicate()
    of_ray = [file for file in (run.path / ".ray").rglob("*") if file.is_file()]  # what Ray Train keeps of itself
    assert of_ray
    for file in of_ray:
        os.truncate(file, file.stat().st_size // 2)
    newest = sorted(run.checkpoints.glob("step-????????"))[-1]
    weights = newest / "weights.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(content)
    again, _ = lab.submit("resume", run.run_id)
    finished(again, run)

    compare(run, reference, most_again=2 * EVERY)
    notes = [event.text for event in events(run, "note")]
    assert any(newest.name in text and "weights.safetensors has changed" in text for text in notes), notes


def test_a_machine_whose_memory_is_taken_away_is_planned_for_anew(lab, reference):
    """The kernel kills its worker at every start: the memory is looked at again, and there is no restart loop."""
    process, run = lab.submit()
    began = time.time()
    lab.cluster.limit_memory("slow", SMALL_MEMORY_BYTES)  # after the plan was made, before the workers have begun
    try:
        finished(process, run)
    finally:
        lab.cluster.limit_memory("slow", -1)

    assert events(run, "replanned")[-1].nodes == ["fast"], events(run, "replanned")
    assert len(events(run, "failure")) <= 4
    compare(run, reference, exact=False)
    tell("no memory left", run, began)
    lab.until_up(("fast", "slow"))


def test_no_process_of_a_finished_run_is_left(lab):
    for name in ("fast", "slow"):
        lines = [Path(f"/proc/{pid}/cmdline").read_text() for pid in lab.cluster.pids(name)]
        assert not [line for line in lines if "RayTrainWorker" in line]
