"""One change each to an object that is taken: what the API server refuses by schema, or KubeRay's operator later.

The verdicts are those of an API server 1.36 with KubeRay 1.7: the first table it refused itself, the second it took,
and the operator refused the object or let it wait for ever.
"""

import copy
from pathlib import Path

import pytest
import yaml

from clusters.kubernetes.rayjob import JobSettings, PodGroup, mistakes, rayjob
from clusters.units import GIB
from tests.kube_schema import documents, verdict

ROOT = Path(__file__).resolve().parents[3]
JOB = rayjob(
    "job-1", "python train.py", "2.60.0", [PodGroup("gpu", 1, 8, 24 * GIB, 24 * GIB)], JobSettings(autoscale=True)
)
(CLUSTER,) = documents((ROOT / "k8s" / "overlays" / "cpu" / "raycluster.yaml").read_text())
CLUSTER["spec"] |= {"enableInTreeAutoscaling": True, "autoscalerOptions": {"version": "v2"}}
GONE = object()
HEAD, WORKERS = "headGroupSpec", "workerGroupSpecs.0"
IN_POD, POD = ".template.spec.containers.0", ".template.spec"
RULE = {"policy": "DeleteCluster", "condition": {"jobStatus": "FAILED"}}
BOTH = {"policy": "DeleteCluster", "condition": {"jobStatus": "FAILED", "jobDeploymentStatus": "Failed"}}


def changed(thing, **values):
    """The object with values at paths below its `spec` (GONE removes one)."""
    made = copy.deepcopy(thing)
    for path, value in values.items():
        *way, last = path.split(".")
        place = made["spec"]
        for step in way:
            place = place[int(step)] if step.isdigit() else place.setdefault(step, {})
        if value is GONE:
            del place[last]
        elif last == "+":
            place.append(value)
        else:
            place[last] = value
    return made


BY_THE_SERVER = {
    "an unknown field": (CLUSTER, {"enableAutoscaling": True}),
    "an unknown field deep inside": (CLUSTER, {WORKERS + IN_POD + ".resource": {}}),
    "an unknown way to scale up": (CLUSTER, {"autoscalerOptions.upscalingMode": "Fast"}),
    "an unknown version of the autoscaler": (CLUSTER, {"autoscalerOptions.version": "v3"}),
    "a count in words": (CLUSTER, {WORKERS + ".replicas": "two"}),
    "a group without a pod": (CLUSTER, {WORKERS + ".template": GONE}),
    "a start parameter that is a number": (CLUSTER, {HEAD + ".rayStartParams.num-cpus": 0}),
    "a label that is a number": (CLUSTER, {WORKERS + ".labels.orchestrator/vram-gb": 24}),
    "an unknown manager": (CLUSTER, {"managedBy": "me"}),
    "an unknown kind of access": (CLUSTER, {"authOptions.mode": "basic"}),
    "a deletion rule of two conditions": (JOB, {"deletionStrategy": {"deletionRules": [BOTH]}}),
    "no deletion rule": (JOB, {"deletionStrategy": {"deletionRules": []}}),
    "no time to start": (JOB, {"preRunningDeadlineSeconds": 0}),
    "a port that stands twice": (CLUSTER, {HEAD + IN_POD + ".ports.+": {"containerPort": 6379, "name": "again"}}),
    "an amount with a blank": (CLUSTER, {WORKERS + IN_POD + ".resources.limits.memory": "16 GB"}),
    "a cluster without a head": (CLUSTER, {"headGroupSpec": GONE}),
    "an environment that is no text": (JOB, {"runtimeEnvYAML": {"pip": ["x"]}}),
    "a number above 32 bits": (CLUSTER, {WORKERS + ".maxReplicas": 3_000_000_000}),
}
BY_THE_OPERATOR = {
    "labels as start parameters": (CLUSTER, {WORKERS + ".rayStartParams.labels": "a=b"}),
    "resources that are given twice": (CLUSTER, {HEAD + ".rayStartParams.num-cpus": "0"}),
    "a token for a Ray that knows none": (CLUSTER, {"rayVersion": "2.51.0"}),
    "a token for a Ray of unknown version": (CLUSTER, {"rayVersion": GONE}),
    "a network policy behind a gate": (CLUSTER, {"networkPolicy": {"mode": "DenyAllIngress"}}),
    "at least more than at most": (CLUSTER, {WORKERS + ".minReplicas": 9, WORKERS + ".maxReplicas": 2}),
    "pods that start again by themselves": (CLUSTER, {WORKERS + POD + ".restartPolicy": "Always"}),
    "an unknown way to submit": (JOB, {"submissionMode": "HttpMode"}),
    "a time to live without an end": (JOB, {"shutdownAfterJobFinishes": False, "ttlSecondsAfterFinished": 60}),
    "a pause without an end": (JOB, {"shutdownAfterJobFinishes": False, "suspend": True}),
    "a sidecar with a submitter": (JOB, {"submissionMode": "SidecarMode", "submitterConfig": {"backoffLimit": 1}}),
    "a job without a cluster": (JOB, {"rayClusterSpec": GONE}),
    "an environment that is no YAML": (JOB, {"runtimeEnvYAML": "env_vars: [unclosed"}),
    "an upgrade of a job's own cluster": (JOB, {"rayClusterSpec.upgradeStrategy": {"type": "Recreate"}}),
    "deletion rules beside a time to live": (
        JOB,
        {"shutdownAfterJobFinishes": True, "ttlSecondsAfterFinished": 60, "deletionStrategy.deletionRules": [RULE]},
    ),
}


def test_both_objects_are_taken_as_they_stand():
    assert [verdict(thing) + mistakes(thing) for thing in (JOB, CLUSTER)] == [[], []]


@pytest.mark.parametrize("name", BY_THE_SERVER)
def test_what_the_server_refuses_is_refused_by_its_schema(name):
    thing, values = BY_THE_SERVER[name]

    assert verdict(changed(thing, **values)), name


@pytest.mark.parametrize("name", BY_THE_OPERATOR)
def test_what_the_operator_refuses_is_refused_before_it_is_sent(name):
    thing, values = BY_THE_OPERATOR[name]
    made = changed(thing, **values)

    assert verdict(made) == [] and mistakes(made), name


def test_a_cluster_with_too_long_a_name_is_refused():
    made = copy.deepcopy(CLUSTER)
    made["metadata"]["name"] = "x" * 54

    assert verdict(made) == [] and mistakes(made)


def test_a_key_that_stands_twice_is_refused_as_kubectl_refuses_it():
    with pytest.raises(yaml.YAMLError, match="duplicate key 'kind'"):
        documents("kind: RayJob\nkind: RayCluster\n")
