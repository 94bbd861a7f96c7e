"""How good a model is on held-out rows: before the first step, and after the last one."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

from orchestrator.data.dataset import Dataset
from orchestrator.errors import NothingFits
from orchestrator.job.job_file import Job
from orchestrator.planning.evaluation import cache_usable_bytes
from orchestrator.planning.plan import Plan
from orchestrator.runs.run_folder import RunFolder
from orchestrator.training.evaluate import Answer, evaluate_loss, generate_answers, num_without_room
from orchestrator.training.metrics import how_compared, score
from orchestrator.training.parallel import Group
from strategies.contract import Techniques, TrainSetup

_HELPER_S = 120.0  # that a finished training waits for the helper
_MOST_TRIES = 3  # of the last evaluation: a run whose process was killed in it each time ends without one


def measure(
    job: Job,
    plan: Plan,
    setup: TrainSetup,
    tokenizer: Any,
    held_out: Dataset,
    techniques: Techniques,
    group: Group,
) -> dict[str, Any]:
    """Held-out loss, metrics of generated answers, and a few of them; workers share the rows.

    Prompts whose answer does not fit in memory even alone are counted as `out_of_memory` and not scored.  Raises
    NothingFits, on every worker, where the loss of a single row does not fit.
    """
    began = time.perf_counter()
    quality: dict[str, Any] = {"eval_loss": evaluate_loss(setup, held_out, techniques, group), "rows": len(held_out)}
    if plan.metrics:
        indices = range(min(len(held_out), job.spec.eval.max_rows))
        mine = indices[group.rank :: group.size]
        dtype = techniques.dtype
        together = group if setup.engine else None
        room = min(cache_usable_bytes(part.memory, part.memory_usable_bytes) for part in plan.nodes)
        mine_answered = generate_answers(
            setup.model, tokenizer, held_out, mine, plan.max_new_tokens, dtype, together, room
        )
        answers: list[Answer] = [answer for part in group.gather(mine_answered) for answer in part]
        quality |= score(plan.metrics, [(answer.generated, answer.reference) for answer in answers])
        quality |= {"answers": len(answers), "compared": how_compared(plan.metrics)}
        if without_room := num_without_room(setup.model, held_out, indices):
            quality["without_room"] = without_room
        if unanswered := sum(held_out.prompt(index)[1] is not None for index in indices) - len(answers):
            quality["out_of_memory"] = unanswered
        quality["samples"] = [dataclasses.asdict(answer) for answer in answers[: job.spec.eval.num_samples]]
    quality["seconds"] = round(time.perf_counter() - began, 2)
    return quality


def measure_first(*arguments: Any, record: Any) -> dict[str, Any] | None:
    """`measure` of the untuned model; what does not fit is said, and training may begin all the same."""
    try:
        found = measure(*arguments)
    except NothingFits as error:
        record("note", text=f"the untuned model was not measured: {error}")
        return None
    record("quality", when="before", **numbers_of(found))
    return found


def measure_last(
    run: RunFolder,
    job: Job,
    plan: Plan,
    setup: TrainSetup,
    tokenizer: Any,
    held_out: Dataset,
    techniques: Techniques,
    group: Group,
    record: Any,
) -> dict[str, Any] | None:
    """`measure` of a run whose result is handed back already: what does not fit ends no run, but is said.

    A process that the system killed in this very evaluation measures fewer rows at a time when it comes back.
    """
    tries = group.gather(num_cut_short(run.events()[0]))[0]
    measure_it = f"`orchestrator evaluate {run.run_id}` measures it, on this machine or another"
    if tries >= _MOST_TRIES:
        record("note", text=f"the last evaluation ended the process {tries} times and is not tried again; {measure_it}")
        return None
    rows = max(1, techniques.per_device_train_batch_size >> 2 * tries)
    record("last_evaluation", rows=rows)
    techniques = dataclasses.replace(techniques, per_device_train_batch_size=rows)
    try:
        found = measure(job, plan, setup, tokenizer, held_out, techniques, group)
    except NothingFits as error:
        record("note", text=f"the result is handed back, but not measured: {error}; {measure_it}")
        return None
    if count := found.get("out_of_memory"):
        record("note", text=f"{count} held-out prompts ran out of memory and are not scored; {measure_it}")
    return found


def num_cut_short(events: Sequence[dict[str, Any]]) -> int:
    """How many last evaluations were begun since the run finished last: none of them came to an end."""
    finished = [at for at, event in enumerate(events) if event.get("state") == "finished"]
    since = events[finished[-1] + 1 :] if finished else events
    return sum(event["event"] == "last_evaluation" for event in since)


def numbers_of(quality: dict[str, Any]) -> dict[str, Any]:
    """A quality's numbers, without texts."""
    return {key: value for key, value in quality.items() if isinstance(value, int | float)}


def measured_by_helper(run: RunFolder, record: Any) -> dict[str, Any] | None:
    """What the machine that did not train measured; it has had the whole training for it."""
    until = time.monotonic() + _HELPER_S
    while (found := run.before()) is None and time.monotonic() < until:
        if run.read_json("before-failed.json") is not None:
            break
        time.sleep(0.5)
    if found is None:
        record("note", text="the untuned model was not measured: the machine that was to do it did not")
    return found
