"""Which layers a node has read: planned again, they stay where they are if they can.  Pure."""

from __future__ import annotations

from dataclasses import replace

from clusters.capability import ClusterCapability
from orchestrator.planning.plan import Plan


def with_held_layers(cluster: ClusterCapability, plan: Plan) -> ClusterCapability:
    """The machines with the layers that each trains, or has read to stand by; none in a plan without stages."""
    held: dict[str, list[tuple[int, int]]] = {}
    for part in plan.nodes:
        if stage := part.techniques.stage:
            held.setdefault(part.node, []).append((stage.first_layer, stage.end_layer))
    for name, stage in plan.stands_by.items():
        held.setdefault(name, []).append((stage.first_layer, stage.end_layer))
    nodes = (replace(node, held_layers=tuple(sorted(held.get(node.name, ())))) for node in cluster.nodes)
    return replace(cluster, nodes=tuple(nodes))
