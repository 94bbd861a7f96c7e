"""When held-out rows are measured and checkpoints saved, and how long a job takes with both.  Pure."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from clusters.units import format_bytes, format_s
from orchestrator.errors import JobError
from orchestrator.job.spec import JobSpec
from orchestrator.planning.candidates import Candidate, Placed
from orchestrator.planning.plan import NodePlan
from strategies.contract import MemoryEstimate
from strategies.cost.phases import Phases, decode_step_s, forward_share, preparation_s, saving_s, start_s
from strategies.cost.reuse import stores_reference
from strategies.shape import ModelShape
from strategies.stage_shape import shape_of_stage
from strategies.workload import BYTES_PER_ELEMENT, Workload

CACHE_BYTES, MOST_PROMPTS = 2**30, 128  # of a batch of prompts: what keys and values may take, and rows
_STAGES_SAVE_EVERY_S = 120.0  # of work, at most
_MOST_SAVING = 0.1  # of that work: where a checkpoint takes longer to write there are fewer

WHOLE_ANSWERS = ("exact_match", "accuracy", "macro_f1")  # metrics that compare them

_NO_ROWS = "there are no held-out rows"
_NEEDS_ROWS = "{} needs held-out rows; add data.eval, e.g. data.eval: {{split: 0.05}}"


@dataclass(frozen=True)
class HeldOutCounts:
    """Counts of the held-out rows that decide how they are evaluated."""

    num_samples: int
    num_tokens: int
    longest_answer: int  # tokens
    num_references: int
    is_classification: bool


@dataclass(frozen=True)
class EvaluationPlan:
    """The eval section without `auto`, and the reason of each key where there is one."""

    eval_steps: int | None  # None: at the end only
    max_new_tokens: int
    metrics: tuple[str, ...]
    reasons: dict[str, str]


def resolve_evaluation(
    spec: JobSpec, workload: Workload, held_out: HeldOutCounts | None, nodes: Sequence[NodePlan]
) -> EvaluationPlan:
    """Raises JobError for an evaluation, or a method, without the held-out rows that it looks at."""
    if held_out is None and all(method.observes_held_out for method in spec.methods()):
        raise JobError(_NEEDS_ROWS.format(f"method: {spec.method.type} with these options"))
    steps, why_steps = resolve_eval_steps(spec, workload, held_out)
    new_tokens, why_tokens = resolve_max_new_tokens(spec, held_out)
    metrics, why_metrics = resolve_metrics(spec, held_out)
    _refuse_unused_tokenizer(spec, metrics, held_out)
    _refuse_unused_pattern(spec, metrics, held_out)
    _refuse_unused_sampling(spec, metrics, held_out)
    if metrics:
        enough, memory = generation_memory(nodes, workload, new_tokens)
        if why_tokens:
            why_tokens += f"; {memory}"
        elif why_metrics:
            why_metrics += f"; {memory}"
        elif not enough:  # what the job states needs no reason, unless not even one answer surely fits
            why_tokens = memory
    found = (("eval.eval_steps", why_steps), ("eval.max_new_tokens", why_tokens), ("eval.metrics", why_metrics))
    return EvaluationPlan(steps, new_tokens, metrics, {key: why for key, why in found if why})


def resolve_eval_steps(
    spec: JobSpec, workload: Workload, held_out: HeldOutCounts | None
) -> tuple[int | None, str | None]:
    """Steps between two held-out losses, None for the end only; and why, where it was open."""
    stated = spec.eval.eval_steps
    if held_out is None:
        if isinstance(stated, int):
            raise JobError(_NEEDS_ROWS.format("eval.eval_steps"))
        return None, _NO_ROWS
    if stated != "auto":
        return stated, None
    trained_tokens = workload.num_tokens * workload.num_samples_seen / workload.num_samples
    times = int(min(4, 0.2 * trained_tokens / held_out.num_tokens))  # a forward pass costs half of a training pass
    if times < 1:
        return None, "held-out rows cost over a tenth of the training: measured at the end only"
    return max(1, math.ceil(workload.num_steps / times)), f"{times} times over the run, at most a tenth of its time"


def resolve_max_new_tokens(spec: JobSpec, held_out: HeldOutCounts | None) -> tuple[int, str | None]:
    """The longest generated answer in tokens; and why, where it was open."""
    stated = spec.eval.max_new_tokens
    longest = held_out.longest_answer if held_out else 0
    value = stated if isinstance(stated, int) else min(512, max(16, longest + longest // 4))
    if held_out is None:
        return value, _NO_ROWS
    if isinstance(stated, int):
        return value, None
    return value, f"the longest held-out answer has {longest} tokens; a quarter more, 512 at most"


def resolve_metrics(spec: JobSpec, held_out: HeldOutCounts | None) -> tuple[tuple[str, ...], str | None]:
    """The metrics of generated answers; and why, where they were open."""
    stated = spec.eval.metrics
    if held_out is None:
        if stated != "auto" and stated:
            raise JobError(_NEEDS_ROWS.format("eval.metrics"))
        return (), _NO_ROWS
    if stated != "auto":
        return tuple(stated), None
    if spec.eval.answer_pattern is not None and held_out.num_references:
        return ("exact_match",), "eval.answer_pattern says what is compared"
    if spec.build_objective().is_by_document:
        return (), "what the objective makes of the held-out rows is measured: their rewards"
    if held_out.num_references == 0:
        return (), "the held-out rows have no answers to compare with"
    if held_out.is_classification:
        return ("accuracy", "macro_f1"), "the rows are labels"
    if held_out.longest_answer <= 96:
        return ("exact_match",), "the answers are short"
    return ("rouge_l",), "the answers are long texts"


def _refuse_unused_tokenizer(spec: JobSpec, metrics: Sequence[str], held_out: HeldOutCounts | None) -> None:
    """Raises JobError where a tokenizer is stated and no metric counts tokens."""
    stated = spec.eval.tokenizer
    if stated != "auto" and held_out is None:
        raise JobError(_NEEDS_ROWS.format("eval.tokenizer"))
    if stated != "auto" and not {"rouge_l", "bleu"} & {*metrics}:
        raise JobError(
            f"eval.tokenizer is {stated}, and no metric here counts tokens ({', '.join(metrics) or 'there is none'}):"
            " add rouge_l or bleu to eval.metrics, or remove it"
        )


def _refuse_unused_pattern(spec: JobSpec, metrics: Sequence[str], held_out: HeldOutCounts | None) -> None:
    """Raises JobError where a pattern is stated and no metric compares whole answers."""
    if spec.eval.answer_pattern is None:
        return
    if held_out is None:
        raise JobError(_NEEDS_ROWS.format("eval.answer_pattern"))
    if not {*WHOLE_ANSWERS} & {*metrics}:
        raise JobError(
            "eval.answer_pattern is stated, and no metric here compares whole answers"
            f" ({', '.join(metrics) or 'there is none'}): add exact_match to eval.metrics, or remove it"
        )


def _refuse_unused_sampling(spec: JobSpec, metrics: Sequence[str], held_out: HeldOutCounts | None) -> None:
    """Raises JobError where it is stated how answers are drawn, and none are."""
    temperature, top_p = spec.eval.temperature, spec.eval.top_p
    if not temperature and top_p < 1:
        raise JobError(
            f"eval.top_p is {top_p:g}, and the likeliest token is always taken: set eval.temperature above 0, or remove"
            " eval.top_p"
        )
    if temperature and held_out is None:
        raise JobError(_NEEDS_ROWS.format("eval.temperature"))
    if temperature and not metrics:
        raise JobError(
            f"eval.temperature is {temperature:g}, and no answers are generated: add a metric to eval.metrics, or"
            " remove it"
        )


def generation_memory(nodes: Sequence[NodePlan], workload: Workload, new_tokens: int) -> tuple[bool, str]:
    """Whether an answer surely fits on the device with least memory for it, and what the answers take there."""
    usable = min(cache_usable_bytes(part.memory, part.memory_usable_bytes) for part in nodes)
    tokens = workload.longest_sample + new_tokens
    shape = max((shape_of_stage(workload.shape, part.techniques.stage) for part in nodes), key=lambda it: it.num_layers)
    one = tokens * cache_bytes_per_token(shape, BYTES_PER_ELEMENT[nodes[0].techniques.dtype])
    if count := int(min(MOST_PROMPTS, usable // one)):
        return True, f"up to {count} prompts at a time: their keys and values take {format_bytes(count * one)} at most"
    return False, (
        f"keys and values of {tokens} tokens take {format_bytes(one)}, and {format_bytes(usable)} are free beside the"
        " weights: an answer that does not fit is not scored"
    )


def cache_bytes_per_token(shape: ModelShape, bytes_per_element: int) -> int:
    """Keys and values of one token in every layer."""
    return 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * bytes_per_element


def cache_usable_bytes(memory: MemoryEstimate, usable_bytes: float | None) -> float:
    """Memory for keys and values while answers are generated: gradients, activations and logits do not exist then.

    At most 1 GiB, beyond which more prompts at a time gain nothing.
    """
    free = (usable_bytes or memory.total_bytes) - memory.weights_bytes - memory.framework_bytes
    return max(0.0, min(CACHE_BYTES, free))


def resolve_save_steps(spec: JobSpec, workload: Workload, chosen: Candidate) -> tuple[int, str | None]:
    """Steps between two checkpoints; and why, where it was open.

    Stages are saved more often: of several machines one is lost more often than of one, and all go back with it.
    """
    stated = spec.checkpoint.save_steps
    if stated != "auto":
        return stated, None
    saved_bytes, fifth = chosen.whole_plan.checkpoint_bytes, max(1, math.ceil(workload.num_steps / 5))
    size = format_bytes(saved_bytes)
    if chosen.pipelines:
        between_s = max(_STAGES_SAVE_EVERY_S, saving_s(saved_bytes) / _MOST_SAVING)
        steps = max(1, round(between_s / chosen.step_s))
        if steps < fifth:
            work = format_s(steps * chosen.step_s)
            return steps, f"a lost stage takes all back to the last checkpoint of {size}: {work} of work between two"
    return fifth, f"five checkpoints of {size} over the run"


def resolve_keep_best(spec: JobSpec, workload: Workload, eval_steps: int | None) -> tuple[bool, str | None]:
    """Whether the weights with the lowest held-out loss are handed back; and why, where it was open."""
    stated = spec.checkpoint.load_best_model_at_end
    if spec.eval.early_stopping_patience and eval_steps is None:
        raise JobError("eval.early_stopping_patience needs data.eval and eval.eval_steps; add them or remove it")
    if stated == "auto":
        if eval_steps is not None and eval_steps < workload.num_steps:
            return True, "held-out loss is measured during training"
        return False, "held-out loss is measured at the end only"
    if stated and eval_steps is None:
        raise JobError(
            "checkpoint.load_best_model_at_end needs data.eval and eval.eval_steps; add them or set it to false"
        )
    return stated, None


@dataclass(frozen=True)
class WholeJobs:
    """The whole job by each candidate; phases are computed once, since a goal asks for them many times."""

    spec: JobSpec
    workload: Workload
    held_out: HeldOutCounts | None
    alone: Mapping[str, Sequence[Placed]]  # by method: each device that could run the model by itself, and how
    _known: dict[int, tuple[Candidate, Phases]] = field(default_factory=dict)  # by identity: a candidate has no hash

    def phases(self, candidate: Candidate) -> Phases:
        """Seconds of each phase; the base model is evaluated meanwhile where an excluded node could."""
        if id(candidate) not in self._known:
            is_helped = next(self.helpers(candidate), None) is not None
            found = phases_of(self.spec, candidate, self.workload, self.held_out, is_helped)
            self._known[id(candidate)] = candidate, found
        return self._known[id(candidate)][1]

    def helpers(self, candidate: Candidate) -> Iterator[Placed]:
        """Devices of excluded nodes that could evaluate the base model while the others train."""
        if self.held_out is None or not self.spec.eval.before or self.spec.cluster.address == "local":
            return
        taking_part = {node.name for node in candidate.nodes}
        for part in self.alone.get(candidate.method.name, ()):
            if part.slot.node.name not in taking_part:
                yield part


def phases_of(
    spec: JobSpec, candidate: Candidate, workload: Workload, held_out: HeldOutCounts | None, is_helped: bool = False
) -> Phases:
    """Seconds of every phase of the job.

    A preflight is a step's two heaviest micro-batches, an evaluation of one and a checkpoint; all wait for the slowest
    of it and of the start.  The trained model is evaluated after its last step, the base model before the first unless
    a helper does, the loss alone as planned.
    """
    checkpoint_s = saving_s(candidate.whole_plan.checkpoint_bytes)
    save_steps, _ = resolve_save_steps(spec, workload, candidate)
    num_saved = math.ceil(workload.num_steps / save_steps) + 1  # and what is handed back
    return Phases(
        preparation_s=preparation_s(workload.num_tokens + (held_out.num_tokens if held_out else 0)),
        start_s=max(_start_s(part, workload) for part in candidate.placed)
        + _reference_s(candidate, workload, held_out)
        + max(part.plan.look_s for part in candidate.placed),
        preflight_s=max(_tried_s(part, workload) for part in candidate.placed) + checkpoint_s
        if spec.strategy.preflight
        else 0.0,
        evaluation_s=_evaluation_s(spec, candidate, workload, held_out, is_helped) if held_out else 0.0,
        training_s=candidate.total_s,
        saving_s=num_saved * checkpoint_s,
        guesses=("start", "preparation", "saving"),
    )


def _start_s(part: Placed, workload: Workload) -> float:
    """Until a worker's model, or its stage of it, is ready."""
    shape = shape_of_stage(workload.shape, part.plan.techniques.stage)
    return start_s(shape, part.slot.device, part.plan.memory.weights_bytes)


