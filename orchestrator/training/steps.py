"""One step of a training on one worker: its samples, their gradients, the update.

Two ways to compute gradients, one function each: `synchronous_gradients`, where every worker adds its part to a sum;
`local_gradients`, where workers train apart inside a step and what they changed is summed in place of gradients.  How
micro-batches go through the model is the setup's `Passes`.

Legend: N samples of a step over all workers, W workers, R replicas of the model (as many as workers, but for stages).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from clusters.safe.reading import first_line
from orchestrator.data.batches import collate
from orchestrator.data.packing import split_by_share
from orchestrator.errors import Diverged
from orchestrator.runs.events import BetweenReport, LearningReport
from orchestrator.training.evaluate import divergence_of, look_at, observe_rows, sample_losses
from orchestrator.training.feed import micro_batches_of
from orchestrator.training.memory import peak_bytes
from orchestrator.training.repair import UpdateFailed, update_does_not_fit
from orchestrator.training.state import STOP_REQUESTS, Training
from strategies.step.out_of_memory import catch_out_of_memory, is_out_of_memory
from strategies.step.passes import passes_of
from strategies.step.step import forward_backward, last_pass, update
from strategies.step.supervised_logits import Batch
from strategies.train_setup import PassTimes, StepPasses


@dataclass(frozen=True)
class StepSamples:
    """The samples of a step and their division among the workers: the same on every worker."""

    step: int
    ids_N: list[int]
    lengths_N: list[int]  # tokens
    num_supervised: int  # tokens
    num_counted: int  # what the loss is a mean over
    parts_R: list[list[int]]  # places in N of each replica's samples
    own: list[int]  # this worker's replica's part

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths_N)

    @property
    def tokens_R(self) -> list[int]:
        return [sum(self.lengths_N[i] for i in part) for part in self.parts_R]


def draw_samples(training: Training, step: int) -> StepSamples:
    """The samples of a step, divided by the replicas' shares."""
    ids_N = training.order.sample_ids(step)
    lengths_N = training.data.lengths[ids_N].tolist()
    parts_R = split_by_share(lengths_N, training.shares.shares)
    data = training.data
    num_supervised, num_counted = int(data.num_supervised[ids_N].sum()), data.num_counted(ids_N)
    return StepSamples(step, ids_N, lengths_N, num_supervised, num_counted, parts_R, parts_R[training.group.replica])


def _micro_batches(training: Training, samples: StepSamples, part: Sequence[int]) -> list[list[int]]:
    """Sample ids of each micro-batch of some samples."""
    return micro_batches_of(training.data, [samples.ids_N[i] for i in part], training.techniques)


def _begin(training: Training, step: int, batch: Batch) -> None:
    """A micro-batch's random numbers follow from what is in it: a resumed run draws the same."""
    if training.setup.noise:
        training.setup.noise.begin(step)
    training.random.begin(f"{training.schedule.seed}/{step}/{batch.sample_ids[0]}")


def synchronous_gradients(training: Training, samples: StepSamples) -> torch.Tensor:
    """Gradients of this worker's samples; they leave for the other workers during the last backward pass."""
    setup = training.setup

    def before_last() -> None:
        training.gradients.arm()
        if training.group.size == 1:
            last_pass(setup, training.schedule.update(samples.step))

    if setup.objective:
        own, count = [samples.ids_N[i] for i in samples.own], len(samples.ids_N)
        moved, short = divergence_of(setup, training.data, own, count, training.techniques, training.group)
        if short:
            raise MemoryError(short)
        setup.objective.begin(samples.num_counted, training.data.num_chosen_tokens(samples.ids_N), moved)
    step = _passes(training, samples, samples.num_counted, before_last)
    return passes_of(setup).run(_micro_batches(training, samples, samples.own), step)


def _passes(
    training: Training, samples: StepSamples, num_counted: int, before_last: Callable[[], None] = lambda: None
) -> StepPasses:
    return StepPasses(
        num_counted,
        training.techniques,
        training.scaler,
        take=training.feed.take,
        begin=partial(_begin, training, samples.step),
        filler=samples.ids_N[:1],
        before_last=before_last,
        begin_layer=training.random.begin_layer,
    )


