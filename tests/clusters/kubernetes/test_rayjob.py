"""RayJobs against KubeRay's schemas and the operator's rules; what both refuse is refused before it is sent."""

import json
import re
from pathlib import Path

import pytest
import yaml

from clusters.kubernetes.rayjob import JobSettings, PodGroup, config_map, helper_pod, mistakes, rayjob, rayjob_on
from clusters.safe.masking import holds_secret
from clusters.units import GIB
from orchestrator.errors import JobError
from orchestrator.job.job_file import parse_job
from orchestrator.remote.kube_objects import deadline_s, object_name, render_on
from tests.cli import called
from tests.conftest import SMALL_MODEL, rows, write_jsonl
from tests.kube_schema import documents, verdict

ROOT = Path(__file__).resolve().parents[3]
GROUPS = [PodGroup("cpu", 1, 16, 20 * GIB), PodGroup("gpu-24g", 2, 8, 24 * GIB, 24 * GIB)]


def refused(document):
    return [*verdict(document), *mistakes(document)]


EVERYTHING = JobSettings(
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


@pytest.mark.parametrize(
    "settings",
    [
        JobSettings(),
        EVERYTHING,
        JobSettings(claim="runs", autoscale=True, runtime_class="nvidia"),
        JobSettings(claim="runs", keep_failed_s=86400),
    ],
    ids=["plain", "everything", "autoscaled", "failed-ones-stay"],
)
def test_a_rendered_job_is_taken(settings):
    made = rayjob("support-1125-120000", "python -m orchestrator", "2.60.0", GROUPS, settings)

    assert refused(made) == []
    for pod in pods_of(made):
        _core_kinds_hold(pod)
    _core_kinds_hold(helper_pod(made, "support-1125-120000-1a2b3"))
    _core_kinds_hold(config_map("a", "b", {"job.yaml": "x"}))


def test_a_job_for_a_cluster_that_exists_is_taken():
    made = rayjob_on("finetune", "support-1125-120000", "python -m orchestrator", JobSettings(namespace="ray"))

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
    made = rayjob("a", "c", "2.60.0", GROUPS, JobSettings(claim="runs", autoscale=True))
    cpu, gpu = made["spec"]["rayClusterSpec"]["workerGroupSpecs"]

    assert [(group["minReplicas"], group["maxReplicas"]) for group in (cpu, gpu)] == [(0, 1), (0, 2)]
    assert cpu["template"]["spec"]["restartPolicy"] == "Never"


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
    assert len(files) == 8 and count == 17


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
    made = rayjob("a", "c", "2.60.0", GROUPS, JobSettings(claim="runs"))
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
    assert object_name("Café au lait") == f"cafe-au-lait-{object_name('Café au lait')[-8:]}"
    assert mistakes({"kind": "RayJob", "metadata": {"name": "Big_Name"}, "spec": {"clusterSelector": {"a": "b"}}})


@pytest.mark.parametrize("name", ["日本", "中国", "é" * 63, "١٢", "x" * 46 + "é", "_", "ß.-", "-.日", "a" * 47 + "日"])
def test_a_name_in_any_letters_becomes_one_of_its_own(name):
    made = object_name(name)

    assert mistakes({"kind": "RayJob", "metadata": {"name": made}, "spec": {"clusterSelector": {"a": "b"}}}) == []
    assert made != object_name(name + "é")  # which a shortened name alone would not tell apart


@pytest.mark.parametrize("name", ["a\n", "a\0", "A", "-a", "a-", "a.b", "a" * 48, "日本"])
def test_what_is_no_name_of_an_object_is_refused(name):
    assert mistakes({"kind": "RayJob", "metadata": {"name": name}, "spec": {"clusterSelector": {"a": "b"}}})


def test_mlflow_and_its_database_answer_nobody_else():
    text = (ROOT / "k8s" / "base" / "networkpolicy.yaml").read_text()
    policies = {one["metadata"]["name"]: one["spec"] for one in documents(text)}
    pods = {
        one["metadata"]["name"]: one["spec"]["template"]["metadata"]["labels"]
        for one in documents((ROOT / "k8s" / "base" / "mlflow.yaml").read_text())
        if one["kind"] == "Deployment"
    }

    assert {name: policies[name]["podSelector"]["matchLabels"] for name in pods} == pods
    assert [one["from"] for one in policies["mlflow-db"]["ingress"]] == [
        [{"podSelector": {"matchLabels": pods["mlflow"]}}]
    ]
    assert "egress" not in policies["mlflow-db"] and "Egress" in policies["mlflow-db"]["policyTypes"]
    (asked,) = policies["mlflow"]["ingress"]
    assert asked["from"][0]["podSelector"]["matchExpressions"] == [{"key": "ray.io/cluster", "operator": "Exists"}]


def test_an_image_is_made_of_what_is_copied_into_it_and_of_nothing_else():
    copied = re.findall(r"^COPY (.+) \S+$", (ROOT / "k8s" / "Dockerfile").read_text(), re.MULTILINE)
    rules = (ROOT / ".dockerignore").read_text().splitlines()

    assert rules[1] == "*" and {name for line in copied for name in line.split()} == {
        rule.removeprefix("!") for rule in rules if rule.startswith("!")
    }


def test_data_beyond_a_config_map_is_said():
    with pytest.raises(ValueError, match="1 MiB"):
        config_map("a", "b", {"train.jsonl": "x" * 2**20})


@pytest.fixture
def job(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", rows(200))
    (tmp_path / "job.yaml").write_text(
        f"name: Support_Bot\nmodel: {{model_name_or_path: {SMALL_MODEL}}}\n"
        f"data: {{train: train.jsonl, max_length: 64}}\nmethod: {{type: lora}}\n"
        f"cluster: {{shared_paths: [{SMALL_MODEL}]}}\nkubernetes: {{claim: runs}}\n"
    )
    (tmp_path / "nodes.yaml").write_text(
        "nodes:\n  - {name: big, cores: 16, memory_gib: 64, gpus: [RTX 4090]}\n"
        "  - {name: box, cores: 16, memory_gib: 64}\nnetwork: {mbit_per_s: 10000, round_trip_ms: 0.1}\n"
    )
    return tmp_path


def render(job, *arguments):
    own = {"HOME": str(job), "KUBECONFIG": str(job / "none")}
    return called("submit", "job.yaml", "--cluster", "kuberay:ray", *arguments, cwd=job, **own)


def texts_in(value):
    """Every text in an object, keys too."""
    if isinstance(value, dict):
        return [text for pair in value.items() for one in pair for text in texts_in(one)]
    if isinstance(value, list):
        return [text for one in value for text in texts_in(one)]
    return [value] if isinstance(value, str) else []


def test_no_object_that_is_shipped_or_rendered_holds_a_secret():
    shipped = [one for file in (ROOT / "k8s").rglob("*.yaml") for one in documents(file.read_text())]
    settings = JobSettings(claim="runs", secret="tokens")
    made = [rayjob("a", "c", "2.60.0", GROUPS, settings), config_map("a", "b", {"job.yaml": "a: 1"})]
    environment = [container for one in made + shipped for container in _containers(one)]

    assert len(environment) > 8
    assert not [text for one in made + shipped for text in texts_in(one) if holds_secret(text)]
    assert {kind for one in made + shipped for kind in [one.get("kind")] if kind == "Secret"} == set()
    for container in environment:
        for one in container.get("env") or []:
            assert "valueFrom" in one or one["name"] in ("POSTGRES_DB", "POSTGRES_USER", "PGDATA"), one


def _containers(value):
    if isinstance(value, dict):
        found = value["containers"] if isinstance(value.get("containers"), list) else []
        return found + [one for inner in value.values() for one in _containers(inner)]
    return [one for inner in value for one in _containers(inner)] if isinstance(value, list) else []


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"tracking": {"mlflow_uri": "postgresql://ann:pa55@db/x"}}, "tracking.mlflow_uri holds a password"),
        ({"tracking": {"mlflow_uri": "http://mlflow:5000?token=pa55"}}, "tracking.mlflow_uri holds a password"),
        ({"kubernetes": {"image": "https://ann:pa55@registry/x"}}, "kubernetes.image holds a password"),
        ({"tracking": {"mlflow_uri": "http://ann:${MLFLOW_PASSWORD}@db"}}, "MLFLOW_PASSWORD: on Kubernetes, secrets"),
        ({"cluster": {"secrets": ["HF_TOKEN"]}}, "HF_TOKEN: on Kubernetes, secrets come from a Secret"),
    ],
)
def test_a_job_with_a_secret_in_it_is_refused_before_it_is_rendered(job, change, named):
    values = yaml.safe_load((job / "job.yaml").read_text())
    asked = parse_job(yaml.safe_dump({**values, **change}), job)

    with pytest.raises(JobError) as refused:
        render_on("finetune", asked, "team", "a")
    assert named in str(refused.value) and "pa55" not in str(refused.value)


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


