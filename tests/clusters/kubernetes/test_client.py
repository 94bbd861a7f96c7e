"""The real client against an API server's double: what is created, watched, translated and given back."""

import contextlib
import io
import tarfile
import threading
import time

import pytest

from clusters.job_backend import JobGone, JobLost, VerbFailed
from clusters.kubernetes.client import KubeClient
from clusters.kubernetes.rayjob import JobSettings, PodGroup, config_map, rayjob
from clusters.ray.connect import CannotConnect
from clusters.units import GIB
from tests.kube_api import KubeApi

NAME = "support-1125-120000"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    api = KubeApi(tmp_path_factory.mktemp("api"))
    yield api
    api.close()


@pytest.fixture
def api(server, monkeypatch):
    server.objects.clear()
    server.faults.clear()
    server.asked.clear()
    server.logs.clear()
    server.served, server.oldest = ["rayjobs", "rayclusters"], 0
    monkeypatch.setenv("KUBECONFIG", str(server.kubeconfig()))
    return server


@pytest.fixture
def client(api):
    with contextlib.closing(KubeClient(None, None, patience_s=0.5)) as opened:
        yield opened


@pytest.fixture
def job(tmp_path):
    settings = JobSettings(namespace="team", claim="runs", storage=str(tmp_path))
    return rayjob(NAME, "python -m orchestrator", "2.60.0", [PodGroup("cpu", 1, 2, 4 * GIB)], settings)


CONFIG = config_map(NAME, "team", {"job.yaml": "name: support"})


def write_status(api, seconds, *states):
    """What an operator writes, one state after another."""

    def run():
        for state in states:
            time.sleep(seconds)
            api.set_status("rayjobs", "team", NAME, **state)

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def submitter(api, tmp_path, text, phase="Running"):
    metadata = {"name": f"{NAME}-x1y2z", "namespace": "team", "labels": {"job-name": NAME}}
    api.store("pods", {"kind": "Pod", "metadata": metadata, "status": {"phase": phase}})
    api.logs[f"{NAME}-x1y2z"] = tmp_path / "log"
    (tmp_path / "log").write_text(text)


def test_a_job_and_the_files_it_owns_are_created_and_go_together(api, client, job):
    client.rehearse(job, CONFIG)
    assert api.objects == {}
    client.start(NAME, job, CONFIG)

    (config,) = api.named("configmaps").values()
    assert config["metadata"]["ownerReferences"][0]["uid"] == api.named("rayjobs")[NAME]["metadata"]["uid"]
    assert client.tidy(NAME) and api.objects == {}
    assert client.tidy(NAME)  # a second time is no error


def test_a_field_the_server_does_not_know_is_refused_before_anything_is_created(api, client, job):
    job["spec"]["shutdownAfterJobFinish"] = True

    with pytest.raises(CannotConnect, match=r"not version 1.7"):
        client.rehearse(job, CONFIG)
    assert api.objects == {}


def test_a_name_that_is_taken_is_said_and_the_other_job_stays(api, client, job):
    client.start(NAME, job, None)

    with pytest.raises(CannotConnect, match=r"exists already"):
        client.start(NAME, job, CONFIG)
    assert list(api.named("rayjobs")) == [NAME]


def test_files_that_are_refused_take_their_job_back(api, client, job):
    api.fail("POST", "configmaps", 403, "Forbidden", 'User "me" cannot create resource "configmaps"')

    with pytest.raises(CannotConnect, match=r"rbac.yaml"):
        client.start(NAME, job, CONFIG)
    assert api.objects == {}


def test_an_answer_that_got_lost_is_asked_for(api, client, job, monkeypatch):
    """The server took the job and the line broke before it could say so."""
    create = client._create_job

    def create_and_lose(*arguments, **options):
        create(*arguments, **options)
        raise OSError("connection reset")

    monkeypatch.setattr(client, "_create_job", create_and_lose)
    client.start(NAME, job, CONFIG)

    assert list(api.named("rayjobs")) == list(api.named("configmaps")) == [NAME]


