"""What a job states must be possible together on at least one device.  Pure."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from clusters.capability import ClusterCapability
from clusters.units import format_count
from orchestrator.errors import JobError
from orchestrator.job.model_check import check_targets
from orchestrator.job.spec import JobSpec
from orchestrator.planning.candidates import Candidate, Slot, Switches, limit_per_node, slowest_link
from orchestrator.planning.goal import prior_of
from orchestrator.planning.workload import grows_with_workers
from strategies.compatibility import conflict, refuses_local_steps
from strategies.cost.pipeline import LEAST_BYTES_PER_S, MOST_DEVICES
from strategies.model.targets import architecture_of_shape
from strategies.optimizers import OPTIMIZERS
from strategies.techniques.sharding import refused_keys
from strategies.workload import StagePart, Techniques, Workload


def refuse_contradictions(spec: JobSpec, workload: Workload, slots: Sequence[Slot], switches: Switches) -> None:
    """Raises JobError for settings that no device could train with, whatever the plan chose for the rest."""
    refuse_beside_documents(spec)
    _refuse_beside_regularisation(spec)
    _refuse_strategy(spec, slots)
    _refuse_pipeline(spec, workload, slots)
    _refuse_workers(spec, len(limit_per_node(slots)))
    _refuse_kernels(spec)
    if all(slot.device.kind == "cpu" for slot in slots):
        _refuse_on_cpus(spec)
    check_targets(spec.methods(), architecture_of_shape(workload.shape))
    method = spec.methods()[0]
    if spec.goal.full_rank and not method.full_rank:
        raise JobError(
            f"goal.full_rank: {method.name} changes weights by a low rank only; set method.type to full or auto"
        )
    shape, goal = workload.shape, spec.goal
    if spec.bank.add and method.own_format:
        raise JobError(
            f"bank.add: the bank adds up pairs of A and B, and {method.name} hands back {method.own_format}, which is"
            " no sum of them; set it to false"
        )
    if goal.min_quality is not None and not any(prior_of(spec, shape.num_parameters, one) for one in spec.methods()):
        raise JobError(
            f"goal.min_quality is {goal.min_quality:g}, and no published run says what to expect of a model of"
            f" {format_count(shape.num_parameters)} parameters on this data; remove it, and measure with data.eval"
        )
    if (stated_workers(spec, len(slots)) or 1) > 1 and (reason := method.why_one_worker()):
        raise JobError(f"method.type: {reason}")
    if spec.strategy.local_steps and (reason := refuses_local_steps(method)):
        raise JobError(f"method.type: {reason}")
    if spec.strategy.local_steps and spec.train.optim != "auto" and OPTIMIZERS[spec.train.optim].averages:
        raise JobError(
            f"strategy.local_steps: workers that train apart average their weights, and {spec.train.optim} keeps"
            " another average of its own; set it to null, or train.optim to auto"
        )
    if spec.cluster.nice is not None and spec.cluster.address != "local":
        raise JobError(
            "cluster.nice belongs to address: local; elsewhere workers have the niceness of RAY_worker_niceness when"
            " their machine joined"
        )
    if not spec.cluster.resident and spec.cluster.address != "local":
        raise JobError("cluster.resident belongs to address: local, and cluster.address names another; remove it")
    most = max((slot.threads for slot in slots), default=0)
    if spec.train.threads != "auto" and 0 < most < spec.train.threads:
        raise JobError(f"train.threads is {spec.train.threads}, and no worker has more than {most} cores; lower it")
    _refuse_conflicts(spec, workload, slots, switches)


def refuse_beside_documents(spec: JobSpec) -> None:
    """Raises JobError with all that an objective over whole documents cannot be combined with."""
    objective, strategy, train = spec.build_objective(), spec.strategy, spec.train
    if not objective.is_by_document:
        return
    stated = {
        f"strategy.mode: {strategy.mode}": strategy.mode in ("zero2", "zero3", "pipeline"),
        "strategy.deepspeed": strategy.deepspeed is not None,
        f"strategy.offload: {strategy.offload}": strategy.offload not in ("auto", "none"),
        "strategy.local_steps": bool(strategy.local_steps),
        "train.torch_compile": train.torch_compile,
        "train.cache_frozen_activations": train.cache_frozen_activations in (True, "disk"),
        "method.samples: hard": all(method.weighs_samples for method in spec.methods()),
        f"method: {{type: {spec.method.type}}}": all(method.streams for method in spec.methods()),
        "bank.add": spec.bank.add,
    }
    if not objective.writes_text:
        stated |= _stated_beside_scores(spec)
    if found := [f"{what}: {_WHY_NOT_BESIDE[what.split(':')[0]]}" for what, is_stated in stated.items() if is_stated]:
        raise JobError([f"objective.type {objective.name} beside {text}" for text in found])


def _refuse_beside_regularisation(spec: JobSpec) -> None:
    """Raises JobError with all that noise on embeddings or smoothed labels cannot be combined with."""
    strategy, train, objective = spec.strategy, spec.train, spec.build_objective()
    each_row = "each row has noise of its own, so that nothing of it is known from another; set it to auto"
    elsewhere = {
        "strategy.mode: pipeline": strategy.mode == "pipeline",
        "strategy.offload: weights": strategy.offload == "weights",
    }
    found = [
        f"train.neftune_noise_alpha beside {what}: it is untested there; set that to auto"
        for what, is_stated in elsewhere.items()
        if train.neftune_noise_alpha and is_stated
    ]
    found += [
        f"train.neftune_noise_alpha beside {key}: true: {each_row}"
        for key, value in (
            ("data.share_prefixes", spec.data.share_prefixes),
            ("train.cache_frozen_activations", train.cache_frozen_activations),
        )
        if train.neftune_noise_alpha and value is True
    ]
    if train.label_smoothing_factor and objective.is_by_document:
        found.append(
            f"train.label_smoothing_factor: objective.type {objective.name} is of whole documents, and no token's label"
            " is trained; remove it, or use objective.label_smoothing where the objective has it"
        )
    found += [
        f"train.label_smoothing_factor beside {what}: it is untested there; set that to auto"
        for what, is_stated in elsewhere.items()
        if train.label_smoothing_factor and is_stated
    ]
    if found:
        raise JobError(found)


def _stated_beside_scores(spec: JobSpec) -> dict[str, bool]:
    """Keys that say something of answers, which a model with a score neither learns nor writes."""
    metrics, data, evaluated = spec.eval.metrics, spec.data, spec.eval.model_fields_set
    masks = ("completion_only_loss", "assistant_only_loss", "train_on_eos")
    return {
        f"eval.metrics: {metrics}": metrics not in ("auto", []),
        "eval.max_new_tokens": "max_new_tokens" in evaluated,
        "eval.num_samples": "num_samples" in evaluated,
        "train.loss_type": spec.train.loss_type != "auto",
        **{f"data.{key}": key in data.model_fields_set for key in masks},
    }


_NO_TEXT = "a model with a score writes no answers"
_NO_TOKENS = "a score is of the whole document, and no token's loss is computed"
_BY_TOKEN = "its passes sum losses of tokens, and an objective needs those of whole documents with a reference"
_WHY_NOT_BESIDE = {
    "strategy.mode": f"{_BY_TOKEN}; set it to auto, ddp or zero1",
    "strategy.deepspeed": f"{_BY_TOKEN}; remove it",
    "strategy.offload": "it is untested with a reference; set it to none",
    "strategy.local_steps": "it is untested; set it to null",
    "train.torch_compile": "switching the adapter off would compile the model anew; set it to false",
    "train.cache_frozen_activations": "it keeps one document a sample; set it to auto",
    "method.samples": "it weighs rows by the losses of their tokens; set it to all",
    "method": "it updates weights beside the computation, which is untested here; use another method",
    "eval.metrics": f"{_NO_TEXT}; set it to auto or [], its held-out rows are measured by their rewards",
    "eval.max_new_tokens": f"{_NO_TEXT}; remove it",
    "eval.num_samples": f"{_NO_TEXT}; remove it",
    "train.loss_type": f"{_NO_TOKENS}; set it to auto",
    "data.completion_only_loss": f"{_NO_TOKENS}; remove it",
    "data.assistant_only_loss": f"{_NO_TOKENS}; remove it",
    "data.train_on_eos": f"{_NO_TOKENS}; remove it",
    "bank.add": "the bank compares adapters by the loss of answers' tokens; set it to false",
}


def _refuse_strategy(spec: JobSpec, slots: Sequence[Slot]) -> None:
    strategy = spec.strategy
    if decided := refused_keys(strategy.deepspeed or {}):
        raise JobError(
            [f"strategy.deepspeed.{key}: the plan decides it; set it by {where}" for key, where in decided.items()]
        )
    workers, count = spec.cluster.num_workers, len(limit_per_node(slots))
    if strategy.mode == "ddp" and (count < 2 or workers == 1):
        raise JobError(
            "strategy.mode: ddp trains on several devices, and here is one worker; set it to auto, or add a device and"
            " leave cluster.num_workers at auto"
        )
    if strategy.mode.startswith("zero") and (count < 2 or workers == 1):
        raise JobError(
            f"strategy.mode: {strategy.mode} divides among devices, and here is one worker; set it to auto, or"
            " cluster.num_workers to at least 2"
        )
    if strategy.local_merge != "factors" and not strategy.local_steps:
        raise JobError(
            "strategy.local_steps_merge says how workers that train apart come together: set strategy.local_steps, or"
            " leave it out"
        )
    if strategy.local_steps_reset and strategy.local_steps_merge == "factors":
        raise JobError(
            "strategy.local_steps_reset begins new pairs where products are averaged: set strategy.local_steps_merge:"
            " product, or leave it out"
        )
    if strategy.local_steps and strategy.mode.startswith("zero"):
        raise JobError("strategy.local_steps: workers that train apart hold everything; set strategy.mode to ddp")


def _refuse_pipeline(spec: JobSpec, workload: Workload, slots: Sequence[Slot]) -> None:
    """Raises JobError with what the job states of a pipeline that cannot be."""
    strategy, pipeline, found = spec.strategy, spec.strategy.pipeline, list[str]()
    if strategy.mode not in ("auto", "pipeline"):
        if pipeline.model_fields_set:
            keys = ", ".join(f"strategy.pipeline.{key}" for key in sorted(pipeline.model_fields_set))
            raise JobError(f"{keys}: strategy.mode is {strategy.mode}; set it to pipeline, or leave these keys out")
        return
    layers, count = workload.shape.num_layers, len(limit_per_node(slots))
    if isinstance(pipeline.replicas, int) and pipeline.replicas > 1:
        found += _replica_mistakes(spec, workload, pipeline.replicas, count)
    if isinstance(pipeline.stages, int) and pipeline.stages > layers:
        found.append(
            f"strategy.pipeline.stages is {pipeline.stages}, and the model has {layers} layers, of which each stage"
            " needs one; lower it"
        )
    if strategy.mode == "pipeline":
        found += _stated_pipeline_mistakes(spec, count, layers)
    elif pipeline.model_fields_set and (other := _rules_out_pipelines(spec)):
        keys = ", ".join(f"strategy.pipeline.{key}" for key in sorted(pipeline.model_fields_set))
        found.append(f"{keys}: with {other} no pipeline is made; remove one of them")
    if found:
        raise JobError(found)


def _replica_mistakes(spec: JobSpec, workload: Workload, replicas: int, num_slots: int) -> list[str]:
    """What stands against so many pipelines beside each other."""
    stated, workers, samples = spec.strategy.pipeline.stages, spec.cluster.num_workers, workload.global_batch_size
    key, usable = f"strategy.pipeline.replicas is {replicas}", min(num_slots, MOST_DEVICES)
    have = f"{usable} devices can train" if num_slots <= MOST_DEVICES else f"at most {MOST_DEVICES} make pipelines"
    found = []
    if replicas > samples:
        found.append(f"{key}, and a step has {samples} samples; lower it, or raise train.global_batch_size")
    if isinstance(stated, int) and replicas * stated > usable:
        found.append(f"{key} with {stated} stages each: that takes {replicas * stated} devices, and {have}; lower one")
    elif replicas >= usable > 1:
        enough = f"lower it to {usable - 1}" if usable > 2 else "set it to auto"
        found.append(f"{key}: one of them at least has two devices, and {have}; {enough}, or set strategy.mode to ddp")
    if isinstance(workers, int) and isinstance(stated, int) and replicas * stated != workers:
        found.append(f"{key} with {stated} stages each, and cluster.num_workers {workers}; set one of them to auto")
    elif isinstance(workers, int) and replicas >= workers > 1:
        found.append(f"{key}, and cluster.num_workers {workers}: one of them at least has two devices; lower it")
    return found


def allows_pipelines(spec: JobSpec) -> bool:
    """Whether the job leaves room for a pipeline.

    A step that is stated as so many samples a worker is one of workers with all layers, unless a pipeline is stated.
    """
    is_open = spec.strategy.mode == "auto" and not grows_with_workers(spec)
    is_open &= spec.train.gradient_accumulation_steps == "auto"
    return (is_open or spec.strategy.mode == "pipeline") and _rules_out_pipelines(spec) is None


def _rules_out_pipelines(spec: JobSpec) -> str | None:
    """What the job states beside a pipeline's keys that belongs to other modes."""
    if spec.build_objective().is_by_document:
        return f"objective.type {spec.objective.type}"
    if spec.train.neftune_noise_alpha:
        return "train.neftune_noise_alpha"
    if spec.train.label_smoothing_factor:
        return "train.label_smoothing_factor"
    if spec.strategy.deepspeed is not None:
        return "strategy.deepspeed"
    return "strategy.local_steps" if spec.strategy.local_steps else None


