"""Workload + ClusterCapability + the job's wishes -> Plan.  Pure: no torch, no ray, no clock.

Every `auto` of the job file is resolved here, each with its reason.  `candidates.py` lists what is possible and what it
costs; here the job's goal chooses among it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from clusters.capability import ClusterCapability, NodeCapability
from clusters.units import format_bytes, format_s
from orchestrator.candidates import Candidate, Slot, Switches, Tried, enumerate_candidates, pareto
from orchestrator.errors import JobError, NothingFits
from orchestrator.evaluating import HeldOut, eval_steps, max_new_tokens, metrics
from orchestrator.money import Price, price_of
from orchestrator.spec import JobSpec
from strategies import METHODS
from strategies.contract import Dtype, MemoryEstimate, Method, Techniques, TimeEstimate, Workload
from strategies.rules import conflict

VERSION = 2
_LONGEST_AUTO = 2048
_ABOUT_AS_FAST = 1.15
_RUN_BY_SUBMIT = (0,)  # ZeRO stages
_OFFLOADS_RUN_BY_SUBMIT = ("none", "activations")


@dataclass(frozen=True)
class NodePlan:
    """What one device of one node does, and what that is predicted to cost."""

    node: str
    device: str  # its name
    torch_device: str  # "cpu" or "cuda"
    memory_usable_bytes: float | None
    threads: int
    techniques: Techniques
    memory: MemoryEstimate
    time: TimeEstimate
    share: float  # of each step's samples


@dataclass(frozen=True)
class Alternative:
    """Another way the planner looked at: what it would cost, and why it was not taken."""

    what: str
    total_s: float
    peak_bytes: float
    quality: float | None
    why_not: str
    on_front: bool  # nothing beats it in time, memory and expected quality at once


@dataclass(frozen=True)
class Plan:
    """How a job will run: nothing in it is `auto`.  Written to plan.json; its hash goes into every checkpoint."""

    method: dict[str, Any]  # {"type": name, knob: value ...}
    nodes: tuple[NodePlan, ...]  # one for each device that trains, the fastest first
    sync_s: float  # of each step, waiting for the network
    step_s: float
    tokens_per_s: float
    price: Price
    calibration: float  # what earlier runs on the first device multiplied the predicted times by
    is_guess: bool  # a figure of a machine was unknown and a typical one stood in
    quality_prior: dict[str, Any] | None
    num_trainable_parameters: int
    flops_per_token: float
    checkpoint_bytes: float
    global_batch_size: int  # samples
    num_steps: int
    save_steps: int
    eval_steps: int | None
    load_best_model_at_end: bool
    max_new_tokens: int
    metrics: tuple[str, ...]
    reasons: dict[str, str]  # key of the job file -> why it was resolved so
    alternatives: tuple[Alternative, ...] = ()
    rejected: dict[str, str] = field(default_factory=dict)  # combination -> why it cannot be
    version: int = VERSION

    @property
    def techniques(self) -> Techniques:
        """Those of the first device; the only ones where all devices are alike."""
        return self.nodes[0].techniques

    @property
    def memory(self) -> MemoryEstimate:
        return self.nodes[0].memory

    @property
    def device(self) -> str:
        return self.nodes[0].torch_device

    @property
    def num_workers(self) -> int:
        return len(self.nodes)

    @property
    def threads_per_worker(self) -> int:
        return self.nodes[0].threads

    @property
    def optim(self) -> str:
        return self.techniques.optim

    @property
    def total_s(self) -> float:
        """Of the training itself, without start and evaluation."""
        return self.step_s * self.num_steps

    def build_method(self) -> Method:
        """The method's dataclass with the knobs of this plan."""
        return METHODS[self.method["type"]](**{key: value for key, value in self.method.items() if key != "type"})

    @property
    def hash(self) -> str:
        """What decides the numbers of a run: two plans with one hash give bit-equal losses on one machine."""
        deciding = {
            "version": self.version,
            "method": self.method,
            "nodes": [
                (part.node, part.device, part.share, part.threads, asdict(part.techniques)) for part in self.nodes
            ],
            "steps": (self.global_batch_size, self.num_steps, self.eval_steps, self.load_best_model_at_end),
        }
        return hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()[:16]

    def to_json(self) -> str:
        return json.dumps({**asdict(self), "total_s": self.total_s, "hash": self.hash}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read plan.json.  Raises JobError when another version wrote it."""
        values = json.loads(text)
        for derived in ("hash", "total_s"):
            values.pop(derived, None)
        if values.get("version") != VERSION:
            raise JobError(
                f"plan.json has version {values.get('version')}, this program writes {VERSION}; submit the job anew"
            )
        values["nodes"] = tuple(_node_plan(part) for part in values["nodes"])
        values["price"] = Price(**values["price"])
        values["metrics"] = tuple(values["metrics"])
        values["alternatives"] = tuple(Alternative(**entry) for entry in values["alternatives"])
        return cls(**values)


def _node_plan(values: Mapping[str, Any]) -> NodePlan:
    typed = {
        "techniques": Techniques(**values["techniques"]),
        "memory": MemoryEstimate(**values["memory"]),
        "time": TimeEstimate(**values["time"]),
    }
    return NodePlan(**{**values, **typed})


def resolve_workers(spec: JobSpec, node: NodeCapability) -> tuple[int, str | None]:
    """How many training processes on one node, and why where it was open."""
    asked = spec.cluster.num_workers
    if spec.strategy.mode == "single":
        if isinstance(asked, int) and asked != 1:
            raise JobError(f"strategy.mode is single but cluster.num_workers is {asked}; set one of them to auto")
        return 1, "strategy.mode: single" if asked == "auto" else None
    if isinstance(asked, int):
        return asked, None
    if node.gpus:
        return len(node.gpus), f"one for each of {len(node.gpus)} GPUs"
    if spec.strategy.mode == "ddp":
        return 2, "strategy.mode: ddp needs at least two"
    return 1, "two processes on one CPU fight over its cores"


def resolve_max_length(spec: JobSpec, config: dict[str, Any]) -> tuple[int, str | None]:
    """Longest sample in tokens, and why where it was open."""
    positions = config.get("max_position_embeddings") or config.get("n_positions")
    asked = spec.data.max_length
    if isinstance(asked, int):
        if positions and asked > positions:
            raise JobError(f"data.max_length is {asked}, but the model has {positions} positions; lower it")
        return asked, None
    if positions and positions <= _LONGEST_AUTO:
        return positions, f"the model has {positions} positions"
    return _LONGEST_AUTO, f"samples beyond {_LONGEST_AUTO} tokens cost most of the memory; raise it if yours are longer"


def slots_of(spec: JobSpec, cluster: ClusterCapability) -> list[Slot]:
    """The devices that may train.  A single node obeys `cluster.num_workers`; of several, every device is offered."""
    free = min(1 - spec.strategy.memory_safety, spec.goal.max_memory_fraction or 1.0)
    slots: list[Slot] = []
    for node in cluster.nodes:
        count, _ = resolve_workers(spec, node)
        trains = [*node.gpus[:count]] if node.gpus else [node.cpu] * count
        for device in trains:
            if device is None:
                continue
            shared_by = count if device.kind == "cpu" else 1
            room = math.inf if device.memory_bytes is None else device.memory_bytes * free / shared_by
            slots.append(Slot(node, device, room, max(1, node.num_cores // len(trains))))
    return slots


def switches_of(spec: JobSpec, max_length: int, runnable_only: bool) -> Switches:
    """What each switch may be: the job's word, or everything worth a look."""
    model, train, strategy = spec.model, spec.train, spec.strategy
    modes = {"zero1": 1, "zero2": 2, "zero3": 3}
    stages: Sequence[int] = (0, 2, 3)
    if strategy.mode != "auto":
        stages = (modes.get(strategy.mode, 0),)
    offloads: Sequence[Any] = ("none", "activations", "optimizer", "parameters")
    if strategy.offload != "auto":
        offloads = (strategy.offload,)
    if runnable_only:
        if strategy.mode in modes or strategy.offload not in ("auto", *_OFFLOADS_RUN_BY_SUBMIT):
            key, value = ("mode", strategy.mode) if strategy.mode in modes else ("offload", strategy.offload)
            raise JobError(
                f"strategy.{key}: {value} can be planned (`orchestrator plan --hardware FILE`) but not run by this"
                " version; set it to auto"
            )
        stages = _RUN_BY_SUBMIT
        offloads = [what for what in offloads if what in _OFFLOADS_RUN_BY_SUBMIT]
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
    )


