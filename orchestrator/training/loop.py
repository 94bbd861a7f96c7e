"""A training, from its first step to its last: plain PyTorch, one step after the other.

What a step computes does not depend on how it is laid out.  The samples of a step are a function of (seed, step); each
micro-batch contributes its *sum* of token losses divided by the supervised tokens of the *whole* step, a number known
from the data's index (of sample losses by samples, under an objective over documents); gradients are summed, never
averaged.  So micro-batch size, packing, accumulation, the number of workers and the share of each change the speed and
nothing else.
"""

from __future__ import annotations

import math
import time
from typing import Any

from orchestrator.data.order import hash_ids
from orchestrator.errors import Diverged, NothingFits
from orchestrator.runs.events import (
    CheckpointReport,
    Evaluation,
    ShareChange,
    StageTimeline,
    StepReport,
)
from orchestrator.runs.stage_spans import StageSpans, align_to_first_pass
from orchestrator.training.evaluate import evaluate_rows
from orchestrator.training.memory import peak_bytes
from orchestrator.training.state import Progress, Training
from orchestrator.training.steps import (
    GroupReport,
    StepSamples,
    compute_gradients,
    draw_samples,
    finish_step,
    learn_if_due,
    repeat_in_less_memory,
    report_to_group,
    update_weights,
    weigh_if_due,
)
from strategies.train_setup import PassTimes


def train(training: Training) -> Progress:
    """Train from `progress.step` to the end of `order`; returns the progress made.

    Raises Diverged, with the step and its samples, when a loss is not a number, and NothingFits when not even one
    sample at a time fits.
    """
    setup, progress, schedule, order = training.setup, training.progress, training.schedule, training.order
    setup.model.train()
    while progress.step < order.num_steps and progress.stopped is None:
        started, sent_before = time.perf_counter(), training.bytes_sent
        step, last = progress.step, progress.step + 1 == order.num_steps

        # Which samples, and which of them are this worker's.  Every worker computes the same division.
        samples = draw_samples(training, step)
        learn_if_due(training, samples)
        weigh_if_due(training, step)

        # Forward and backward, one micro-batch after the other; gradients add up, here and over the workers.
        attempt = compute_gradients(training, samples)
        if not training.updates.has_succeeded():
            # This worker's last update did, so it hands its state over, and computes these gradients again.
            training.repair_update()
            continue
        if attempt.out_of_memory is not None:
            training.gradients.abandon()

        # Over all workers: the loss of the step, who wants to stop or needs it again, how long each took.
        report = report_to_group(training, attempt, time.perf_counter() - started)
        if report.repeat:
            repeat_in_less_memory(training, attempt, report)
            continue
        if not math.isfinite(report.loss):
            own = [] if math.isfinite(attempt.loss) else [samples.ids_N[i] for i in samples.own]
            raise Diverged(step, [sample for suspects in training.group.gather(own) for sample in suspects])

        # The update.
        evaluates = bool(training.held_out) and schedule.evaluates_after(step, last)
        saves = schedule.saves_after(step, last) or report.stop is not None
        grad_norm = update_weights(training, step, is_awaited=evaluates or saves or setup.learner is not None)
        if not training.local and (overflow := training.overflow(step, samples.ids_N)):
            training.hooks.note(f"{overflow}; the step is repeated")
            continue
        finish_step(training, step)

        # What happened.
        progress.step = step + 1
        progress.count(samples.num_tokens, samples.num_supervised, report.num_computed)
        _record_step(training, samples, report, grad_norm, time.perf_counter() - started, sent_before)
        _adapt_shares(training, samples, report)

        # Held-out loss, best checkpoint, early stopping: the same numbers on every worker, so the same decisions.
        improved = evaluates and _evaluate(training)
        if report.stop and not last:
            progress.stopped = report.stop

        # Checkpoint: on schedule, at the best loss so far, and at the end however it comes.
        if saves or improved or progress.stopped is not None:
            _save(training, improved)
    training.gradients.close()
    return progress


