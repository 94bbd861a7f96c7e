"""A technique's measured effect on this machine: a small model trained with and without it, on a clock.

Random weights, the real step of `strategies.step.step`.  Memory is what the step's tensors take; time is the median of
alternating steps, so that a busy moment hits both sides.
"""

from __future__ import annotations

import contextlib
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from clusters.capability import DeviceCapability
from clusters.safe.reading import first_line
from strategies.engines.shard import shard
from strategies.measure import trace
from strategies.measure.trace import Lengths
from strategies.model.heads import inner_model
from strategies.shape import ModelShape
from strategies.step.quantise import quantise_on
from strategies.step.step import Update, forward_backward, update
from strategies.step.weight_stream import stream_weights
from strategies.techniques import checkpointing
from strategies.techniques.liger import use_liger
from strategies.techniques.precision import gradient_scaler
from strategies.techniques.technique import Choice, Technique
from strategies.train_setup import TrainSettings, TrainSetup
from strategies.workload import Workload

# 34 million parameters: large enough that matrix products count, small enough for two cores.
SMALL_MODEL: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 1536,
    "vocab_size": 8192,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
}
_LENGTHS = (256, 40, 120, 64, 200, 88, 150, 106)  # tokens of the samples of one step: 1024 together
_COMMON = 32  # that all begin with, where that is computed once


@dataclass(frozen=True)
class Measured:
    """Ratios with over without, as measured; None with the reason where it could not run."""

    memory_ratio: float | None
    time_ratio: float | None
    problem: str | None = None


def small_workload() -> Workload:
    """The step that is measured, as the formulas see it."""
    return Workload(
        shape=ModelShape.from_config(SMALL_MODEL),
        num_samples=len(_LENGTHS),
        num_tokens=sum(_LENGTHS),
        num_supervised_tokens=sum(_LENGTHS) // 2,
        longest_sample=max(_LENGTHS),
        global_batch_size=len(_LENGTHS),
        num_steps=1,
        num_samples_seen=len(_LENGTHS),
        mean_square_length=sum(n * n for n in _LENGTHS) / len(_LENGTHS),
        padded_ratio={1: 1.0, 2: 1.08, 4: 1.25, 8: 2.0},
        tree_ratio={rows: 128 * rows / (128 * rows - _COMMON * (rows - 1)) for rows in (1, 2, 4, 8)},
    )


def measure(technique: Technique, choice: Choice, device: DeviceCapability, num_steps: int = 3) -> Measured:
    """Run both sides.  Nothing is raised for a technique that fails: that is a result too."""
    try:
        sides = [Side(technique.off(choice), device), Side(technique.on(choice), device)]
        for side in sides:
            side.step()  # compiles, allocates, makes the optimizer's state
        times: list[list[float]] = [[], []]
        for _ in range(num_steps):
            for side, seconds in zip(sides, times, strict=True):
                seconds.append(side.step())
        without_s, with_s = (statistics.median(seconds) for seconds in times)
        peaks = [side.peak_bytes() for side in sides]
    except Exception as error:  # any library may refuse in any way; the reason is printed beside the verdict
        return Measured(None, None, first_line(error, 160))
    return Measured(peaks[1] / peaks[0], with_s / without_s)


class Side:
    """One way of training a model of random weights, ready to be stepped.

    `lengths` are the tokens of the samples of one step, half of each supervised.
    """

    def __init__(
        self,
        choice: Choice,
        device: DeviceCapability,
        config: dict[str, Any] = SMALL_MODEL,
        lengths: Sequence[int] = _LENGTHS,
    ) -> None:
        self.choice, self.device = choice, torch.device(device.torch_device)
        self.settings = TrainSettings(1e-4, 0.0, choice.techniques.optim, 0.9, 0.999, 1e-8, choice.techniques, seed=1)
        arguments = choice.method.load_arguments(choice.techniques)
        streams = choice.techniques.streams_weights
        visits = streams and bool(arguments) and self.device.type != "cpu"
        with quantise_on(self.device) if visits else contextlib.nullcontext():
            built = _build(choice, self.settings, arguments, torch.device("cpu") if streams else self.device, config)
        self.setup: TrainSetup = shard(built, self.settings, self.device)
        self.stream = stream_weights(self.setup, self.device) if streams else None
        if choice.techniques.liger_kernel:
            use_liger(inner_model(self.setup.model))
        if choice.techniques.torch_compile:
            self.setup.model.compile(dynamic=True)
        self.batches = self._batches(lengths)
        self.scaler = gradient_scaler(self.device.type, choice.techniques.dtype)

    def _batches(self, tokens: Sequence[int]) -> list[Any]:
        t = self.choice.techniques
        cap = self.choice.workload.longest_sample
        lengths = sorted((min(n, cap) for n in tokens), reverse=True)
        groups: list[list[int]] = [[]]
        for length in lengths:
            full = (
                sum(groups[-1]) + length > t.per_device_train_batch_size * t.max_length
                if t.packing
                else len(groups[-1]) >= t.per_device_train_batch_size
            )
            if groups[-1] and full:
                groups.append([])
            groups[-1].append(length)
        made = [Lengths(tuple(group), tuple(max(1, n // 2) for n in group), _COMMON) for group in groups]
        return [lengths.batch(t.packing, t.share_prefixes).to(self.device) for lengths in made]

    def step(self) -> float:
        """One optimizer step; its seconds."""
        began = time.perf_counter()
        supervised = sum(batch.targets_S.numel() for batch in self.batches)
        for batch in self.batches:
            forward_backward(self.setup, batch, supervised, self.choice.techniques, self.scaler)
        update(self.setup, self.scaler, Update(1.0, 1.0)).item()
        return time.perf_counter() - began

    def peak_bytes(self) -> float:
        """Most bytes that tensors take in a step, weights and optimizer included."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            storages = {t.untyped_storage()._cdata: t.untyped_storage() for t in trace.tensors_of(self.setup)}
            held = sum(storage.nbytes() for storage in storages.values())
            before = torch.cuda.memory_allocated()
            self.step()
            return torch.cuda.max_memory_allocated() - before + held
        live = trace.LiveStorages()
        for tensor in trace.tensors_of(self.setup):
            live.watch(tensor)
        live.take_peak()
        with live:
            self.step()
        return live.take_peak()


def _build(
    choice: Choice, settings: TrainSettings, arguments: dict[str, Any], device: torch.device, config: dict[str, Any]
) -> TrainSetup:
    torch.manual_seed(0)
    num_layers = config["num_hidden_layers"]
    if not arguments:
        return trace.build(config, num_layers, choice.method, settings, str(device))
    # A quantised base is made while it is loaded: the model goes through a folder.
    with tempfile.TemporaryDirectory() as folder:
        trace.plain_model(config, num_layers, choice.method, settings, "cpu").save_pretrained(folder)
        dtype = getattr(torch, choice.method.load_dtype(choice.techniques))
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, attn_implementation=choice.techniques.attn_implementation, **arguments
        )
    setup = choice.method.setup(model, settings)
    if choice.techniques.gradient_checkpointing:
        checkpointing.enable(setup.model)
    setup.model.train()  # as a model without weights of its own is from the beginning
    return setup