def make_plan(
    spec: JobSpec,
    workload: Workload,
    cluster: ClusterCapability,
    max_length: int,
    held_out: HeldOut | None,
    reasons: dict[str, str],
    runnable_only: bool = True,
) -> Plan:
    """Resolve what is left open.  Raises NothingFits when nothing fits or keeps the goal, JobError for mistakes."""
    reasons = dict(reasons)
    slots = slots_of(spec, cluster)
    if not slots:
        raise NothingFits("no machine has a device that could train; declare one with --hardware FILE")
    switches = switches_of(spec, max_length, runnable_only)
    _refuse_contradictions(spec, workload, slots, switches)
    methods = spec.methods()
    tried = enumerate_candidates(workload, slots, cluster, methods, switches)
    if runnable_only:
        tried.fitting = [found for found in tried.fitting if _runs(found, slots)]
    if not tried.fitting:
        raise NothingFits(_why_nothing_fits(spec, workload, slots, tried, cluster, methods, switches))
    chosen = _choose(spec, tried.fitting)
    _explain_choice(spec, workload, chosen, tried, reasons)
    first = chosen.placed[0].plan
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
    return Plan(
        method={"type": chosen.method.name, **asdict(chosen.method)},  # type: ignore[call-overload]
        nodes=tuple(_node_plan_of(part) for part in sorted(chosen.placed, key=lambda part: -part.share)),
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
        num_steps=workload.num_steps,
        save_steps=save_steps,
        eval_steps=when,
        load_best_model_at_end=keep_best,
        max_new_tokens=max_new_tokens(spec, held_out, reasons),
        metrics=metrics(spec, held_out, reasons),
        reasons=reasons,
        alternatives=_alternatives(spec, chosen, tried.fitting),
        rejected=tried.rejected,
    )