def _make_pipelines(workers: int, stages: int, replicas: int | str) -> bool:
    """Whether so many workers make pipelines of so many stages; several that are stated are looked at elsewhere."""
    return workers == stages or (replicas == "auto" and workers % stages == 0) or replicas not in ("auto", 1)


def _stated_pipeline_mistakes(spec: JobSpec, num_slots: int, num_layers: int) -> list[str]:
    strategy, stages, workers = spec.strategy, spec.strategy.pipeline.stages, spec.cluster.num_workers
    replicas, found = strategy.pipeline.replicas, []
    if num_layers < 2:
        found.append("strategy.mode: pipeline divides layers among devices, and the model has one; set it to auto")
    elif isinstance(workers, int) and num_layers < workers <= MOST_DEVICES and replicas in ("auto", 1):
        found.append(
            f"cluster.num_workers is {workers}, and the model has {num_layers} layers, of which each stage needs one;"
            " lower it"
        )
    if num_slots < 2:
        found.append("strategy.mode: pipeline divides layers among devices, and here is one worker; set it to auto")
    elif isinstance(stages, int) and stages > num_slots:
        found.append(
            f"strategy.pipeline.stages is {stages}, and {num_slots} devices can train; lower it to {num_slots}"
        )
    if isinstance(workers, int) and not 2 <= workers <= MOST_DEVICES:
        found.append(
            f"cluster.num_workers is {workers}, and a pipeline has 2 to {MOST_DEVICES} stages, one on each; set it to"
            " auto"
        )
    if isinstance(stages, int) and isinstance(workers, int) and not _make_pipelines(workers, stages, replicas):
        found.append(f"strategy.pipeline.stages is {stages} and cluster.num_workers {workers}; set one of them to auto")
    if strategy.deepspeed is not None:
        found.append(
            "strategy.deepspeed configures ZeRO, of which a pipeline has none: remove it, or set strategy.mode to zero2"
        )
    if strategy.local_steps:
        found.append("strategy.local_steps: stages pass on every micro-batch; remove it, or set strategy.mode to ddp")
    return found


