"""Which trials share one resident base model, and how many at a time.  Pure: no torch, no ray.

Trials that differ in rank, rate, initialisation or schedule alone compute the same passes over the same frozen weights;
what jobs may share (lifecycle/together/share.py) they may share too, in micro-batches of one size.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from clusters.capability import DeviceCapability
from orchestrator.job.job_file import Job, spec_with
from orchestrator.job.space import Point, Space
from orchestrator.job.spec import JobSpec
from orchestrator.lifecycle.together.share import base_key, device_of, memory_of, num_places, why_alone
from orchestrator.planning.plan import Plan
from orchestrator.runs.search_folder import Samples
from orchestrator.search.advice import LAYOUT, Planning
from strategies.contract import MemoryEstimate
from strategies.multi_lora.memory import JobMemory, estimate_together

MOST_PLACES = 8  # trials at a time: each begins before it could learn from the others
_TIMED = LAYOUT | {"model.dtype", "data.max_length", "method.type"}  # keys whose values are compared by their time


@dataclass(frozen=True)
class Share:
    """What decides which trials a trial can share a base model with, and how many."""

    key: Hashable  # equal of those that share
    memory: JobMemory
    most: int  # such trials whose micro-batches fill a row
    device: DeviceCapability
    usable_bytes: float | None


@dataclass(frozen=True)
class NextTrial:
    """A point that is to be tried."""

    number: int
    point: Point
    plans: dict[str, list[Plan]]  # by node, one for each kind of its devices
    shares: dict[str, Share] | str  # by node; or why it is tried by itself, empty where nothing is to be said


def why_none_share(spec: JobSpec, space: Space, named: Sequence[tuple[str, Point]]) -> str | None:
    """Why all trials of a search are tried by themselves; empty as the job wants it so, None where some may share."""
    if spec.search.share_base == "never":
        return ""
    if compared := time_sensitive_keys(spec, space, named):
        return (
            f"no trial shares its base model with others: goal.prefer is {spec.goal.prefer}, and times of"
            f" {', '.join(compared)} can be compared only where each trial computes by itself"
        )
    return None


def time_sensitive_keys(spec: JobSpec, space: Space, named: Sequence[tuple[str, Point]]) -> list[str]:
    """Keys whose values a search compares by the time of their trials."""
    if spec.goal.prefer not in ("time", "cost"):
        return []
    tried = {key for key, values in space.choices.items() if len(values) > 1} | set(space.ranges)
    points = [point for _, point in named]
    tried |= {key for point in points for key in point if any(other.get(key) != point[key] for other in points)}
    return sorted(tried & _TIMED)


def share_of(
    job: Job, planning: Planning, samples: dict[str, Samples], point: Point, plans: Sequence[Plan]
) -> Share | str:
    """What a point's trial can share, or why it is tried by itself; `plans` are those of its node."""
    if len({plan.nodes[0].device for plan in plans}) > 1:
        return "its machine has several kinds of GPU, and which of them it gets is seen only when it starts"
    # On a cluster as well it computes on one machine.
    plan, own = plans[0], Job(spec_with(job.spec, {**point, "cluster.address": "local"}), job.folder, job.text)
    if why := why_alone(own, plan):
        return why
    part, techniques = plan.nodes[0], plan.techniques
    lengths = planning.sample.cut(plan.max_length).lengths
    limit = techniques.micro_batch_tokens
    typical = max(1, round(sum(lengths) / len(lengths) * plan.global_batch_size))
    if 2 * typical > limit:
        return f"a row of {limit} tokens does not hold the steps of two trials, of {typical} each"
    key = (
        base_key(samples[str(plan.max_length)].model, own, plan),
        plan.max_length,
        techniques.per_device_train_batch_size,
    )
    device = device_of(planning.capability, part)
    return Share(key, memory_of(plan, lengths), limit // typical, device, part.memory_usable_bytes)


def has_place(share: Share, others: Sequence[Share]) -> bool:
    """Whether a trial may begin beside others that share its base model, by what is predicted of all."""
    together = [*others, share]
    if len(together) > min(MOST_PLACES, *(one.most for one in together)):
        return False
    memories = [one.memory for one in together]
    return num_places(memories, share.device, share.usable_bytes) == len(together)


def places_of(shares: Sequence[Share]) -> tuple[int, MemoryEstimate]:
    """How many of these trials, whichever, may train at a time, and what that is predicted to take."""
    first = shares[0]
    memories = sorted((one.memory for one in shares), key=lambda memory: -memory.own_bytes)
    places = min(MOST_PLACES, num_places(memories, first.device, first.usable_bytes), *(one.most for one in shares))
    return places, estimate_together(memories[:places], first.device)
