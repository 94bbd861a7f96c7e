"""Benchmarks a training step and the generation of a trained model, on this machine, in this process.

The planned set-up on the job's own batches; nothing of it is kept.
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from orchestrator.data.batches import collate
from orchestrator.data.dataset import Dataset
from orchestrator.data.order import Order
from orchestrator.data.prepare import datasets
from orchestrator.errors import JobError
from orchestrator.job.job_file import Job
from orchestrator.job.paths import write_text_file
from orchestrator.planning.plan import Plan, settings_of
from orchestrator.runs.run_folder import RunFolder
from orchestrator.training.feed import micro_batches_of
from orchestrator.training.memory import peak_bytes
from orchestrator.training.model.devices import planned_device
from orchestrator.training.model.references import assume_references
from orchestrator.training.worker_context import WorkerContext
from orchestrator.training.workers import finished, preflight
from orchestrator.training.workers.setup import prepare_model
from strategies.measure import dissect, timeline
from strategies.measure.trace import LiveStorages
from strategies.step import host_memory, thread_waits
from strategies.step.supervised_logits import Batch
from strategies.train_setup import TrainSetup
from strategies.workload import Techniques

_WARM_UP = 2  # steps that compile kernels and fill caches


@dataclass(frozen=True)
class _Step:
    """A step's micro-batches, each made when it is called for, and what it holds."""

    batches: list[Callable[[], Batch]]
    num_samples: int
    num_tokens: int
    num_supervised: int  # tokens
    num_counted: int  # what the loss is a mean over
    num_computed: int  # tokens that go through the model, padding included


def bench_training(
    job: Job,
    ready: Any,
    num_steps: int,
    say: Callable[[str], None],
    with_timeline: bool = False,
    bus_bytes_per_s: float | None = None,
) -> dict[str, Any]:
    """Throughput, time by phase, part and operator, memory by part, and how near to the machine's ceiling.

    With a timeline also two steps layer by layer; with a bus an optimizer that streams waits for one of that rate.
    """
    plan: Plan = ready.plan
    part, folder = plan.nodes[0], ready.data_files.model
    if part.techniques.uses_engine:
        raise JobError("bench runs one device: set strategy.mode: single and strategy.offload: none")
    device = planned_device(part)
    thread_waits.use_threads(part.threads)
    data, _ = datasets(ready.data_files)
    say(f"loading the model, then {_WARM_UP + num_steps} steps ...")
    setup, techniques = prepare_model(WorkerContext(job, plan, part, folder, device))
    assume_references(plan, data)
    if bus_bytes_per_s:
        _emulate_bus(setup, plan, bus_bytes_per_s)
    order = Order(len(data), plan.global_batch_size, job.spec.train.seed, _WARM_UP + num_steps + 1)
    setup.model.train()
    steps = [_step(data, order.sample_ids(number), techniques) for number in range(_WARM_UP + num_steps + 1)]
    with host_memory.kept():
        timed = [dissect.timed_step(setup, step.batches, step.num_counted, techniques, device) for step in steps[:-1]]
    last = steps[-1]
    say("profiling one step ...")
    batches = [make().to(device) for make in last.batches]
    profiled = dissect.profiled_step(setup, batches, last.num_counted, techniques)
    spans = []
    if with_timeline:
        say("two steps for the timeline ...")
        spans = [vars(span) for span in timeline.record_spans(setup, last.batches, last.num_counted, techniques, 2)]
    heaviest = preflight.heaviest(setup, data, techniques, plan.global_batch_size)[0]
    return {
        "kind": "train",
        **_where(job, plan, folder),
        "settings": settings_of(plan),
        "steps": num_steps,
        **_times(plan, steps[_WARM_UP:-1], timed[_WARM_UP:], _ceiling(ready, plan)),
        "parts": profiled.parts,
        "operators": [{"name": name, "seconds": spent, "calls": calls} for name, spent, calls in profiled.operators],
        **({"timeline": spans} if with_timeline else {}),
        "memory": dissect.memory_by_part(setup, heaviest, heaviest.targets_S.numel(), techniques),
        "predicted_memory": part.memory.parts,
        "process_peak_bytes": peak_bytes(device),
    }


def _emulate_bus(setup: TrainSetup, plan: Plan, bytes_per_s: float) -> None:
    """Let an optimizer that streams wait for a bus of that rate.  Raises JobError."""
    if not setup.streaming:
        raise JobError(f"--bus is for methods that send gradients over one; {plan.method['type']} does not")
    try:
        setup.streaming.emulate_bus(bytes_per_s)
    except ValueError as error:
        raise JobError(f"--bus: {error}") from None


def _step(data: Dataset, sample_ids: list[int], techniques: Techniques) -> _Step:
    layout = techniques.packing, techniques.share_prefixes
    batches = [partial(collate, data, group, *layout) for group in micro_batches_of(data, sample_ids, techniques)]
    return _Step(
        batches,
        len(sample_ids),
        int(data.lengths[sample_ids].sum()),
        int(data.num_supervised[sample_ids].sum()),
        data.num_counted(sample_ids),
        sum(make().input_ids_BT.numel() for make in batches),
    )


