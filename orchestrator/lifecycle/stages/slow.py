"""Stages that compute slower than planned, and the machines as measured, to plan again with.

`find_slow_stage` and `with_measured_pace` are pure; `RecentSteps` reads a run's events.  Whether a new cut of the
layers is worth a restart is decided in recovery_policy.py.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from clusters.capability import ClusterCapability, DeviceCapability, NodeCapability
from orchestrator.planning.plan import NodePlan, Plan
from orchestrator.runs.events import StepReport, WorkerGroup
from orchestrator.runs.run_folder import RunFolder

SLOWER = 1.15  # times as planned: less is no reason to cut anew
NUM_STEPS = 3  # in a row


@dataclass(frozen=True)
class StagePace:
    """How fast the stages of a plan compute, as measured."""

    ratios: tuple[float, ...]  # of each worker of the plan: measured over planned seconds of computing
    slowest: int  # the worker for which the others wait
    step_s: float  # of a planned step: as measured, or as the plan's with the measured slowest stage, the lower


@dataclass
class RecentSteps:
    """The last steps of the workers that train now."""

    _offset: int = 0
    _reports: deque[StepReport] = field(default_factory=lambda: deque(maxlen=NUM_STEPS))

    def read(self, run: RunFolder) -> Sequence[StepReport]:
        """Read what the run has recorded since the last call; the last steps."""
        events, self._offset = run.events(self._offset)
        for event in events:
            if isinstance(event, WorkerGroup):
                self._reports.clear()
            elif isinstance(event, StepReport):
                self._reports.append(event)
        return tuple(self._reports)


def find_slow_stage(plan: Plan, reports: Sequence[StepReport]) -> StagePace | None:
    """The measured pace if the slowest stage took over 15 % longer than planned in each of the last three steps.

    None otherwise, and where there are no stages or too few steps.  Seconds are scaled by a step's tokens, of several
    pipelines each by its own.
    """
    planned_s = [_computing_s(part) for part in plan.nodes]
    if not plan.techniques.stage or not all(planned_s):
        return None
    planned_tokens, recent = plan.tokens_per_s * plan.step_s, reports[-NUM_STEPS:]
    measured: list[list[float]] = []
    for report in recent:
        busy_s = report.stage_busy_s
        if busy_s is None or len(busy_s) != len(planned_s) or not report.tokens or not all(busy_s):
            return None
        own = report.worker_tokens or [report.tokens] * len(busy_s)
        planned = [planned_tokens * part.share for part in plan.nodes]
        measured.append([s * wanted / tokens for s, wanted, tokens in zip(busy_s, planned, own, strict=True)])
    if len(measured) < NUM_STEPS or not all(_is_slow(one, planned_s) for one in measured):
        return None
    seconds = [statistics.median(own) for own in zip(*measured, strict=True)]
    slowest = max(range(len(seconds)), key=seconds.__getitem__)
    step_s = statistics.median(report.seconds * planned_tokens / report.tokens for report in recent)
    ratios = tuple(own / planned for own, planned in zip(seconds, planned_s, strict=True))
    return StagePace(ratios, slowest, min(step_s, plan.step_s - max(planned_s) + seconds[slowest]))


def _is_slow(seconds: Sequence[float], planned_s: Sequence[float]) -> bool:
    slowest = max(range(len(seconds)), key=seconds.__getitem__)
    return seconds[slowest] > SLOWER * planned_s[slowest]


def _computing_s(part: NodePlan) -> float:
    """Seconds of a step without its update."""
    return part.time.step_s - part.time.update_s


def with_measured_pace(cluster: ClusterCapability, plan: Plan, ratios: Sequence[float]) -> ClusterCapability:
    """The machines with each planned device's speed as measured: `ratios` are measured over planned seconds."""
    nodes = list(cluster.nodes)
    for part, ratio in zip(plan.nodes, ratios, strict=True):
        nodes = [_node_with_pace(node, part, ratio) if node.name == part.node else node for node in nodes]
    return replace(cluster, nodes=tuple(nodes))


def _node_with_pace(node: NodeCapability, part: NodePlan, ratio: float) -> NodeCapability:
    dtype = part.techniques.dtype

    def slow_down(device: DeviceCapability) -> DeviceCapability:
        if (device.uuid, device.name) != (part.uuid, part.device):
            return device
        return replace(device, calibration={**device.calibration, dtype: ratio * device.calibration.get(dtype, 1.0)})

    return replace(node, devices=tuple(map(slow_down, node.devices)))
