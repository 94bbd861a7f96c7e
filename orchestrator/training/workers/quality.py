"""How good a model is on held-out rows: before the first step, and after the last one."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

from orchestrator.data.dataset import Dataset
from orchestrator.data.packing import split_by_share
from orchestrator.errors import JobError, NothingFits
from orchestrator.job.scoring.answers import extract, pairs_of_answers
from orchestrator.job.scoring.functions import call, functions_of, load, name_of
from orchestrator.planning.evaluation import WHOLE_ANSWERS, cache_usable_bytes
from orchestrator.runs.events import Event, FinalEvaluation, QualityReport, StateChange
from orchestrator.runs.run_folder import RunFolder
from orchestrator.training.evaluate import (
    GeneratedAnswer,
    Generation,
    evaluate_rows,
    generate_answers,
    num_without_room,
    sampling_of,
)
from orchestrator.training.metrics import how_compared, refuse_tokenizer, score, scores_by_answer
from orchestrator.training.worker_context import WorkerContext
from orchestrator.training.workers.setup import Inputs
from strategies.step.optimizers import evaluated_weights
from strategies.train_setup import TrainSetup
from strategies.workload import Techniques

_HELPER_S = 120.0  # that a finished training waits for the baseline helper
_MOST_TRIES = 3  # of the last evaluation: a run whose process was killed in it each time ends without one


def measure(
    context: WorkerContext, setup: TrainSetup, techniques: Techniques, tokenizer: Any, held_out: Dataset
) -> dict[str, Any]:
    """Held-out loss, metrics of generated answers, and a few of them; workers share the rows.

    Prompts whose answer does not fit in memory even alone are counted as `out_of_memory` and not scored.  Raises
    NothingFits, on every worker, where the loss of a single row does not fit.
    """
    with evaluated_weights(setup):
        return _measure(context, setup, techniques, tokenizer, held_out)


def _measure(
    context: WorkerContext, setup: TrainSetup, techniques: Techniques, tokenizer: Any, held_out: Dataset
) -> dict[str, Any]:
    started, plan, group, spec = time.perf_counter(), context.plan, context.group, context.job.spec.eval
    shares = planned_shares(context)
    losses = evaluate_rows(setup, held_out, techniques, group, shares)
    quality: dict[str, Any] = {"eval_loss": losses.loss, **losses.rewards, "rows": len(held_out)}
    if plan.metrics:
        refuse_tokenizer(spec.tokenizer, plan.metrics)
        indices = range(min(len(held_out), spec.max_rows))
        generation = Generation(
            plan.max_new_tokens,
            techniques.dtype,
            passes=setup.passes,
            cache_bytes=min(cache_usable_bytes(part.memory, part.memory_usable_bytes) for part in plan.nodes),
            sampling=sampling_of(context.job.spec),
        )
        mine = split_by_share([1] * len(indices), shares)[group.replica]  # answers end alike: prompts are counted
        own = generate_answers(setup.model, tokenizer, held_out, mine, generation)
        answers: list[GeneratedAnswer] = [one for part in group.gather(own if group.leads else []) for one in part]
        quality |= {"answers": len(answers)} | scores_of(context, [(one.generated, one.reference) for one in answers])
        if without_room := num_without_room(setup.model, held_out, indices):
            quality["without_room"] = without_room
        if unanswered := sum(held_out.prompt(index)[1] is not None for index in indices) - len(answers):
            quality["out_of_memory"] = unanswered
        quality["samples"] = [dataclasses.asdict(answer) for answer in answers[: spec.num_samples]]
    quality["seconds"] = round(time.perf_counter() - started, 2)
    return quality


def planned_shares(context: WorkerContext) -> list[float]:
    """What the plan gives each copy of the model, by replica: held-out rows are divided as steps are.  Collective."""
    group = context.group
    if group.num_replicas == 1:
        return [1.0]
    shares_W = group.gather(context.part.share)
    return [shares_W[group.ranks_of(replica)[0]] for replica in range(group.num_replicas)]


def scores_of(context: WorkerContext, pairs: list[tuple[str, str]]) -> dict[str, Any]:
    """The planned metrics of (generated, reference) pairs, those of each answer, and what was compared.

    A function of the job's that fails is noted and not measured: nothing else is lost with it.
    """
    metrics, spec = context.plan.metrics, context.job.spec.eval
    references = [reference for _, reference in pairs]
    if spec.answer_pattern is None:
        found: dict[str, Any] = score(metrics, pairs, spec.tokenizer)
        by_answer, compared = scores_by_answer(metrics, pairs, spec.tokenizer), {}
    else:
        others = [one for one in metrics if one not in WHOLE_ANSWERS]
        whole = [one for one in metrics if one in WHOLE_ANSWERS]
        answers = pairs_of_answers(spec.answer_pattern, pairs)
        found = {**score(others, pairs, spec.tokenizer), **score(whole, answers)}
        by_answer = {**scores_by_answer(others, pairs, spec.tokenizer), **scores_by_answer(whole, answers)}
        compared = dict.fromkeys(whole, f"what {spec.answer_pattern} finds, as a number where it is one")
        found["no_answer"] = sum(extract(spec.answer_pattern, generated) is None for generated, _ in pairs)
    compared = how_compared(metrics, references, spec.tokenizer) | compared
    for metric in functions_of(metrics) if pairs else ():
        try:
            function = load(metric, context.metrics_folder)
            scored = call(metric, function, [generated for generated, _ in pairs], references)
        except JobError as error:
            context.note(f"{error}; it is not measured")
            continue
        found[name_of(metric)] = scored.mean
        compared[name_of(metric)] = f"by {metric} of the job's folder"
        if scored.by_answer is not None:
            by_answer[name_of(metric)] = [round(one, 4) for one in scored.by_answer]
    return {**found, "by_answer": by_answer, "compared": compared}


def measure_first(context: WorkerContext, inputs: Inputs) -> dict[str, Any] | None:
    """Evaluate the base model; where that does not fit, a note says so and training begins all the same."""
    assert inputs.held_out is not None
    try:
        found = measure(context, inputs.setup, inputs.techniques, inputs.tokenizer, inputs.held_out)
    except NothingFits as error:
        context.note(f"the base model was not evaluated: {error}")
        return None
    context.record(QualityReport.of("before", found))
    return found


def measure_last(
    run: RunFolder, context: WorkerContext, inputs: Inputs, known_loss: float | None
) -> dict[str, Any] | None:
    """Evaluate the trained model, whose result is handed back already: what does not fit is noted and ends no run.

    `known_loss` is what training measured with the same weights.  Without it nobody knows that the rows fit, so a
    process that was killed in this very evaluation evaluates fewer at a time when it is started again.  With it the
    rows stay as they are: other batches are other sums, and the loss would differ in its last bits from that of a run
    that was never killed.
    """
    assert inputs.held_out is not None
    tries = context.group.gather(num_cut_short(run.events_of(StateChange, FinalEvaluation)))[0]
    remedy = f"`orchestrator evaluate {run.run_id}` measures it, on this machine or another"
    if tries >= _MOST_TRIES:
        known = "" if known_loss is None else "; its loss is what training measured with the same weights"
        context.note(f"the last evaluation ended the process {tries} times and is not tried again{known}; {remedy}")
        return None if known_loss is None else {"eval_loss": known_loss, "rows": len(inputs.held_out)}
    techniques = inputs.techniques
    if tries and known_loss is None:
        techniques = _in_fewer_rows(context, techniques, tries)
    context.record(FinalEvaluation(techniques.per_device_train_batch_size))
    try:
        found = measure(context, inputs.setup, techniques, inputs.tokenizer, inputs.held_out)
    except NothingFits as error:
        context.note(f"the result is handed back, but not measured: {error}; {remedy}")
        return None
    if count := found.get("out_of_memory"):
        context.note(f"{count} held-out prompts ran out of memory and are not scored; {remedy}")
    return found


def _in_fewer_rows(context: WorkerContext, techniques: Techniques, tries: int) -> Techniques:
    """A quarter of the rows at a time for each process that was killed, and a note that says so."""
    rows, length = max(1, techniques.per_device_train_batch_size >> 2 * tries), techniques.max_length
    if rows < techniques.per_device_train_batch_size:
        context.note(
            f"the last evaluation ended the process, so it takes at most {rows} x {length} tokens at a time: its loss"
            " is equal up to rounding to that of a run that never stopped"
        )
    return dataclasses.replace(techniques, per_device_train_batch_size=rows)


def num_cut_short(events: Sequence[Event]) -> int:
    """How many last evaluations started since the run finished last: none of them came to an end."""
    finished = [at for at, event in enumerate(events) if isinstance(event, StateChange) and event.state == "finished"]
    since = events[finished[-1] + 1 :] if finished else events
    return sum(isinstance(event, FinalEvaluation) for event in since)


def wait_for_helper(run: RunFolder, context: WorkerContext) -> dict[str, Any] | None:
    """The base model's quality from the baseline helper, which has had the whole training to measure it."""
    until = time.monotonic() + _HELPER_S
    while (found := run.before()) is None and time.monotonic() < until:
        if run.read_json("before-failed.json") is not None:
            break
        time.sleep(0.5)
    if found is None:
        context.note("the base model was not evaluated: the baseline helper did not finish")
        return None
    return found.values