def refuse_slow_links(spec: JobSpec, slots: Sequence[Slot], cluster: ClusterCapability) -> None:
    """Raises JobError where a pipeline is stated and no link could carry its hidden states."""
    names = list(dict.fromkeys(slot.node.name for slot in slots))
    if spec.strategy.mode != "pipeline" or len(names) < len(slots) or len(names) < 2:
        return
    rates = {pair: slowest_link(pair, cluster)[0] for pair in itertools.combinations(names, 2)}
    (one, other), best = max(rates.items(), key=lambda item: item[1])
    if best < LEAST_BYTES_PER_S:
        raise JobError(
            f"strategy.mode: the best link of these machines, {one} - {other}, carries {8e-6 * best:.2g} Mbit/s, and a"
            f" pipeline needs {8e-6 * LEAST_BYTES_PER_S:.0f}: hidden states cross it with every micro-batch. Join the"
            " machines by a faster one, or set strategy.mode to auto"
        )


def _refuse_workers(spec: JobSpec, count: int) -> None:
    """Raises JobError for more workers than there are devices."""
    workers = spec.cluster.num_workers
    if isinstance(workers, int) and workers > count:
        raise JobError(f"cluster.num_workers is {workers}, with devices for {count}: set it to auto, or add machines")


def _refuse_kernels(spec: JobSpec) -> None:
    attention, packing, compiled = spec.model.attn_implementation, spec.data.packing, spec.train.torch_compile
    if attention == "document" and packing is False:
        raise JobError("model.attn_implementation: document needs data.packing: true")
    if compiled and packing is True and attention in ("auto", "document"):
        raise JobError("train.torch_compile would recompile for every set of document lengths; set data.packing: false")
    if attention.startswith("flash") and spec.model.dtype == "float32":
        raise JobError(f"model.attn_implementation: {attention} computes in 16 bits; set model.dtype to auto")