def test_a_rendered_file_is_named_in_json(job):
    done = render(job, "--hardware", "nodes.yaml", "--render", "out.yaml", "--run-id", "support-1", "--json")

    assert json.loads(done.stdout) == {"run": "support-1", "path": "out.yaml"}


def test_a_long_job_is_not_ended_before_three_times_its_plan_or_goal(job):
    def rendered(*stated):
        done = render(job, "--hardware", "nodes.yaml", "--render", "out.yaml", *stated)
        assert done.returncode == 0 and "activeDeadlineSeconds" in done.stderr, done.stderr
        text = (job / "out.yaml").read_text()
        return text.splitlines()[0], documents(text)[1]["spec"]["activeDeadlineSeconds"]

    assert rendered()[1] == 7 * 86400
    said, seconds = rendered("--set", "goal.max_hours=1000")
    assert seconds == 3 * 1000 * 3600 and said.startswith("# Kubernetes ends the job after 125 days")
    asked = parse_job((job / "job.yaml").read_text(), job)
    assert [deadline_s(asked, seconds) for seconds in (60.0, 1e6, 1e12)] == [7 * 86400, 3_000_000, 2**31 - 1]


def test_a_job_that_is_planned_on_its_cluster_has_no_deadline_but_that_of_its_goal(job):
    def attached(**goal):
        values = yaml.safe_load((job / "job.yaml").read_text())
        asked = parse_job(yaml.safe_dump({**values, "cluster": {"storage": "/storage"}, "goal": goal}), job)
        return render_on("finetune", asked, "team", "a").job["spec"].get("activeDeadlineSeconds")

    assert attached() is None
    assert attached(max_hours=1000) == 3 * 1000 * 3600


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--render", "out.yaml"], 4, "no Kubernetes cluster is known here"),
        (["--hardware", "nodes.yaml", "--run-id", "Big_Name", "--render", "out.yaml"], 2, "lowercase letters"),
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