def _record_step(
    training: Training, samples: StepSamples, report: GroupReport, grad_norm: float, seconds: float, sent_before: int
) -> None:
    progress, setup, hooks = training.progress, training.setup, training.hooks
    of_group: dict[str, Any] = {} if training.group.size == 1 else {
        "worker_tokens": [samples.tokens_R[replica] for replica in training.group.replicas],
        "worker_s": [round(s, 4) for s in report.seconds_W],
        "worker_peak_bytes": report.peak_bytes_W,
        "step_bytes_sent": None if setup.engine else training.bytes_sent - sent_before,  # DeepSpeed counts nothing
        "slowest": training.group.ranks_of(training.shares.slowest)[0],
    }  # fmt: skip
    reported = StepReport(
        step=progress.step,
        epoch=round(training.order.epoch(progress.step), 4),
        loss=report.loss,
        grad_norm=grad_norm,
        learning_rate=setup.optimizer.param_groups[0].get("scheduled_lr", setup.optimizer.param_groups[0]["lr"]),
        tokens=samples.num_tokens,
        supervised_tokens=samples.num_supervised,
        seconds=round(seconds, 4),
        tokens_per_s=round(samples.num_tokens / seconds, 1),
        peak_bytes=peak_bytes(training.device),
        samples=hash_ids(samples.ids_N),
        computed_tokens=report.num_computed if training.techniques.share_prefixes else None,
        known_tokens=report.num_known if setup.lower else None,
        loss_scale=progress.loss_scale["scale"] if training.scaler.is_enabled() else None,
        rewards=report.rewards,
        extra_loss=report.extra,
        **of_group,
        **report.stages,
        **(setup.streaming.report() if setup.streaming else {}),
    )
    hooks.record(reported)
    if report.times and progress.step == training.timeline_step:
        _record_timeline(training, report, report.times)


def _record_timeline(training: Training, report: GroupReport, times: PassTimes) -> None:
    """Record when each stage computed and waited in this step.  Collective."""
    stage, group = training.techniques.stage, training.group
    assert stage
    own = StageSpans.of(group.replica, stage.index, times, report.ended)
    training.hooks.record(StageTimeline(training.progress.step, align_to_first_pass(group.gather(own))))


def _adapt_shares(training: Training, samples: StepSamples, report: GroupReport) -> None:
    """Let the shares follow the replicas' pace."""
    shares, group = training.shares, training.group
    seconds_R = [max(report.seconds_W[rank] for rank in group.ranks_of(one)) for one in range(group.num_replicas)]
    if group.num_replicas > 1 and shares.observe(samples.tokens_R, seconds_R):
        rounded = [round(share, 4) for share in shares.shares]
        training.hooks.record(ShareChange(step=training.progress.step, shares=rounded))


def _evaluate(training: Training) -> bool:
    """Measure the held-out loss; whether it is the lowest so far of a model that may be handed back."""
    progress, held_out = training.progress, training.held_out
    assert held_out is not None
    try:
        found = evaluate_rows(training.setup, held_out, training.techniques, training.group, training.shares.shares)
    except NothingFits as error:
        training.hooks.note(f"the held-out rows were not measured after step {progress.step}: {error}")
        return False
    training.hooks.record(Evaluation(progress.step, found.loss, extra=found.rewards))
    if progress.step < training.setup.settled_after:
        return False
    return progress.add_eval_loss(found.loss, training.schedule.early_stopping_patience)


def _save(training: Training, is_best: bool) -> None:
    """Write a checkpoint."""
    progress, group, sharding = training.progress, training.group, training.setup.sharding
    if is_best:
        progress.best_checkpoint = f"step-{progress.step:08d}"
    # Unlike devices round differently, and local steps leave each worker moments of its own; from here on all continue
    # from what a restart would begin with.
    if training.local or not group.alike:
        training.align()
    if group.rank == 0 or sharding:
        name = training.hooks.save(progress)
        training.hooks.record(CheckpointReport(progress.step, name))
