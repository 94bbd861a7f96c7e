"""Nodes without a stage stand by: each reads the tensors of a stage that no other node has, into its page cache.

Which stage is a pure choice.  A plan that is made again after a loss prefers that node for those layers
(strategies/cost/kept_layers.py), and its worker then starts from memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from clusters.capability import ClusterCapability
from orchestrator.planning.memory_fit import host_usable_bytes
from orchestrator.planning.plan import Beside, Plan
from orchestrator.runs.events import Note
from orchestrator.runs.run_folder import RunFolder
from strategies.shape import ModelShape
from strategies.stage_shape import shape_of_stage
from strategies.workload import StagePart

FREE = "It is free for other jobs"  # how a plan's sentence on a node ends that does nothing (planning/explain.py)
_FILE_BYTES = 2  # of a parameter: model files hold 16-bit weights; where they hold fewer bits there is room to spare


def with_spares(plan: Plan, cluster: ClusterCapability, shape: ModelShape) -> Plan:
    """The plan with excluded nodes standing by: one for each stage that fits into a node, the costliest loss first.

    A stage has at most one node that stands by; a plan without stages has none.
    """
    free = {
        node.name: host_usable_bytes(node)
        for node in cluster.nodes
        if node.name in plan.left_out  # those that could train
    }
    spares: list[Beside] = []
    for stage in stages_by_loss(plan):
        needed = _FILE_BYTES * float(shape_of_stage(shape, stage).num_parameters)
        fitting = [name for name, usable in free.items() if usable >= needed]
        if fitting:
            name = max(fitting, key=lambda name: free[name])
            spares.append(Beside(name, "stands by", stage=stage, num_bytes=needed))
            del free[name]
    left_out = dict(plan.left_out)
    for spare in spares:
        left_out[spare.node] = _with_task(left_out[spare.node], f"stands by with {spare.stage}")
    return replace(plan, beside=(*plan.beside, *spares), left_out=left_out)


def stages_by_loss(plan: Plan) -> list[StagePart]:
    """Stages with layers that no other node has, the most such layers first."""
    holders: dict[int, set[str]] = {}
    for part in plan.nodes:
        if stage := part.techniques.stage:
            for layer in range(stage.first_layer, stage.end_layer):
                holders.setdefault(layer, set()).add(part.node)
    stages = [part.techniques.stage for part in plan.nodes if part.techniques.stage]
    alone = {
        stage: sum(len(holders[layer]) == 1 for layer in range(stage.first_layer, stage.end_layer)) for stage in stages
    }
    return sorted((stage for stage in alone if alone[stage]), key=lambda stage: -alone[stage])


def _with_task(why: str, task: str) -> str:
    return f"{why.removesuffix(FREE)}It {task}" if why.endswith(FREE) else f"{why} and {task}"


class StandBy:
    """Makes the nodes that stand by read their stages, each once; training does not wait for them."""

    def __init__(self, run: RunFolder) -> None:
        self._run = run
        self._started: set[tuple[str, StagePart]] = set()
        self._calls: dict[str, Any] = {}  # by node

    def begin(self, plan: Plan, node_ids: Mapping[str, str]) -> None:
        """Start the reads that a plan asks for, each once; nodes that are not in the cluster are skipped."""
        for name, stage in plan.stands_by.items():
            if name not in node_ids or name in self._calls or (name, stage) in self._started:
                continue
            from clusters.ray.nodes import CallOn
            from orchestrator.training.workers.stand_by import read_stage

            self._started.add((name, stage))
            self._calls[name] = CallOn(node_ids[name], read_stage, self._run.data().model, stage)

    def poll(self) -> None:
        """Record the result of each read that has ended, once."""
        for node, call in list(self._calls.items()):
            if call.has_ended():
                del self._calls[node]
                reason = call.error()
                self._run.record(Note(f"{node} cannot stand by: {reason}" if reason else f"{node} {call.result()}"))
