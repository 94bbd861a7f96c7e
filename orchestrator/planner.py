"""Workload + ClusterCapability + the job's wishes -> Plan.  Pure: no torch, no ray, no clock.

Every `auto` of the job file is resolved here, each with its reason.  The rules are simple on purpose; they use the
methods' estimates and what the machines report.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from typing import Any

from clusters.capability import ClusterCapability, DeviceCapability, NodeCapability
from clusters.units import format_bytes
from orchestrator.errors import JobError, NothingFits
from orchestrator.spec import JobSpec
from strategies.contract import Dtype, MemoryEstimate, StrategyPlan, Techniques, Workload
from strategies.techniques.precision import choose_dtype

VERSION = 1
_CPU_MICRO_BATCH_TOKENS = 2048  # beyond it a CPU gains nothing: its cores are full, its caches overflow
_LONGEST_AUTO = 2048


@dataclass(frozen=True)
class Plan:
    """How a job will run: nothing in it is `auto`.  Written to plan.json; its hash goes into every checkpoint."""

    device: str  # "cpu" or "cuda"
    num_workers: int
    threads_per_worker: int
    techniques: Techniques
    memory: MemoryEstimate
    num_trainable_parameters: int
    flops_per_token: float
    checkpoint_bytes: float
    global_batch_size: int  # samples
    num_steps: int
    optim: str
    save_steps: int
    eval_steps: int | None
    load_best_model_at_end: bool
    max_new_tokens: int
    metrics: tuple[str, ...]
    reasons: dict[str, str]  # key of the job file -> why it was resolved so
    version: int = VERSION

    @property
    def hash(self) -> str:
        """What decides the numbers of a run: two plans with one hash give bit-equal losses on one machine."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]

    def to_json(self) -> str:
        return json.dumps({**asdict(self), "hash": self.hash}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read plan.json.  Raises JobError when another version wrote it."""
        values = json.loads(text)
        values.pop("hash", None)
        if values.get("version") != VERSION:
            raise JobError(
                f"plan.json has version {values.get('version')}, this program writes {VERSION}; submit the job anew"
            )
        values["techniques"] = Techniques(**values["techniques"])
        values["memory"] = MemoryEstimate(**values["memory"])
        values["metrics"] = tuple(values["metrics"])
        return cls(**values)


@dataclass(frozen=True)
class HeldOut:
    """Counts of the held-out rows that decide how they are evaluated."""

    num_samples: int
    num_tokens: int
    longest_answer: int  # tokens
    num_references: int
    is_classification: bool


def resolve_workers(spec: JobSpec, node: NodeCapability) -> tuple[int, str | None]:
    """How many training processes, and why where it was open."""
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


def make_plan(
    spec: JobSpec,
    workload: Workload,
    cluster: ClusterCapability,
    num_workers: int,
    max_length: int,
    held_out: HeldOut | None,
    reasons: dict[str, str],
) -> Plan:
    """Resolve what is left open.  Raises NothingFits when no micro-batch fits, JobError for contradictions."""
    node = cluster.nodes[0]
    device = node.gpus[0] if node.gpus else node.cpu
    reasons = dict(reasons)
    strategy = _fit(spec, workload, device, num_workers, max_length, reasons)
    optim = spec.train.optim
    if optim == "auto":
        optim, reasons["train.optim"] = "adamw_torch_fused", "AdamW with one kernel for all weights"
    eval_steps = _eval_steps(spec, workload, held_out, reasons)
    keep_best = spec.checkpoint.load_best_model_at_end
    if keep_best == "auto":
        keep_best = eval_steps is not None and eval_steps < workload.num_steps
        why = "held-out loss is measured during training" if keep_best else "held-out loss is measured at the end only"
        reasons["checkpoint.load_best_model_at_end"] = why
    elif keep_best and eval_steps is None:
        raise JobError(
            "checkpoint.load_best_model_at_end needs data.eval and eval.eval_steps; add them or set it to false"
        )
    if spec.eval.early_stopping_patience and eval_steps is None:
        raise JobError("eval.early_stopping_patience needs data.eval and eval.eval_steps; add them or remove it")
    save_steps = spec.checkpoint.save_steps
    if save_steps == "auto":
        save_steps = max(1, math.ceil(workload.num_steps / 5))
        reasons["checkpoint.save_steps"] = f"five checkpoints of {format_bytes(strategy.checkpoint_bytes)} over the run"
    return Plan(
        device=device.kind,
        num_workers=num_workers,
        threads_per_worker=max(1, node.num_cores // num_workers),
        techniques=strategy.techniques,
        memory=strategy.memory,
        num_trainable_parameters=strategy.num_trainable_parameters,
        flops_per_token=strategy.flops_per_token,
        checkpoint_bytes=strategy.checkpoint_bytes,
        global_batch_size=workload.global_batch_size,
        num_steps=workload.num_steps,
        optim=optim,
        save_steps=save_steps,
        eval_steps=eval_steps,
        load_best_model_at_end=keep_best,
        max_new_tokens=_max_new_tokens(spec, held_out, reasons),
        metrics=_metrics(spec, held_out, reasons),
        reasons=reasons,
    )


def _fit(
    spec: JobSpec,
    workload: Workload,
    device: DeviceCapability,
    num_workers: int,
    max_length: int,
    reasons: dict[str, str],
) -> StrategyPlan:
    """The largest micro-batch that fits, without checkpointing if possible."""
    dtype: Dtype
    if spec.model.dtype == "auto":
        dtype, reasons["model.dtype"] = choose_dtype(device)
    else:
        dtype = spec.model.dtype
    packing = spec.data.packing
    if packing == "auto":
        packing, reasons["data.packing"] = True, "no padding; documents stay apart, so the result is the same"
    attention = spec.model.attn_implementation
    if attention == "auto":
        attention = "document" if packing else "sdpa"
        reasons["model.attn_implementation"] = "one causal kernel a document" if packing else "rows are padded"
    if attention == "document" and not packing:
        raise JobError("model.attn_implementation: document needs data.packing: true")
    if attention.startswith("flash") and device.kind == "cpu":
        raise JobError(f"model.attn_implementation: {attention} needs a GPU; set it to auto")
    method = spec.build_method()
    room_bytes = math.inf
    if device.memory_bytes is not None:
        shared_by = num_workers if device.kind == "cpu" else 1
        room_bytes = device.memory_bytes * (1 - spec.strategy.memory_safety) / shared_by
    wishes = spec.train.gradient_checkpointing
    row_counts = _row_counts(spec, workload, device, num_workers, max_length, packing)
    candidates = [
        method.estimate(workload, device, Techniques(dtype, attention, packing, checkpointing, rows, max_length))
        for checkpointing in ([False, True] if wishes == "auto" else [wishes])
        for rows in row_counts
    ]
    for candidate in candidates:
        if candidate.memory.total_bytes <= room_bytes:
            _explain_fit(spec, candidate, device, reasons)
            return candidate
    least = candidates[-1]
    several = f" a worker ({num_workers} workers)" if num_workers > 1 and device.kind == "cpu" else ""
    raise NothingFits(
        f"{least.method} on {device.name}: needs {format_bytes(least.memory.total_bytes)}, has"
        f" {format_bytes(room_bytes)} usable{several}. Lower data.max_length or train.per_device_train_batch_size, set"
        " train.gradient_checkpointing: auto, choose a smaller model, or add a device"
    )


def _row_counts(
    spec: JobSpec, workload: Workload, device: DeviceCapability, num_workers: int, max_length: int, packing: bool
) -> list[int]:
    """Micro-batch sizes to try, largest first."""
    asked = spec.train.per_device_train_batch_size
    if isinstance(asked, int):
        return [asked]
    share = math.ceil(workload.global_batch_size / num_workers)
    steps = spec.train.gradient_accumulation_steps
    if isinstance(steps, int):
        share = math.ceil(share / steps)
    if packing:  # rows of max_length tokens, each holding several samples
        share = math.ceil(share * workload.mean_length / max_length)
    if device.kind == "cpu":
        share = min(share, max(1, _CPU_MICRO_BATCH_TOKENS // max_length))
    return sorted({max(1, share >> halvings) for halvings in range(share.bit_length())} | {1}, reverse=True)


def _explain_fit(spec: JobSpec, fit: StrategyPlan, device: DeviceCapability, reasons: dict[str, str]) -> None:
    needs = format_bytes(fit.memory.total_bytes)
    has = "unknown memory" if device.memory_bytes is None else format_bytes(device.memory_bytes)
    if spec.train.per_device_train_batch_size == "auto":
        reasons["train.per_device_train_batch_size"] = f"needs about {needs} of {has}"
    if spec.train.gradient_checkpointing == "auto":
        on = fit.techniques.gradient_checkpointing
        reasons["train.gradient_checkpointing"] = (
            "does not fit without" if on else f"fits without: about {needs} of {has}"
        )


def _eval_steps(spec: JobSpec, workload: Workload, held_out: HeldOut | None, reasons: dict[str, str]) -> int | None:
    asked = spec.eval.eval_steps
    if held_out is None:
        if isinstance(asked, int):
            raise JobError("eval.eval_steps needs held-out rows; add data.eval, e.g. data.eval: {split: 0.05}")
        return None
    if asked != "auto":
        return asked
    trained_tokens = workload.num_tokens * workload.num_samples_seen / workload.num_samples
    times = int(min(4, 0.2 * trained_tokens / held_out.num_tokens))  # a forward pass costs half of a training pass
    if times < 1:
        reasons["eval.eval_steps"] = "held-out rows cost over a tenth of the training: measured at the end only"
        return None
    reasons["eval.eval_steps"] = f"{times} times over the run, at most a tenth of its time"
    return max(1, math.ceil(workload.num_steps / times))


def _max_new_tokens(spec: JobSpec, held_out: HeldOut | None, reasons: dict[str, str]) -> int:
    if isinstance(spec.eval.max_new_tokens, int):
        return spec.eval.max_new_tokens
    longest = held_out.longest_answer if held_out else 0
    value = min(512, max(16, longest + longest // 4))
    if held_out:
        reasons["eval.max_new_tokens"] = (
            f"the longest held-out answer has {longest} tokens; a quarter more, 512 at most"
        )
    return value


def _metrics(spec: JobSpec, held_out: HeldOut | None, reasons: dict[str, str]) -> tuple[str, ...]:
    asked = spec.eval.metrics
    if held_out is None:
        if asked != "auto" and asked:
            raise JobError("eval.metrics needs held-out rows; add data.eval, e.g. data.eval: {split: 0.05}")
        return ()
    if asked != "auto":
        return tuple(asked)
    if held_out.num_references == 0:
        chosen, why = (), "the held-out rows have no answers to compare with"
    elif held_out.is_classification:
        chosen, why = ("accuracy", "macro_f1"), "the rows are labels"
    elif held_out.longest_answer <= 96:
        chosen, why = ("exact_match",), "the answers are short"
    else:
        chosen, why = ("rouge_l",), "the answers are long texts"
    reasons["eval.metrics"] = why
    return chosen


def settings_of(plan: Plan) -> dict[str, Any]:
    """The resolved values by job-file key, for printing and tracking."""
    techniques = plan.techniques
    return {
        "cluster.num_workers": plan.num_workers,
        "model.dtype": techniques.dtype,
        "model.attn_implementation": techniques.attn_implementation,
        "data.packing": techniques.packing,
        "data.max_length": techniques.max_length,
        "train.global_batch_size": plan.global_batch_size,
        "train.per_device_train_batch_size": techniques.per_device_train_batch_size,
        "train.gradient_checkpointing": techniques.gradient_checkpointing,
        "train.optim": plan.optim,
        "checkpoint.save_steps": plan.save_steps,
        "checkpoint.load_best_model_at_end": plan.load_best_model_at_end,
        "eval.eval_steps": plan.eval_steps,
        "eval.max_new_tokens": plan.max_new_tokens,
        "eval.metrics": list(plan.metrics),
    }
