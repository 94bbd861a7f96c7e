"""Which jobs share a base model, how many of them at a time, and why the others train alone."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

from clusters.capability import ClusterCapability, DeviceCapability
from clusters.units import format_bytes
from orchestrator.job.job_file import Job
from orchestrator.lifecycle.hooks import NO_BANK, BankHooks
from orchestrator.lifecycle.run import HeldRun
from orchestrator.lifecycle.together.side_by_side import divide
from orchestrator.planning.memory_fit import needed_bytes
from orchestrator.planning.plan import NodePlan, Plan
from orchestrator.runs import record
from orchestrator.runs.run_folder import RunFolder
from strategies.contract import MemoryEstimate
from strategies.multi_lora.memory import JobMemory, estimate_together

_TRAINED_BYTES = 4.0  # of a trained weight's element


@dataclass(frozen=True)
class Sharing:
    """Runs that train over one base model, in one worker."""

    runs: tuple[HeldRun, ...]
    places: int  # of them that train at a time
    memory: MemoryEstimate  # of those together

    @property
    def text(self) -> str:
        """What happens, in one sentence."""
        names = ", ".join(held.run.run_id for held in self.runs)
        if len(self.runs) == 1:
            return f"{names} has its base model for itself, with a predicted {format_bytes(self.memory.total_bytes)}"
        at_once = "all at once" if self.places == len(self.runs) else f"{self.places} at a time, the others as they end"
        return (
            f"{len(self.runs)} runs share one base model in one worker ({names}): {at_once}, with a predicted"
            f" {format_bytes(self.memory.total_bytes)}"
        )


def why_alone(job: Job, plan: Plan) -> str | None:
    """Why a job cannot share its base model with others; None where it can."""
    techniques = plan.techniques
    reasons = {
        "cluster.address is a cluster, whose nodes are planned one run at a time": job.spec.cluster.address != "local",
        f"it trains on {plan.num_workers} devices": plan.num_workers > 1,
        "its workers train apart (strategy.local_steps)": plan.local_batch_size is not None,
        f"strategy.offload: {techniques.offload}": techniques.offload != "none",
        f"strategy.mode: zero{techniques.zero_stage}": techniques.zero_stage > 0,
        "the model is compiled (train.torch_compile)": techniques.torch_compile,
        "its norms and MLPs are Liger's (train.use_liger_kernel)": techniques.liger_kernel,
        "its rows are padded (data.packing: false)": not techniques.packing,
        "its objective is over whole documents": plan.build_objective().is_by_document,
        "its embeddings get noise (train.neftune_noise_alpha)": bool(job.spec.train.neftune_noise_alpha),
        "its labels are smoothed (train.label_smoothing_factor)": bool(job.spec.train.label_smoothing_factor),
        "train.cache_frozen_activations is set": job.spec.train.cache_frozen_activations in (True, "disk"),
    }
    own = plan.build_method().why_alone()
    found = [*([own] if own else []), *(text for text, holds in reasons.items() if holds)]
    return "; ".join(found) or None


def model_of(run: RunFolder) -> Hashable:
    """A run's base model: its files as they were recorded, and where they lie."""
    known = record.read(run.path)
    digests = known.model if known else {}
    return tuple(sorted((name, str(digest)) for name, digest in digests.items())), run.data().model


def base_key(model: Hashable, job: Job, plan: Plan) -> Hashable:
    """What must be equal of jobs that share a base model: its bytes, how they are loaded, and where they compute."""
    part, method = plan.nodes[0], plan.build_method()
    techniques = part.techniques
    return (
        model,
        job.spec.model.trust_remote_code,
        method.load_dtype(techniques),
        str(method.load_arguments(techniques)),
        (techniques.dtype, techniques.attn_implementation, techniques.gradient_checkpointing, techniques.loss_type),
        (part.node, part.device, part.torch_device, part.uuid, job.spec.train.threads),
        job.spec.train.deterministic,
        job.spec.cluster.nice,
    )


def _why_and_key(held: HeldRun) -> Hashable:
    assert held.plan
    return why_alone(held.job, held.plan), base_key(model_of(held.run), held.job, held.plan)


def share(
    runs: Sequence[HeldRun], say: Callable[[str], None], bank: BankHooks = NO_BANK
) -> list[tuple[Sharing, ...] | HeldRun]:
    """Runs that have something to train, grouped by their base where they can be; says what happens and why.

    Runs of one base may be divided among workers that train side by side.
    """
    groups: dict[Hashable, list[HeldRun]] = {}
    for held in runs:
        assert held.plan is not None
        why = why_alone(held.job, held.plan)
        if why:
            say(f"{held.run.run_id} trains by itself: {why}")
        key = held.run.run_id if why else base_key(model_of(held.run), held.job, held.plan)
        groups.setdefault(key, []).append(held)
    found: list[tuple[Sharing, ...] | HeldRun] = []
    for members in groups.values():
        if len(members) == 1:
            found += members
            continue
        division = divide(members, bank, _why_and_key)
        sharing = tuple(map(_sharing, division.workers))
        found.append(sharing)
        if len(sharing) > 1:
            say(division.text)
        for one in sharing:
            say(one.text)
    return found


def _sharing(members: Sequence[HeldRun]) -> Sharing:
    plans = [held.plan for held in members if held.plan]
    jobs = [_memory_of(held) for held in members]
    device = device_of(members[0].run.capability(), plans[0].nodes[0])
    known = [plan.nodes[0].memory_usable_bytes for plan in plans if plan.nodes[0].memory_usable_bytes is not None]
    places = num_places(jobs, device, min(known, default=None))
    largest = sorted(jobs, key=lambda job: -job.own_bytes)[:places]
    return Sharing(tuple(members), places, estimate_together(largest, device))


def num_places(jobs: Sequence[JobMemory], device: DeviceCapability, usable_bytes: float | None) -> int:
    """How many of the jobs, whichever, fit at a time; at least one, which was planned to fit alone."""
    largest = sorted(jobs, key=lambda job: -job.own_bytes)
    estimates = {count: estimate_together(largest[:count], device) for count in range(1, len(jobs) + 1)}
    needed = {count: needed_bytes(memory, device.kind) for count, memory in estimates.items()}
    return max((count for count, size in needed.items() if usable_bytes is None or size <= usable_bytes), default=1)


def _memory_of(held: HeldRun) -> JobMemory:
    from orchestrator.training.model.loading import load_data

    assert held.plan
    return memory_of(held.plan, load_data(held.run)[0].lengths.tolist())


def memory_of(plan: Plan, lengths: Sequence[int]) -> JobMemory:
    """What a job on samples of these lengths was planned to take."""
    part, longest = plan.nodes[0], sorted(lengths, reverse=True)
    limit = part.techniques.micro_batch_tokens
    tokens = min(limit, max(sum(longest[: plan.global_batch_size]), longest[0]))
    return JobMemory(part.memory, _TRAINED_BYTES * plan.num_trainable_parameters, tokens, limit)


def device_of(cluster: ClusterCapability, part: NodePlan) -> DeviceCapability:
    """The device of a part of a plan, among those that the plan was made for."""
    devices = [device for node in cluster.nodes if node.name == part.node for device in node.devices]
    alike = [device for device in devices if (device.name, device.uuid) == (part.device, part.uuid)]
    return (alike or [device for device in devices if device.kind == part.kind])[0]
