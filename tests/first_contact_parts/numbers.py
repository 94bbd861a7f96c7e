"""Whether what the card computes is right: against fp32 on the CPU, against itself, across a checkpoint."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from orchestrator.training import checkpoint
from strategies import METHODS
from strategies.contract import Method
from strategies.engines.uneven_zero import shard_by_memory
from strategies.measure.techniques import Side
from strategies.step.state import gather, restore
from strategies.step.step import Update, forward_backward, last_pass, update
from strategies.techniques.libraries import lacks
from strategies.workload import Techniques
from tests.first_contact_parts.bench import Bench, largest_difference, weights_of
from tests.first_contact_parts.checks import Check, judged, not_run, raised

_ROUNDING = {"float32": 1e-3, "bfloat16": 0.1, "float16": 0.02}  # of gradients: norm of the difference over the norm
_KERNELS = ("fmha", "flash", "efficient_attention", "varlen", "cudnn_attention", "attention_math")
_ADAPTER_SPREAD = 0.05  # of the adapters: PEFT's begin at zero, where most gradients vanish


def exact(bench: Bench) -> Iterator[Check]:
    """Loss and gradients of every attention kernel and layout against fp32 on the CPU, and which kernel ran."""
    first = bench.side(_lora(), _techniques("float32", "document", True), bench.lengths, bench.tiny, on_cpu=True)
    for index, parameter in enumerate(first.setup.parameters.values()):
        noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index))
        parameter.data.copy_(_ADAPTER_SPREAD * noise)
    weights = {name: parameter.detach().clone() for name, parameter in first.setup.model.named_parameters()}
    reference = _loss_and_gradients(first)
    for dtype, attention, packing in _ways(bench):
        name = f"{dtype} {attention} {'packed' if packing else 'padded'}"
        reason = lacks(bench.capability, "flash_attn") if bench.is_gpu else "needs a GPU"
        if attention == "flash_attention_2" and reason:
            yield not_run(name, reason)
            continue
        try:
            yield _against(bench, name, _techniques(dtype, attention, packing), weights, reference)
        except Exception as error:  # a kernel may refuse in any way: that is the finding
            yield raised(name, error)


def _ways(bench: Bench) -> Iterator[tuple[str, str, bool]]:
    yield "float32", "document", True
    yield "float32", "sdpa", False
    for attention, packing in (
        ("document", True),
        ("sdpa", True),
        ("sdpa", False),
        ("flash_attention_2", True),
        ("eager", False),
    ):
        yield bench.half, attention, packing


def _against(
    bench: Bench,
    name: str,
    techniques: Techniques,
    weights: dict[str, torch.Tensor],
    reference: tuple[float, torch.Tensor],
) -> Check:
    side = bench.side(_lora(), techniques, bench.lengths, bench.tiny)
    with torch.no_grad():
        for key, parameter in side.setup.model.named_parameters():
            parameter.copy_(weights[key])
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if bench.is_gpu else []
    with torch.profiler.profile(activities=activities, acc_events=True) as profiler:
        loss, gradients = _loss_and_gradients(side)
        bench.wait()
    keys = {event.key for event in profiler.key_averages()}
    kernels = sorted({key.removeprefix("aten::")[:50] for key in keys if any(part in key for part in _KERNELS)})
    loss_error = abs(loss / reference[0] - 1)
    error = ((gradients - reference[1]).norm() / reference[1].norm()).item()
    is_right = max(loss_error, error) <= _ROUNDING[techniques.dtype]
    text = (
        f"loss {loss_error:.1e}, gradients {error:.1e} off fp32 on the CPU; {', '.join(kernels) or 'no kernel named'}"
    )
    return judged(name, is_right, text, loss_error=loss_error, gradient_error=error)


def _loss_and_gradients(side: Side) -> tuple[float, torch.Tensor]:
    """Of all micro-batches of the step; gradients end to end, on the CPU."""
    supervised = sum(batch.targets_S.numel() for batch in side.batches)
    pass_through = torch.amp.GradScaler(side.device.type, enabled=False)
    techniques = side.choice.techniques
    losses = [forward_backward(side.setup, batch, supervised, techniques, pass_through) for batch in side.batches]
    gradients = [parameter.grad for parameter in side.setup.parameters.values()]
    flat = torch.cat([gradient.detach().float().cpu().flatten() for gradient in gradients if gradient is not None])
    return sum(loss.item() for loss in losses), flat


def streamed(bench: Bench) -> Iterator[Check]:
    """Two steps with frozen weights that visit the card, and with resident ones: the same bits, two layers at once."""
    for name in ("lora", "nf4", "int8"):
        reason = None if name == "lora" else lacks(bench.capability, "bitsandbytes")
        if reason:
            yield not_run(name, reason)
            continue
        method = METHODS["lora"](lora_r=8) if name == "lora" else METHODS["qlora"](lora_r=8, bnb_quant_type=name)
        plain = replace(_techniques(bench.half, "document", True), gradient_checkpointing=True)
        try:
            yield _against_resident(bench, name, method, plain)
        except Exception as error:  # a driver or a library may refuse in any way: that is the finding
            yield raised(name, error)


def _against_resident(bench: Bench, name: str, method: Method, techniques: Techniques) -> Check:
    found, most = [], 0
    for one in (techniques, techniques, replace(techniques, offload="weights")):
        side = bench.side(method, one, bench.lengths, bench.tiny)
        side.step(), side.step()
        found.append(weights_of(side))
        most = side.stream.counts.most_visitors if side.stream else 0
    noise, difference = largest_difference(*found[:2]), largest_difference(found[0], found[2])
    text = f"weights differ by {difference:.1e}, two resident runs by {noise:.1e}; {most} layers on the device at most"
    return judged(name, difference <= noise and most <= 2, text, difference=difference, noise=noise)


def resume(bench: Bench) -> Iterator[Check]:
    """Four steps, and two with a checkpoint there and back and two more: the same bits."""
    cases: list[tuple[str, Method, str]] = [
        ("lora, dropout, fused AdamW", METHODS["lora"](lora_r=8, lora_dropout=0.1), "adamw_torch_fused"),
        ("lora, AdamW", METHODS["lora"](lora_r=8), "adamw_torch"),
        ("lora, 8-bit AdamW", METHODS["lora"](lora_r=64), "adamw_bnb_8bit"),
        ("full, fused AdamW", METHODS["full"](), "adamw_torch_fused"),
    ]
    for name, method, optim in cases:
        reason = lacks(bench.capability, "bitsandbytes") if "8bit" in optim else None
        if reason:
            yield not_run(name, reason)
            continue
        try:
            yield _resumed(bench, name, method, _techniques(bench.half, "document", True, optim))
        except Exception as error:  # a library, or the restored state: either is the finding
            yield raised(name, error)


def _resumed(bench: Bench, name: str, method: Method, techniques: Techniques) -> Check:
    straight, again = (_four_steps(bench, method, techniques, False) for _ in range(2))
    through = _four_steps(bench, method, techniques, True)
    difference, noise = largest_difference(straight, through), largest_difference(straight, again)
    if difference and noise:
        text = f"two runs without a checkpoint differ by {noise:.1e} already, the resumed one by {difference:.1e}"
        return Check(name, "measured", text, {"difference": difference, "noise": noise})
    text = f"resumed weights differ by {difference:.1e}" if difference else "bit-equal"
    return judged(name, not difference, text, difference=difference, noise=noise)


def _four_steps(bench: Bench, method: Method, techniques: Techniques, through_checkpoint: bool) -> list[torch.Tensor]:
    side = bench.side(method, techniques, bench.lengths, bench.tiny)
    torch.manual_seed(3)
    side.step(), side.step()
    if through_checkpoint:
        held = gather(side.setup)
        assert held is not None  # one worker holds everything
        with tempfile.TemporaryDirectory() as folder:
            path = checkpoint.save(Path(folder), held, {"step": 2})
            side = bench.side(method, techniques, bench.lengths, bench.tiny)
            saved = checkpoint.read(path, print)
            assert saved is not None  # it was written a moment ago
            saved.restore(side.setup)
    torch.manual_seed(4)
    side.step(), side.step()
    return weights_of(side)


def divided(bench: Bench) -> Iterator[Check]:
    """The optimizer's state divided over a group of one: three steps with a restore are those of the undivided one."""
    import torch.distributed as dist

    whole = bench.side(_lora(), _techniques(bench.half, "document", True), bench.lengths, bench.tiny)
    for _ in range(3):
        whole.step()
    backend = "nccl" if bench.is_gpu and dist.is_nccl_available() else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        side = bench.side(_lora(), _techniques(bench.half, "document", True), bench.lengths, bench.tiny)
        side.setup = shard_by_memory(side.setup, [1.0], bench.device)
        side.step(), side.step()
        held = gather(side.setup)
        assert held is not None  # the first worker's
        restore(side.setup, held)
        side.step()
    finally:
        dist.destroy_process_group()
    difference = largest_difference(weights_of(whole), weights_of(side))
    yield judged("state of one worker", not difference, f"weights differ by {difference:.1e}", difference=difference)