@pytest.mark.parametrize(
    ("code", "reason", "message", "says"),
    [
        (401, "Unauthorized", "Unauthorized", "those of the context 'here'"),
        (403, "Forbidden", 'rayjobs.ray.io is forbidden: User "me" cannot create', "rbac.yaml"),
        (403, "Forbidden", "exceeded quota: team, requested: cpu=64, used: cpu=8, limited: cpu=32", "quota"),
        (400, "BadRequest", 'admission webhook "images" denied the request: no registry', "a policy of the cluster"),
        (404, "NotFound", 'namespaces "team" not found', "kubectl create namespace team"),
        (422, "Invalid", "spec.x: must be above 0", "422: spec.x: must be above 0"),
    ],
)
def test_what_the_server_refuses_is_told_as_what_to_do(api, client, job, code, reason, message, says):
    api.fail("POST", "rayjobs", code, reason, message)

    with pytest.raises(CannotConnect, match=says):
        client.start(NAME, job, CONFIG)
    assert api.objects == {}


def test_clusters_that_cannot_take_a_job_are_told_apart(api, monkeypatch, tmp_path):
    with pytest.raises(CannotConnect, match=r"no context 'there'.*here, gone"):
        KubeClient("there", None)
    with pytest.raises(CannotConnect, match=r"no Kubernetes API server at http://127.0.0.1"):
        KubeClient("gone", None)
    api.served = []
    with pytest.raises(CannotConnect, match=r"KubeRay is not installed"):
        KubeClient(None, None)
    api.served = ["old"]
    with pytest.raises(CannotConnect, match=r"serves ray.io/v1alpha1"):
        KubeClient(None, None)
    monkeypatch.setenv("KUBECONFIG", str(api.kubeconfig(token="expired")))
    with pytest.raises(CannotConnect, match=r"have expired"):
        KubeClient(None, None)
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    with pytest.raises(CannotConnect, match=r"kubeconfig"):
        KubeClient(None, None)


def test_states_are_watched_and_lines_come_once(api, client, job, tmp_path):
    client.start(NAME, job, CONFIG)
    submitter(api, tmp_path, "one\ntwo\n")
    writing = write_status(
        api,
        0.2,
        {"jobDeploymentStatus": "Initializing"},
        {"jobDeploymentStatus": "Initializing", "jobStatus": "Failure"},  # a word of another object: not ours
        {"jobDeploymentStatus": "Running", "jobStatus": "RUNNING"},
    )
    lines, notices = [], []

    for line in client.follow(NAME, notices.append):
        lines.append(line)
        if line == "two":
            with (tmp_path / "log").open("a") as log:
                log.write("three\n")
            api.set_status("pods", "team", f"{NAME}-x1y2z", phase="Succeeded")
            api.set_status("rayjobs", "team", NAME, jobDeploymentStatus="Complete", jobStatus="SUCCEEDED")
    writing.join()

    assert lines == ["one", "two", "three"]
    assert client.look(NAME).state == "SUCCEEDED"
    assert any("Initializing" in text for text in notices) and any("runs" in text for text in notices)


def test_a_watch_goes_on_after_the_server_forgot_and_after_the_line_broke(api, client, job):
    client.start(NAME, job, CONFIG)
    api.oldest = 10**9  # every watch is too old
    writing = write_status(api, 0.3, {"jobDeploymentStatus": "Failed", "reason": "DeadlineExceeded"})
    assert list(client.follow(NAME, str)) == []
    writing.join()
    assert "deadline" in client.look(NAME).message

    api.fail("GET", "rayjobs", 0)
    with pytest.raises(JobLost, match=r"the connection to"):
        client.look(NAME)
    assert client.look(NAME).state == "FAILED"


def test_a_line_cut_in_the_middle_of_a_log_repeats_nothing(api, client, job, tmp_path):
    client.start(NAME, job, CONFIG)
    submitter(api, tmp_path, "one\ntwo\n", phase="Succeeded")
    api.set_status("rayjobs", "team", NAME, jobDeploymentStatus="Complete", jobStatus="SUCCEEDED")
    follow = client.follow(NAME, str)
    assert next(follow) == "one"
    follow.close()

    assert list(client.follow(NAME, str)) == ["two"]