def _times(
    plan: Plan, steps: Sequence[_Step], timed: Sequence[dissect.Timed], ceiling_flops_per_s: float | None
) -> dict[str, Any]:
    """Throughput, seconds by phase and FLOP/s of steady steps, beside what was predicted."""
    seconds, num_tokens = sum(one.step_s for one in timed), sum(step.num_tokens for step in steps)
    num_computed = sum(step.num_computed for step in steps)
    flops_per_s = plan.flops_per_token * num_computed / seconds
    phases = {phase: statistics.mean(one.phases[phase] for one in timed) for phase in dissect.PHASES}
    return {
        "throughput": {
            "tokens_per_s": num_tokens / seconds,
            "supervised_tokens_per_s": sum(step.num_supervised for step in steps) / seconds,
            "computed_tokens_per_s": num_computed / seconds,
            "samples_per_s": sum(step.num_samples for step in steps) / seconds,
        },
        "step_s": statistics.median(one.step_s for one in timed),
        "predicted_step_s": plan.nodes[0].time.step_s,
        "phases": phases | {"communication": 0.0},
        "predicted_communication_s": plan.sync_s,
        "flops_per_s": flops_per_s,
        "ceiling_flops_per_s": ceiling_flops_per_s,
        "of_ceiling": flops_per_s / ceiling_flops_per_s if ceiling_flops_per_s else None,
    }


def _ceiling(ready: Any, plan: Plan) -> float | None:
    """The device's best matrix products in the format that is used, as the probe measured them."""
    node = next((n for n in ready.capability.nodes if n.name == plan.nodes[0].node), ready.capability.nodes[0])
    device = next((d for d in node.devices if d.name == plan.nodes[0].device), node.devices[0])
    return device.flops_per_s.get(plan.techniques.dtype)


def _where(job: Job, plan: Plan, model_folder: str) -> dict[str, Any]:
    """The model, the device and the libraries, without which a number means nothing."""
    import transformers

    return {
        "name": job.spec.name,
        "model": job.spec.model.model_name_or_path,
        "model_folder": model_folder,
        "device": plan.nodes[0].device,
        "threads": plan.nodes[0].threads,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "time": time.time(),
    }


def bench_generation(
    run: RunFolder,
    job: Job,
    batch_sizes: Sequence[int],
    prompt_lengths: Sequence[int],
    num_new: int,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Time to the first token, time per further token, throughput and memory: base, adapter and merged side by side."""
    context, rows = finished.context_of(run, job), []
    for name, model in finished.variants(run, context):
        model.eval()
        for prompt_length in prompt_lengths:
            for batch_size in batch_sizes:
                say(f"{name}: {batch_size} x {prompt_length} tokens ...")
                found = generation(model, batch_size, prompt_length, num_new)
                rows.append({"model": name, "batch_size": batch_size, "prompt_tokens": prompt_length, **found})
        del model
    return {"kind": "generate", **_where(job, context.plan, context.model_folder), "new_tokens": num_new, "rows": rows}


@torch.no_grad()
def generation(model: Any, batch_size: int, prompt_length: int, num_new: int, repeats: int = 3) -> dict[str, float]:
    """Medians over `repeats`; greedy, with a cache, every row to its full length."""
    device, vocabulary = model.device, int(model.config.vocab_size)
    prompts = torch.randint(0, vocabulary, (batch_size, prompt_length), generator=torch.Generator().manual_seed(0))
    prompts = prompts.to(device)
    mask = torch.ones_like(prompts)

    def generate(count: int) -> float:
        started = time.perf_counter()
        model.generate(
            input_ids=prompts,
            attention_mask=mask,
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
        )
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - started

    generate(2)  # warms up
    first_s = statistics.median(generate(1) for _ in range(repeats))
    whole_s = statistics.median(generate(num_new) for _ in range(repeats))
    live = LiveStorages()
    for tensor in (*model.parameters(), *model.buffers()):
        live.watch(tensor)
    weights = live.live_bytes
    with live:
        generate(min(num_new, 4))
    return {
        "first_token_s": first_s,
        "next_token_s": (whole_s - first_s) / max(1, num_new - 1),
        "tokens_per_s": batch_size * num_new / whole_s,
        "weights_bytes": float(weights),
        "peak_bytes": float(live.take_peak()),
    }


def save(result: dict[str, Any], folder: Path, file: Path | None) -> Path:
    """Write a result, by default beside the runs, named after job, kind and time.  Raises JobError."""
    stamp = time.strftime("%Y%m%d-%H%M%S", time.localtime(result["time"]))
    file = file or folder / f"bench-{result['name']}-{result['kind']}-{stamp}.json"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise JobError(f"--output {file}: cannot be written: {error.strerror}") from None
    write_text_file(file, json.dumps(result, indent=1), "--output")
    return file
