"""What is saved by not computing again: a job trained side by side in several ways, a step of each in turn.

    python tests/benchmarks/reuse.py quickstart --set train.max_steps=-1
    python tests/benchmarks/reuse.py JOB --ways plain,shared

`plain` computes every row by itself and in every epoch, as before the two techniques; `shared` computes what rows begin
with alike once; `kept` keeps what frozen lower layers make of a row; `both` does both.  What `auto` chooses is printed.
Seconds of a step are those of the clock and those of computing; on a busy machine the latter, with `--threads 1`, are
what counts.  The held-out loss is that of the last step.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
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
    parser.add_argument("--threads", type=int, help="of a step, in place of all that the plan gives it")
    parser.add_argument("--steps", type=int, help="at most so many; the held-out rows are then not evaluated")
    arguments = parser.parse_args()
    limits = arguments.steps, arguments.threads
    print(json.dumps(measure(arguments.job, arguments.changes, arguments.ways.split(","), *limits), indent=1))


def measure(
    job_file: str, changes: list[str], ways: list[str], most_steps: int | None, threads: int | None
) -> dict[str, Any]:
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
    torch.set_num_threads(threads or plan.threads_per_worker)
    sides = {way: Side(job, plan, ready.data_files.model, way) for way in ways}
    num_steps = min(order.num_steps, most_steps or order.num_steps)
    for step in range(num_steps):
        for side in list(sides.values())[:: 1 if step % 2 else -1]:
            side.step(data, replace(order, max_steps=step + 1), step)
        shown = {way: f"{side.cpu_seconds[-1]:.2f} s, loss {side.reports[-1].loss:.6f}" for way, side in sides.items()}
        print(f"step {step + 1}: {shown}", file=sys.stderr, flush=True)
    techniques = plan.techniques
    found: dict[str, Any] = {
        "auto": {"shared": techniques.share_prefixes, "kept": techniques.cache_frozen_activations},
        "steps": num_steps,
        "tree_ratio": dict(ready.work.tree_ratio),
        "predicted_computed_part": plan.computed_part,
    }
    for way, side in sides.items():
        found[way] = side.summary(order.steps_per_epoch) | {"eval_loss": most_steps is None and side.evaluate(held_out)}
    for way in ways[1:]:
        found[way][f"times_{ways[0]}"] = {
            "clock": _compare(sides[ways[0]].seconds, sides[way].seconds),
            "computing": _compare(sides[ways[0]].cpu_seconds, sides[way].cpu_seconds),
        }
    return found


def _compare(plain: list[float], other: list[float]) -> dict[str, float]:
    ratios = [a / b for a, b in zip(plain, other, strict=True)]
    return {"whole": sum(plain) / sum(other), "median_step": statistics.median(ratios)}


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
        self.cpu_seconds: list[float] = []
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
        group, began = ProcessGroup(), time.process_time()
        train(Training(self.setup, data, None, order, self.schedule, self.techniques, group, progress, hooks))
        self.cpu_seconds.append(time.process_time() - began)

    def evaluate(self, held_out: Any) -> dict[str, float]:
        from orchestrator.training.evaluate import evaluate_loss
        from orchestrator.training.parallel import ProcessGroup

        began, computed = time.perf_counter(), time.process_time()
        loss = evaluate_loss(self.setup, held_out, self.techniques, ProcessGroup()) if held_out else float("nan")
        return {
            "loss": loss,
            "seconds": time.perf_counter() - began,
            "cpu_seconds": time.process_time() - computed,
        }

    def summary(self, steps_per_epoch: int) -> dict[str, Any]:
        tokens = sum(report.tokens for report in self.reports)
        epochs = [
            self.cpu_seconds[start : start + steps_per_epoch] for start in range(0, len(self.seconds), steps_per_epoch)
        ]
        return {
            "tokens": tokens,
            "computed_tokens": sum(report.computed_tokens or report.tokens for report in self.reports),
            "known_tokens": sum(report.known_tokens or 0 for report in self.reports),
            "tokens_per_s": tokens / sum(self.seconds),
            "median_cpu_s_by_epoch": [statistics.median(epoch) for epoch in epochs],
            "last_loss": self.reports[-1].loss,
        }


if __name__ == "__main__":
    Path("runs").mkdir(exist_ok=True)
    main()
