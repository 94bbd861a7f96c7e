"""The path of a run around its workers: what is reported, tried again, judged.  Ray's doors are fakes."""

import contextlib
import json
import sys
from types import SimpleNamespace

import pytest

from clusters.ray.connect import CannotConnect
from orchestrator.errors import ClusterError, JobError, RunFailed, Stopped
from orchestrator.lifecycle import run as path_of_a_job
from orchestrator.lifecycle.hooks import NO_BANK, Quiet
from orchestrator.lifecycle.prepare import plan_without_data
from orchestrator.runs.events import Note, StateChange
from orchestrator.runs.mirror.tracking import Mirror
from orchestrator.runs.run_folder import RunFolder

ALONE = "cluster: {max_failures: 1}\ntracking: {report_to: []}\n"


class Watcher(Quiet):
    """Keeps what it is told."""

    def __init__(self):
        self.said, self.events = [], []

    def say(self, text):
        self.said.append(text)

    def event(self, event):
        self.events.append(event.kind)


@pytest.fixture
def started(job_with, machine, tmp_path):
    """A run folder with its job, plan and machines, before its workers start."""
    job = job_with(ALONE)
    ready = plan_without_data(job, machine, print)
    run = RunFolder.create(tmp_path / "runs", "tiny")
    run.write("plan.json", ready.plan.to_json())
    run.write("origin.json", json.dumps({"folder": str(tmp_path)}))
    run.write("job.yaml", job.text)
    return run, job, ready


@pytest.fixture
def train(started, monkeypatch):
    """A function that executes the run; its workers do in each try what one of the given calls does."""
    run, job, ready = started

    def execute(*tries, connect=None):
        left, watcher = list(tries), Watcher()
        fake = SimpleNamespace(launch=lambda run, *_: left.pop(0)(run))
        monkeypatch.setitem(sys.modules, "orchestrator.training.workers.launch", fake)
        cluster = SimpleNamespace(slot_resources={"CPU": 1.0})
        door = connect or (lambda *_, **__: contextlib.nullcontext(cluster))
        monkeypatch.setattr(path_of_a_job, "connect", door)
        try:
            path_of_a_job.execute(run, job, ready.plan, ready.capability, watcher)
        finally:
            assert not left
        return watcher

    return execute


def stop(run):
    run.record(StateChange("stopped", step=3))


def fail(run):
    raise RunFailed("a worker was killed")


def states(run):
    return [event.state for event in run.events_of(StateChange)]


def test_workers_that_do_nothing_have_failed_whatever_ray_says(train, started):
    with pytest.raises(RunFailed, match=r"no step was trained; `orchestrator logs "):
        train(lambda run: None)
    assert states(started[0]) == ["running", "failed"]


def test_a_run_that_was_stopped_says_how_to_continue(train, started):
    with pytest.raises(Stopped, match=r"stopped as asked. `orchestrator resume .*` continues from the last checkpoint"):
        train(stop)
    assert states(started[0]) == ["running", "stopped"]


def test_a_failure_is_tried_again_from_the_last_checkpoint(train, started):
    with pytest.raises(Stopped):
        train(fail, stop)
    events = [event.kind for event in started[0].events()[0]]

    assert events == ["state", "failure", "replanned", "state"]


def test_more_failures_than_allowed_end_the_run_with_their_reason(train, started):
    with pytest.raises(RunFailed, match=r"^a worker was killed$"):
        train(fail, fail)
    assert states(started[0]) == ["running", "failed"]


def test_what_is_no_failure_of_a_worker_ends_the_run_at_once(train):
    def mistake(run):
        raise JobError("data.train: is gone")

    with pytest.raises(JobError, match=r"is gone"):
        train(mistake)


def test_a_cluster_that_is_not_there_is_named_with_a_way_out(train):
    def refuse(*_, **__):
        raise CannotConnect("nobody answers at head:6379")

    with pytest.raises(ClusterError, match=r"nobody answers at head:6379. `local` runs on this machine"):
        train(connect=refuse)


def test_the_watcher_gets_every_event_once(started, job_with):
    run, job, _ = started
    live = path_of_a_job.LiveRun(run, job, watcher := Watcher(), NO_BANK, Mirror(run, job), run.events()[1])
    run.record(Note("one"))
    live.report()
    run.record(Note("two"))
    live.report()
    live.report()

    assert watcher.events == ["note", "note"]


def test_the_first_ctrl_c_saves_and_the_second_kills(started):
    run, job, _ = started
    live = path_of_a_job.LiveRun(run, job, watcher := Watcher(), NO_BANK, Mirror(run, job), 0)

    live.interrupt()

    assert run.stop_file.exists() and watcher.said[0].startswith("stopping after this step and saving a checkpoint")
    with pytest.raises(RunFailed, match=r"killed. `orchestrator resume "):
        live.interrupt()


def test_a_secret_that_is_not_set_stops_a_job_before_anything_is_prepared(job_with, monkeypatch):
    monkeypatch.delenv("SHOP_PASSWORD", raising=False)
    job = job_with('tracking: {mlflow_uri: "http://user:${SHOP_PASSWORD}@server"}\n')

    with pytest.raises(JobError, match=r"secrets of the job: SHOP_PASSWORD is not set where the job runs"):
        path_of_a_job.submit(job, Quiet())
