"""Submitting to an API server: what is created, what is left where that fails, and a run that was sent before."""

import json
import re

import pytest
import yaml

from orchestrator.errors import ClusterError, JobError
from orchestrator.job.job_file import read_job
from orchestrator.remote import kube_submit
from orchestrator.remote.kube_objects import check_name
from orchestrator.remote.record import ClusterTarget, Remote
from tests.conftest import SMALL_MODEL, rows, write_jsonl
from tests.kube_api import KubeApi

NAME = "support-1125-120000"
NODE = {
    "metadata": {"name": "node-1"}, "spec": {}, "status": {"allocatable": {"cpu": "4", "memory": "16Gi"}}
}  # fmt: skip


@pytest.fixture
def api(tmp_path, monkeypatch):
    made = KubeApi(tmp_path, [NODE])
    monkeypatch.setenv("KUBECONFIG", str(made.kubeconfig()))
    yield made
    made.close()


@pytest.fixture
def job(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", rows(20))
    (tmp_path / "job.yaml").write_text(
        f"name: support\nmodel: {{model_name_or_path: {SMALL_MODEL}}}\ndata: {{train: train.jsonl, max_length: 64}}\n"
        f"method: {{type: lora}}\ncluster: {{shared_paths: [{SMALL_MODEL}]}}\nkubernetes: {{claim: runs}}\n"
    )
    return read_job(tmp_path / "job.yaml")


def submit(job, address="kuberay", **target):
    said = []
    target = ClusterTarget(address, run_id=NAME, **target)
    return kube_submit.submit(job, target, job.folder / "runs", said.append, follow=False), "\n".join(said)


def test_a_job_is_planned_for_the_servers_nodes_and_the_run_remembers_where_it_went(api, job):
    run, said = submit(job)

    (entry,) = [made["spec"]["entrypoint"] for made in api.named("rayjobs").values()]
    remote = Remote.of(run)
    assert f"--run-id {NAME}" in entry and f"run {NAME} in team" in said
    assert (remote.address, remote.attempts, remote.is_closed) == ("kuberay", (NAME,), False)
    assert run.has_started and run.job().spec == job.spec
    made = [one["kind"] for one in yaml.safe_load_all((run.path / "kube.yaml").read_text())]
    assert made == ["RayJob", "ConfigMap"]


def test_a_run_that_ended_asks_no_server(api, job):
    run, _ = submit(job)
    (run.path / "events.jsonl").write_text(json.dumps({"event": "state", "time": 1.0, "state": "finished"}) + "\n")
    api.asked.clear()

    again, said = submit(job)

    assert again.path == run.path and said == "" and api.asked == []


def test_what_the_server_refuses_leaves_no_run(api, job):
    api.fail("POST", "rayjobs", 403, "Forbidden", "not you")

    with pytest.raises(ClusterError, match="--cluster kuberay: "):
        submit(job)

    assert not (job.folder / "runs" / NAME).exists() and not api.named("rayjobs")


def test_a_server_that_is_not_there_leaves_no_run(api, job):
    with pytest.raises(ClusterError, match="--cluster kuberay:gone/team: "):
        submit(job, "kuberay:gone/team")

    assert not (job.folder / "runs" / NAME).exists()


def test_what_would_lie_on_the_volume_cannot_be_rendered_into_a_file(job):
    target = ClusterTarget("kuberay:team", attach="finetune", run_id=NAME)
    (job.folder / "job.yaml").write_text(job.text.replace("cluster: {", "cluster: {storage: /storage, "))

    with pytest.raises(JobError, match=r"--render does not work with --attach"):
        kube_submit.render(read_job(job.folder / "job.yaml"), target, job.folder / "out.yaml", print)

    assert not (job.folder / "out.yaml").exists()


@pytest.mark.parametrize("name", ["a", "Support_Bot 2", "日本", "x" * 63, "9-lives", "a" * 34 + "_b"])
def test_a_name_of_a_job_and_a_moment_is_one_that_kubernetes_takes(job, name):
    named = job.folder / "named.yaml"
    named.write_text(yaml.safe_dump({**yaml.safe_load(job.text), "name": name.replace(" ", "_")}, allow_unicode=True))

    made = kube_submit.new_name(read_job(named))

    assert re.search(r"[a-z0-9]-\d{4}-\d{6}$", made)
    check_name(made)