def local_gradients(training: Training, samples: StepSamples) -> torch.Tensor:
    """Train on this worker's samples alone, a local step after the other; what that changed stands as gradients."""
    local, loss, learnt = training.local, torch.zeros((), device=training.device), 0
    assert local
    waiting = local.split(samples.own)
    while waiting:
        part = waiting[0]
        num_supervised = int(training.data.num_supervised[[samples.ids_N[i] for i in part]].sum())
        step = _passes(training, samples, num_supervised)
        mean = passes_of(training.setup).run(_micro_batches(training, samples, part), step)
        update(training.setup, training.scaler, training.schedule.update(samples.step))
        if overflow := training.overflow(samples.step, samples.ids_N):
            training.hooks.note(f"{overflow}; the local step is repeated")
            continue
        loss += mean * (num_supervised / samples.num_supervised)
        learnt += num_supervised
        del waiting[0]
    local.changes_to_gradients(learnt / samples.num_supervised)  # so that one step of SGD is the synchronous one
    return loss


@dataclass(frozen=True)
class Attempt:
    """What came of a worker's part of a step."""

    loss: float = 0.0  # its part of the step's
    num_computed: int = 0  # tokens that went through its model, padding included
    num_known: int = 0  # of them, those that did not pass frozen lower layers
    totals: Sequence[float] = ()  # of an objective over documents
    extra: Sequence[float] = ()  # of a loss beside the tokens'
    out_of_memory: str | None = None  # the error, where memory ran out


def compute_gradients(training: Training, samples: StepSamples) -> Attempt:
    """This worker's gradients, on their way to the others; what the last update left undone ends the passes early."""
    setup = training.setup
    compute = local_gradients if training.local else synchronous_gradients
    training.feed.count()
    if setup.extra_loss:
        setup.extra_loss.take()  # of passes that did not count: the preflight's, those before memory ran out
    try:
        loss_on_device = compute(training, samples)
        if samples.step + 1 < training.order.num_steps:
            _prepare_first_batch(training, samples.step + 1)
        loss = loss_on_device.item()
        training.gradients.flush()
    except UpdateFailed:
        return Attempt()
    except Exception as error:
        if setup.engine or not is_out_of_memory(error):  # DeepSpeed's others wait inside this very pass
            raise
        return Attempt(out_of_memory=first_line(error))
    totals = setup.objective.take() if setup.objective else ()
    extra = setup.extra_loss.take() if setup.extra_loss else ()
    return Attempt(loss, training.feed.count(), setup.lower.count() if setup.lower else 0, totals, extra)


def _prepare_first_batch(training: Training, step: int) -> None:
    """Make this worker's first micro-batch of a step, should shares and techniques stay as they are."""
    samples = draw_samples(training, step)
    batches = _micro_batches(training, samples, samples.own)
    training.feed.prepare(batches[0] if batches else samples.ids_N[:1])


@dataclass(frozen=True)
class GroupReport:
    """What all workers know of a step before its update."""

    loss: float  # of the whole step
    repeat: bool  # memory ran out somewhere
    short_of_memory: bool  # in this worker's replica
    stop: str | None  # one of STOP_REQUESTS, where any worker has one
    seconds_W: list[float]
    peak_bytes_W: list[int]
    num_computed: int  # tokens, over all replicas, padding included
    num_known: int  # of them, those that did not pass frozen lower layers
    ended: float  # when the sum ended, of time.perf_counter: on all workers the same moment, up to a round trip
    times: PassTimes | None = None  # of this worker's stage
    stages: dict[str, list[float]] = field(default_factory=dict)  # fields of StepReport
    rewards: dict[str, float] | None = None  # of an objective over documents
    extra: dict[str, float] | None = None  # of a loss beside the tokens'


