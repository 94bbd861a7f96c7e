"""Staying with a job through an API server whose line breaks: nothing is lost, nothing said twice, nothing left."""

import json
import threading
import time

import pytest

from clusters.kubernetes.client import KubeClient
from clusters.kubernetes.rayjob import JobSettings, PodGroup, config_map, rayjob
from clusters.units import GIB
from orchestrator.errors import ClusterError, RunFailed
from orchestrator.remote import jobs
from orchestrator.remote.backends import start_attempt
from orchestrator.remote.record import Remote
from orchestrator.runs.run_folder import RunFolder
from tests.kube_api import KubeApi

NAME = "support-1125-120000"


@pytest.fixture
def api(tmp_path, monkeypatch):
    made = KubeApi(tmp_path)
    monkeypatch.setenv("KUBECONFIG", str(made.kubeconfig()))
    monkeypatch.setattr(jobs, "_RETRY_S", 0.05)
    yield made
    made.close()


@pytest.fixture
def run(api, tmp_path):
    """A job that was sent, whose submitter has printed two lines."""
    run = RunFolder.create(tmp_path / "runs", "support", NAME)
    (run.path / "job.yaml").write_text("name: support\nmodel: {model_name_or_path: a}\ndata: {train: b.jsonl}\n")
    (run.path / "origin.json").write_text(json.dumps({"folder": str(tmp_path)}))
    made = rayjob(
        NAME, "c", "2.60.0", [PodGroup("cpu", 1, 2, 4 * GIB)], JobSettings(namespace="team", storage=str(tmp_path))
    )
    client = KubeClient(None, None)
    client.start(NAME, made, config_map(NAME, "team", {"job.yaml": "x"}))
    client.close()
    Remote("kuberay", str(tmp_path / "none"), (NAME,)).keep(run)
    metadata = {"name": "submitter", "namespace": "team", "labels": {"job-name": NAME}}
    api.store("pods", {"kind": "Pod", "metadata": metadata, "status": {"phase": "Running"}})
    api.logs["submitter"] = tmp_path / "log"
    (tmp_path / "log").write_text("one\ntwo\n")
    return run


def state(api, **fields):
    api.set_status("rayjobs", "team", NAME, **fields)


@pytest.fixture
def kubelet(api):
    over = threading.Event()

    def start_helpers():
        while not over.wait(0.05):
            for pod in api.named("pods").values():
                if pod["metadata"]["name"].endswith("-helper") and pod["status"]["phase"] == "Pending":
                    api.set_status("pods", "team", pod["metadata"]["name"], phase="Running")

    thread = threading.Thread(target=start_helpers)
    thread.start()
    yield
    over.set()
    thread.join()


def test_a_broken_line_is_taken_up_again_and_no_line_comes_twice(api, run, kubelet, tmp_path):
    state(api, jobDeploymentStatus="Running")
    lines = []

    def hear(text):
        lines.append(text)
        if text == "two":
            api.fail("GET", "rayjobs|log", 0, times=4)
            (tmp_path / "log").write_text("one\ntwo\nthree\n")
            api.set_status("pods", "team", "submitter", phase="Failed")
            state(api, jobDeploymentStatus="Failed", reason="AppFailed", message="exit code 3")

    with pytest.raises(RunFailed, match="exit code 3"):
        jobs.attach(run, hear)

    assert [line for line in lines if line in ("one", "two", "three")] == ["one", "two", "three"]
    assert (run.path / "printed.log").read_text() == "one\ntwo\nthree\n"
    assert Remote.of(run).is_closed and not api.named("rayjobs") and not api.named("configmaps")


def test_a_line_that_stays_broken_says_how_to_attach_again(api, run, monkeypatch):
    monkeypatch.setattr(jobs, "_LOST_S", 0.5)
    state(api, jobDeploymentStatus="Running")
    api.fail("GET", "log", 0, times=10_000)

    with pytest.raises(ClusterError, match=f"logs {NAME} --follow"):
        jobs.attach(run, str)
    assert NAME in api.named("rayjobs")  # it continues there


def test_a_job_that_has_not_started_is_cancelled(api, run):
    state(api, jobDeploymentStatus="Initializing")

    assert "had not started" in jobs.stop(run)
    assert not api.named("rayjobs")
    assert json.loads((run.path / "remote.json").read_text())["is_closed"]


def test_a_job_that_is_gone_is_said_at_once(api, run):
    api.delete("rayjobs", "team", NAME)
    began = time.monotonic()

    with pytest.raises(ClusterError, match="somebody deleted it"):
        jobs.attach(run, str)
    assert time.monotonic() - began < 30


def test_a_run_of_a_japanese_name_has_jobs_of_ascii_names(tmp_path):
    """A submission's name is a part of the dashboard's URLs."""
    run = RunFolder.create(tmp_path / "runs", "日本語", "実行１")
    remote, started = Remote("http://head:8265", "/runs", ()), []

    class Dashboard:
        def start(self, name, command):
            started.append((name, command))

    again = start_attempt(Dashboard(), run, start_attempt(Dashboard(), run, remote))

    names = [name for name, _ in started]
    assert again.attempts == tuple(names) and [name[-2:] for name in names] == ["-1", "-2"]
    assert all(name.isascii() for name in names)
    assert all("--run-id '実行１'" in command for _, command in started)
