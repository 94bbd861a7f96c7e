"""Workload + ClusterCapability + the job's wishes -> Plan.  Pure: no torch, no ray, no clock.

Every `auto` of the job file is resolved here, each with its reason.  `candidates.py` lists what is possible and what it
costs; here the job's goal chooses among it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

from clusters.capability import ClusterCapability, NodeCapability
from clusters.units import format_bytes, format_s
from orchestrator.data.order import Order
from orchestrator.errors import JobError, NothingFits
from orchestrator.job.model_check import check_targets
from orchestrator.job.spec import JobSpec
from orchestrator.planning.candidates import Candidate, Slot, Switches, Tried, at_once, enumerate_candidates
from orchestrator.planning.evaluation import HeldOut, eval_steps, explain_generation, max_new_tokens, metrics
from orchestrator.planning.explain import alternatives, explain_choice, left_out, unusable, why_nothing_fits
from orchestrator.planning.plan import NodePlan, Plan, Sync
from orchestrator.planning.price import price_of
from orchestrator.planning.workload import grows_with_workers, max_positions
from strategies.compatibility import conflict, refuses_local_steps
from strategies.contract import BYTES_PER_ELEMENT, Dtype, Techniques, Workload
from strategies.cost.time import product_rate
from strategies.model.targets import architecture_of_shape
from strategies.techniques.sharding import refused_keys

_LONGEST_AUTO = 2048
_ABOUT_AS_FAST = 1.15
_MORE_SAMPLES = (2, 4, 8, 16)  # times those of a step, where a group waits for its network
_WAITS = 0.05  # of a step for the others is worth a thought
_WORTH_LARGER_STEPS = 1.1  # so much faster, or the smaller steps stay
_LEAST_STEPS_PER_EPOCH = 8


def resolve_workers(spec: JobSpec, node: NodeCapability, several: bool = False) -> tuple[int, str | None]:
    """How many training processes on one node, and why where it was open.

    Of several nodes each offers what it has: `cluster.num_workers` then counts those of all.
    """
    asked = spec.cluster.num_workers
    if spec.strategy.mode == "single":
        if isinstance(asked, int) and asked != 1:
            raise JobError(f"strategy.mode is single but cluster.num_workers is {asked}; set one of them to auto")
        return 1, "strategy.mode: single" if asked == "auto" else None
    if isinstance(asked, int) and not several:
        return asked, None
    if node.gpus:
        return len(node.gpus), f"one for each of {len(node.gpus)} GPUs"
    if spec.strategy.mode in ("ddp", "zero1", "zero2", "zero3") and not several:
        return 2, f"strategy.mode: {spec.strategy.mode} needs at least two"
    return 1, "two processes on one CPU fight over its cores"


def resolve_max_length(spec: JobSpec, config: dict[str, Any]) -> tuple[int, str | None]:
    """Longest sample in tokens, and why where it was open."""
    positions = max_positions(config)
    asked = spec.data.max_length
    if isinstance(asked, int):
        if positions and asked > positions:
            raise JobError(f"data.max_length is {asked}, but the model has {positions} positions; lower it")
        return asked, None
    if positions and positions <= _LONGEST_AUTO:
        return positions, f"the model has {positions} positions"
    return _LONGEST_AUTO, f"samples beyond {_LONGEST_AUTO} tokens cost most of the memory; raise it if yours are longer"


def slots_of(spec: JobSpec, cluster: ClusterCapability) -> list[Slot]:
    """The devices that may train at once; of a machine that gives fewer to training than it has, the fastest."""

    def rate(slot: Slot) -> float:
        return max(product_rate(slot.device, slot.node, dtype)[0] for dtype in BYTES_PER_ELEMENT)

    offered = offered_slots(spec, cluster)
    chosen = {id(slot) for slot in at_once(sorted(offered, key=rate, reverse=True))}
    return [slot for slot in offered if id(slot) in chosen]


def offered_slots(spec: JobSpec, cluster: ClusterCapability) -> list[Slot]:
    """The devices that may train: of a machine with GPUs each of them, of which as many are taken as workers are asked
    and as the machine gives.

    A device of unknown memory is none of them.
    """
    free = min(1 - spec.strategy.memory_safety, spec.goal.max_memory_fraction or 1.0)
    slots: list[Slot] = []
    for node in cluster.nodes:
        count, _ = resolve_workers(spec, node, several=len(cluster.nodes) > 1)
        if node.num_slots is not None:
            count = min(count, node.num_slots)
        trains = (node.gpus if count else ()) if node.gpus else [node.cpu] * count
        together = max(1, min(count, len(trains)))
        for device in trains:
            if device is None or device.memory_bytes is None:
                continue
            room = device.memory_bytes * free / (count if device.kind == "cpu" else 1)
            slots.append(Slot(node, device, room, max(1, node.num_cores // together)))
    return slots


def switches_of(spec: JobSpec, max_length: int) -> Switches:
    """What each switch may be: the job's word, or everything worth a look."""
    model, train, strategy = spec.model, spec.train, spec.strategy
    modes = {"zero1": 1, "zero2": 2, "zero3": 3}
    stages: Sequence[int] = (0,) if strategy.local_steps else (0, 1, 2, 3)
    if strategy.mode != "auto":
        stages = (modes.get(strategy.mode, 0),)
    offloads: Sequence[Any] = ("none", "activations", "optimizer", "parameters")
    if strategy.offload != "auto":
        offloads = (strategy.offload,)
    dtypes: Sequence[Dtype] = ("bfloat16", "float16", "float32") if model.dtype == "auto" else (model.dtype,)
    attentions: Sequence[str] = ("document", "flash_attention_2", "sdpa", "eager")
    if model.attn_implementation != "auto":
        attentions = (model.attn_implementation,)
    optims: Sequence[str] = ("adamw_torch_fused", "adamw_bnb_8bit") if train.optim == "auto" else (train.optim,)
    checkpointing, rows, steps = (
        train.gradient_checkpointing,
        train.per_device_train_batch_size,
        train.gradient_accumulation_steps,
    )
    return Switches(
        dtypes=dtypes,
        attentions=attentions,
        packings=(True, False) if spec.data.packing == "auto" else (spec.data.packing,),
        checkpointings=(False, True) if checkpointing == "auto" else (checkpointing,),
        losses=("nll", "chunked_nll") if train.loss_type == "auto" else (train.loss_type,),
        offloads=offloads,
        optims=optims,
        rows=rows if isinstance(rows, int) else None,
        accumulation=steps if isinstance(steps, int) else None,
        zero_stages=stages,
        torch_compile=train.torch_compile,
        max_length=max_length,
        deepspeed=spec.strategy.deepspeed is not None,
    )