def test_a_job_that_somebody_deleted_is_said(api, client, job):
    client.start(NAME, job, CONFIG)
    threading.Timer(0.3, lambda: api.delete("rayjobs", "team", NAME)).start()

    with pytest.raises(JobGone, match=r"deleted"):
        list(client.follow(NAME, str))


def test_an_image_that_is_not_there_ends_the_wait_and_the_job(api, client, job, monkeypatch):
    monkeypatch.setattr("clusters.kubernetes.client._WINDOW_S", 1)
    client.start(NAME, job, CONFIG)
    api.set_status("rayjobs", "team", NAME, jobDeploymentStatus="Initializing", rayClusterName="c")
    waiting = {"reason": "ImagePullBackOff", "message": "Back-off pulling image"}
    metadata = {"name": "c-head", "namespace": "team", "labels": {"ray.io/cluster": "c", "ray.io/node-type": "head"}}
    state = {"phase": "Pending", "containerStatuses": [{"image": "no:1", "state": {"waiting": waiting}}]}
    api.store("pods", {"kind": "Pod", "metadata": metadata, "status": state})

    with pytest.raises(CannotConnect, match=r"cannot pull the image 'no:1'.*cancelled"):
        list(client.follow(NAME, str))
    assert not api.named("rayjobs") and not api.named("configmaps")


def test_a_pod_without_a_node_and_a_quota_are_told_while_waiting(api, client, job, monkeypatch):
    monkeypatch.setattr("clusters.kubernetes.client._WINDOW_S", 1)
    client.start(NAME, job, CONFIG)
    api.set_status("rayjobs", "team", NAME, jobDeploymentStatus="Initializing", rayClusterName="c")
    condition = {"type": "PodScheduled", "status": "False", "message": "0/3 nodes are available: 3 Insufficient cpu."}
    metadata = {"name": "c-worker", "namespace": "team", "labels": {"ray.io/cluster": "c"}}
    api.store("pods", {"kind": "Pod", "metadata": metadata, "status": {"conditions": [condition]}})
    event = {
        "kind": "Event",
        "metadata": {"name": "e", "namespace": "team"},
        "type": "Warning",
        "reason": "FailedToCreateWorkerPod",
        "message": "pods is forbidden: exceeded quota: team, requested: pods=1, used: pods=4, limited: pods=4",
        "involvedObject": {"kind": "RayCluster", "name": "c"},
    }
    api.store("events", event)
    writing = write_status(api, 2.5, {"jobDeploymentStatus": "Failed", "reason": "PreRunningDeadlineExceeded"})
    notices = []

    list(client.follow(NAME, notices.append))
    writing.join()

    assert any("c-worker cannot be scheduled: 0/3" in text for text in notices)
    assert any("quota does not allow it" in text for text in notices)


def test_a_verb_runs_in_a_helper_pod_where_the_cluster_is_gone(api, client, job, monkeypatch, tmp_path):
    client.start(NAME, job, CONFIG)
    starting = threading.Event()

    def kubelet():
        while not starting.is_set():
            for pod in api.named("pods").values():
                if pod["status"]["phase"] == "Pending":
                    api.set_status("pods", "team", pod["metadata"]["name"], phase="Running")
            time.sleep(0.05)

    threading.Thread(target=kubelet, daemon=True).start()
    said = client.ask(NAME, ["recipes"])
    with pytest.raises(VerbFailed, match=r"no such run"):
        client.ask(NAME, ["status", "nothing", "--runs", str(tmp_path)])
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        entry = tarfile.TarInfo("日本語.jsonl")
        entry.size = 600_000
        archive.addfile(entry, io.BytesIO(bytes(range(250)) * 2400))
    client.put(NAME, job, str(tmp_path / "a place"), out.getvalue())
    starting.set()

    assert "quickstart" in said
    assert (tmp_path / "a place" / "日本語.jsonl").read_bytes() == bytes(range(250)) * 2400
    assert api.named("pods") == {}
