"""Where a card ends: its memory, and the range of fp16."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import torch

from clusters.safe.reading import first_line
from clusters.units import MIB
from strategies import METHODS
from strategies.contract import Method
from strategies.measure.trace import Lengths
from strategies.step.out_of_memory import is_out_of_memory
from strategies.step.step import Update, forward_backward, update
from strategies.workload import Techniques
from tests.first_contact_parts.bench import Bench
from tests.first_contact_parts.checks import Check, judged, not_run, raised

_ROOM_BYTES = 256 * MIB  # that the full card has left: less than the second step takes
_SCALED_STEPS = 8
_MOST_SKIPPED = 4  # of them: the scale begins at 65536 and is halved by each


def full_card(bench: Bench) -> Iterator[Check]:
    """Out of memory on purpose, under a cap: it is recognised, everything comes back, the next step runs."""
    if not bench.is_gpu:
        yield not_run("out of memory", "needs a GPU")
        return
    bench.clear()
    techniques = Techniques(bench.half, "document", True, False, 4, 1024)
    side = bench.side(METHODS["lora"](), techniques, (64,), bench.large)
    too_much = [Lengths((2048, 2048), (1024, 1024)).batch(packing=True).to(bench.device)]
    side.step()
    fits, held = side.batches, torch.cuda.memory_allocated(bench.device)
    total = torch.cuda.get_device_properties(bench.device).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved(bench.device) + _ROOM_BYTES) / total)
    try:
        side.batches = too_much
        side.step()
        text, is_known = "no error: 4096 tokens fitted into what was left", False
    except Exception as error:  # which one it is, is the question
        text, is_known = f"{type(error).__name__}: {first_line(error)[:100]}", is_out_of_memory(error)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    yield judged("out of memory is recognised", is_known, text)
    side.setup.optimizer.zero_grad(set_to_none=True)
    gc.collect()
    torch.cuda.empty_cache()
    left = torch.cuda.memory_allocated(bench.device) - held
    yield judged("its memory comes back", left < MIB, f"{left / MIB:.1f} MiB stay taken", left_bytes=left)
    side.batches = fits
    side.step()
    yield judged("the next step runs", True, "it did")


def scaling(bench: Bench) -> Iterator[Check]:
    """fp16: everything that trains can be unscaled, and the loss scale settles within a few steps."""
    cases: list[tuple[str, Method]] = [
        ("adapters", METHODS["lora"](lora_r=8)),
        ("adapters and biases", METHODS["lora"](lora_r=8, bias="all")),
        ("adapters and output layer", METHODS["lora"](lora_r=8, modules_to_save=["lm_head"])),
    ]
    for name, method in cases:
        try:
            yield _scaled(bench, name, method)
        except Exception as error:  # `Attempting to unscale FP16 gradients` is the one to expect
            yield raised(name, error)


def _scaled(bench: Bench, name: str, method: Method) -> Check:
    techniques = Techniques("float16", "document", True, False, 4, 512)
    config = {**bench.tiny, "model_type": "qwen2", "tie_word_embeddings": False}  # it has biases
    side = bench.side(method, techniques, bench.lengths[:2], config)
    supervised = sum(batch.targets_S.numel() for batch in side.batches)
    skipped = 0
    for _ in range(_SCALED_STEPS):
        for batch in side.batches:
            forward_backward(side.setup, batch, supervised, techniques, side.scaler)
        before = side.scaler.get_scale()
        update(side.setup, side.scaler, Update(1.0, 1.0))
        skipped += side.scaler.get_scale() < before
    wrong = [key for key, parameter in side.setup.parameters.items() if parameter.dtype != torch.float32]
    text = f"{skipped} of {_SCALED_STEPS} steps skipped, scale {side.scaler.get_scale():g}"
    text += f"; {wrong[0]} trains in {side.setup.parameters[wrong[0]].dtype}" if wrong else ""
    return judged(name, not wrong and skipped <= _MOST_SKIPPED, text, skipped=skipped, scale=side.scaler.get_scale())