def make_plan(
    spec: JobSpec,
    workload: Workload,
    cluster: ClusterCapability,
    max_length: int,
    held_out: HeldOut | None,
    reasons: dict[str, str],
) -> Plan:
    """Resolve what is left open.  Raises NothingFits when nothing fits or keeps the goal, JobError for mistakes."""
    reasons = dict(reasons)
    slots, num_slots = offered_slots(spec, cluster), len(slots_of(spec, cluster))
    if not slots:
        lines = ["no machine has a device that could train; declare one with --hardware FILE"]
        raise NothingFits("\n".join([*lines, *(f"{device}: {why}" for device, why in unusable(cluster).items())]))
    switches = switches_of(spec, max_length)
    _refuse_contradictions(spec, workload, slots, switches)
    methods = spec.methods()

    def plans(work: Workload) -> tuple[Tried, Candidate | None]:
        tried = enumerate_candidates(work, slots, cluster, methods, switches)
        tried.other_groups = [found for found in tried.fitting if not _as_asked(spec, found, num_slots)]
        tried.fitting = [found for found in tried.fitting if _as_asked(spec, found, num_slots)]
        return tried, _choose(spec, tried.fitting) if tried.fitting else None

    tried, chosen = plans(workload)
    if chosen is None:
        raise NothingFits(why_nothing_fits(spec, workload, slots, tried, cluster, methods, switches))
    if any(found.sync_s > _WAITS * found.step_s for found in tried.fitting):
        larger, better, tried_larger = _larger_steps(spec, workload, plans, chosen)
        if better is not None and tried_larger is not None:
            reasons["train.global_batch_size"] = (
                f"{larger.global_batch_size} instead of {workload.global_batch_size} samples a step: fewer sums over"
                f" the network, {format_s(better.total_s)} instead of {format_s(chosen.total_s)}"
            )
            workload, chosen, tried = larger, better, tried_larger
    explain_choice(spec, workload, chosen, tried, reasons)
    first = chosen.placed[0].plan
    helper = _helper(spec, chosen, tried, held_out)
    when = eval_steps(spec, workload, held_out, reasons)
    if held_out is None:
        for key in ("eval.eval_steps", "eval.max_new_tokens", "eval.metrics"):
            reasons[key] = "there are no held-out rows"
    keep_best = _keep_best(spec, workload, when, reasons)
    save_steps = spec.checkpoint.save_steps
    if save_steps == "auto":
        save_steps = max(1, math.ceil(workload.num_steps / 5))
        reasons["checkpoint.save_steps"] = f"five checkpoints of {format_bytes(first.checkpoint_bytes)} over the run"
    prior = chosen.method.quality_prior()
    nodes = tuple(_node_plan_of(part) for part in sorted(chosen.placed, key=lambda part: -part.share))
    new_tokens, scores = max_new_tokens(spec, held_out, reasons), metrics(spec, held_out, reasons)
    if scores:
        explain_generation(nodes, workload, new_tokens, reasons)
    return Plan(
        method={"type": chosen.method.name, **asdict(chosen.method), **_resolved(chosen, reasons)},  # type: ignore[call-overload]
        nodes=nodes,
        sync=_sync_of(spec, chosen),
        sync_s=chosen.sync_s,
        step_s=chosen.step_s,
        tokens_per_s=chosen.tokens_per_s,
        price=price_of(spec, chosen),
        calibration=chosen.placed[0].slot.device.calibration.get(first.techniques.dtype, 1.0),
        is_guess=chosen.is_guess,
        quality_prior=asdict(prior) if prior else None,
        num_trainable_parameters=first.num_trainable_parameters,
        flops_per_token=first.flops_per_token,
        checkpoint_bytes=first.checkpoint_bytes,
        global_batch_size=workload.global_batch_size,
        local_batch_size=_local_batch_size(spec, workload),
        num_steps=workload.num_steps,
        save_steps=save_steps,
        eval_steps=when,
        load_best_model_at_end=keep_best,
        max_new_tokens=new_tokens,
        metrics=scores,
        reasons=reasons,
        alternatives=alternatives(spec, chosen, tried.fitting),
        rejected=tried.rejected,
        left_out=left_out(chosen, tried, slots, helper.node if helper else None) | unusable(cluster),
        helper=helper,
    )