def _node_plan_of(part: Any) -> NodePlan:
    slot, plan = part.slot, part.plan
    return NodePlan(
        node=slot.node.name,
        device=slot.device.name,
        torch_device=slot.device.torch_device,
        memory_usable_bytes=None if math.isinf(slot.memory_bytes) else slot.memory_bytes,
        threads=slot.threads,
        techniques=plan.techniques,
        memory=plan.memory,
        time=plan.time,
        share=part.share,
    )


def _runs(candidate: Candidate, slots: Sequence[Slot]) -> bool:
    """Whether `submit` can do it in this version: all slots it was given, each with the same settings."""
    alike = len({(part.plan.techniques, part.slot.device.kind) for part in candidate.placed}) == 1
    return len(candidate.placed) == len(slots) and alike


def _refuse_contradictions(spec: JobSpec, workload: Workload, slots: Sequence[Slot], switches: Switches) -> None:
    """What the job states must hold together on at least one device, whatever the rest is."""
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
    method = spec.methods()[0]
    stated = {
        "attn_implementation": attention if attention != "auto" else "sdpa",
        "dtype": spec.model.dtype if spec.model.dtype != "auto" else "bfloat16",
        "optim": spec.train.optim if spec.train.optim != "auto" else "adamw_torch_fused",
        "loss_type": spec.train.loss_type if spec.train.loss_type != "auto" else "nll",
        "packing": packing if packing != "auto" else attention == "document",
        "gradient_checkpointing": spec.train.gradient_checkpointing is True,
        "offload": spec.strategy.offload if spec.strategy.offload != "auto" else "none",
        "zero_stage": min(switches.zero_stages),
    }
    techniques = Techniques(per_device_train_batch_size=1, max_length=8, **stated)  # type: ignore[arg-type]
    if spec.model.dtype == "auto":  # bf16 may be what is in the way, and nobody asked for it
        return
    reasons = [conflict(method, techniques, slot.device, workload.shape, max(2, len(slots))) for slot in slots]
    if reasons and all(reasons):
        raise JobError(f"the job's settings do not go together: {reasons[0]}")


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
    # A model's error in time is larger than this: of ways about as fast, the one that promises more.
    about = [candidate for candidate in kept if candidate.total_s <= _ABOUT_AS_FAST * best.total_s]
    return min(about, key=lambda c: (-(c.quality or 0.0), c.total_s, c.peak_bytes))


