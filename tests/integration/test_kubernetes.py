"""Jobs through an API server: a double on loopback whose pods are Ray processes of this machine, or the real cluster.

`make test-k8s KUBECONFIG=FILE` runs all but what needs the double's faults on that cluster's current context: it needs
KubeRay, the image orchestrator:cpu on its nodes and the volume claim `runs` (k8s/README.md).
"""

import json
import os

import pytest
import yaml

from orchestrator.runs.run_folder import RunFolder
from tests.conftest import rows, write_jsonl
from tests.integration.test_dashboard_jobs import JOB
from tests.kube_api import KubeApi
from tests.kube_operator import Operator
from tests.processes import ROOT, outcome, start, wait_for

pytestmark = [pytest.mark.k8s, pytest.mark.timeout(1900)]
REAL = os.environ.get("KUBECONFIG")

KUBERNETES = "kubernetes: {claim: runs, keep_s: 5}\n"


@pytest.fixture(scope="module")
def place(model_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("k8s")
    (folder / "volume").mkdir()
    write_jsonl(folder / "train.jsonl", rows(40))
    write_jsonl(folder / "eval.jsonl", rows(8, start=100))
    for name, steps in (("job", 30), ("long", 8000)):
        here = f"cluster: {{storage: {folder / 'volume'}, shared_paths: [{model_folder}]}}"
        text = JOB.format(model=model_folder, steps=steps, cluster=KUBERNETES + ("" if REAL else here))
        (folder / f"{name}.yaml").write_text(text)
    return folder


@pytest.fixture(scope="module")
def api(place):
    if REAL:
        yield RealApi()
        return
    node = {
        "metadata": {"name": "node-1", "labels": {"kubernetes.io/arch": "amd64"}},
        "spec": {},
        "status": {"allocatable": {"cpu": "2", "memory": "8Gi", "pods": "110"}},
    }
    api = KubeApi(place, [node])
    operator = api.operator = Operator(api, missing_images=("nowhere/none:1",))
    yield api
    operator.close()
    api.close()


class RealApi:
    """As much of the double's face as the tests look at, of the cluster in KUBECONFIG."""

    def kubeconfig(self):
        return REAL

    def named(self, plural):
        from kubernetes import client, config

        _, active = config.list_kube_config_contexts(REAL)
        namespace = active["context"].get("namespace", "default")
        made = config.new_client_from_config(REAL)
        label = "app.kubernetes.io/managed-by=orchestrator"
        if plural.startswith("ray"):
            label = label if plural == "rayjobs" else ""
            listed = client.CustomObjectsApi(made).list_namespaced_custom_object(
                "ray.io", "v1", namespace, plural, label_selector=label
            )["items"]
        else:
            core = client.CoreV1Api(made)
            ask = {"pods": core.list_namespaced_pod, "configmaps": core.list_namespaced_config_map}[plural]
            listed = json.loads(ask(namespace, label_selector=label, _preload_content=False).data)["items"]
        return {thing["metadata"]["name"]: thing for thing in listed}


only_the_double = pytest.mark.skipif(bool(REAL), reason="needs the double's faults")


def begin(place, api, *arguments, output=None):
    return start(*arguments, cwd=place, output=output, KUBECONFIG=str(api.kubeconfig()))


def verb(place, api, *arguments, code=0):
    done = outcome(begin(place, api, *arguments))
    assert done.returncode == code, done.output
    return done.output


def newest(place, known=()):
    (run,) = [run for run in RunFolder.all(place / "runs") if run.run_id not in known]
    return run


def nothing_left(api):
    return not any(api.named(plural) for plural in ("rayjobs", "rayclusters", "configmaps", "pods"))


def test_a_job_is_sent_and_its_adapter_fetched(place, api):
    said = verb(place, api, "submit", "job.yaml", "--cluster", "kuberay")

    run = newest(place)
    assert run.state() == "finished", said
    assert (run.exported() / "adapter_model.safetensors").is_file()
    assert run.read_json("result.json")["steps"] == 30
    assert "step 30/30" in said and "fetched" in said
    wait_for(lambda: nothing_left(api))
    assert "finished" in verb(place, api, "status", run.run_id)
    assert "step 30/30" in verb(place, api, "logs", run.run_id)


def test_the_quick_start_runs_on_it_too(place, api):
    given = () if REAL else ("-s", f"cluster.storage={place / 'volume'}")  # on a cluster it is /storage by itself

    said = verb(place, api, "submit", "quickstart", "--cluster", "kuberay", *given)

    run = next(run for run in RunFolder.all(place / "runs") if run.run_id.startswith("quickstart"))
    result = run.read_json("result.json")
    assert result["after"]["exact_match"] > 0.8 > result["before"]["exact_match"], said


def test_stop_and_resume_from_another_shell(place, api):
    known = {run.run_id for run in RunFolder.all(place / "runs")}
    verb(place, api, "submit", "long.yaml", "--cluster", "kuberay" if REAL else "kuberay:here/team", "--detach")
    run = newest(place, known)
    assert "waiting" in verb(place, api, "status", run.run_id)
    wait_for(lambda: "step " in verb(place, api, "logs", run.run_id))
    assert "running" in verb(place, api, "status", run.run_id)
    assert "running" in verb(place, api, "resume", run.run_id, code=2)
    verb(place, api, "stop", run.run_id)
    said = verb(place, api, "logs", run.run_id, "--follow", code=5)

    assert "stopped as requested" in said and run.state_by_events() == "stopped"
    assert len(api.named("rayclusters")) == 0, "a stopped job must not be started again"
    document = yaml.safe_load((run.path / "kube.yaml").read_text().split("---")[0])
    assert document["spec"]["backoffLimit"] == 1
    again = begin(place, api, "resume", run.run_id, output=place / "resumed.log")
    wait_for(lambda: api.named("rayclusters") and "step " in verb(place, api, "logs", run.run_id))
    again.send_signal(2)
    assert outcome(again).returncode == 5  # detached
    verb(place, api, "stop", run.run_id)
    wait_for(lambda: api.named("rayjobs")[run.run_id]["status"]["jobDeploymentStatus"] == "Complete")
    verb(place, api, "fetch", run.run_id)
    events = run.events()[0]
    steps = [event.step for event in events if event.kind == "step"]
    assert len(steps) == len(set(steps)) and steps == sorted(steps)
    assert [event.state for event in events if event.kind == "state"] == ["running", "stopped"] * 2
    assert nothing_left(api)


@only_the_double
def test_a_lost_cluster_is_replaced_and_the_run_continues(place, api):
    known = {run.run_id for run in RunFolder.all(place / "runs")}
    text = (place / "long.yaml").read_text().replace("max_steps: 8000", "max_steps: 400")
    (place / "retried.yaml").write_text(text)
    sending = begin(place, api, "submit", "retried.yaml", "--cluster", "kuberay")
    wait_for(lambda: any(run.run_id not in known for run in RunFolder.all(place / "runs")))
    run = newest(place, known)
    there = RunFolder(place / "volume" / "runs" / run.run_id)
    wait_for(lambda: max(there.steps(), default=0) > 60)
    (cluster,) = api.named("rayclusters")
    api.operator.kill(cluster)

    done = outcome(sending)
    assert done.returncode == 0, done.output
    starts = [event for event in run.events()[0] if event.kind == "state" and event.state == "running"]
    steps = [event.step for event in run.events()[0] if event.kind == "step"]
    assert len(starts) == 2 and max(steps) == 400
    assert len(steps) < 400 + 60, "it began again"  # at most what lay between two checkpoints and the crash


@only_the_double
def test_a_job_runs_on_a_cluster_that_exists(place, api):
    manifest = yaml.safe_load((ROOT / "k8s/overlays/cpu/raycluster.yaml").read_text())
    manifest["metadata"]["namespace"] = "team"
    manifest["spec"]["workerGroupSpecs"][0]["replicas"] = 1
    manifest["spec"]["workerGroupSpecs"][0]["resources"]["CPU"] = "2"
    api.store("rayclusters", manifest)
    name = manifest["metadata"]["name"]
    wait_for(
        lambda: (
            len(api.named("pods")) == 2 and all(p["status"]["phase"] == "Running" for p in api.named("pods").values())
        )
    )
    known = {run.run_id for run in RunFolder.all(place / "runs")}

    said = verb(place, api, "submit", "job.yaml", "--cluster", "kuberay", "--attach", name)

    run = newest(place, known)
    assert run.read_json("result.json")["steps"] == 30, said
    assert list(api.named("rayclusters")) == [name] and not api.named("rayjobs")
    assert not list((place / "volume" / "jobs").iterdir()), "what was sent is removed"
    api.delete("rayclusters", "team", name)


@only_the_double
def test_what_cannot_be_sent_leaves_nothing(place, api):
    before = len(RunFolder.all(place / "runs"))
    cases = [
        (("--cluster", "kuberay:there/team"), 4, "no context 'there'"),
        (("--cluster", "kuberay:gone/team"), 4, "no Kubernetes API server"),
        (("--cluster", "kuberay:nobody"), 4, "kubectl create namespace nobody"),
        (("--cluster", "kuberay", "--run-id", "My_Run"), 2, "lowercase letters"),
        (("--cluster", "kuberay", "-s", "goal.max_hours=0.0000001"), 3, "max_hours"),
        (("--cluster", "kuberay", "--attach", "none"), 4, "no head of the RayCluster none"),
    ]
    for arguments, code, says in cases:
        assert says in verb(place, api, "submit", "job.yaml", *arguments, code=code)
    assert len(RunFolder.all(place / "runs")) == before and nothing_left(api)


@only_the_double
def test_an_image_that_nobody_has_ends_the_wait(place, api):
    arguments = ("--cluster", "kuberay", "-s", "kubernetes.image=nowhere/none:1")

    assert "cannot pull the image" in verb(place, api, "submit", "job.yaml", *arguments, code=4)
    assert nothing_left(api)