def _resolved(chosen: Candidate, reasons: dict[str, str]) -> dict[str, Any]:
    """The method's own `auto` knobs: one value for all workers, the smallest that any of them asks for."""
    values: dict[str, Any] = {}
    for part in chosen.placed:
        for key, (value, reason) in part.plan.resolved.items():
            if key not in values or value < values[key]:
                values[key], reasons[f"method.{key}"] = value, reason
    return values


def _node_plan_of(part: Any) -> NodePlan:
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
    )


def _helper(spec: JobSpec, chosen: Candidate, tried: Tried, held_out: HeldOut | None) -> NodePlan | None:
    """The fastest node that is left out and could run the model: it measures it untuned while the others train."""
    if held_out is None or not spec.eval.before or spec.cluster.address == "local":
        return None
    taking_part = {node.name for node in chosen.nodes}
    free = [
        found.placed[0]
        for found in tried.fitting
        if len(found.placed) == 1
        and found.method.name == chosen.method.name
        and found.placed[0].slot.node.name not in taking_part
    ]
    if not free:
        return None
    return replace(_node_plan_of(min(free, key=lambda part: part.plan.time.step_s)), share=0.0)


def _as_asked(spec: JobSpec, candidate: Candidate, num_slots: int) -> bool:
    """Whether a candidate has as many workers as the job states."""
    asked, mode = spec.cluster.num_workers, spec.strategy.mode
    if isinstance(asked, int):
        return len(candidate.placed) == min(asked, num_slots)
    return len(candidate.placed) == num_slots if mode == "ddp" else mode != "single" or len(candidate.placed) == 1


def _sync_of(spec: JobSpec, candidate: Candidate) -> Sync:
    """How gradients travel; the seconds of each way are those a step would wait."""
    if candidate.network is None:
        return Sync()
    network, dtype = candidate.network, spec.strategy.sync_dtype
    sent = candidate.sent_bytes / BYTES_PER_ELEMENT["float32"] * BYTES_PER_ELEMENT[dtype]
    return Sync(dtype, network.bucket_bytes(sent), candidate.sync_options)


