"""Workload + ClusterCapability + the job's wishes -> Plan.  Pure: no torch, no ray, no clock.

Every `auto` of the job file is resolved here, each with its reason.  `enumeration.py` finds what is possible, `goal.py`
chooses among it.
"""

from __future__ import annotations

import itertools
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any

from clusters.capability import ClusterCapability, NodeCapability
from orchestrator.errors import JobError, NothingFits
from orchestrator.job.spec import JobSpec
from orchestrator.planning.candidates import Candidate, Placed, Slot, Switches, limit_per_node
from orchestrator.planning.enumeration import Enumeration
from orchestrator.planning.evaluation import (
    HeldOutCounts,
    WholeJobs,
    resolve_evaluation,
    resolve_keep_best,
    resolve_save_steps,
)
from orchestrator.planning.explain import (
    alternatives,
    describe_larger_steps,
    describe_remedies,
    explain_absent_libraries,
    explain_choice,
    explain_excluded,
    explain_unusable,
    why_nothing_fits,
)
from orchestrator.planning.goal import choose_candidate, prior_of, too_long, what_decides
from orchestrator.planning.pipelines import why_no_stage, with_pipelines
from orchestrator.planning.plan import Alternative, Beside, NodePlan, Plan, Sync
from orchestrator.planning.price import price_of
from orchestrator.planning.refusals import (
    has_stated_workers,
    refuse_contradictions,
    refuse_slow_links,
    stated_workers,
)
from orchestrator.planning.remedies import PlanInputs
from orchestrator.planning.workload import grows_with_workers, max_positions, with_more_samples
from strategies.cost.phases import Phases
from strategies.cost.reuse import stores_reference
from strategies.cost.time import product_rate
from strategies.workload import BYTES_PER_ELEMENT, Workload

_LONGEST_AUTO = 2048
_MORE_SAMPLES = (2, 4, 8, 16)  # times those of a step, where a group waits for its network
_WAITS = 0.05  # of a step for the network: larger steps are looked at
_WORTH_LARGER_STEPS = 1.1  # so much faster, or larger steps are not worth a line


def resolve_workers(spec: JobSpec, node: NodeCapability, several: bool = False) -> tuple[int, str | None]:
    """How many training processes on one node, and why where it was open.

    Of several nodes each offers what it has: `cluster.num_workers` then counts those of all.
    """
    stated = spec.cluster.num_workers
    if spec.strategy.mode == "single":
        if isinstance(stated, int) and stated != 1:
            raise JobError(f"strategy.mode is single but cluster.num_workers is {stated}; set one of them to auto")
        return 1, "strategy.mode: single" if stated == "auto" else None
    if isinstance(stated, int) and not several:
        return stated, None
    if node.gpus:
        return len(node.gpus), f"one for each of {len(node.gpus)} GPUs"
    if spec.strategy.mode in ("ddp", "zero1", "zero2", "zero3") and not several:
        return 2, f"strategy.mode: {spec.strategy.mode} needs at least two"
    return 1, "two processes on one CPU compete for its cores"


def resolve_max_length(spec: JobSpec, config: dict[str, Any]) -> tuple[int, str | None]:
    """Longest sample in tokens, and why where it was open."""
    positions = max_positions(config)
    stated = spec.data.max_length
    if isinstance(stated, int):
        if positions and stated > positions:
            raise JobError(f"data.max_length is {stated}, but the model has {positions} positions; lower it")
        return stated, None
    if positions and positions <= _LONGEST_AUTO:
        return positions, f"the model has {positions} positions"
    return _LONGEST_AUTO, f"samples beyond {_LONGEST_AUTO} tokens cost most of the memory; raise it if yours are longer"


def slots_of(spec: JobSpec, cluster: ClusterCapability) -> list[Slot]:
    """The devices that may train at once; of a machine that gives fewer to training than it has, the fastest."""

    def rate(slot: Slot) -> float:
        return max(product_rate(slot.device, slot.node, dtype)[0] for dtype in BYTES_PER_ELEMENT)

    offered = offered_slots(spec, cluster)
    chosen = {id(slot) for slot in limit_per_node(sorted(offered, key=rate, reverse=True))}
    return [slot for slot in offered if id(slot) in chosen]


