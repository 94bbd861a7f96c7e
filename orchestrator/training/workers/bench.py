"""Runtime benchmarks on this machine, in this process: a training step dissected, a tuned model generating.

The planned set-up on the job's own batches; nothing is kept of it.
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from orchestrator.data.batches import collate
from orchestrator.data.order import Order
from orchestrator.data.packing import micro_batches
from orchestrator.data.prepare import datasets
from orchestrator.errors import JobError
from orchestrator.job.job_file import Job
from orchestrator.job.paths import write_text_file
from orchestrator.planning.plan import Plan, settings_of
from orchestrator.runs.run_folder import RunFolder
from orchestrator.training.loop import peak_bytes
from orchestrator.training.model.devices import device_like, planned_device
from orchestrator.training.workers import finished, preflight, worker
from strategies.measure import dissect, timeline
from strategies.measure.trace import LiveStorages
from strategies.step import host_memory

_WARM_UP = 2  # steps that compile kernels and fill caches


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
    part, location = plan.nodes[0], ready.data_files["model"]
    if part.techniques.uses_engine:
        raise JobError("bench runs one device: set strategy.mode: single and strategy.offload: none")
    device = planned_device(part)
    torch.set_num_threads(part.threads)
    data, _ = datasets(ready.data_files)
    say(f"loading the model, then {_WARM_UP + num_steps} steps ...")
    setup, techniques = worker.prepare(job, plan, part, location, device, lambda *_, **__: None)
    if bus_bytes_per_s:
        if not setup.streaming:
            raise JobError(f"--bus is for methods that send gradients over one; {plan.method['type']} does not")
        try:
            setup.streaming.emulate_bus(bus_bytes_per_s)
        except ValueError as error:
            raise JobError(f"--bus: {error}") from None
    order = Order(len(data), plan.global_batch_size, job.spec.train.seed, _WARM_UP + num_steps + 1)
    setup.model.train()
    timed: list[dissect.Timed] = []
    tokens, supervised, samples = [], [], []
    with host_memory.kept():
        for step in range(_WARM_UP + num_steps):
            ids, makers, learnt = _step(data, order, step, techniques)
            timed.append(dissect.timed_step(setup, makers, learnt, techniques, device))
            tokens.append(int(data.lengths[ids].sum()))
            supervised.append(learnt)
            samples.append(len(ids))
    steady = slice(_WARM_UP, None)
    _, makers, learnt = _step(data, order, _WARM_UP + num_steps, techniques)
    say("profiling one step ...")
    profiled = dissect.profiled_step(setup, [make().to(device) for make in makers], learnt, techniques)
    spans = []
    if with_timeline:
        say("two steps for the timeline ...")
        spans = [vars(span) for span in timeline.recorded(setup, makers, learnt, techniques, 2)]
    heaviest = preflight.heaviest(setup, data, techniques, plan.global_batch_size)[0]
    memory = dissect.memory_by_part(setup, heaviest, heaviest.targets_S.numel(), techniques)
    seconds = sum(one.step_s for one in timed[steady])
    achieved = plan.flops_per_token * sum(tokens[steady]) / seconds
    peak_rate = _ceiling(ready, plan)
    return {
        "kind": "train",
        **_where(job, plan, location),
        "settings": settings_of(plan),
        "steps": num_steps,
        "throughput": {
            "tokens_per_s": sum(tokens[steady]) / seconds,
            "supervised_tokens_per_s": sum(supervised[steady]) / seconds,
            "samples_per_s": sum(samples[steady]) / seconds,
        },
        "step_s": statistics.median(one.step_s for one in timed[steady]),
        "predicted_step_s": plan.nodes[0].time.step_s,
        "phases": {phase: statistics.mean(one.phases[phase] for one in timed[steady]) for phase in dissect.PHASES}
        | {"communication": 0.0},
        "predicted_communication_s": plan.sync_s,
        "parts": profiled.parts,
        "operators": [{"name": name, "seconds": spent, "calls": calls} for name, spent, calls in profiled.operators],
        **({"timeline": spans} if with_timeline else {}),
        "memory": memory,
        "predicted_memory": plan.nodes[0].memory.parts,
        "process_peak_bytes": peak_bytes(device),
        "flops_per_s": achieved,
        "ceiling_flops_per_s": peak_rate,
        "of_ceiling": achieved / peak_rate if peak_rate else None,
    }


def _step(data: Any, order: Order, step: int, techniques: Any) -> tuple[list[int], list[Callable[[], Any]], int]:
    """Samples of a step, a maker for each of its micro-batches, and its supervised tokens."""
    ids = order.sample_ids(step)
    lengths = data.lengths[ids].tolist()
    rows, max_length, packing = techniques.per_device_train_batch_size, techniques.max_length, techniques.packing
    groups = micro_batches(lengths, rows, max_length, packing)
    makers = [partial(collate, data, [ids[i] for i in group], packing) for group in groups]
    return ids, makers, int(data.num_supervised[ids].sum())


def _ceiling(ready: Any, plan: Plan) -> float | None:
    """The device's best matrix products in the format that is used, as the probe measured them."""
    node = next((n for n in ready.capability.nodes if n.name == plan.nodes[0].node), ready.capability.nodes[0])
    device = next((d for d in node.devices if d.name == plan.nodes[0].device), node.devices[0])
    return device.flops_per_s.get(plan.techniques.dtype)


def _where(job: Job, plan: Plan, location: str) -> dict[str, Any]:
    """What a number means nothing without."""
    import transformers

    return {
        "name": job.spec.name,
        "model": job.spec.model.model_name_or_path,
        "model_folder": location,
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
    plan = run.plan()
    location = finished.model_of(run)
    device = device_like(plan.nodes[0])
    torch.set_num_threads(plan.threads_per_worker * plan.num_workers)
    rows = []
    for name, model in finished.variants(run, job, device):
        model.eval()
        for prompt_length in prompt_lengths:
            for batch_size in batch_sizes:
                say(f"{name}: {batch_size} x {prompt_length} tokens ...")
                found = generation(model, batch_size, prompt_length, num_new)
                rows.append({"model": name, "batch_size": batch_size, "prompt_tokens": prompt_length, **found})
        del model
    return {"kind": "generate", **_where(job, plan, location), "new_tokens": num_new, "rows": rows}


@torch.no_grad()
def generation(model: Any, batch_size: int, prompt_length: int, num_new: int, repeats: int = 3) -> dict[str, float]:
    """Medians over `repeats`; greedy, with a cache, every row to its full length."""
    device, vocabulary = model.device, int(model.config.vocab_size)
    prompts = torch.randint(0, vocabulary, (batch_size, prompt_length), generator=torch.Generator().manual_seed(0))
    prompts = prompts.to(device)
    mask = torch.ones_like(prompts)

    def generate(count: int) -> float:
        began = time.perf_counter()
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
        return time.perf_counter() - began

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
    """Write a result, by default beside the runs under a name that tells what and when.  Raises JobError."""
    stamp = time.strftime("%Y%m%d-%H%M%S", time.localtime(result["time"]))
    file = file or folder / f"bench-{result['name']}-{result['kind']}-{stamp}.json"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise JobError(f"--output {file}: cannot be written: {error.strerror}") from None
    write_text_file(file, json.dumps(result, indent=1), "--output")
    return file
