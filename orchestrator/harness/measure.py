"""Base and tuned model of a run on tasks of the harness, one after the other, in the process that computes.

https://github.com/EleutherAI/lm-evaluation-harness: the only module that knows it.
"""

from __future__ import annotations

import gc
import itertools
import logging
import socket
from pathlib import Path
from typing import Any

from clusters.safe.reading import first_line
from orchestrator.errors import JobError, OrchestratorError, RunFailed
from orchestrator.harness.wish import TaskWish
from orchestrator.runs.condition import exported_whole
from orchestrator.runs.run_folder import RunFolder
from orchestrator.runs.tasks.task_score import ModelScore, TaskScore, compared
from orchestrator.training.model.loading import load_tokenizer
from orchestrator.training.workers import finished
from strategies.step.out_of_memory import release_cache

_OTHER = ("alias", "name", "sample_len", "sample_count")  # of a task's results


def measure(folder: str, wish: TaskWish, node: str | None = None) -> list[TaskScore]:
    """Raises JobError for tasks that are not known or cannot be read, RunFailed where a model cannot be measured."""
    from lm_eval.models.huggingface import HFLM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    run = RunFolder(Path(folder))
    job = run.job()
    manager = _manager(wish)
    context = finished.context_of(run, job)
    tokenizer = load_tokenizer(str(exported_whole(run)), job)
    found: list[dict[tuple[str, str], ModelScore]] = []
    for _, model in itertools.islice(finished.variants(run, context), 2):  # the base, then what was trained
        model.eval()
        batch_size = context.part.techniques.per_device_train_batch_size
        harnessed = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size)
        found.append(_evaluate(harnessed, wish, manager))
        del harnessed, model
        gc.collect()
        release_cache()
    before, after = found
    where = {"limit": wish.limit, "where": node or socket.gethostname()}
    return [compared(*key, before[key], after[key], **where) for key in after if key in before]


def _manager(wish: TaskWish) -> Any:
    """The harness's index of tasks: of a folder of one's own alone where all lie there.  Raises JobError."""
    from lm_eval.tasks import TaskManager

    own = TaskManager(include_path=wish.include_path, include_defaults=False) if wish.include_path else None
    if own and not _unknown(own, wish):
        return own
    everything = TaskManager(include_path=wish.include_path)
    if unknown := _unknown(everything, wish):
        known = f" in {wish.include_path}: {', '.join(sorted(own.all_tasks)) or 'none'}" if own else ""
        raise JobError(
            f"--tasks: {', '.join(unknown)} is no task of the harness. `lm-eval ls tasks` lists its own, --include-path"
            f" names a folder of task files{known}"
        )
    return everything


def _unknown(manager: Any, wish: TaskWish) -> list[str]:
    return [task for task in wish.tasks if task not in set(manager.all_tasks)]


def _evaluate(model: Any, wish: TaskWish, manager: Any) -> dict[tuple[str, str], ModelScore]:
    """(task, metric) -> what the harness measured.  Raises JobError and RunFailed."""
    from lm_eval import simple_evaluate

    try:
        found: Any = simple_evaluate(
            model,
            tasks=list(wish.tasks),
            task_manager=manager,
            limit=wish.limit,
            apply_chat_template=wish.chat,
            log_samples=True,
        )
    except OrchestratorError:
        raise
    except Exception as error:  # the harness, its tasks and their data raise anything
        raise RunFailed(
            f"lm-evaluation-harness: {type(error).__name__}: {first_line(error)}. Tasks of the harness fetch their rows"
            " from the hub; --include-path names a folder of tasks with files of yours"
        ) from error
    measured = {}
    for task, values in found["results"].items():
        rows = found["n-samples"].get(task, {}).get("effective", 0)
        samples = found.get("samples", {}).get(task, ())
        for key, value in values.items():
            name, _, kind = key.partition(",")
            if key in _OTHER or name.endswith("_stderr") or not isinstance(value, int | float):
                continue
            stderr = values.get(f"{name}_stderr,{kind}")
            metric = name if kind in ("", "none") else key
            stderr = float(stderr) if isinstance(stderr, int | float) else None
            measured[task, metric] = ModelScore(float(value), stderr, rows, _by_row(samples, name, kind, float(value)))
    return measured


def _by_row(samples: Any, name: str, kind: str, mean: float) -> list[float]:
    """Each row's value of a metric that is their mean; none of another."""
    own = [one for one in samples if one.get("filter", "none") == (kind or "none")]
    values = [one.get(name) for one in sorted(own, key=lambda one: one["doc_id"])]
    if not values or not all(isinstance(one, int | float) for one in values):
        return []
    numbers = [float(one) for one in values]
    return numbers if abs(sum(numbers) / len(numbers) - mean) < 1e-6 else []