def report_to_group(training: Training, attempt: Attempt, seconds: float) -> GroupReport:
    """Sum losses, requests and what each worker took.  Collective."""
    group, request = training.group, training.hooks.stop_request()
    requests = [float(request == known) for known in STOP_REQUESTS]
    times = training.setup.passes.times() if training.setup.passes else None
    of_stage = {} if times is None else {
        "stage_busy_s": times.busy_s,
        "stage_wait_s": times.wait_s,
        "stage_bytes_sent": times.bytes_sent,
        "stage_bytes_received": times.bytes_received,
    }  # fmt: skip
    own = (
        seconds,
        peak_bytes(training.device),
        float(attempt.out_of_memory is not None),
        attempt.num_computed,
        attempt.num_known,
        *of_stage.values(),
    )
    objective, extra_loss = training.setup.objective, training.setup.extra_loss
    totals = list(attempt.totals) or [0.0] * (objective.num_totals if objective else 0)
    extra = list(attempt.extra) or [0.0] * (extra_loss.num_totals if extra_loss else 0)
    loss, *rest = group.sum(
        [attempt.loss, *totals, *extra, *requests, *(value for one in own for value in group.at_own_rank(one))]
    )
    ended = time.perf_counter()
    totals, rest = rest[: len(totals)], rest[len(totals) :]
    extra, rest = rest[: len(extra)], rest[len(extra) :]
    stop = next((known for known, count in zip(STOP_REQUESTS, rest, strict=False) if count), None)
    measured, size = rest[len(STOP_REQUESTS) :], group.size
    by_value = (measured[start : start + size] for start in range(0, len(measured), size))
    seconds_W, peaks_W, short_W, computed_W, known_W, *stages = by_value
    short = any(short_W[rank] for rank in group.ranks_of(group.replica))
    return GroupReport(
        loss,
        any(short_W),
        short,
        stop,
        seconds_W,
        [int(peak) for peak in peaks_W],
        sum(int(computed_W[group.ranks_of(replica)[0]]) for replica in range(group.num_replicas)),
        int(sum(known_W)),
        ended,
        times,
        {name: [round(value, 5) for value in values] for name, values in zip(of_stage, stages, strict=True)},
        objective.metrics_of(totals) if objective else None,
        extra_loss.metrics_of(extra) if extra_loss else None,
    )


def repeat_in_less_memory(training: Training, attempt: Attempt, report: GroupReport) -> None:
    """Memory ran out somewhere: in that replica less at a time, and the same step again, everywhere."""
    training.gradients.discard()
    training.setup.optimizer.zero_grad(set_to_none=True)
    if training.local:
        training.local.reset()
    if report.short_of_memory:
        training.use_less_memory(attempt.out_of_memory)


def update_weights(training: Training, step: int, is_awaited: bool) -> float:
    """Move the weights by the summed gradients; returns the gradients' norm.

    Whether it went through everywhere is learnt during the next step, unless the weights are needed before
    (`is_awaited`).  Raises NothingFits where it fits nowhere, and Diverged, everywhere, where a gradient is not finite:
    before anything is saved, so that the last checkpoint is sound.
    """
    grad_norm, between, updates = math.nan, training.setup.between, training.updates
    ready = partial(between.gradients_ready, step) if between else None
    with catch_out_of_memory() as shortage:
        training.gradients.finish()
        if training.local:
            grad_norm = training.local.outer_step(step)
        else:
            grad_norm = update(training.setup, training.scaler, training.schedule.update(step), ready).item()
        if not training.scaler.is_enabled() and not 0 <= grad_norm < math.inf:  # DeepSpeed's is -1 then
            raise Diverged(step, training.order.sample_ids(step), has_loss=True)
    if shortage.reason is not None:
        if not updates.are_shared:
            raise update_does_not_fit(shortage.reason, updates.why_not_repaired)
        training.give_up_update()
    updates.announce(shortage.reason)
    # Stages that went through are in the next step's passes already: one that did not follows them there.
    is_repaired_now = shortage.reason is not None and updates.can_repair
    if (is_repaired_now or is_awaited) and not updates.has_succeeded():
        return training.repair_update(grad_norm)
    return grad_norm