def _tried_s(part: Placed, workload: Workload) -> float:
    """A worker's two heaviest micro-batches, and an evaluation of one."""
    longer = max(1.0, workload.longest_sample / workload.mean_length)
    micro_s = part.plan.time.step_s / part.plan.num_micro_batches * longer
    return (2 + forward_share(part.plan.techniques)) * micro_s


def _forward_share(candidate: Candidate) -> float:
    """Of a training pass, what a forward pass takes where it takes most."""
    return max(forward_share(part.plan.techniques) for part in candidate.placed)


def _reference_s(candidate: Candidate, workload: Workload, held_out: HeldOutCounts | None) -> float:
    """Log-probabilities under the reference, of held-out rows and of training rows where they are stored."""
    if not workload.needs_reference:
        return 0.0
    stored = workload.num_tokens if stores_reference(workload, candidate.method.starts_as_base) else 0
    num_tokens = (1 + workload.needs_divergence) * (stored + (held_out.num_tokens if held_out else 0))
    return _forward_share(candidate) * num_tokens / candidate.tokens_per_s


def _evaluation_s(
    spec: JobSpec, candidate: Candidate, workload: Workload, held_out: HeldOutCounts, is_helped: bool
) -> float:
    """Held-out losses before, meanwhile and after, and the answers of both ends."""
    eval_steps, _ = resolve_eval_steps(spec, workload, held_out)
    both = 1 + (spec.eval.before and not is_helped)
    meanwhile = workload.num_steps // eval_steps if eval_steps else 0
    losses_s = (both + meanwhile) * _forward_share(candidate) * held_out.num_tokens / candidate.tokens_per_s
    if not resolve_metrics(spec, held_out)[0]:
        return losses_s
    num_answers, (num_tokens, _) = (
        min(held_out.num_references, spec.eval.max_rows),
        resolve_max_new_tokens(spec, held_out),
    )
    return losses_s + both * _generation_s(candidate, workload, num_answers, num_tokens)