def _local_batch_size(spec: JobSpec, workload: Workload) -> int | None:
    steps = spec.strategy.local_steps
    return workload.global_batch_size // steps if steps else None


def _larger_steps(
    spec: JobSpec, workload: Workload, plans: Callable[[Workload], tuple[Tried, Candidate | None]], first: Candidate
) -> tuple[Workload, Candidate | None, Tried | None]:
    """More samples a step where a group would otherwise wait for its network: fewer sums for the same samples."""
    best: tuple[Workload, Candidate | None, Tried | None] = (workload, None, None)
    best_s = first.total_s
    is_stated = spec.train.global_batch_size != "auto" or grows_with_workers(spec)
    if is_stated or spec.train.max_steps > 0 or spec.strategy.local_steps:
        return best
    for factor in _MORE_SAMPLES:
        size = factor * workload.global_batch_size
        order = Order(workload.num_samples, size, 0, spec.train.num_train_epochs)
        if order.steps_per_epoch < _LEAST_STEPS_PER_EPOCH:
            break
        larger = replace(
            workload,
            global_batch_size=size,
            num_steps=order.num_steps,
            fullest_step_tokens=factor * workload.fullest_step_tokens if workload.fullest_step_tokens else None,
        )
        tried, chosen = plans(larger)
        if chosen and len(chosen.placed) > 1 and chosen.total_s < best_s / _WORTH_LARGER_STEPS:
            best, best_s = (larger, chosen, tried), chosen.total_s
    return best


def _refuse_contradictions(spec: JobSpec, workload: Workload, slots: Sequence[Slot], switches: Switches) -> None:
    """What the job states must hold together on at least one device, whatever the rest is."""
    strategy = spec.strategy
    if decided := refused_keys(strategy.deepspeed or {}):
        raise JobError(
            [f"strategy.deepspeed.{key}: the plan decides it; say it by {where}" for key, where in decided.items()]
        )
    if strategy.mode.startswith("zero") and (len(at_once(slots)) < 2 or spec.cluster.num_workers == 1):
        raise JobError(
            f"strategy.mode: {strategy.mode} divides among devices, and here is one worker; set it to auto, or"
            " cluster.num_workers to at least 2"
        )
    if strategy.local_steps and strategy.mode.startswith("zero"):
        raise JobError("strategy.local_steps: workers that train apart hold everything; set strategy.mode to ddp")
    attention, packing, compiled = spec.model.attn_implementation, spec.data.packing, spec.train.torch_compile
    if attention == "document" and packing is False:
        raise JobError("model.attn_implementation: document needs data.packing: true")
    if compiled and packing is True and attention in ("auto", "document"):
        raise JobError(
            "train.torch_compile would compile anew for every set of document lengths; set data.packing: false"
        )
    if attention.startswith("flash") and spec.model.dtype == "float32":
        raise JobError(f"model.attn_implementation: {attention} computes in 16 bits; set model.dtype to auto")
    if all(slot.device.kind == "cpu" for slot in slots):
        if attention.startswith("flash") or attention == "flex_attention":
            raise JobError(f"model.attn_implementation: {attention} needs a GPU; set it to auto")
        if spec.strategy.offload not in ("auto", "none"):
            raise JobError("strategy.offload: a CPU's memory is the host's already; set it to auto")
    check_targets(spec.methods(), architecture_of_shape(workload.shape))
    method = spec.methods()[0]
    if spec.goal.full_rank and not method.full_rank:
        raise JobError(
            f"goal.full_rank: {method.name} changes weights by a low rank only; set method.type to full or auto"
        )
    if strategy.local_steps and (reason := refuses_local_steps(method)):
        raise JobError(f"method.type: {reason}")
    _refuse_what_never_goes_together(spec, workload, slots, switches)


