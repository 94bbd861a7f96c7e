"""Why a plan is as it is: a sentence for every choice, the runners-up, and what is missing where nothing fits."""

from __future__ import annotations

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

from clusters.capability import ClusterCapability, DeviceCapability
from clusters.units import format_bytes, format_s
from orchestrator.job.job_file import value_of
from orchestrator.job.spec import JobSpec
from orchestrator.planning.candidates import Candidate, Pipeline, Placed, Slot
from orchestrator.planning.enumeration import Enumeration
from orchestrator.planning.evaluation import WholeJobs
from orchestrator.planning.goal import pareto, prior_of, why_not_beside
from orchestrator.planning.plan import Alternative
from orchestrator.planning.remedies import Accepts, PlanInputs, find_remedies
from orchestrator.planning.settings import describe_techniques
from orchestrator.planning.workload import explain_kinds, why_kept, why_shared
from strategies.compatibility import conflict
from strategies.contract import StrategyPlan
from strategies.cost.pipeline import WORTH_A_DEVICE
from strategies.cost.time import bus_rate
from strategies.techniques.libraries import INSTALL, absent_libraries, with_installed
from strategies.workload import Techniques, Workload

_GAIN = 0.95  # of memory or time: less is no reason to install something

IDLE = "is free for other jobs"  # what an excluded node does
_MOST_OTHER_WAYS = 8
_NEAR = 1.05  # times this close are no reason to decide otherwise


def describe_candidate(candidate: Candidate) -> str:
    """A candidate in one phrase: method, what matters of its techniques, where."""
    first = candidate.placed[0].plan.techniques
    parts = [candidate.method.name, first.dtype, *describe_techniques(first, with_loss=True)]
    parts += [f"{len(candidate.pipelines)} pipelines"] if len(candidate.pipelines) > 1 else []
    names = candidate.device_names
    where = " + ".join(
        f"{names.count(name)} x {name}" if names.count(name) > 1 else name for name in dict.fromkeys(names)
    )
    return f"{', '.join(parts)} on {where}"


