"""Memory and time: what the planner predicts beside what the card takes."""

from __future__ import annotations

import os
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from clusters.safe.reading import first_line
from clusters.units import GIB, MIB
from strategies import METHODS
from strategies.contract import Method
from strategies.step import document_attention
from strategies.techniques.libraries import lacks
from strategies.workload import Techniques
from tests.first_contact_parts.bench import Bench
from tests.first_contact_parts.checks import Check, judged, not_run, raised

_SLOWER = 2.0  # a step that takes so many times what was predicted, or so little of it, makes plans wrong
_STEPS = 3


def memory(bench: Bench) -> Iterator[Check]:
    """Tensors, reserved memory and seconds of a step, predicted beside measured; the optimizer's state exists."""
    for name, method, techniques in _ways(bench):
        needs_library = "8bit" in techniques.optim or method.load_arguments(techniques)
        reason = lacks(bench.capability, "bitsandbytes") if needs_library else None
        if reason:
            yield not_run(name, reason)
            continue
        try:
            yield _measured(bench, name, method, techniques)
        except Exception as error:  # out of memory on a small card, or a library: the others are still worth trying
            yield raised(name, error)
        bench.clear()


def _ways(bench: Bench) -> Iterator[tuple[str, Method, Techniques]]:
    plain = Techniques(bench.half, "document", True, False, 2, bench.long)
    lora, kept = METHODS["lora"](), replace(plain, gradient_checkpointing=True)
    yield "lora packed", lora, plain
    yield "lora padded", lora, replace(plain, attn_implementation="sdpa", packing=False)
    yield "lora checkpointing, chunked loss", lora, replace(kept, loss_type="chunked_nll")
    yield "qlora checkpointing", METHODS["qlora"](), kept
    yield "lora fp32", lora, replace(plain, dtype="float32")
    yield "full checkpointing, 8-bit AdamW", METHODS["full"](), replace(kept, optim="adamw_bnb_8bit")


def _measured(bench: Bench, name: str, method: Method, techniques: Techniques) -> Check:
    bench.clear()
    side = bench.side(method, techniques, (techniques.max_length,) * 2, bench.large)
    plan = method.estimate(side.choice.workload, bench.capability, bench.node, techniques)
    side.step()
    step_s = statistics.median(side.step() for _ in range(_STEPS))
    tensors = side.peak_bytes()
    predicted, most = plan.memory.tensors_bytes, plan.memory.high_bytes
    text = (
        f"tensors {tensors / GIB:.2f} GiB, predicted {predicted / GIB:.2f}; step {step_s:.3f} s, predicted"
        f" {plan.time.step_s:.3f}{' (a guess)' if plan.time.is_guess else ''}{_held(bench, plan.memory.total_bytes)}"
    )
    figures = {
        "predicted_bytes": predicted,
        "measured_bytes": tensors,
        "predicted_step_s": plan.time.step_s,
        "measured_step_s": step_s,
    }
    if bench.is_small or plan.time.is_guess:
        return Check(name, "measured", text, figures)
    fits, in_time = tensors <= most, 1 / _SLOWER <= step_s / plan.time.step_s <= _SLOWER
    return judged(name, fits and in_time, text, **figures)


def _held(bench: Bench, predicted: float) -> str:
    """What the process holds on a card beside its tensors, as the allocator and the driver see it."""
    if not bench.is_gpu:
        return ""
    reserved = torch.cuda.max_memory_reserved(bench.device)
    driver = _memory_of_this_process()
    told = f"{driver / GIB:.2f}" if driver else "not told"
    return f"; reserved {reserved / GIB:.2f} GiB, by the driver {told}, predicted in all {predicted / GIB:.2f}"


def _memory_of_this_process() -> int | None:
    """Bytes by nvidia-smi; None where it does not say."""
    query = ["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
    try:
        lines = subprocess.run(query, capture_output=True, text=True, timeout=30).stdout.splitlines()
    except (OSError, subprocess.TimeoutExpired):
        return None
    cells = [[cell.strip() for cell in line.split(",")] for line in lines]
    return next((int(mib) * MIB for pid, mib in cells if pid == str(os.getpid()) and mib.isdigit()), None)


def offload(bench: Bench) -> Iterator[Check]:
    """Activations or frozen weights in the host's memory: what a step costs beside none and beside checkpointing."""
    plain = Techniques(bench.half, "document", True, False, 2, bench.long)
    for name, techniques in (
        ("no offload", plain),
        ("checkpointing", replace(plain, gradient_checkpointing=True)),
        ("activations on the host", replace(plain, offload="activations")),
        ("weights on the host", replace(plain, gradient_checkpointing=True, offload="weights")),
    ):
        bench.clear()
        side = bench.side(METHODS["lora"](), techniques, (bench.long,) * 2, bench.large)
        side.step()
        step_s, peak = statistics.median(side.step() for _ in range(_STEPS)), side.peak_bytes()
        text = f"step {step_s:.3f} s, tensors {peak / GIB:.2f} GiB"
        yield Check(name, "measured", text, {"step_s": step_s, "tensors_bytes": peak})


def packed_kernels(bench: Bench) -> Iterator[Check]:
    """A packed row by this project's attention and by PyTorch's variable-length kernel: seconds there and back."""
    if not bench.is_gpu:
        yield not_run("packed rows", "needs a GPU")
        return
    for lengths in ((2048,) * 2, (256,) * 16, (64,) * 64):
        query, key, value = (_random(bench, heads, sum(lengths)) for heads in (32, 8, 8))

        def document(lengths=lengths, q=query, k=key, v=value) -> torch.Tensor:
            arguments: Any = {"document_lengths": lengths}
            return document_attention.document_attention(torch.nn.Module(), q, k, v, None, **arguments)[0]

        def varlen(lengths=lengths, q=query, k=key, v=value) -> torch.Tensor:
            return _varlen(lengths, q, k, v)

        for name, call in (("document", document), ("varlen_attn", varlen)):
            label = f"{len(lengths)} x {lengths[0]} {name}"
            try:
                seconds = _there_and_back(bench, call)
            except Exception as error:  # a kernel that this card or this torch does not have
                yield not_run(label, f"{type(error).__name__}: {first_line(error)[:120]}")
                continue
            yield Check(label, "measured", f"{1e3 * seconds:.2f} ms", {"seconds": seconds})


def _random(bench: Bench, num_heads: int, length: int) -> torch.Tensor:
    dtype = getattr(torch, bench.half)
    return torch.randn(1, num_heads, length, 64, device=bench.device, dtype=dtype, requires_grad=True)


def _varlen(lengths: tuple[int, ...], q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    borders = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device=q.device)
    by_token = (x[0].transpose(0, 1) for x in (q, k, v))
    longest = max(lengths)
    return varlen_attn(*by_token, borders, borders, longest, longest, window_size=(-1, 0), enable_gqa=True)


def _there_and_back(bench: Bench, call: Callable[[], torch.Tensor]) -> float:
    seconds = 0.0
    for count in (2, 10):  # the first ones compile and allocate
        bench.wait()
        began = time.perf_counter()
        for _ in range(count):
            call().float().sum().backward()
        bench.wait()
        seconds = (time.perf_counter() - began) / count
    return seconds