def _refuse_what_never_goes_together(
    spec: JobSpec, workload: Workload, slots: Sequence[Slot], switches: Switches
) -> None:
    """Raises JobError where the method and the switches that the job states can be on none of the devices."""
    attention, packing = spec.model.attn_implementation, spec.data.packing
    stated: dict[str, Any] = {
        "attn_implementation": attention if attention != "auto" else "sdpa",
        "optim": spec.train.optim if spec.train.optim != "auto" else "adamw_torch_fused",
        "loss_type": spec.train.loss_type if spec.train.loss_type != "auto" else "nll",
        "packing": packing if packing != "auto" else attention == "document",
        "gradient_checkpointing": spec.train.gradient_checkpointing is True,
        "offload": spec.strategy.offload if spec.strategy.offload != "auto" else "none",
    }
    devices = {slot.kind: slot.device for slot in slots}.values()
    reasons = []
    for method, device, dtype, stage in itertools.product(
        spec.methods(), devices, switches.dtypes, switches.zero_stages
    ):
        by_memory = stage == 1 and not switches.deepspeed
        techniques = Techniques(
            dtype,
            per_device_train_batch_size=1,
            max_length=8,
            zero_stage=stage,
            state_share=0.5 if by_memory else None,
            **stated,
        )
        for count in (2,) if stage else (1, 2):
            reasons.append(conflict(method, techniques, device, workload.shape, count))
    if reasons and all(reasons):
        raise JobError(f"the job's settings do not go together: {max(reasons, key=reasons.count)}")


def _keep_best(spec: JobSpec, workload: Workload, when: int | None, reasons: dict[str, str]) -> bool:
    keep_best = spec.checkpoint.load_best_model_at_end
    if spec.eval.early_stopping_patience and when is None:
        raise JobError("eval.early_stopping_patience needs data.eval and eval.eval_steps; add them or remove it")
    if keep_best == "auto":
        keep_best = when is not None and when < workload.num_steps
        why = "held-out loss is measured during training" if keep_best else "held-out loss is measured at the end only"
        reasons["checkpoint.load_best_model_at_end"] = why
    elif keep_best and when is None:
        raise JobError(
            "checkpoint.load_best_model_at_end needs data.eval and eval.eval_steps; add them or set it to false"
        )
    return keep_best


def _choose(spec: JobSpec, fitting: Sequence[Candidate]) -> Candidate:
    """The best by the goal among those that keep it.  Raises NothingFits saying which limit is in the way."""
    goal = spec.goal
    kept = list(fitting)
    limits = (
        ("goal.max_hours", goal.max_hours, lambda c: c.total_s / 3600, "takes {:.2g} h", True),
        ("goal.max_cost", goal.max_cost, lambda c: price_of(spec, c).total, "costs {:.2f}", True),
        ("goal.min_quality", goal.min_quality, lambda c: c.quality, "promises {:.3f}", False),
    )
    for key, limit, measure, phrase, at_most in limits:
        if limit is None:
            continue
        known = [(measure(candidate), candidate) for candidate in kept]
        passing = [c for value, c in known if value is not None and (value <= limit if at_most else value >= limit)]
        if not passing:
            values = [value for value, _ in known if value is not None]
            if not values:
                raise JobError(f"{key}: cannot be kept, because no machine's price or power is known; state it in cost")
            best = min(values) if at_most else max(values)
            raise NothingFits(
                f"{key} is {limit:g}, and the best that fits {phrase.format(best)}. Raise the limit, lower"
                " train.num_train_epochs or data.max_length, choose a smaller model, or add a device"
                if at_most
                else f"{key} is {limit:g}, and the best that fits {phrase.format(best)} (a prior from published runs)."
                " Lower it, or use a larger model and measure"
            )
        kept = passing
    keys = {
        "time": lambda c: (c.total_s, c.peak_bytes),
        "memory": lambda c: (c.memory_fraction, c.total_s),
        "cost": lambda c: (_cost_or_time(spec, c), c.total_s),
        "quality": lambda c: (-(c.quality or 0.0), c.total_s),
    }
    best = min(kept, key=keys[goal.prefer])
    if goal.prefer != "time":
        return best
    # A model's error in time is larger than this: of ways about as fast, the one that promises more; then the plain
    # one, whose shares may be uneven and whose steps may be repeated, before one that is divided.
    about = [candidate for candidate in kept if candidate.total_s <= _ABOUT_AS_FAST * best.total_s]
    return min(about, key=lambda c: (-(c.quality or 0.0), c.zero_stage, c.total_s, c.peak_bytes))


def _cost_or_time(spec: JobSpec, candidate: Candidate) -> float:
    total = price_of(spec, candidate).total
    return candidate.total_s / 3600 if total is None else total