def _generation_s(candidate: Candidate, workload: Workload, num_answers: int, num_tokens: int) -> float:
    """Answers to all prompts; a batch takes as many steps as its longest answer.

    Copies of the model answer their shares at once; a token passes the stages of one one after the other.
    """
    found = []
    for parts in candidate.replicas:
        own = max(1, math.ceil(num_answers * parts[0].share - 1e-9)) if num_answers else 0
        rows = min(_prompts_at_once(part, workload, own, num_tokens) for part in parts)
        token_s = 0.0
        for part in parts:
            techniques, slot = part.plan.techniques, part.slot
            shape = shape_of_stage(workload.shape, techniques.stage)
            one = cache_bytes_per_token(shape, BYTES_PER_ELEMENT[techniques.dtype])
            cache = rows * one * (workload.mean_length + num_tokens / 2)
            token_s += decode_step_s(shape, slot.device, slot.node, techniques, cache, rows)
        found.append(math.ceil(own / rows) * num_tokens * token_s)
    return max(found)


def _prompts_at_once(part: Placed, workload: Workload, own: int, num_tokens: int) -> int:
    """Prompts whose keys and values fit on a device together."""
    shape = shape_of_stage(workload.shape, part.plan.techniques.stage)
    one = cache_bytes_per_token(shape, BYTES_PER_ELEMENT[part.plan.techniques.dtype])
    usable = cache_usable_bytes(part.plan.memory, part.slot.memory_bytes)
    return max(1, min(own, MOST_PROMPTS, int(usable // (one * (workload.longest_sample + num_tokens)))))
