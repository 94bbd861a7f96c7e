"""How fast each worker computes, and the shares of a step that follow from that."""

from __future__ import annotations

import math
import os
import time

from orchestrator.data.batches import collate
from orchestrator.data.order import Order
from orchestrator.errors import RunFailed
from orchestrator.job.job_file import Job
from orchestrator.runs.events import Member, WorkerGroup
from orchestrator.training.feed import micro_batches_of
from orchestrator.training.shares import Shares
from orchestrator.training.worker_context import WorkerContext
from orchestrator.training.workers.setup import Inputs
from strategies.step.out_of_memory import catch_out_of_memory, release_cache
from strategies.step.step import forward_backward
from strategies.techniques.precision import gradient_scaler
from strategies.workload import Techniques


def has_fixed_shares(job: Job, techniques: Techniques) -> bool:
    """Whether the planned shares stay whatever is measured."""
    return job.spec.strategy.shares == "planned" or job.spec.train.deterministic or techniques.uses_engine


def agree_on_shares(context: WorkerContext, inputs: Inputs, order: Order, step: int) -> Shares:
    """Measure each worker on its part of the next step and choose all shares by that.  Collective.

    Raises RunFailed where the workers read different plans.
    """
    group, plan, part = context.group, context.plan, context.part
    if group.size == 1:
        return Shares([1.0])
    sample_ids = order.sample_ids(min(step, order.num_steps - 1))  # a run that lacks only its end has no next step
    own = {
        "node": part.node,
        "device": part.device,
        "pid": os.getpid(),
        "planned_share": part.share,
        # Under DeepSpeed and in stages a worker cannot run a pass by itself.
        "tokens_per_s": None if inputs.setup.passes else measure_pace(inputs, sample_ids, part.share),
        "plan": plan.hash,
    }
    members = group.gather(own)
    if len({member["plan"] for member in members}) > 1:
        raise RunFailed(
            "the workers read different plans: is the run folder the same on every machine? "
            + ", ".join(f"{member['node']}: {member['plan']}" for member in members)
        )
    planned = [members[group.ranks_of(replica)[0]]["planned_share"] for replica in range(group.num_replicas)]
    paces = [member["tokens_per_s"] for member in members]
    is_fixed = has_fixed_shares(context.job, inputs.techniques)
    shares = Shares(planned, is_fixed) if is_fixed or None in paces else Shares.choose(planned, paces)
    rounded = [round(share, 4) for share in shares.shares]
    workers = [Member.from_json(one) for one in members]
    context.record(WorkerGroup(step=step, plan=plan.hash, members=workers, shares=rounded))
    return shares


def measure_pace(inputs: Inputs, sample_ids: list[int], share: float) -> float | None:
    """Tokens a second of one micro-batch of this worker, forward and backward; nothing is left behind.

    A micro-batch that runs out of memory is halved; None where not even one sample fits, for which training finds
    another way.
    """
    num_samples = max(1, round(share * len(sample_ids)))
    members = micro_batches_of(inputs.data, sample_ids[:num_samples], inputs.techniques)[0]
    pace = None
    while members and pace is None:
        with catch_out_of_memory():
            seconds = _time_pass(inputs, members)
            pace = int(inputs.data.lengths[members].sum()) / seconds
        inputs.setup.optimizer.zero_grad(set_to_none=True)
        if pace is None:
            release_cache()
            members = members[: len(members) // 2]
    return pace


def _time_pass(inputs: Inputs, sample_ids: list[int]) -> float:
    """Seconds of a pass forward and backward."""
    setup, techniques = inputs.setup, inputs.techniques
    batch = collate(inputs.data, sample_ids, techniques.packing, techniques.share_prefixes).to(setup.device)
    scaler = gradient_scaler(setup.device.type, "float32")
    seconds = math.inf
    setup.model.train()
    for _ in range(2):  # the first one compiles kernels and fills caches
        started = time.perf_counter()
        forward_backward(setup, batch, 1, techniques, scaler).item()
        seconds = time.perf_counter() - started
    return seconds
