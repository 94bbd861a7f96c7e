"""The fields of KubeRay 1.7's RayJob and RayCluster as far as this project uses them, as OpenAPI schemas.

`python -m tests.kube_fields FOLDER` compares them with the CRDs of a release (ray-operator/config/crd/bases).
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import yaml

Schema = dict[str, Any]
_NUMBER = r"(([0-9]+(\.[0-9]*)?)|(\.[0-9]+))"
_TEXT: Schema = {"type": "string"}
_FLAG: Schema = {"type": "boolean"}
_INT32: Schema = {"type": "integer", "format": "int32"}
_INT64: Schema = {"type": "integer", "format": "int64"}
_QUANTITY: Schema = {
    "x-kubernetes-int-or-string": True,
    "pattern": rf"^(\+|-)?{_NUMBER}(([KMGTPE]i)|[numkMGTPE]|([eE](\+|-)?{_NUMBER}))?$",
}


def _fields(*required: str, rules: tuple[tuple[str, str], ...] = (), **properties: Schema) -> Schema:
    """An object; each rule is a CEL expression with the message of its refusal."""
    made: Schema = {"type": "object", "properties": properties}
    if required:
        made["required"] = list(required)
    if rules:
        made["x-kubernetes-validations"] = [{"rule": rule, "message": message} for rule, message in rules]
    return made


def _map(value: Schema) -> Schema:
    return {"type": "object", "additionalProperties": value}


def _list(items: Schema, *keys: str, **limits: int) -> Schema:
    """A list; with keys, no two entries have the same ones."""
    kind: Schema = {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": list(keys)} if keys else {}
    return {"type": "array", "items": items, **limits, **kind}


def _one_of(*values: str) -> Schema:
    return {**_TEXT, "enum": list(values)}


_NAME = {**_TEXT, "default": ""}
_RESOURCES = _fields(limits=_map(_QUANTITY), requests=_map(_QUANTITY))
_CONTAINER_SECURITY = _fields(allowPrivilegeEscalation=_FLAG, capabilities=_fields(drop=_list(_TEXT)))
_CONTAINER = _fields(
    "name",
    name=_TEXT,
    image=_TEXT,
    envFrom=_list(_fields(secretRef=_fields(name=_NAME))),
    ports=_list(
        _fields("containerPort", containerPort=_INT32, name=_TEXT, protocol={**_TEXT, "default": "TCP"}),
        *("containerPort", "protocol"),
    ),
    resources=_RESOURCES,
    securityContext=_CONTAINER_SECURITY,
    volumeMounts=_list(_fields("mountPath", "name", mountPath=_TEXT, name=_TEXT, readOnly=_FLAG), "mountPath"),
)
_VOLUME = _fields(
    "name",
    name=_TEXT,
    configMap=_fields(name=_NAME),
    emptyDir=_fields(medium=_TEXT, sizeLimit=_QUANTITY),
    persistentVolumeClaim=_fields("claimName", claimName=_TEXT),
)
_EXPRESSION = _fields("key", "operator", key=_TEXT, operator=_TEXT, values=_list(_TEXT))
_NODE_TERMS = _fields("nodeSelectorTerms", nodeSelectorTerms=_list(_fields(matchExpressions=_list(_EXPRESSION))))
_POD = _fields(
    spec=_fields(
        "containers",
        containers=_list(_CONTAINER, "name"),
        volumes=_list(_VOLUME, "name"),
        imagePullSecrets=_list(_fields(name=_NAME), "name"),
        nodeSelector=_map(_TEXT),
        affinity=_fields(nodeAffinity=_fields(requiredDuringSchedulingIgnoredDuringExecution=_NODE_TERMS)),
        tolerations=_list(_fields(effect=_TEXT, key=_TEXT, operator=_TEXT)),
        securityContext=_fields(
            fsGroup=_INT64,
            runAsNonRoot=_FLAG,
            runAsUser=_INT64,
            seccompProfile=_fields("type", type=_TEXT),
        ),
        automountServiceAccountToken=_FLAG,
        restartPolicy=_TEXT,
        runtimeClassName=_TEXT,
    )
)
_GROUP = {"labels": _map(_TEXT), "rayStartParams": _map(_TEXT), "resources": _map(_TEXT), "template": _POD}
_WORKERS = _fields(
    *("groupName", "maxReplicas", "minReplicas", "template"),
    groupName=_TEXT,
    replicas={**_INT32, "default": 0},
    minReplicas={**_INT32, "default": 0},
    maxReplicas={**_INT32, "default": 2**31 - 1},
    numOfHosts={**_INT32, "default": 1},
    priority={**_INT32, "default": 0},
    idleTimeoutSeconds=_INT32,
    **_GROUP,
)
_MANAGERS = (
    "self in ['ray.io/kuberay-operator', 'kueue.x-k8s.io/multikueue']",
    "the managedBy field value must be either 'ray.io/kuberay-operator' or 'kueue.x-k8s.io/multikueue'",
)
_CLUSTER = _fields(
    "headGroupSpec",
    rayVersion=_TEXT,
    headGroupSpec=_fields("template", **_GROUP),
    workerGroupSpecs=_list(_WORKERS),
    enableInTreeAutoscaling=_FLAG,
    autoscalerOptions=_fields(
        version=_one_of("v1", "v2"),
        upscalingMode=_one_of("Default", "Aggressive", "Conservative"),
        idleTimeoutSeconds=_INT32,
        resources=_RESOURCES,
        securityContext=_CONTAINER_SECURITY,
    ),
    authOptions=_fields(mode=_one_of("disabled", "token")),
    managedBy={**_TEXT, "x-kubernetes-validations": [dict(zip(("rule", "message"), _MANAGERS, strict=True))]},
    networkPolicy=_fields(mode={**_one_of("DenyAll", "DenyAllIngress", "DenyAllEgress"), "default": "DenyAll"}),
    upgradeStrategy=_fields(type=_one_of("Recreate", "None")),
)
_CONDITION = _fields(
    rules=(
        ("!(has(self.jobStatus) && has(self.jobDeploymentStatus))", "a deletion condition names one status, not two"),
        ("has(self.jobStatus) || has(self.jobDeploymentStatus)", "a deletion condition names a status"),
    ),
    jobStatus=_one_of("SUCCEEDED", "FAILED"),
    jobDeploymentStatus=_one_of("Failed"),
    ttlSeconds={**_INT32, "minimum": 0, "default": 0},
)
_DELETION = _fields(
    rules=(("has(self.deletionRules)", "deletionStrategy requires deletionRules"),),
    deletionRules=_list(
        _fields(
            *("condition", "policy"),
            condition=_CONDITION,
            policy=_one_of("DeleteCluster", "DeleteWorkers", "DeleteSelf", "DeleteNone"),
        ),
        minItems=1,
    ),
)
_JOB = _fields(
    entrypoint=_TEXT,
    rayClusterSpec=_CLUSTER,
    clusterSelector=_map(_TEXT),
    submissionMode={**_TEXT, "default": "K8sJobMode"},
    submitterPodTemplate=_POD,
    submitterConfig=_fields(backoffLimit=_INT32),
    runtimeEnvYAML=_TEXT,
    metadata=_map(_TEXT),
    shutdownAfterJobFinishes=_FLAG,
    ttlSecondsAfterFinished={**_INT32, "default": 0},
    activeDeadlineSeconds=_INT32,
    preRunningDeadlineSeconds={**_INT32, "minimum": 1},
    backoffLimit={**_INT32, "default": 0},
    deletionStrategy=_DELETION,
    suspend=_FLAG,
)
SCHEMAS: dict[tuple[str, str], Schema] = {
    ("ray.io/v1", kind): _fields(apiVersion=_TEXT, kind=_TEXT, metadata={"type": "object"}, spec=spec)
    for kind, spec in {"RayJob": _JOB, "RayCluster": _CLUSTER}.items()
}


def differences(ours: Schema, theirs: Schema, at: str = "") -> list[str]:
    """Fields that a release does not know, or knows otherwise."""
    keys = ("type", "enum", "default", "minimum", "minItems", "required", "pattern", "x-kubernetes-list-map-keys")
    found = [f"{at}.{key}" for key in keys if ours.get(key) != theirs.get(key)]
    for name, inner in ours.get("properties", {}).items():
        known = theirs.get("properties", {}).get(name)
        found += differences(inner, known, f"{at}.{name}") if known else [f"{at}.{name}: is not there"]
    for key in ("items", "additionalProperties"):
        if key in ours:
            found += differences(ours[key], theirs.get(key) or {}, f"{at}[]")
    return found


def _released(folder: Path) -> dict[tuple[str, str], Schema]:
    """The schema of each served version of the CRDs in a folder."""
    found: dict[tuple[str, str], Schema] = {}
    for file in sorted(folder.glob("*.yaml")):
        spec = yaml.load(file.read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))["spec"]
        for version in spec["versions"]:
            if version["served"]:
                key = f"{spec['group']}/{version['name']}", spec["names"]["kind"]
                found[key] = version["schema"]["openAPIV3Schema"]
    return found


if __name__ == "__main__":
    released = _released(Path(sys.argv[1]))
    lines = [line for key, schema in SCHEMAS.items() for line in differences(schema, released[key], key[1])]
    print("\n".join(lines) or "every field is as the release has it")
    sys.exit(bool(lines))
