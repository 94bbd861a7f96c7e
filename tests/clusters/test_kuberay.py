"""RayJobs against KubeRay's real schemas and the operator's rules; what both refuse is refused before it is sent."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from clusters.kuberay import Group, Wishes, config_map, helper_pod, mistakes, rayjob, rayjob_on
from clusters.units import GIB
from orchestrator.kube import object_name
from tests.conftest import rows, write_jsonl
from tests.kube_schema import SHARED, documents, verdict

ROOT = Path(__file__).resolve().parents[2]
needs_schemas = pytest.mark.skipif(not (SHARED / "crds").is_dir(), reason="KubeRay's CRDs are not beside the checkout")
GROUPS = [Group("cpu", 1, 16, 20 * GIB), Group("gpu-24g", 2, 8, 24 * GIB, 24 * GIB)]


def refused(document):
    return [*verdict(document), *mistakes(document)]


@needs_schemas
def test_all_that_kuberay_refused_is_refused_here():
    files = sorted((SHARED / "refused").glob("*.yaml"))
    taken = []
    for file in files:
        try:
            found = [text for document in documents(file.read_text()) for text in refused(document)]
        except yaml.YAMLError as error:
            found = [str(error)]
        if not found:
            taken.append(file.name)

    assert len(files) == 34
    assert taken == []


@needs_schemas
def test_what_a_real_server_and_operator_took_is_taken():
    files = sorted((SHARED / "examples").glob("*.yaml"))
    found = {file.name: [refused(document) for document in documents(file.read_text())] for file in files}

    assert len(files) == 10
    assert {name: told for name, told in found.items() if any(told)} == {}


EVERYTHING = Wishes(
    namespace="ray",
    claim="runs",
    queue="team",
    secret="tokens",
    pull_secret="registry",
    node_selector={"pool": "training"},
    tolerations=[{"key": "training", "operator": "Exists", "effect": "NoSchedule"}],
    runtime_class="nvidia",
    retries=3,
    keep_s=0,
)


@needs_schemas
@pytest.mark.parametrize(
    "wishes",
    [
        Wishes(),
        EVERYTHING,
        Wishes(claim="runs", autoscale=True, runtime_class="nvidia"),
        Wishes(claim="runs", keep_failed_s=86400),
    ],
    ids=["plain", "everything", "autoscaled", "failed-ones-stay"],
)
def test_a_rendered_job_is_taken(wishes):
    made = rayjob("support-1125-120000", "python -m orchestrator", "2.60.0", GROUPS, wishes)

    assert refused(made) == []
    for pod in pods_of(made):
        _core_kinds_hold(pod)
    _core_kinds_hold(helper_pod(made, "support-1125-120000-1a2b3"))
    _core_kinds_hold(config_map("a", "b", {"job.yaml": "x"}))


@needs_schemas
def test_a_job_for_a_cluster_that_exists_is_taken():
    made = rayjob_on("finetune", "support-1125-120000", "python -m orchestrator", Wishes(namespace="ray"))

    assert refused(made) == []
    assert made["spec"]["clusterSelector"] == {"ray.io/cluster": "finetune"}
    assert not made["spec"]["shutdownAfterJobFinishes"]  # it is not ours to end


def pods_of(job):
    """The pods the operator would make of a RayJob, for a judge of core kinds."""
    cluster = job["spec"]["rayClusterSpec"]
    templates = [group["template"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]
    for template in [*templates, job["spec"]["submitterPodTemplate"]]:
        yield {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a", "namespace": "b"}, **template}


def test_every_pod_is_hardened_and_goes_where_it_is_told():
    made = rayjob("a", "c", "2.60.0", GROUPS, EVERYTHING)
    pods = [pod["spec"] for pod in pods_of(made)]

    assert len(pods) == 4
    for pod in pods:
        assert pod["nodeSelector"] == {"pool": "training"} and pod["imagePullSecrets"] == [{"name": "registry"}]
        assert pod["securityContext"]["runAsNonRoot"] and not pod["automountServiceAccountToken"]
        (container,) = pod["containers"]
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        assert container["envFrom"] == [{"secretRef": {"name": "tokens"}}]
    gpu = pods[2]
    assert gpu["runtimeClassName"] == "nvidia" and "runtimeClassName" not in pods[1]
    assert [one["key"] for one in gpu["tolerations"]] == ["training", "nvidia.com/gpu"]
    assert made["spec"]["backoffLimit"] == 3 and made["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "team"


def test_workers_of_an_autoscaled_job_come_from_nothing():
    made = rayjob("a", "c", "2.60.0", GROUPS, Wishes(claim="runs", autoscale=True))
    cpu, gpu = made["spec"]["rayClusterSpec"]["workerGroupSpecs"]

    assert [(group["minReplicas"], group["maxReplicas"]) for group in (cpu, gpu)] == [(0, 1), (0, 2)]
    assert cpu["template"]["spec"]["restartPolicy"] == "Never"


@needs_schemas
def test_every_shipped_manifest_is_taken():
    files = sorted(file for file in (ROOT / "k8s").rglob("*.yaml") if file.name != "kustomization.yaml")
    count = 0
    for file in files:
        for document in documents(file.read_text()):
            count += 1
            if document["apiVersion"].startswith("ray.io/"):
                assert refused(document) == [], file
            else:
                _core_kinds_hold(document)

    print(f"{count} objects in {len(files)} files")
    assert len(files) == 8 and count == 15


def test_every_kustomization_names_files_that_are_there():
    found = sorted((ROOT / "k8s").rglob("kustomization.yaml"))
    for file in found:
        asked = yaml.safe_load(file.read_text())["resources"]
        for name in asked:
            there = file.parent / name
            assert there.is_file() or (there / "kustomization.yaml").is_file(), f"{file}: {name}"
        beside = {other.name for other in file.parent.glob("*.yaml")} - {"kustomization.yaml"}
        assert beside <= set(asked), f"{file} leaves out {beside - set(asked)}"

    assert len(found) == 3


def _core_kinds_hold(document):
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    kubernetes_validate.validate(document, "1.36", strict=True)


def test_a_group_for_each_class_with_slots_and_without_rays_gpus():
    made = rayjob("a", "c", "2.60.0", GROUPS, Wishes(claim="runs"))
    cpu, gpu = made["spec"]["rayClusterSpec"]["workerGroupSpecs"]

    assert [group["replicas"] for group in (cpu, gpu)] == [1, 2]
    assert gpu["resources"] == {"CPU": "8", "GPU": "0", "train_slot": "1"}
    container = gpu["template"]["spec"]["containers"][0]
    assert container["resources"]["limits"] == {"cpu": "8", "memory": "24576Mi", "nvidia.com/gpu": "1"}
    wanted = gpu["template"]["spec"]["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    low, high = (int(one["values"][0]) for one in wanted["nodeSelectorTerms"][0]["matchExpressions"])
    assert low < 24564 < high < 32 * 1024  # an RTX 4090 says 24564 MiB
    assert "affinity" not in cpu["template"]["spec"]


def test_names_become_kubernetes_names():
    assert object_name("Qwen3_4B.Support") == "qwen3-4b-support"
    assert object_name("3rd try") == "job-3rd-try"
    assert len(object_name("x" * 80)) == 47
    assert mistakes({"kind": "RayJob", "metadata": {"name": "Big_Name"}, "spec": {"clusterSelector": {"a": "b"}}})


def test_data_beyond_a_config_map_is_said():
    with pytest.raises(ValueError, match="1 MiB"):
        config_map("a", "b", {"train.jsonl": "x" * 2**20})


@pytest.fixture
def job(tmp_path, model_folder):
    write_jsonl(tmp_path / "train.jsonl", rows(200))
    (tmp_path / "job.yaml").write_text(
        f"name: Support_Bot\nmodel: {{model_name_or_path: {model_folder}}}\n"
        f"data: {{train: train.jsonl, max_length: 64}}\nmethod: {{type: lora}}\n"
        f"cluster: {{shared_paths: [{model_folder}]}}\nkubernetes: {{claim: runs}}\n"
    )
    (tmp_path / "nodes.yaml").write_text(
        "nodes:\n  - {name: big, cores: 16, memory_gib: 64, gpus: [RTX 4090]}\n"
        "  - {name: box, cores: 16, memory_gib: 64}\nnetwork: {mbit_per_s: 10000, round_trip_ms: 0.1}\n"
    )
    return tmp_path


def render(job, *arguments):
    return subprocess.run(
        [sys.executable, "-m", "orchestrator", "submit", "job.yaml", "--cluster", "kuberay:ray", *arguments],
        cwd=job,
        env={**os.environ, "HOME": str(job), "KUBECONFIG": str(job / "none"), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )


@needs_schemas
def test_submit_renders_a_job_that_is_taken(job):
    done = render(job, "--hardware", "nodes.yaml", "--render", "out.yaml")

    assert done.returncode == 0, done.stderr
    config, made = documents((job / "out.yaml").read_text())
    assert refused(made) == [] and "kubectl apply" in done.stdout + done.stderr
    _core_kinds_hold(config)
    inner = yaml.safe_load(config["data"]["job.yaml"])
    assert inner["data"]["train"] == "0-train.jsonl" and len(config["data"]["0-train.jsonl"].splitlines()) == 200
    assert inner["checkpoint"]["output_dir"] == "/storage/runs" and inner["cluster"]["address"] == "auto"
    assert made["metadata"]["namespace"] == "ray" and made["metadata"]["name"].startswith("support-bot-")
    assert "--run-id " + made["metadata"]["name"] in made["spec"]["entrypoint"]
    assert json.dumps(made).count("nvidia.com/gpu") >= 2


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--render", "out.yaml"], 4, "no Kubernetes cluster is known here"),
        (["--hardware", "nodes.yaml", "--run-id", "Big_Name", "--render", "out.yaml"], 2, "small letters"),
        (["--attach", "finetune", "--render", "out.yaml"], 2, "cluster.storage"),
        (
            ["--hardware", "nodes.yaml", "--render", "out.yaml", "-s", "cluster.secrets=[HF_TOKEN]"],
            2,
            "kubernetes.secret",
        ),
        (["--hardware", "nodes.yaml", "--render", "no/where.yaml"], 2, "cannot be written"),
        (["--hardware", "nodes.yaml", "--render", "out.yaml", "--set", "goal.max_hours=0.0000001"], 3, "max_hours"),
    ],
)
def test_what_cannot_be_rendered_says_why(job, arguments, code, says):
    done = render(job, *arguments)

    assert done.returncode == code and says in done.stderr, done.stdout + done.stderr
    assert not (job / "out.yaml").exists()