def lanes(bench: Bench) -> Iterator[Check]:
    """LSP-Offload: the overlapped schedule against the sequential one, bit by bit, over 12 steps."""
    sequential, layerwise, again = (_offloaded(bench, name) for name in ("sequential", "layerwise", "layerwise"))
    difference, noise = largest_difference(sequential, layerwise), largest_difference(layerwise, again)
    text = f"layerwise differs from sequential by {difference:.1e}, from itself by {noise:.1e}"
    yield judged("overlapped schedule", not difference and not noise, text, difference=difference, noise=noise)


def _offloaded(bench: Bench, schedule: str) -> list[torch.Tensor]:
    knobs = {"subspace_size": 16 if bench.is_small else 64, "schedule": schedule, "projection": "random"}
    dtype = "bfloat16" if bench.half == "bfloat16" else "float32"  # the method takes no fp16
    techniques = _techniques(dtype, "document", True)
    side = bench.side(METHODS["experimental_lsp_offload"](**knobs), techniques, bench.lengths[:2], bench.tiny)
    supervised = sum(batch.targets_S.numel() for batch in side.batches)
    for _ in range(12):
        last_pass(side.setup, Update(1.0, 1.0))
        for batch in side.batches:
            forward_backward(side.setup, batch, supervised, techniques, side.scaler)
        update(side.setup, side.scaler, Update(1.0, 1.0))
    assert side.setup.streaming is not None  # what the method is about
    side.setup.streaming.settle()
    return weights_of(side)


def _lora() -> Method:
    return METHODS["lora"](lora_r=8)


def _techniques(dtype: str, attention: str, packing: bool, optim: str = "adamw_torch_fused") -> Techniques:
    return Techniques(dtype, attention, packing, False, 4, 512, optim)  # type: ignore[arg-type]
