"""Objects that live on another node of the cluster this process is connected to."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from clusters.ray.probe import alive


class NoSuchNode(ValueError):
    """The cluster has no node of that name; the text says which there are."""


class There:
    """Calls its methods where the object is, and waits for them."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def __getattr__(self, name: str) -> Callable[..., Any]:
        import ray

        method = getattr(self._actor, name)
        return lambda *arguments: ray.get(method.remote(*arguments))


def start(node: str, kind: type, *arguments: Any) -> There:
    """An object of `kind` on the node of that name, beside whatever runs there.  Raises NoSuchNode."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = dict(alive(ray.nodes()))
    if node not in nodes:
        raise NoSuchNode(f"{node} is not in the cluster, which has {', '.join(nodes)}")
    cores = max(1, int(nodes[node]["Resources"].get("CPU", 1)))
    options = {
        "num_cpus": 0,  # it asks for nothing: its work is small beside what may be training there
        "max_restarts": 0,
        "scheduling_strategy": NodeAffinitySchedulingStrategy(nodes[node]["NodeID"], soft=False),
        "runtime_env": {"env_vars": {"OMP_NUM_THREADS": str(cores)}},
    }
    return There(ray.remote(kind).options(**options).remote(*arguments))


def reachable() -> Callable[..., There] | None:
    """`start`, where this process is connected to a cluster."""
    ray = sys.modules.get("ray")
    return start if ray is not None and ray.is_initialized() else None