def offered_slots(spec: JobSpec, cluster: ClusterCapability) -> list[Slot]:
    """The devices that may train, without those of unknown memory: of a machine with GPUs each of them, of which as
    many are taken as workers are stated and as the machine gives.
    """
    free = min(1 - spec.strategy.memory_safety, spec.goal.max_memory_fraction or 1.0)
    slots: list[Slot] = []
    for node in cluster.nodes:
        count, _ = resolve_workers(spec, node, several=len(cluster.nodes) > 1)
        if node.num_slots is not None:
            count = min(count, node.num_slots)
        trains = (node.gpus if count else ()) if node.gpus else [node.cpu] * count
        together = max(1, min(count, len(trains)))
        threads = min(max(1, node.num_cores // together), spec.train.most_threads)
        for device in trains:
            if device is None or device.memory_bytes is None:
                continue
            usable = device.memory_bytes * free / (count if device.kind == "cpu" else 1)
            slots.append(Slot(node, device, usable, threads).as_part_of_cpu(together))
    return slots


def switches_of(spec: JobSpec, max_length: int) -> Switches:
    """The values of each switch: what the job states, or everything worth an estimate."""
    model, train, strategy = spec.model, spec.train, spec.strategy
    stated: dict[str, Any] = {
        "dtypes": model.dtype,
        "attentions": model.attn_implementation,
        "packings": spec.data.packing,
        "checkpointings": train.gradient_checkpointing,
        "losses": train.loss_type,
        "offloads": strategy.offload,
        "optims": train.optim,
    }
    values: dict[str, Any] = {name: (value,) for name, value in stated.items() if value != "auto"}
    if strategy.mode != "auto":
        values["zero_stages"] = ({"zero1": 1, "zero2": 2, "zero3": 3}.get(strategy.mode, 0),)
    elif strategy.local_steps:
        values["zero_stages"] = (0,)
    single: dict[str, Any] = {"share_prefixes": spec.data.share_prefixes}
    single |= {"rows": train.per_device_train_batch_size, "accumulation": train.gradient_accumulation_steps}
    single |= {"cache_frozen_activations": train.cache_frozen_activations}
    objective = spec.build_objective()
    if train.neftune_noise_alpha:  # a token has noise of its own in each row and each epoch
        values = {"share_prefixes": False, "cache_frozen_activations": False} | values
    if objective.is_by_document:
        values = {"offloads": ("none",), "zero_stages": (0, 1), "cache_frozen_activations": False} | values
    return Switches(
        max_length * objective.num_documents,
        torch_compile=train.torch_compile,
        liger_kernel=train.use_liger_kernel,
        local_merge=strategy.local_merge,
        deepspeed=strategy.deepspeed is not None,
        **values | {name: value for name, value in single.items() if value != "auto"},
    )


@dataclass(frozen=True)
class ChosenCandidate:
    """A candidate among all that were enumerated for a workload."""

    workload: Workload
    enumeration: Enumeration
    candidate: Candidate
    jobs: WholeJobs

    @property
    def phases(self) -> Phases:
        """Seconds of the whole job, by phase."""
        return self.jobs.phases(self.candidate)


def make_plan(
    spec: JobSpec,
    workload: Workload,
    cluster: ClusterCapability,
    max_length: int,
    held_out: HeldOutCounts | None,
    reasons: dict[str, str],
) -> Plan:
    """Resolve what is left open, beside what has `reasons` already.

    Raises NothingFits when nothing fits or keeps the goal, JobError for mistakes.
    """
    inputs = PlanInputs(spec, workload, cluster, max_length, held_out)
    enumeration, num_slots = _enumeration(inputs)
    choice = _choose(inputs, enumeration, num_slots)
    if choice is None:
        raise NothingFits(why_nothing_fits(inputs, enumeration, accepts))
    if too_slow := too_long(spec, choice.candidate, choice.phases):
        raise NothingFits("\n".join([too_slow, *describe_remedies(inputs, accepts)]))
    larger = _larger_steps(inputs, choice, num_slots)
    return _plan_of(spec, choice, held_out, reasons, (larger,) if larger else ())


def _enumeration(inputs: PlanInputs) -> tuple[Enumeration, int]:
    """What there is to look at, and on how many devices at once.  Raises NothingFits without any, JobError."""
    spec, cluster = inputs.spec, inputs.cluster
    slots, switches = offered_slots(spec, cluster), switches_of(spec, inputs.max_length)
    if not slots:
        unusable = [f"{device}: {why}" for device, why in explain_unusable(cluster).items()]
        first = "no machine has a device that could train; declare one with --hardware FILE"
        raise NothingFits("\n".join([first, *unusable]))
    refuse_contradictions(spec, inputs.workload, slots, switches)
    refuse_slow_links(spec, slots, cluster)
    stated = stated_workers(spec, num_slots := len(slots_of(spec, cluster)))
    return Enumeration(inputs.workload, slots, cluster, spec.methods(), switches, stated), num_slots


def accepts(inputs: PlanInputs) -> bool:
    """Whether a plan can be made that keeps the goal; where no time or price is limited, one row a pass decides."""
    try:
        enumeration, num_slots = _enumeration(inputs)
        if enumeration.switches.rows is None and {inputs.spec.goal.max_hours, inputs.spec.goal.max_cost} == {None}:
            enumeration = replace(enumeration, switches=replace(enumeration.switches, rows=1))
        choice = _choose(inputs, enumeration, num_slots)
        return choice is not None and too_long(inputs.spec, choice.candidate, choice.phases) is None
    except (JobError, NothingFits):
        return False


def _choose(
    inputs: PlanInputs, enumeration: Enumeration, num_slots: int, whole: bool = False
) -> ChosenCandidate | None:
    """The best candidate with as many workers as the job states, each `whole` or not; None where nothing fits."""
    spec, fitting = inputs.spec, enumeration.run().fitting
    fitting = fitting if whole else with_pipelines(spec, enumeration)
    enumeration.fitting = [found for found in fitting if has_stated_workers(spec, found, num_slots)]
    enumeration.other_groups = [found for found in fitting if not has_stated_workers(spec, found, num_slots)]
    if not enumeration.fitting:
        return None
    alone: dict[str, list[Placed]] = {}
    for found in enumeration.fitting:
        if len(found.placed) == 1:
            like = enumeration.slots_like(found.placed[0].slot)
            alone.setdefault(found.method.name, []).extend(replace(found.placed[0], slot=slot) for slot in like)
    jobs = WholeJobs(spec, enumeration.workload, inputs.held_out, alone)
    best = choose_candidate(spec, enumeration.fitting, jobs.phases)
    return ChosenCandidate(enumeration.workload, enumeration, best, jobs)


def _plan_of(
    spec: JobSpec,
    choice: ChosenCandidate,
    held_out: HeldOutCounts | None,
    reasons: dict[str, str],
    larger: tuple[Alternative, ...],
) -> Plan:
    """The plan that runs a candidate, with what the evaluation and the checkpoints leave open resolved."""
    workload, enumeration, chosen = choice.workload, choice.enumeration, choice.candidate
    first, prior = chosen.whole_plan, prior_of(spec, workload.shape.num_parameters, chosen.method)
    nodes = tuple(_node_plan_of(part) for part in sorted(chosen.placed, key=lambda part: -part.share))
    helper, decides = _helper(choice), what_decides(spec, enumeration.fitting)
    evaluation = resolve_evaluation(spec, workload, held_out, nodes)
    keep_best, why_best = resolve_keep_best(spec, workload, evaluation.eval_steps)
    save_steps, why_save = resolve_save_steps(spec, workload, chosen)
    phases = choice.phases
    options, why_options = _resolve_options(chosen)
    checkpoint = {"checkpoint.load_best_model_at_end": why_best, "checkpoint.save_steps": why_save}
    reasons = explain_choice(spec, chosen, enumeration.fitting, workload) | reasons | evaluation.reasons | why_options
    no_stage = why_no_stage(spec, enumeration, chosen)
    excluded = explain_excluded(chosen, enumeration, choice.jobs, helper and helper.node, no_stage)
    return Plan(
        method={"type": chosen.method.name, **asdict(chosen.method), **options},  # type: ignore[call-overload]
        nodes=nodes,
        sync=_sync_of(spec, chosen),
        sync_s=chosen.sync_s,
        step_s=chosen.step_s,
        tokens_per_s=chosen.tokens_per_s,
        phases=phases,
        price=price_of(spec, chosen, phases.total_s),
        calibration=chosen.placed[0].slot.device.calibration.get(first.techniques.dtype, 1.0),
        is_guess=chosen.is_guess,
        quality_prior=asdict(prior) if prior else None,
        num_trainable_parameters=first.num_trainable_parameters,
        flops_per_token=first.flops_per_token,
        checkpoint_bytes=first.checkpoint_bytes,
        global_batch_size=workload.global_batch_size,
        local_batch_size=workload.global_batch_size // steps if (steps := spec.strategy.local_steps) else None,
        num_steps=workload.num_steps,
        save_steps=save_steps,
        eval_steps=evaluation.eval_steps,
        load_best_model_at_end=keep_best,
        max_new_tokens=evaluation.max_new_tokens,
        metrics=evaluation.metrics,
        reasons=reasons | {key: why for key, why in checkpoint.items() if why},
        alternatives=alternatives(spec, chosen, enumeration.fitting, workload.shape.num_parameters, larger),
        rejected=enumeration.rejections.reasons,
        left_out=excluded | explain_unusable(enumeration.cluster),
        if_installed=explain_absent_libraries(enumeration, chosen),
        computed_part=first.computed_part,
        pipelines=tuple(pipeline.planned for pipeline in chosen.pipelines),
        beside=(Beside(helper.node, "measures", helper),) if helper else (),
        objective={"type": spec.objective.type, **asdict(spec.build_objective())},  # type: ignore[call-overload]
        stores_reference=stores_reference(workload, chosen.method.starts_as_base),
        notes=(*chosen.method.exports(workload.shape).warnings, *([decides] if decides else [])),
    )


def _resolve_options(chosen: Candidate) -> tuple[dict[str, Any], dict[str, str]]:
    """The method's own `auto` options: one value for all workers, the smallest that any of them needs; and why."""
    values, reasons = dict[str, Any](), dict[str, str]()
    for part in chosen.placed:
        for key, (value, reason) in part.plan.resolved.items():
            if key not in values or value < values[key]:
                values[key], reasons[f"method.{key}"] = value, reason
    return values, reasons


def _node_plan_of(part: Placed) -> NodePlan:
    slot, plan = part.slot, part.plan
    return NodePlan(
        node=slot.node.name,
        device=slot.device.name,
        torch_device=slot.device.torch_device,
        memory_usable_bytes=slot.memory_bytes,
        threads=slot.threads,
        techniques=plan.techniques,
        memory=plan.memory,
        time=plan.time,
        share=part.share,
        kind=slot.device.kind,
        uuid=slot.device.uuid,
        replica=part.replica,
    )


def _helper(choice: ChosenCandidate) -> NodePlan | None:
    """The fastest excluded node that could run the model: it evaluates the base model while the others train."""
    best = min(choice.jobs.helpers(choice.candidate), key=lambda part: part.plan.time.step_s, default=None)
    return replace(_node_plan_of(best), share=0.0) if best else None


def _sync_of(spec: JobSpec, candidate: Candidate) -> Sync:
    """How gradients travel; the seconds of each way are those a step would wait."""
    if candidate.network is None:
        return Sync()
    network, dtype = candidate.network, spec.strategy.sync_dtype
    sent = candidate.sent_bytes / BYTES_PER_ELEMENT["float32"] * BYTES_PER_ELEMENT[dtype]
    return Sync(dtype, network.bucket_bytes(sent), candidate.sync_options)


def _larger_steps(inputs: PlanInputs, choice: ChosenCandidate, num_slots: int) -> Alternative | None:
    """The chosen way with more samples a step, where steps wait for the network: fewer sums for the same samples.

    It is never chosen: fewer, larger updates make another model, and how large they are is not the machines' to say.
    The fewest samples that gain enough are offered; more never gain less, so that most sizes need no look.
    """
    train, enumeration, chosen = inputs.spec.train, choice.enumeration, choice.candidate
    is_open = train.global_batch_size == "auto" and not grows_with_workers(inputs.spec) and train.max_steps <= 0
    waits = any(found.sync_s > _WAITS * found.step_s for found in enumeration.fitting)
    if not is_open or not waits or inputs.spec.strategy.local_steps:
        return None
    larger = (with_more_samples(choice.workload, factor, train.num_train_epochs) for factor in _MORE_SAMPLES)
    workloads = list(itertools.takewhile(lambda workload: workload is not None, larger))
    same_way = _same_way(inputs.spec, choice)

    @cache
    def wider(index: int) -> ChosenCandidate | None:
        try:
            found = _choose(inputs, replace(same_way, workload=workloads[index]), num_slots, whole=True)
        except NothingFits:  # steps rounded up may break a limit that is just kept
            return None
        return found if found and len(found.candidate.placed) > 1 else None

    best, first = choice, 0
    while first < len(workloads) and _is_faster(wider(len(workloads) - 1), best):
        last = len(workloads) - 1
        while first < last:
            middle = (first + last) // 2
            first, last = (first, middle) if _is_faster(wider(middle), best) else (middle + 1, last)
        best, first = wider(first) or best, first + 1
    return None if best is choice else describe_larger_steps(chosen, best.candidate, best.workload)


def _same_way(spec: JobSpec, choice: ChosenCandidate) -> Enumeration:
    """The chosen method and division, with the settings that are the fastest of some group."""
    enumeration, chosen = choice.enumeration, choice.candidate
    fastest: dict[tuple[int, ...], Candidate] = {}
    for found in sorted(enumeration.fitting, key=lambda found: found.step_s):
        if (found.method.name, found.zero_stage) == (chosen.method.name, chosen.zero_stage):
            fastest.setdefault(tuple(id(part.slot) for part in found.placed), found)
    used = [part.plan.techniques for found in (chosen, *fastest.values()) for part in found.placed]
    optims, stages = (used[0].optim,), (chosen.zero_stage,)
    switches = replace(enumeration.switches.used_by(used), optims=optims, zero_stages=stages)
    looks_lean = spec.goal.prefer == "memory"
    return replace(enumeration, methods=[chosen.method], switches=switches, looks_lean=looks_lean)


def _is_faster(choice: ChosenCandidate | None, than: ChosenCandidate) -> bool:
    return choice is not None and choice.candidate.total_s < than.candidate.total_s / _WORTH_LARGER_STEPS