def finish_step(training: Training, step: int) -> None:
    """Let the method do what it does after an update, and record it."""
    if training.local and (averaged := training.local.take_report()):
        training.hooks.record(BetweenReport.of(step + 1, averaged))
    if training.setup.between and (found := training.setup.between.step_done(step)):
        training.group.broadcast([training.setup.buffers[name] for name in training.setup.decided], 0)
        training.hooks.record(BetweenReport.of(step + 1, found))


def weigh_if_due(training: Training, step: int) -> None:
    """Let the method weigh the samples by their losses now, where it does before this step."""
    weighing, data = training.setup.weighing, training.data
    if weighing and weighing.is_due(step):
        losses_N = sample_losses(training.setup, data, training.techniques, training.group, training.shares.shares)
        weighed = weighing.weigh(losses_N, torch.as_tensor(data.num_supervised))
        training.hooks.record(LearningReport.of(step, weighed))


def learn_if_due(training: Training, samples: StepSamples) -> None:
    """Let the method learn before this step, where it does: from gradients of its first samples, from held-out rows."""
    learner, observer, held_out = training.setup.learner, training.setup.held_out_observer, training.held_out
    if learner and learner.is_due(samples.step):
        _learn(training, samples)
    if observer and observer.is_due(samples.step):
        assert held_out is not None  # refused before anything starts
        observe_rows(training.setup, held_out, training.techniques)
        training.hooks.record(LearningReport.of(samples.step, observer.end()))


def _learn(training: Training, samples: StepSamples) -> None:
    """Learn, then take over what the first worker learnt.

    Two devices of one kind differ in the last bits of a gradient, and so may choose other entries.  A worker whose
    memory runs out learns again in less.
    """
    assert training.setup.learner
    sample_ids, learnt = _rows_to_learn_from(training, samples), None
    while learnt is None:
        with catch_out_of_memory() as shortage:
            learnt = _learn_once(training, samples.step, sample_ids)
        if shortage.reason is not None:
            training.use_less_memory(shortage.reason)
    training.hooks.record(LearningReport.of(samples.step, learnt))
    training.hooks.note(learnt["text"])
    training.group.broadcast(training.replicated(), 0)


def _rows_to_learn_from(training: Training, samples: StepSamples) -> list[int]:
    """Of the step's samples; of the following steps' as well where the method only looks at them."""
    learner, order, found = training.setup.learner, training.order, list(samples.ids_N)
    assert learner
    step = samples.step
    while learner.num_looks and len(found) < learner.rows and (step := step + 1) < order.num_steps:
        found += order.sample_ids(step)
    return list(dict.fromkeys(found))[: learner.rows]


def _learn_once(training: Training, step: int, sample_ids: Sequence[int]) -> dict[str, Any]:
    """Passes that depend on the step and the samples alone, not on how these are laid out or what ran before."""
    setup, techniques, started = training.setup, training.techniques, time.perf_counter()
    learner, objective, num_counted = setup.learner, setup.objective, training.data.num_counted(sample_ids)
    assert learner
    if learner.num_looks:
        techniques = replace(techniques, share_prefixes=False)  # it looks at documents, each whole
    groups = micro_batches_of(training.data, sample_ids, techniques) * max(1, learner.num_looks)
    learner.begin_learning(len(groups))
    for number, group in enumerate(groups):
        if number:
            learner.next_learning()
        batch = collate(training.data, group, techniques.packing, techniques.share_prefixes).to(training.device)
        learner.watch(batch)
        if learner.num_looks:
            look_at(setup, training.data, batch, techniques)
            continue
        _begin(training, step, batch)
        if objective:
            objective.begin(num_counted, training.data.num_chosen_tokens(sample_ids))
        forward_backward(setup, batch, max(1, num_counted), techniques, training.scaler)
        if objective:
            objective.take()
    return {**learner.end_learning(), "seconds": round(time.perf_counter() - started, 2)}