def _refuse_on_cpus(spec: JobSpec) -> None:
    attention = spec.model.attn_implementation
    if attention.startswith("flash") or attention == "flex_attention":
        raise JobError(f"model.attn_implementation: {attention} needs a GPU; set it to auto")
    if spec.train.use_liger_kernel:
        raise JobError("train.use_liger_kernel: Liger's kernels are for NVIDIA's GPUs; set it to false")
    if spec.strategy.offload not in ("auto", "none", "weights"):
        raise JobError("strategy.offload: a CPU's memory is the host's already; set it to auto, or to weights")


def _refuse_conflicts(spec: JobSpec, workload: Workload, slots: Sequence[Slot], switches: Switches) -> None:
    """Raises JobError where no device can combine the method with the switches that the job states."""
    attention, packing = spec.model.attn_implementation, spec.data.packing
    shares, keeps = bool(switches.share_prefixes), switches.cache_frozen_activations or False
    stated: dict[str, Any] = {
        "optim": spec.train.optim if spec.train.optim != "auto" else "adamw_torch_fused",
        "loss_type": spec.train.loss_type if spec.train.loss_type != "auto" else "nll",
        "packing": packing if packing != "auto" else attention == "document" or shares or bool(keeps),
        "gradient_checkpointing": spec.train.gradient_checkpointing is True
        or (spec.strategy.offload == "weights" and spec.train.gradient_checkpointing == "auto"),
        "offload": spec.strategy.offload if spec.strategy.offload != "auto" else "none",
        "torch_compile": switches.torch_compile if spec.strategy.mode == "pipeline" else False,
        "liger_kernel": switches.liger_kernel,
        "stage": StagePart(0, 2, 0, 1) if spec.strategy.mode == "pipeline" else None,
        "local_merge": switches.local_merge,
        "share_prefixes": shares,
        "cache_frozen_activations": keeps,
    }
    kernels = ("document",) if shares else ("sdpa", "eager")  # eager computes every model's attention
    kernels = (attention,) if attention != "auto" else kernels
    devices = {slot.kind: slot.device for slot in slots}.values()
    reasons = []
    for method, device, dtype, stage, kernel in itertools.product(
        spec.methods(), devices, switches.dtypes, switches.zero_stages, kernels
    ):
        by_memory = stage == 1 and not switches.deepspeed
        techniques = Techniques(
            dtype,
            kernel,
            per_device_train_batch_size=1,
            max_length=8,
            zero_stage=stage,
            state_share=0.5 if by_memory else None,
            **stated,
        )
        for count in (2,) if stage else (1, 2):
            reasons.append(conflict(method, techniques, device, workload.shape, count))
    if reasons and all(reasons):
        raise JobError(f"the job's settings do not go together: {max(reasons, key=reasons.count)}")


def stated_workers(spec: JobSpec, num_slots: int) -> int | None:
    """How many workers the job states, by their number or by its mode; None where it leaves that open."""
    stated, mode = spec.cluster.num_workers, spec.strategy.mode
    if isinstance(stated, int):
        return stated
    return {"ddp": num_slots, "single": 1}.get(mode)


def has_stated_workers(spec: JobSpec, candidate: Candidate, num_slots: int) -> bool:
    """Whether a candidate is of as many workers as the job states, and a pipeline where it states one."""
    if spec.strategy.mode == "pipeline" and not candidate.pipelines:
        return False
    return stated_workers(spec, num_slots) in (None, len(candidate.placed))
