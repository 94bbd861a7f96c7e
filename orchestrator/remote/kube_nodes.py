"""The nodes that an API server lists, as machines to plan for."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from clusters.capability import ClusterCapability
from clusters.hardware import datasheet
from clusters.hardware.hardware_file import ImpossibleHardware, hardware_of
from clusters.kubernetes.messages import mapping
from clusters.safe.reading import BadInput, printable, record
from clusters.units import GIB, MIB
from orchestrator.errors import ClusterError, JobError
from orchestrator.job.sections.machines import KubernetesSection

_OTHERS_CORES, _OTHERS_FRACTION = 1, 0.1  # of a node, for what runs on every node
_BINARY = {f"{name}i": 2.0 ** (10 * power) for power, name in enumerate("KMGTPE", 1)}
_UNITS = {**_BINARY, "n": 1e-9, "u": 1e-6, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15, "E": 1e18}
_QUANTITY = re.compile(r"(\d{1,20}(?:\.\d{0,20})?|\.\d{1,20})(?:[eE]([+-]?\d{1,2}))?([A-Za-z]{0,2})", re.ASCII)


@dataclass(frozen=True)
class _Taint:
    key: str
    effect: str
    value: str | None = None


@dataclass(frozen=True)
class _NodeSpec:
    unschedulable: bool | None = None
    taints: list[_Taint] | None = None


@dataclass(frozen=True)
class _Status:
    allocatable: dict[str, str]


@dataclass(frozen=True)
class _KubeNode:
    """What is read of a node."""

    name: str
    labels: dict[str, str]
    spec: _NodeSpec
    status: _Status


def read_nodes(listed: list[dict[str, Any]], section: KubernetesSection) -> ClusterCapability:
    """The nodes of an API server as a hardware file would declare them, without those that take none of our pods.

    GPUs are known by the labels of NVIDIA's feature discovery.  Raises JobError where no node is left.
    """
    nodes = [node for node in map(_parse, listed) if _takes_our_pods(node, section)]
    declared = [entry for node in nodes if (entry := _declare(node))]
    if not declared:
        unknown = [f"{node.name} ({_product(node) or 'no nvidia.com/gpu.product label'})" for node in nodes]
        why = f"; their GPUs are unknown: {', '.join(unknown)}" if unknown else ""
        raise JobError(f"no node of the cluster takes pods{why}. --hardware FILE declares its node classes")
    try:
        return hardware_of({"nodes": declared})
    except ImpossibleHardware as error:
        raise JobError(f"no plan can use the cluster's nodes: {error}. --hardware FILE declares them") from None


def _takes_our_pods(node: _KubeNode, section: KubernetesSection) -> bool:
    if node.spec.unschedulable or any(node.labels.get(key) != value for key, value in section.node_selector.items()):
        return False
    return not any(_repels(taint, section.tolerations) for taint in node.spec.taints or [])


def _declare(node: _KubeNode) -> dict[str, Any] | None:
    """A node's entry of a hardware file; None where its GPUs are in no data sheet."""
    allocatable = node.status.allocatable
    cores = int(_parse_quantity(allocatable.get("cpu", "0"))) - _OTHERS_CORES
    memory_gib = _parse_quantity(allocatable.get("memory", "0")) * (1 - _OTHERS_FRACTION) / GIB
    entry: dict[str, Any] = {"name": node.name, "cores": max(1, cores), "memory_gib": round(memory_gib, 2)}
    count = int(_parse_quantity(allocatable.get("nvidia.com/gpu", "0")))
    if count:
        memory_bytes = int(_parse_quantity(node.labels.get("nvidia.com/gpu.memory", "0")) * MIB)
        product = _product(node)
        gpu = datasheet.find(product, memory_bytes or None) if product else None
        if gpu is None:
            return None
        entry["gpus"] = [{"name": gpu.name, "count": count, "memory_gib": round(gpu.memory_bytes / GIB)}]
    return entry


def _product(node: _KubeNode) -> str:
    return node.labels.get("nvidia.com/gpu.product", "").replace("-", " ")


def _parse(values: dict[str, Any]) -> _KubeNode:
    metadata = mapping(values, "metadata")
    known = {"name": metadata.get("name"), "labels": metadata.get("labels") or {}, "spec": values.get("spec") or {}}
    try:
        return record(_KubeNode, {**known, "status": values.get("status")}, f"the node {metadata.get('name')}")
    except BadInput as error:
        raise ClusterError(
            f"the API server's answer is malformed: {error}. --hardware FILE declares the nodes"
        ) from None


def _repels(taint: _Taint, tolerations: list[dict[str, Any]]) -> bool:
    """Whether a taint keeps our pods away; GPU pods tolerate NVIDIA's.

    https://kubernetes.io/docs/concepts/scheduling-eviction/taint-and-toleration/
    """

    def matches(toleration: dict[str, Any]) -> bool:
        if toleration.get("effect") not in (None, taint.effect):
            return False
        if toleration.get("operator") == "Exists":
            return toleration.get("key") in (None, taint.key)
        return (toleration.get("key"), toleration.get("value")) == (taint.key, taint.value)

    if taint.effect not in ("NoSchedule", "NoExecute") or taint.key == "nvidia.com/gpu":
        return False
    return not any(matches(toleration) for toleration in tolerations)


def _parse_quantity(quantity: str) -> float:
    """A Kubernetes quantity: 16, 500m, 65Gi, 1e3."""
    match = _QUANTITY.fullmatch(quantity)
    if match is None or (match[3] and match[3] not in _UNITS):
        raise ClusterError(
            f"the API server's answer is malformed: {printable(quantity[:40])!r} is not a Kubernetes quantity."
            " --hardware FILE declares the nodes"
        )
    return float(match[1]) * 10.0 ** int(match[2] or 0) * _UNITS.get(match[3], 1)