def explain_excluded(
    chosen: Candidate,
    enumeration: Enumeration,
    jobs: WholeJobs,
    helper: str | None = None,
    stages: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Node -> why it does not train beside the others, and what it does or is good for instead.

    `stages` has that of nodes without a stage of the chosen pipeline.
    """
    taking_part = {node.name for node in chosen.nodes}
    wider = [
        (names, other)
        for other in sorted(enumeration.fitting, key=lambda other: other.step_s)
        if other.method.name == chosen.method.name and (names := {node.name for node in other.nodes}) > taking_part
    ]
    found = {}
    for slot in enumeration.slots:
        name = slot.node.name
        if name in taking_part or name in found:
            continue
        best = next((other for names, other in wider if name in names), None)
        if stages and name in stages:
            why = stages[name]
        elif best:
            why = why_not_beside(jobs.spec, chosen, best, jobs.phases)
        else:
            why = enumeration.rejections.of_slot(slot.label) or "it does not fit there"
        instead = "evaluates the base model meanwhile" if name == helper else IDLE
        found[name] = f"{why}. It {instead}"
    return found


def explain_unusable(cluster: ClusterCapability) -> dict[str, str]:
    """Device and node -> why no job can train on it, for all devices that no plan uses."""
    found: dict[str, str] = {}
    for node in cluster.nodes:
        for number, why in enumerate(node.problems):
            found[f"GPU ({node.name})" if not number else f"GPU {number + 1} ({node.name})"] = why
        for device in node.devices:
            why = device.problem or ("its memory is unknown" if device.memory_bytes is None else None)
            if why is not None:
                name = f"{device.name} ({node.name})"
                found[name if name not in found else f"{name}, {device.uuid or device.pci_bus_id}"] = why
    return found


def alternatives(
    spec: JobSpec,
    chosen: Candidate,
    fitting: Sequence[Candidate],
    num_parameters: int,
    larger: Sequence[Alternative] = (),
) -> tuple[Alternative, ...]:
    """At most eight other ways that differ in what a user would decide: those with more samples a step, the Pareto
    front, and the fastest of each other method, division and number of devices.

    Expected quality is the third cost where published runs say something of this model and task.
    """
    scores = {
        name: prior.score
        for name, method in {candidate.method.name: candidate.method for candidate in fitting}.items()
        if (prior := prior_of(spec, num_parameters, method))
    }

    def costs(candidate: Candidate) -> tuple[float, float, float]:
        return candidate.total_s, candidate.peak_bytes, -scores.get(candidate.method.name, 0.0)

    front = sorted(pareto(fitting, costs), key=lambda candidate: candidate.total_s)
    fastest: dict[tuple[str, int, int], Candidate] = {}
    for candidate in sorted(fitting, key=lambda c: c.total_s):
        division = -len(candidate.pipelines) or candidate.zero_stage
        fastest.setdefault((candidate.method.name, division, len(candidate.placed)), candidate)
    shown = [chosen]
    for candidate in (*fastest.values(), *front):
        if not any(_offers_as_much(known, candidate) for known in shown):
            shown.append(candidate)
    on_front = {id(candidate) for candidate in front}
    ranked = sorted(shown[1:], key=lambda candidate: (id(candidate) not in on_front, candidate.total_s))
    described = (
        Alternative(
            what=describe_candidate(other),
            total_s=other.total_s,
            peak_bytes=other.peak_bytes,
            quality=scores.get(other.method.name),
            why_not=_why_not(chosen, other, scores),
            on_front=id(other) in on_front,
        )
        for other in ranked
    )
    return (*larger, *described)[:_MOST_OTHER_WAYS]


def _offers_as_much(known: Candidate, other: Candidate) -> bool:
    """Whether a way is no other decision: the same method in the same precision, neither faster nor leaner by more than
    the near-equal part, on the same machines, or on more of them in about the same time.
    """
    if (known.method.name, known.dtype) != (other.method.name, other.dtype):
        return False
    if Counter(known.device_names) - Counter(other.device_names):
        return False
    if len(other.placed) > len(known.placed) and other.total_s > _NEAR * known.total_s:
        return False
    return known.total_s <= _NEAR * other.total_s and known.peak_bytes <= _NEAR * other.peak_bytes


def describe_larger_steps(chosen: Candidate, larger: Candidate, workload: Workload) -> Alternative:
    """What more samples a step would change."""
    size = workload.global_batch_size
    changes = f"{larger.num_steps} steps instead of {chosen.num_steps}, at the learning rate as it is: another model"
    return Alternative(
        what=f"train.global_batch_size: {size}, {describe_candidate(larger)}",
        total_s=larger.total_s,
        peak_bytes=larger.peak_bytes,
        quality=None,  # priors are of the usual batches
        why_not=f"{_compare(chosen, larger)}; {changes}",
        on_front=False,
    )


def _why_not(chosen: Candidate, other: Candidate, scores: Mapping[str, float]) -> str:
    parts = [_compare(chosen, other)]
    theirs, ours = scores.get(other.method.name), scores.get(chosen.method.name)
    if theirs is not None and ours is not None and theirs != ours:
        parts.append(f"expected score {theirs:.3f} against {ours:.3f} (prior)")
    if other.sync_s > 0.3 * other.step_s:
        whom = "other stages" if other.pipelines else "the network"
        parts.append(f"{other.sync_s / other.step_s:.0%} of each step waits for {whom}")
    return ", ".join(parts)


def _compare(chosen: Candidate, other: Candidate) -> str:
    slower, lighter = other.total_s / chosen.total_s, other.peak_bytes / chosen.peak_bytes
    speed = f"{slower:.2g}x the time" if slower > 1 else f"{1 / slower:.2g}x as fast"
    parts = ["about as fast" if 1 / _NEAR <= slower <= _NEAR else speed]
    parts.append("about as much memory" if 1 / _NEAR <= lighter <= _NEAR else f"{lighter:.2g}x the memory")
    return ", ".join(parts)


def explain_choice(
    spec: JobSpec, chosen: Candidate, fitting: Sequence[Candidate], workload: Workload
) -> dict[str, str]:
    """Job-file key -> reason, for every `auto` that the choice resolved."""
    part = chosen.placed[0]
    techniques, device = part.plan.techniques, part.slot.device
    needs = format_bytes(part.plan.memory.total_bytes)
    usable = (
        "unknown memory" if math.isinf(part.slot.memory_bytes) else f"{format_bytes(part.slot.memory_bytes)} usable"
    )
    others = sorted({candidate.method.name for candidate in fitting} - {chosen.method.name})
    other_methods = f"{', '.join(others)} would fit too" if others else "no other method fits"
    kernels = {"document": "one causal kernel a document", "flash_attention_2": "Ampere or newer"}
    reasons = {
        "method.type": f"best by goal.prefer: {spec.goal.prefer}; {other_methods}",
        "model.dtype": _why_dtype(techniques.dtype, device),
        "data.packing": "no padding; documents stay apart, so the result is the same"
        if techniques.packing
        else "padding costs less here than separate kernels would, or the model's attention cannot be packed",
        "data.share_prefixes": why_shared(chosen, workload),
        "train.cache_frozen_activations": why_kept(chosen, workload),
        "model.attn_implementation": kernels.get(techniques.attn_implementation, "the best this model can use"),
        "train.per_device_train_batch_size": f"needs about {needs} of {usable}",
        "train.gradient_checkpointing": "does not fit without, or leaves room for what is faster"
        if techniques.gradient_checkpointing
        else f"fits without: about {needs} of {usable}",
        "train.loss_type": "all supervised logits fit" if techniques.loss_type == "nll" else "saves logits",
        "train.optim": "AdamW with one kernel for all weights"
        if "8bit" not in techniques.optim
        else "fp32 moments do not fit",
        "strategy.offload": _why_offload(part.plan, device),
        "cluster.num_workers": "the devices that together are best by the goal",
    }
    reasons = {key: why for key, why in reasons.items() if value_of(spec, key) == "auto"}
    return reasons | explain_kinds(chosen, workload) | _explain_pipelines(spec, chosen, fitting)


def _explain_pipelines(spec: JobSpec, chosen: Candidate, fitting: Sequence[Candidate]) -> dict[str, str]:
    """Which layers lie where, what each stage and the slowest link take, and why the model is divided at all."""
    if not chosen.pipelines:
        return {}
    fastest = min((one for one in fitting if not one.pipelines), key=lambda one: one.step_s, default=None)
    why = "nothing else fits"
    if fastest is not None:
        why = f"a step takes {format_s(chosen.step_s)}, {format_s(fastest.step_s)} by {describe_candidate(fastest)}"
    run, stated, several = chosen.pipelines[0], spec.strategy.pipeline, len(chosen.pipelines) > 1
    counts = " and ".join(str(len(parts)) for parts in chosen.replicas)
    what = f"{len(chosen.pipelines)} pipelines of {counts} stages" if several else f"pipeline of {counts} stages"
    stages = [_describe_stages(parts, one) for parts, one in zip(chosen.replicas, chosen.pipelines, strict=True)]
    if several:
        shares = [f"{parts[0].share:.0%}" for parts in chosen.replicas]
        stages = [f"{share} of the samples, {text}" for share, text in zip(shares, stages, strict=True)]
    reasons = {
        "strategy.mode": (spec.strategy.mode, f"{what}: {why}"),
        "strategy.pipeline.stages": ("auto", ". ".join(stages)),
        "strategy.pipeline.wire": (stated.wire, f"{run.wire}: what hidden states are computed in"),
        "strategy.pipeline.ahead": (stated.ahead, f"{run.simulation.ahead}: the shortest step of those that fit"),
        "strategy.pipeline.replicas": (stated.replicas, _why_so_many(chosen, fitting)),
    }
    return {key: why for key, (value, why) in reasons.items() if value == "auto"}


def _describe_stages(parts: Sequence[Placed], run: Pipeline) -> str:
    """The stages of one pipeline, and its slowest link."""
    stages = []
    for part, one in zip(parts, run.simulation.passes, strict=True):
        streams = ", streamed from the host" if part.plan.techniques.streams_weights else ""
        stages.append(f"{part.plan.techniques.stage} on {part.slot.label}{streams}: {format_s(one.total_s)}")
    text = f"a micro-batch: {'; '.join(stages)}"
    if not run.boundaries:
        return text
    slowest = max(range(len(run.boundaries)), key=lambda number: run.boundaries[number].message_s)
    names = " - ".join(part.slot.node.name for part in parts[slowest : slowest + 2])
    return f"{text}; slowest link {names}: {format_s(run.boundaries[slowest].message_s)} each way"


def _why_so_many(chosen: Candidate, fitting: Sequence[Candidate]) -> str:
    """Why there are so many pipelines beside each other."""
    count = len(chosen.pipelines)
    if count == 1:
        return f"1: several beside each other, each with all layers, make no step {1 - WORTH_A_DEVICE:.0%} shorter"
    fewer = [one for one in fitting if 0 < len(one.pipelines) < count and one.method == chosen.method]
    single = min(fewer, key=lambda one: one.step_s, default=None)
    than = f", {format_s(single.step_s)} with {len(single.pipelines)}" if single else ""
    return f"{count}: a step takes {format_s(chosen.step_s)}{than}; a layer's gradients are summed between its holders"


def _why_offload(plan: StrategyPlan, device: DeviceCapability) -> str:
    """Whether something must lie on the host; of streamed weights, what their way over the bus costs."""
    if plan.techniques.offload == "none":
        return "fits without"
    if not plan.streamed_bytes:
        return "does not fit without"
    if device.kind == "cpu":
        return f"does not fit without; a micro-batch reads {format_bytes(plan.streamed_bytes)} of the model's files"
    bus, computing_s = bus_rate(device), (plan.time.compute_s + plan.time.memory_s) / plan.num_micro_batches
    sent_s, tokens = plan.streamed_bytes / bus, plan.tokens_per_micro_batch
    knows = device.host_to_device_bytes_per_s or device.device_to_host_bytes_per_s
    rate = f"{'' if knows else 'a guessed '}{bus / 1e9:.3g} GB/s"
    crossing = f"a micro-batch sends {format_bytes(plan.streamed_bytes)} over the bus, {format_s(sent_s)} at {rate}"
    if sent_s <= computing_s:
        return f"does not fit without; {crossing}, hidden behind {format_s(computing_s)} of computing"
    enough = math.ceil(tokens * sent_s / computing_s / 100) * 100
    why = f"the bus is the limit, {enough:,} tokens instead of {round(tokens):,} would hide it"
    return f"does not fit without; {crossing}: {why}"


def _why_dtype(dtype: str, device: DeviceCapability) -> str:
    flops, fp32_flops = device.flops_per_s.get(dtype), device.flops_per_s.get("float32")
    if flops and fp32_flops:
        source = device.sources.get(f"flops_per_s.{dtype}", "declared")
        return f"{flops / 1e9:.0f} GFLOP/s against {fp32_flops / 1e9:.0f} in fp32 ({source})"
    if dtype == "float32":
        return f"{device.name} has no bf16 or fp16 units that are known to be faster"
    if dtype == "bfloat16":
        by = f" ({', '.join(device.instruction_sets)})" if device.instruction_sets else ""
        return f"{device.name} computes it in hardware{by}"
    return f"{device.name} has fp16 but no bf16 units"


def explain_absent_libraries(enumeration: Enumeration, chosen: Candidate) -> dict[str, str]:
    """Library that is not installed -> what it would bring, in the settings chosen for the first device.

    What the job states stays; a gain is 5 % of the memory or of a step.
    """
    part, workload = chosen.placed[0], enumeration.workload
    slot, techniques = part.slot, part.plan.techniques
    device, switches = slot.device, enumeration.switches
    variants = [(method, techniques) for method in enumeration.methods if method.is_quantised]
    variants += [(chosen.method, replace(techniques, attn_implementation=kernel)) for kernel in switches.attentions]
    variants += [(chosen.method, replace(techniques, optim=optim)) for optim in switches.optims]
    found: dict[str, str] = {}
    for library, (method, changed) in itertools.product(absent_libraries(device), variants):
        equipped = with_installed(device, [library])
        if library in found or not conflict(method, changed, device, workload.shape, techniques.num_shards):
            continue
        if conflict(method, changed, equipped, workload.shape, techniques.num_shards):
            continue
        plan = method.estimate(replace(workload, share=part.share), equipped, slot.node, changed)
        needs, had = plan.memory.total_bytes, part.plan.memory.total_bytes
        step_s, before_s = plan.time.step_s, part.plan.time.step_s
        if needs > _GAIN * had and step_s > _GAIN * before_s:
            continue
        what = [method.name] + [new for new, old in _choices(changed, techniques) if new != old]
        found[library] = (
            f"{', '.join(what)}: {format_bytes(needs)} instead of {format_bytes(had)}, {format_s(step_s)} a step"
            f" instead of {format_s(before_s)} ({INSTALL[library]})"
        )
    return found


def _choices(changed: Techniques, techniques: Techniques) -> tuple[tuple[str, str], ...]:
    return (changed.attn_implementation, techniques.attn_implementation), (changed.optim, techniques.optim)


def why_nothing_fits(inputs: PlanInputs, enumeration: Enumeration, accepts: Accepts) -> str:
    """What is missing where, and the smallest changes that would help, each checked by planning again."""
    spec, lines = inputs.spec, _shortages(enumeration)
    if spec.strategy.mode == "pipeline":
        layers, replicas = enumeration.workload.shape.num_layers, spec.strategy.pipeline.replicas
        what = "a pipeline"
        if replicas not in ("auto", 1):
            what = f"{replicas} pipelines, each with all of them"
        lines.insert(0, f"no cut of the model's {layers} layers fits these devices as stages of {what}; each whole:")
    if enumeration.other_groups:
        other = min(enumeration.other_groups, key=lambda candidate: candidate.total_s)
        lines.append(
            f"{describe_candidate(other)} would fit, with {len(other.placed)} workers; the job states"
            f" cluster.num_workers: {spec.cluster.num_workers}, strategy.mode: {spec.strategy.mode}"
        )
    lines += [f"{device} is not used: {why}" for device, why in explain_unusable(enumeration.cluster).items()]
    lines += describe_remedies(inputs, accepts) or ["No single change helps: choose a smaller model and larger devices"]
    return "\n".join(dict.fromkeys(lines))


def describe_remedies(inputs: PlanInputs, accepts: Accepts) -> list[str]:
    """A line with the smallest changes that would help; none where none helps."""
    found = find_remedies(inputs, accepts)
    return ["It would fit with: " + "; or ".join(remedy.text for remedy in found)] if found else []


def _shortages(enumeration: Enumeration) -> list[str]:
    """What stands against each slot, slots of one reason in one line."""
    labels: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
    for slot in enumeration.slots:
        for method, why in _why_not_on(slot, enumeration):
            if slot.label not in labels[method, why]:
                labels[method, why].append(slot.label)
    return [
        f"{method} on {', '.join(which[:3])}{f' and {len(which) - 3} more' if len(which) > 3 else ''}: {why}"
        for (method, why), which in labels.items()
    ]


def _why_not_on(slot: Slot, enumeration: Enumeration) -> list[tuple[str, str]]:
    """Methods and what stands against them on a slot: the rule against the leanest, and the nearest miss.

    Of several methods a GPU's user wants the one in few bits where nothing larger fits, so its miss is the one shown.
    """
    rejections, label, found = enumeration.rejections, slot.label, list[tuple[str, str]]()
    misses = {method.name: rejections.nearest.get((label, method.name)) for method in enumeration.methods}
    leanest = [method.name for method in enumeration.methods if method.is_quantised and slot.device.kind != "cpu"]
    for name in leanest or misses:
        if misses[name] is None and (rule := rejections.rule_of(label, name)):
            found.append((name, rule))
    known = [miss for name in leanest if (miss := misses[name])] or [miss for miss in misses.values() if miss]
    if known:
        miss = min(known, key=lambda miss: miss.shortage.times)
        offload = miss.plan.techniques.offload
        with_offload = "" if offload == "none" else f" with {offload} offload"
        found.append((miss.plan.method + with_offload, miss.shortage.reason))
    return found
