"""The capability of a whole Ray cluster: every node measures itself, then every pair of nodes its link.

Nodes measure at the same time, links one after another.  A node that fails is named with its reason; the others count.
"""

from __future__ import annotations

import logging
import textwrap
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

from clusters.capability import ClusterCapability, Link, NodeCapability
from clusters.probe.link import Peer
from clusters.probe.measure import LIMIT_S
from clusters.probe.node import probe_node
from clusters.ray.connect import SLOT, CannotConnect, connect

NODE_TIMEOUT_S = LIMIT_S + 60.0  # a worker process has to start first
_LINK_TIMEOUT_S = 20.0
SLOTS_TIMEOUT_S = 1800.0  # a node has to be rented, an image pulled
_log = logging.getLogger(__name__)


class _Probe(Peer):
    """What runs on a node: it measures the node and is one end of its links."""

    def node(self, refresh: bool, seconds: float) -> NodeCapability:
        return probe_node(refresh, seconds)


@dataclass(frozen=True)
class _Place:
    """A node of the cluster, its unique name, and the actor that was started there."""

    name: str
    host: str
    actor: Any


def probe_cluster(
    address: str,
    refresh: bool = False,
    timeout_s: float = NODE_TIMEOUT_S,
    seconds: float = 5.0,
    num_slots: int = 0,
    slots_timeout_s: float = SLOTS_TIMEOUT_S,
) -> ClusterCapability:
    """The nodes of the cluster at a Ray address; `local` is this machine, for which no Ray is started.

    `timeout_s` bounds all nodes together, since they measure at the same time.  Before, `num_slots` slots to train on
    are asked for and waited for: they come where an autoscaler hears it, or machines are still to join.
    Raises CannotConnect.
    """
    if address == "local":
        return ClusterCapability((probe_node(refresh, seconds),))
    with connect(address, num_slots=1, cores_per_slot=1):
        if num_slots:
            wait_for_slots(num_slots, slots_timeout_s)
        return probe_connected(ClusterCapability(), refresh, timeout_s, seconds)


def wait_for_slots(count: int, timeout_s: float = SLOTS_TIMEOUT_S) -> None:
    """Until the connected cluster offers so many slots; an autoscaler is asked for them.  Raises CannotConnect."""
    import ray
    from ray.autoscaler.sdk import request_resources

    until = time.monotonic() + timeout_s
    if ray.cluster_resources().get(SLOT, 0) < count:
        request_resources(bundles=[{SLOT: 1}] * count)
    while (there := ray.cluster_resources().get(SLOT, 0)) < count:
        if time.monotonic() > until:
            raise CannotConnect(f"of {count} slots to train on {there:.0f} joined in {timeout_s:.0f} s")
        time.sleep(0.5)


def probe_connected(
    known: ClusterCapability, refresh: bool = False, timeout_s: float = NODE_TIMEOUT_S, seconds: float = 5.0
) -> ClusterCapability:
    """The nodes of the cluster that this process is connected to; what is `known` of those present is not measured."""
    import ray

    kept = {node.name: node for node in known.nodes}
    places = [_Place(name, node["NodeManagerAddress"], _start(node["NodeID"])) for name, node in alive(ray.nodes())]
    nodes, failed = _probe_nodes([place for place in places if place.name not in kept], refresh, timeout_s, seconds)
    nodes |= {place.name: kept[place.name] for place in places if place.name in kept}
    nodes = {name: replace(node, num_slots=_slots(ray.nodes()).get(name)) for name, node in nodes.items()}
    reached = [place for place in places if place.name in nodes]
    links = [known.link(a.name, b.name) or _measure_link(a, b) for a, b in combinations(reached, 2)]
    for place in places:
        ray.kill(place.actor)
    return ClusterCapability(tuple(nodes.values()), tuple(link for link in links if link), failed)


def _slots(ray_nodes: list[dict[str, Any]]) -> dict[str, int | None]:
    """Devices that each node gives to training; nothing is known of any where nobody declares slots."""
    offered = {name: node["Resources"].get(SLOT) for name, node in alive(ray_nodes)}
    return {name: int(count or 0) for name, count in offered.items()} if any(offered.values()) else {}


def alive(ray_nodes: list[dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    """Alive nodes with unique names, in an order that is the same each time."""
    alive = [node for node in ray_nodes if node["Alive"]]
    alive.sort(key=lambda node: (_given_name(node), node["NodeManagerAddress"], node["NodeID"]))
    return list(zip(unique([_given_name(node) for node in alive]), alive, strict=True))


def _given_name(node: Mapping[str, Any]) -> str:
    """What `ray start --node-name` said; without it Ray knows an address only, and the host's name reads better."""
    name = node.get("NodeName")
    return name if name and name != node["NodeManagerAddress"] else node["NodeManagerHostname"]


def unique(names: list[str]) -> list[str]:
    """The names in their order; one that is taken gets -2, -3 ..."""
    result: list[str] = []
    for name in names:
        chosen, number = name, 2
        while chosen in result or (chosen != name and chosen in names):
            chosen, number = f"{name}-{number}", number + 1
        result.append(chosen)
    return result


def _start(node_id: str) -> Any:
    """An actor on one node, beside whatever runs there: it asks for no resources."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    pinned = NodeAffinitySchedulingStrategy(node_id, soft=False)
    return ray.remote(_Probe).options(num_cpus=0, max_restarts=0, scheduling_strategy=pinned).remote()


def _probe_nodes(
    places: list[_Place], refresh: bool, timeout_s: float, seconds: float
) -> tuple[dict[str, NodeCapability], Mapping[str, str]]:
    """The nodes that answered, and why the others did not."""
    import ray

    answers = {place.name: place.actor.node.remote(refresh, seconds) for place in places}
    in_time, _ = ray.wait(list(answers.values()), num_returns=len(answers), timeout=timeout_s)
    nodes, failed = {}, {}
    for place in places:
        if answers[place.name] not in in_time:
            failed[place.name] = f"no answer within {timeout_s:.0f} s"
            ray.kill(place.actor)
            continue
        try:
            node: Any = ray.get(answers[place.name])
            nodes[place.name] = replace(node, name=place.name)
        except Exception as error:  # the node died, its worker was killed, or this package is not installed there
            failed[place.name] = _reason(error)
    for name, reason in failed.items():
        _log.warning("%s could not be probed: %s", name, reason)
    return nodes, failed


def _reason(error: Exception) -> str:
    """The last line of what Ray says: a remote traceback ends with the error itself."""
    cause = getattr(error, "cause", None) or error
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return textwrap.shorten(f"{type(cause).__name__}: {lines[-1] if lines else 'no message'}", 200, placeholder=" ...")


def _measure_link(first: _Place, second: _Place) -> Link | None:
    """Both ways, one at a time; the slower counts, since a job waits for it.  None where the nodes cannot talk."""
    import ray

    try:
        ways = []
        for server, client in ((first, second), (second, first)):
            port, token = ray.get(server.actor.listen.remote(), timeout=_LINK_TIMEOUT_S)
            received = server.actor.receive.remote()
            round_trip_s = ray.get(client.actor.send.remote(server.host, port, token), timeout=_LINK_TIMEOUT_S)
            ways.append((ray.get(received, timeout=_LINK_TIMEOUT_S), round_trip_s))
    except Exception as error:  # a firewall, a timeout, a node that has just died
        _log.warning("%s and %s: link not measured: %s", first.name, second.name, _reason(error))
        return None
    return Link((first.name, second.name), min(way[0] for way in ways), min(way[1] for way in ways))
