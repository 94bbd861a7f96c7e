"""Every technique on every device: the verdict from the cost model, and beside it what was measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from typing import Any

from clusters.capability import ClusterCapability, DeviceCapability, NodeCapability
from orchestrator.data.sizes import rough_lengths
from orchestrator.job import model_files
from orchestrator.job.job_file import Job
from orchestrator.planning import planner, workload
from orchestrator.planning.explain import explain_unusable
from strategies import METHODS, TECHNIQUES
from strategies.compatibility import conflict
from strategies.cost.time import product_rate
from strategies.shape import ModelShape
from strategies.techniques.technique import Choice, Technique, judge
from strategies.workload import Dtype, Techniques, Workload

_TOO_SLOW = 8.0  # times longer than without

# What a device is judged with where no job is given: the largest of these whose 16-bit weights fill at most half of it.
_SIZES = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "vocab_size",
    "tie_word_embeddings",
)
REFERENCES: dict[str, dict[str, Any]] = {
    name: dict(zip(_SIZES, sizes, strict=True), model_type="llama")
    for name, *sizes in (
        ("SmolLM2-135M", 576, 30, 9, 3, 1536, 49152, True),
        ("Llama-3.2-1B", 2048, 16, 32, 8, 8192, 128256, True),
        ("Llama-3.2-3B", 3072, 28, 24, 8, 8192, 128256, True),
        ("Llama-3.1-8B", 4096, 32, 32, 8, 14336, 128256, False),
        ("Llama-3.1-70B", 8192, 80, 64, 8, 28672, 128256, False),
    )
}


def catalogue(
    cluster: ClusterCapability, job: Job | None, measure: bool, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """A row for each technique and kind of device."""
    rows = []
    for what, why in explain_unusable(cluster).items():
        say(f"{what} is not judged: {why}")
    for node, device in _kinds(cluster):
        model, work = _of_job(job) if job else _reference(device)
        max_length = min(2048, work.longest_sample)
        choice = _default_choice(work, device, node, max_length)
        num_devices = sum(len(n.gpus) for n in cluster.nodes) if device.kind != "cpu" else len(cluster.nodes)
        for technique in TECHNIQUES:
            verdict = judge(technique, choice, device, node, num_devices)
            row: dict[str, Any] = {"node": node.name, "device": device.name, "model": model, "about": technique.about}
            row["not_with"] = _not_with(technique, choice, device)
            row |= {"switch": technique.switch, "quality": technique.quality, **asdict(verdict)}
            if measure:
                say(f"measuring {technique.name} ...")
                row |= _measured(technique, device, node, verdict.level)
            rows.append(row)
    return rows


def _kinds(cluster: ClusterCapability) -> Iterator[tuple[NodeCapability, DeviceCapability]]:
    """Every different device once, of those that can be trained on."""
    seen = set()
    for node in cluster.nodes:
        for device in node.devices:
            if (device.kind, device.name) not in seen and device.problem is None:
                seen.add((device.kind, device.name))
                yield node, device


def _not_with(technique: Technique, choice: Choice, device: DeviceCapability) -> dict[str, str]:
    """The techniques that cannot be on together with this one on the device, each with its reason."""
    shape, several = choice.workload.shape, 8  # as if there were enough devices: alone or not is no conflict

    def clash(both: Choice) -> str | None:
        return conflict(both.method, both.techniques, device, shape, several)

    one = technique.on(choice)
    if clash(one) is not None:
        return {}
    found = {}
    for other in TECHNIQUES:
        if other is technique or clash(other.on(choice)) is not None:
            continue
        # Either may set what the other needs: only where both orders clash do the two exclude each other.
        reasons = [clash(other.on(one)), clash(technique.on(other.on(choice)))]
        if all(reasons):
            found[other.name] = str(reasons[0])
    return found


def _default_choice(work: Workload, device: DeviceCapability, node: NodeCapability, max_length: int) -> Choice:
    """What a technique is added to or taken from: the default method, packed, in the device's fastest format."""
    method = next(iter(METHODS.values()))()
    dtypes: tuple[Dtype, ...] = ("bfloat16", "float16", "float32")
    plain = Techniques("float32", "document", True, False, 1, max_length)
    if conflict(method, plain, device, work.shape):
        plain = replace(plain, attn_implementation="eager", packing=False)
    possible = [d for d in dtypes if conflict(method, replace(plain, dtype=d), device, work.shape) is None]
    fastest = max(possible, key=lambda dtype: product_rate(device, node, dtype)[0])
    return Choice(work, method, replace(plain, dtype=fastest))


def _reference(device: DeviceCapability) -> tuple[str, Workload]:
    room = (device.memory_bytes or 8 * 2**30) / (2 if device.kind != "cpu" else 16)
    shapes = {name: ModelShape.from_config(config) for name, config in REFERENCES.items()}
    name = next((name for name in reversed(shapes) if 2 * shapes[name].num_parameters <= room), next(iter(shapes)))
    mean, longest = 400, 1024
    return name, Workload(
        shape=shapes[name],
        num_samples=1000,
        num_tokens=1000 * mean,
        num_supervised_tokens=1000 * mean // 2,
        longest_sample=longest,
        global_batch_size=16,
        num_steps=62,
        num_samples_seen=62 * 16,
        mean_square_length=1.4 * mean**2,
        padded_ratio={1: 1.0, 2: 1.08, 4: 1.2, 8: 1.4, 16: 2.0},
        tree_ratio={1: 1.0, 8: 1.66},  # the mean of 28 tasks (LOG.md, "Beginnings that are computed once")
    )


def _of_job(job: Job) -> tuple[str, Workload]:
    config = model_files.config_of(job.spec.model.model_name_or_path, job.folder, job.spec.model.model_revision)
    max_length, _ = planner.resolve_max_length(job.spec, config)
    lengths, num_supervised = rough_lengths(job, max_length)
    work, _, _ = workload.describe(job.spec, workload.model_shape(config), lengths, num_supervised, 1)
    return job.spec.model.model_name_or_path, work


def _measured(technique: Technique, device: DeviceCapability, node: NodeCapability, level: str) -> dict[str, Any]:
    """Expected and measured ratios on the small model of strategies.measure.techniques."""
    if level in ("impossible", "not installed"):
        return {"problem": "impossible here" if level == "impossible" else level}
    if technique.needs_devices > 1:
        return {"problem": "needs several workers: tests/benchmarks/zero.py measures it"}
    from strategies.measure.techniques import measure, small_workload

    work = small_workload()
    choice = _default_choice(work, device, node, work.longest_sample)
    choice = choice.with_(per_device_train_batch_size=4)
    expected = judge(technique, choice, device, node)
    if expected.time_ratio is not None and expected.time_ratio > _TOO_SLOW:
        return {"expected_small_time": expected.time_ratio, "problem": "not tried: it would take minutes"}
    found = measure(technique, choice, device)
    with_it, without = technique.on(choice).estimate(device, node), technique.off(choice).estimate(device, node)
    return {
        "expected_small_memory": with_it.memory.tensors_bytes / without.memory.tensors_bytes,
        "expected_small_time": expected.time_ratio,
        "measured_memory": found.memory_ratio,
        "measured_time": found.time_ratio,
        "problem": found.problem,
    }
