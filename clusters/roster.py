"""Which nodes of a connected Ray cluster are there now, and which of them answer."""

from __future__ import annotations

from typing import Any

from clusters.connect import SLOT
from clusters.ray_probe import alive


def present() -> dict[str, str]:
    """Name -> Ray's id of every node that Ray believes alive; a node that fell silent stays for some seconds."""
    import ray

    return {name: node["NodeID"] for name, node in alive(ray.nodes())}


def trainable(names: dict[str, str]) -> set[str]:
    """Names of those that offer a slot to train on; all where nobody declares slots."""
    import ray

    by_id: dict[str, dict[str, Any]] = {node["NodeID"]: node for node in ray.nodes()}
    offering = {name for name, node_id in names.items() if by_id.get(node_id, {}).get("Resources", {}).get(SLOT)}
    return offering or set(names)


def answering(names: dict[str, str], timeout_s: float = 8.0) -> set[str]:
    """Names of the nodes that run a task within the time: a better word than Ray's own, which may be old."""
    import ray
    from ray.exceptions import RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    def here() -> bool:
        return True

    asked = {
        ray.remote(here)
        .options(num_cpus=0, max_retries=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False))
        .remote(): name
        for name, node_id in names.items()
    }
    done, late = ray.wait(list(asked), num_returns=len(asked), timeout=timeout_s)
    for task in late:
        ray.cancel(task, force=True)
    answered = set()
    for task in done:
        try:
            ray.get(task)
            answered.add(asked[task])
        except RayError:  # lost between the question and the answer
            continue
    return answered
