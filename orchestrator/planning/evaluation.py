"""When held-out rows are measured, and with what: the `auto` values of the eval section.  Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from clusters.units import format_bytes
from orchestrator.errors import JobError
from orchestrator.job.spec import JobSpec
from orchestrator.planning.plan import NodePlan
from strategies.contract import BYTES_PER_ELEMENT, MemoryEstimate, Workload
from strategies.shape import ModelShape

CACHE_BYTES, MOST_PROMPTS = 2**30, 128  # of a batch of prompts: what keys and values may take, and rows


@dataclass(frozen=True)
class HeldOut:
    """Counts of the held-out rows that decide how they are evaluated."""

    num_samples: int
    num_tokens: int
    longest_answer: int  # tokens
    num_references: int
    is_classification: bool


def eval_steps(spec: JobSpec, workload: Workload, held_out: HeldOut | None, reasons: dict[str, str]) -> int | None:
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


def max_new_tokens(spec: JobSpec, held_out: HeldOut | None, reasons: dict[str, str]) -> int:
    if isinstance(spec.eval.max_new_tokens, int):
        return spec.eval.max_new_tokens
    longest = held_out.longest_answer if held_out else 0
    value = min(512, max(16, longest + longest // 4))
    if held_out:
        reasons["eval.max_new_tokens"] = (
            f"the longest held-out answer has {longest} tokens; a quarter more, 512 at most"
        )
    return value


def metrics(spec: JobSpec, held_out: HeldOut | None, reasons: dict[str, str]) -> tuple[str, ...]:
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


def cache_bytes_per_token(shape: ModelShape, bytes_per_element: int) -> int:
    """Keys and values of one token in every layer."""
    return 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * bytes_per_element


def cache_room_bytes(memory: MemoryEstimate, usable_bytes: float | None) -> float:
    """What keys and values may take while answers are generated: gradients, activations and logits are not there then.

    At most 1 GiB, beyond which more prompts at a time gain nothing.
    """
    free = (usable_bytes or memory.total_bytes) - memory.weights_bytes - memory.framework_bytes
    return max(0.0, min(CACHE_BYTES, free))


def explain_generation(nodes: Sequence[NodePlan], workload: Workload, new_tokens: int, reasons: dict[str, str]) -> None:
    """Add to the plan's reasons what memory generating answers takes, on the device with least room for it.

    What the job states has no reason, unless not even one answer surely fits.
    """
    room = min(cache_room_bytes(part.memory, part.memory_usable_bytes) for part in nodes)
    tokens = workload.longest_sample + new_tokens
    one = tokens * cache_bytes_per_token(workload.shape, BYTES_PER_ELEMENT[nodes[0].techniques.dtype])
    if count := int(min(MOST_PROMPTS, room // one)):
        why = f"up to {count} prompts at a time: their keys and values take {format_bytes(count * one)} at most"
    else:
        why = (
            f"keys and values of {tokens} tokens take {format_bytes(one)}, and {format_bytes(room)} are free beside the"
            " weights: an answer that does not fit is not scored"
        )
    known = [key for key in ("eval.max_new_tokens", "eval.metrics") if key in reasons]
    if known:
        reasons[known[0]] += f"; {why}"
    elif not count:
        reasons["eval.max_new_tokens"] = why
