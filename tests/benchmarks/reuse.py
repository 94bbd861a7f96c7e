"""What is saved by not computing again: a job trained side by side in several ways, a step of each in turn.

    python tests/benchmarks/reuse.py quickstart --set train.max_steps=-1
    python tests/benchmarks/reuse.py JOB --ways plain,shared

`plain` computes every row by itself and in every epoch, as before the two techniques; `shared` computes what rows begin
with alike once; `kept` keeps what frozen lower layers make of a row; `both` does both.  What `auto` chooses is printed.
Seconds of a step are medians over each epoch, the held-out loss is that of the last step, one evaluation of each.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

WAYS = {"plain": (False, False), "shared": (True, False), "kept": (False, True), "both": (True, True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job")
    parser.add_argument("--set", action="append", default=[], dest="changes")
    parser.add_argument("--ways", default="plain,shared,both")
    parser.add_argument("--steps", type=int, help="at most so many")
    arguments = parser.parse_args()
    print(json.dumps(measure(arguments.job, arguments.changes, arguments.ways.split(","), arguments.steps), indent=1))


def measure(job_file: str, changes: list[str], ways: list[str], most_steps: int | None) -> dict[str, Any]:
    """Tokens of the samples a second, of each way and each epoch, and the held-out losses."""
    from orchestrator.cli.options import load_job
    from orchestrator.data.order import Order
    from orchestrator.data.prepare import datasets
    from orchestrator.lifecycle.prepare import prepare

    job = load_job(job_file, changes)
    ready = prepare(job, print)
    plan = ready.plan
    data, held_out = datasets(ready.data_files)
    train = job.spec.train
    order = Order(len(data), plan.global_batch_size, train.seed, train.num_train_epochs, train.max_steps)
    torch.set_num_threads(plan.threads_per_worker)
    sides = {way: Side(job, plan, ready.data_files.model, way) for way in ways}
    num_steps = min(order.num_steps, most_steps or order.num_steps)
    for step in range(num_steps):
        for side in list(sides.values())[:: 1 if step % 2 else -1]:
            side.step(data, replace(order, max_steps=step + 1), step)
    techniques = plan.techniques
    found: dict[str, Any] = {
        "auto": {"shared": techniques.share_prefixes, "kept": techniques.cache_frozen_activations},
        "steps": num_steps,
        "tree_ratio": dict(ready.work.tree_ratio),
        "predicted_computed_part": plan.computed_part,
    }
    for way, side in sides.items():
        found[way] = side.summary(order.steps_per_epoch) | {"eval_loss": side.evaluate(held_out)}
    for way in ways[1:]:
        ratios = [a / b for a, b in zip(sides[ways[0]].seconds, sides[way].seconds, strict=True)]
        found[way][f"times_{ways[0]}"] = {
            "whole": sum(sides[ways[0]].seconds) / sum(sides[way].seconds),
            "median_step": statistics.median(ratios),
        }
    return found


class Side:
    """One way of training the job, stepped from outside."""

    def __init__(self, job: Any, plan: Any, model_folder: str, way: str) -> None:
        from orchestrator.training.worker_context import WorkerContext
        from orchestrator.training.workers.setup import prepare_model, schedule_of

        shares, keeps = WAYS[way]
        part = plan.nodes[0]
        techniques = replace(part.techniques, share_prefixes=shares, cache_frozen_activations=keeps)
        part = replace(part, techniques=techniques)
        torch.manual_seed(job.spec.train.seed)
        context = WorkerContext(job, replace(plan, nodes=(part,)), part, model_folder, torch.device("cpu"))
        self.setup, self.techniques = prepare_model(context)
        self.schedule = replace(schedule_of(job, plan), save_steps=10**9, eval_steps=None)
        self.seconds: list[float] = []
        self.reports: list[Any] = []

    def step(self, data: Any, order: Any, number: int) -> None:
        from orchestrator.runs.events import StepReport
        from orchestrator.training.loop import train
        from orchestrator.training.parallel import ProcessGroup
        from orchestrator.training.state import Hooks, Progress, Training

        def record(event: Any) -> None:
            if isinstance(event, StepReport):
                self.seconds.append(event.seconds)
                self.reports.append(event)

        hooks, progress = Hooks(record, lambda now: "", lambda: None), Progress(step=number)
        group = ProcessGroup()
        train(Training(self.setup, data, None, order, self.schedule, self.techniques, group, progress, hooks))

    def evaluate(self, held_out: Any) -> dict[str, float]:
        from orchestrator.training.evaluate import evaluate_loss
        from orchestrator.training.parallel import ProcessGroup

        began = time.perf_counter()
        loss = evaluate_loss(self.setup, held_out, self.techniques, ProcessGroup()) if held_out else float("nan")
        return {"loss": loss, "seconds": time.perf_counter() - began}

    def summary(self, steps_per_epoch: int) -> dict[str, Any]:
        tokens = sum(report.tokens for report in self.reports)
        epochs = [
            self.seconds[start : start + steps_per_epoch] for start in range(0, len(self.seconds), steps_per_epoch)
        ]
        return {
            "tokens": tokens,
            "computed_tokens": sum(report.computed_tokens or report.tokens for report in self.reports),
            "known_tokens": sum(report.known_tokens or 0 for report in self.reports),
            "tokens_per_s": tokens / sum(self.seconds),
            "median_step_s_by_epoch": [statistics.median(epoch) for epoch in epochs],
            "last_loss": self.reports[-1].loss,
        }


if __name__ == "__main__":
    Path("runs").mkdir(exist_ok=True)
    main()
