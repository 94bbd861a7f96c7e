"""Stated keys that nothing of the job, or of the plan made for it, looks at.  Pure.

What a job states against itself is a mistake.  What only this plan has no use for, since the job left open what would
use it, is a notice; so is what is merely superfluous.  A run that continues is not asked: with fewer machines less of
its job is of use.
"""

from __future__ import annotations

import math

from clusters.capability import ClusterCapability
from orchestrator.job.sections.training import EvalSection
from orchestrator.job.spec import JobSpec
from orchestrator.planning.plan import Plan
from strategies.optimizers import ADAM_NUMBERS, OPTIMIZERS
from strategies.workload import Workload

_ANSWERS = ("max_new_tokens", "max_rows", "num_samples")  # of eval, which say something of generated answers


def job_mistakes(spec: JobSpec, is_local_model: bool) -> list[str]:
    """What the job states and by itself rules out; the model's files are here or come with a package, or do not."""
    found, revision = [], spec.model.model_revision
    if revision is not None and is_local_model:
        found.append(
            f"model.model_revision is {revision}, and {spec.model.model_name_or_path} does not come from the hub;"
            " remove it"
        )
    if spec.data.eval is None:
        found += [f"eval.{key} needs held-out rows; add data.eval or remove it" for key in _stated_answers(spec.eval)]
    elif spec.eval.metrics == []:
        found += [
            f"eval.{key} is stated, and eval.metrics is []: no answers are generated; add a metric or remove it"
            for key in _stated_answers(spec.eval)
        ]
    return found


def job_notices(spec: JobSpec, is_for_here: bool = True) -> list[str]:
    """What the job states although it changes nothing.

    A job that is planned for other machines may be sent there, where its slots are waited for.
    """
    found, train, tracking, wait = [], spec.train, spec.tracking, spec.cluster.wait_for_slots
    if train.optim != "auto":  # no mistake: other tools' files state the numbers beside any optimizer
        unread = {*ADAM_NUMBERS} - {*OPTIMIZERS[train.optim].adam_numbers}
        found += [
            f"train.{key} is {getattr(train, key):g}, and {train.optim} does not use it"
            for key in ADAM_NUMBERS
            if key in unread & train.model_fields_set
        ]
    if spec.data.eval is None and not spec.eval.before:
        found.append("eval.before is not used: there are no held-out rows (data.eval) to evaluate a model on")
    if wait is not None and is_for_here and spec.cluster.address == "local":
        found.append(
            f"cluster.wait_for_slots is {wait}, and cluster.address is local: on this machine nothing is waited for"
        )
    if "mlflow" not in tracking.report_to:
        found += [
            f"tracking.{key} is not used: tracking.report_to does not name mlflow"
            for key, value in (("mlflow_uri", tracking.mlflow_uri), ("experiment", tracking.experiment))
            if value is not None
        ]
    return found


def plan_mistakes(spec: JobSpec, plan: Plan) -> list[str]:
    """What the job states and cannot get of the plan made for it."""
    found = [text for text, is_open in _unused_engine(spec, plan) if not is_open]
    if isinstance(spec.eval.eval_steps, int) and spec.eval.eval_steps > plan.num_steps:
        needs = {
            "eval.early_stopping_patience": spec.eval.early_stopping_patience is not None,
            "checkpoint.load_best_model_at_end": spec.checkpoint.load_best_model_at_end is True,
        }
        found += [
            f"{key} compares held-out losses during the training, and eval.eval_steps {spec.eval.eval_steps} is more"
            f" than its {plan.num_steps} steps; lower eval.eval_steps or remove {key}"
            for key, is_stated in needs.items()
            if is_stated
        ]
    return found


def plan_notices(spec: JobSpec, plan: Plan, work: Workload, cluster: ClusterCapability) -> list[str]:
    """What the job states and this plan has no use for, or rounds."""
    strategy, stated = spec.strategy, spec.strategy.model_fields_set
    found = [text for text, is_open in _unused_engine(spec, plan) if is_open]
    if strategy.local_steps and plan.num_workers == 1 and not strategy.local_steps_reset:
        found.append(
            f"strategy.local_steps is {strategy.local_steps}: several workers train apart, and this plan has one, so"
            " that its steps are merely counted together; set it to null, or add a device"
        )
    if plan.num_workers == 1:
        found += [
            f"strategy.{key} is not used: it is of several workers, and this plan has one"
            for key in ("sync_dtype", "shares")
            if key in stated and getattr(strategy, key) != type(strategy).model_fields[key].default
        ]
    if not plan.metrics and spec.data.eval is not None and spec.eval.metrics == "auto":
        found += [
            f"eval.{key} is not used: no answers are generated here ({plan.reasons.get('eval.metrics', 'no metric')})"
            for key in _stated_answers(spec.eval)
        ]
    return [*found, *_rounded_accumulation(spec, plan, work), *_unknown_prices(spec, cluster)]


def _stated_answers(section: EvalSection) -> list[str]:
    """Keys that say something of answers and are stated, but for `auto`."""
    return [key for key in _ANSWERS if key in section.model_fields_set and getattr(section, key) != "auto"]


def _unused_engine(spec: JobSpec, plan: Plan) -> list[tuple[str, bool]]:
    """What is stated of DeepSpeed where it does not run, and whether the job leaves open that it does."""
    strategy, parts = spec.strategy, [part.techniques for part in plan.nodes]
    found = []
    if strategy.deepspeed is not None and not any(one.uses_engine for one in parts):
        text = (
            "strategy.deepspeed is not used: this plan neither divides by DeepSpeed nor offloads the optimizer; set"
            " strategy.mode to zero2, or remove it"
        )
        found.append((text, strategy.mode == "auto"))
    if strategy.nvme_path is not None and not any(one.uses_engine and one.offloads_optimizer for one in parts):
        text = (
            f"strategy.nvme_path is {strategy.nvme_path}, and this plan offloads neither weights nor optimizer; set"
            " strategy.offload to parameters, or remove it"
        )
        found.append((text, strategy.offload == "auto"))
    return found


def _rounded_accumulation(spec: JobSpec, plan: Plan, work: Workload) -> list[str]:
    """Packed rows hold several samples each: how many micro-batches they make is counted in tokens."""
    stated, part = spec.train.gradient_accumulation_steps, plan.nodes[0]
    techniques = part.techniques
    if not isinstance(stated, int) or not techniques.packing:
        return []
    rows = max(1, math.ceil(part.share * work.tokens_per_step / techniques.max_length))
    count = math.ceil(rows / techniques.per_device_train_batch_size)
    if count == stated:
        return []
    return [
        f"train.gradient_accumulation_steps is {stated}, and packed rows hold several samples each: a step of"
        f" {work.global_batch_size} samples is about {count} micro-batches of"
        f" {techniques.per_device_train_batch_size} x {techniques.max_length} tokens; data.packing: false keeps"
        f" {stated}"
    ]


def _unknown_prices(spec: JobSpec, cluster: ClusterCapability) -> list[str]:
    """Prices of machines that are not there; `*` is every machine's."""
    known = [node.name for node in cluster.nodes]
    if unknown := sorted({*spec.cost.nodes} - {"*", *known, *cluster.failed}):
        return [f"cost.nodes: {', '.join(unknown)} is no machine's name here; these are {', '.join(known)}"]
    return []