def _cost_or_time(spec: JobSpec, candidate: Candidate) -> float:
    total = price_of(spec, candidate).total
    return candidate.total_s / 3600 if total is None else total


def describe_candidate(candidate: Candidate) -> str:
    """A candidate in one phrase: method, what matters of its techniques, where."""
    first = candidate.placed[0].plan.techniques
    parts = [candidate.method.name, first.dtype]
    if first.gradient_checkpointing:
        parts.append("checkpointing")
    if first.loss_type != "nll":
        parts.append(first.loss_type)
    if first.optim == "adamw_bnb_8bit":
        parts.append("8-bit optimizer")
    if first.offload != "none":
        parts.append(f"{first.offload} offload")
    if first.zero_stage:
        parts.append(f"ZeRO-{first.zero_stage}")
    names = [part.slot.device.name for part in candidate.placed]
    where = " + ".join(
        f"{names.count(name)} x {name}" if names.count(name) > 1 else name for name in dict.fromkeys(names)
    )
    return f"{', '.join(parts)} on {where}"


def _alternatives(spec: JobSpec, chosen: Candidate, fitting: Sequence[Candidate]) -> tuple[Alternative, ...]:
    """The front, and the best of each other method or group: what a reader would ask about."""
    front = pareto(fitting)
    worth = [candidate for candidate in front if candidate is not chosen]
    seen = {(chosen.method.name, chosen.zero_stage, len(chosen.placed))}
    for candidate in sorted(fitting, key=lambda c: c.total_s):
        key = (candidate.method.name, candidate.zero_stage, len(candidate.placed))
        if key not in seen:
            seen.add(key)
            if candidate not in worth:
                worth.append(candidate)
    described = (
        Alternative(
            what=describe_candidate(other),
            total_s=other.total_s,
            peak_bytes=other.peak_bytes,
            quality=other.quality,
            why_not=_why_not(spec, chosen, other),
            on_front=other in front,
        )
        for other in worth
    )
    return tuple(described)


def _why_not(spec: JobSpec, chosen: Candidate, other: Candidate) -> str:
    slower = other.total_s / chosen.total_s
    lighter = other.peak_bytes / chosen.peak_bytes
    parts = [f"{slower:.2g}x the time" if slower > 1.005 else f"{1 / slower:.2g}x as fast"]
    parts.append(f"{lighter:.2g}x the memory")
    if other.quality is not None and chosen.quality is not None and other.quality != chosen.quality:
        parts.append(f"expected score {other.quality:.3f} against {chosen.quality:.3f} (prior)")
    if other.sync_s > 0.3 * other.step_s:
        parts.append(f"{other.sync_s / other.step_s:.0%} of each step waits for the network")
    return ", ".join(parts)


def _explain_choice(
    spec: JobSpec, workload: Workload, chosen: Candidate, tried: Tried, reasons: dict[str, str]
) -> None:
    """One sentence for every `auto` that the choice resolved."""
    part = chosen.placed[0]
    techniques, device = part.plan.techniques, part.slot.device
    needs = format_bytes(part.plan.memory.total_bytes)
    room = "unknown memory" if math.isinf(part.slot.memory_bytes) else f"{format_bytes(part.slot.memory_bytes)} usable"
    if spec.method.type not in METHODS:
        others = sorted({c.method.name for c in tried.fitting} - {chosen.method.name})
        fits = f"; {', '.join(others)} would fit too" if others else "; no other method fits"
        reasons["method.type"] = f"best by goal.prefer: {spec.goal.prefer}{fits}"
    if spec.model.dtype == "auto":
        reasons["model.dtype"] = _why_dtype(techniques.dtype, device)
    if spec.data.packing == "auto":
        reasons["data.packing"] = (
            "no padding; documents stay apart, so the result is the same"
            if techniques.packing
            else "padding costs less here than separate kernels would, or the model's attention cannot be packed"
        )
    if spec.model.attn_implementation == "auto":
        why = {"document": "one causal kernel a document", "flash_attention_2": "Ampere or newer"}
        reasons["model.attn_implementation"] = why.get(techniques.attn_implementation, "the best this model can use")
    if spec.train.per_device_train_batch_size == "auto":
        reasons["train.per_device_train_batch_size"] = f"needs about {needs} of {room}"
    if spec.train.gradient_checkpointing == "auto":
        reasons["train.gradient_checkpointing"] = (
            "does not fit without, or leaves room for what is faster"
            if techniques.gradient_checkpointing
            else f"fits without: about {needs} of {room}"
        )
    if spec.train.loss_type == "auto":
        reasons["train.loss_type"] = "all supervised logits fit" if techniques.loss_type == "nll" else "saves logits"
    if spec.train.optim == "auto":
        reasons["train.optim"] = (
            "AdamW with one kernel for all weights" if "8bit" not in techniques.optim else "fp32 moments do not fit"
        )
    if spec.strategy.offload == "auto":
        reasons["strategy.offload"] = "fits without" if techniques.offload == "none" else "does not fit without"
    if spec.cluster.num_workers == "auto":
        reasons.setdefault("cluster.num_workers", "the devices that together are best by the goal")


