"""When held-out rows are measured, and with what: the `auto` values of the eval section.  Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass

from orchestrator.errors import JobError
from orchestrator.spec import JobSpec
from strategies.contract import Workload


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
