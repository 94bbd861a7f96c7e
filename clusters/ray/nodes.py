"""Which nodes of a connected Ray cluster are there now, and which of them answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from clusters.ray.connect import SLOT
from clusters.ray.probe import alive


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


def shortage(wanted: Mapping[str, Mapping[str, float]]) -> str | None:
    """What is not free of what nodes (by Ray's id) are to give now, and who has it; None where all of it is free.

    What a node does not have at all is none of this function's business: it would be waited for without end.
    """
    import ray
    from ray._private import state  # the public one asks the dashboard, which may be off

    free, nodes = state.available_resources_per_node(), {node["NodeID"]: node for node in ray.nodes()}
    lacking = []
    for name, node_id in present().items():
        total, left = nodes.get(node_id, {}).get("Resources", {}), free.get(node_id, {})  # it may have joined just now
        for kind, amount in wanted.get(node_id, {}).items():
            if left.get(kind, 0.0) < amount <= total.get(kind, 0.0):
                lacking.append(
                    f"{amount:g} {kind} of {name}, where {left.get(kind, 0.0):g} of {total[kind]:g} are free"
                )
    if not lacking:
        return None
    holders = _other_drivers()
    return "; ".join(lacking) + (f". Also connected: {', '.join(holders)}" if holders else "")


def _other_drivers() -> list[str]:
    """Programs beside this one that are connected to the cluster, each with where it runs."""
    import ray
    from ray._private import state

    mine = ray.get_runtime_context().get_job_id()
    return [
        f"{job.get('Entrypoint') or 'a driver'} on {job.get('DriverIPAddress', 'an unknown machine')}"
        for job in state.jobs()
        if not job.get("IsDead") and job.get("JobID") != mine and "dashboard" not in str(job.get("Entrypoint"))
    ]


class CallOn:
    """A call that runs on one node beside whatever else happens; it asks for no resources but GPUs."""

    def __init__(self, node_id: str, call: Callable[..., Any], *arguments: Any, num_gpus: int = 0) -> None:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        pinned = NodeAffinitySchedulingStrategy(node_id, soft=False)
        options = {"num_cpus": 0, "num_gpus": num_gpus, "max_retries": 0, "scheduling_strategy": pinned}
        self._task = ray.remote(call).options(**options).remote(*arguments)

    def has_ended(self) -> bool:
        import ray

        return bool(ray.wait([self._task], timeout=0)[0])

    def error(self) -> str | None:
        """What went wrong with a call that has ended."""
        import ray

        try:
            ray.get(self._task)
        except Exception as error:  # whatever it raised, or the node is gone
            return str(getattr(error, "cause", None) or error).strip().splitlines()[-1]
        return None

    def result(self) -> Any:
        """What a call that has ended without an error returned."""
        import ray

        return ray.get(self._task)


def inventory() -> list[dict[str, Any]]:
    """Every node: who, where, alive or lost, what it offers, what it does."""
    import ray
    from ray._private import state  # the public one asks the dashboard, which may be off

    free = state.available_resources_per_node()
    actors = [actor for actor in state.actors().values() if actor["State"] == "ALIVE"]
    names = {node["NodeID"]: name for name, node in alive(ray.nodes())}
    found = []
    for node in ray.nodes():
        total, left = node["Resources"], free.get(node["NodeID"], {})
        labels = node.get("Labels", {})
        slots = total.get(SLOT, 0.0)
        found.append(
            {
                "name": names.get(node["NodeID"], node.get("NodeName") or node["NodeManagerHostname"]),
                "address": node["NodeManagerAddress"],
                "state": "alive" if node["Alive"] else "lost",
                "num_cores": total.get("CPU", 0.0),
                "memory_bytes": int(total.get("memory", 0)),
                "device": labels.get("device-name", labels.get("device", "-")),
                "slots": slots,
                "slots_in_use": slots - left.get(SLOT, 0.0) if node["Alive"] else 0.0,
                "does": sorted(
                    {_what(actor) for actor in actors if actor["Address"]["NodeID"] == node["NodeID"]} - {""}
                ),
            }
        )
    return found


def _what(actor: dict[str, Any]) -> str:
    """What an actor is there for; Ray's own are nobody's business."""
    return {"RayTrainWorker": "trains", "_Probe": "measures"}.get(actor["ActorClassName"].rsplit(".", 1)[-1], "")