def _why_dtype(dtype: str, device: Any) -> str:
    measured = device.flops_per_s.get(dtype), device.flops_per_s.get("float32")
    if all(measured):
        source = device.sources.get(f"flops_per_s.{dtype}", "declared")
        return f"{measured[0] / 1e9:.0f} GFLOP/s against {measured[1] / 1e9:.0f} in fp32 ({source})"
    if dtype == "float32":
        return f"{device.name} has no bf16 or fp16 units that are known to be faster"
    if dtype == "bfloat16":
        by = f" ({', '.join(device.instruction_sets)})" if device.instruction_sets else ""
        return f"{device.name} computes it in hardware{by}"
    return f"{device.name} has fp16 but no bf16 units"


def _why_nothing_fits(
    spec: JobSpec,
    workload: Workload,
    slots: Sequence[Slot],
    tried: Tried,
    cluster: ClusterCapability,
    methods: Sequence[Method],
    switches: Switches,
) -> str:
    """What is missing where, and the smallest changes that would help, each checked by planning again."""
    from orchestrator.remedies import remedies

    lines = []
    for slot in slots:
        where = f"{slot.node.name} ({slot.device.name})"
        least = tried.least.get(where)
        if least is None:
            reason = next((why for what, why in tried.rejected.items() if what.endswith(where)), "nothing was possible")
            line = f"{spec.method.type} on {where}: {reason}"
        else:
            line = (
                f"{least.method} on {where}: needs {format_bytes(least.memory.total_bytes)}, has"
                f" {format_bytes(slot.memory_bytes)} usable"
            )
        if line not in lines:
            lines.append(line)
    found = remedies(workload, slots, cluster, methods, switches)
    if found:
        lines.append("It would fit with: " + "; or ".join(found))
    else:
        lines.append("Choose a smaller model, lower data.max_length, or add a device")
    return "\n".join(lines)


def settings_of(plan: Plan) -> dict[str, Any]:
    """The resolved values by job-file key, for printing and tracking."""
    techniques = plan.techniques
    return {
        "method.type": plan.method["type"],
        "cluster.num_workers": plan.num_workers,
        "model.dtype": techniques.dtype,
        "model.attn_implementation": techniques.attn_implementation,
        "data.packing": techniques.packing,
        "data.max_length": techniques.max_length,
        "train.global_batch_size": plan.global_batch_size,
        "train.per_device_train_batch_size": techniques.per_device_train_batch_size,
        "train.gradient_checkpointing": techniques.gradient_checkpointing,
        "train.loss_type": techniques.loss_type,
        "train.optim": plan.optim,
        "strategy.offload": techniques.offload,
        "checkpoint.save_steps": plan.save_steps,
        "checkpoint.load_best_model_at_end": plan.load_best_model_at_end,
        "eval.eval_steps": plan.eval_steps,
        "eval.max_new_tokens": plan.max_new_tokens,
        "eval.metrics": list(plan.metrics),
    }


def summary(plan: Plan) -> str:
    """The plan in one sentence."""
    where = ", ".join(dict.fromkeys(f"{part.device} ({part.node})" for part in plan.nodes))
    return f"{plan.method['type']} on {where}: {format_s(plan.total_s)}, {plan.tokens_per_s:.0f} tokens/s"
