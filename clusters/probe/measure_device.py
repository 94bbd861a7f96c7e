"""Measure one device with PyTorch: matrix products, memory, transfers, the price of an operation, optional libraries.

Importing this loads torch.  A figure that cannot be measured is None, and the log (INFO) says why.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import logging
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch

from clusters.capability import NUMBER_FORMATS, DeviceCapability, Library, Source
from clusters.safe.reading import printable

# Tokens x inputs x outputs of a layer: a device climbs as far as one measurement fits its time.
_CPU_PRODUCTS = ((64, 512, 512), (128, 1024, 1024), (512, 1024, 1024), (512, 2048, 2048))
_GPU_PRODUCTS = ((512, 1024, 1024), (4096, 4096, 4096), (8192, 8192, 8192))
_ARRAY_BYTES = 256 * 2**20  # larger than the caches of most machines
_COLD_BYTES = 128 * 2**20  # of the weights of several maps: when one's turn comes again, it has left the caches
_log = logging.getLogger(__name__)


def seconds_each(operation: Callable[[], object], budget_s: float, wait: Callable[[], None] = lambda: None) -> float:
    """Seconds of one operation: the median of the faster half of what fits in the budget, at least one after a warm-up.

    The slower half is what other programs disturbed.  Short operations are timed in rows of up to 10 ms, so that
    neither the clock nor waiting for the GPU is measured.
    """

    def timed(times: int) -> float:
        start = time.perf_counter()
        for _ in range(times):
            operation()
        wait()
        return (time.perf_counter() - start) / times

    timed(1)
    end = time.perf_counter() + budget_s
    each = [timed(1)]
    in_a_row = max(1, int(min(0.01, budget_s / 10) / max(each[0], 1e-9)))
    if in_a_row > 1:
        each.clear()  # too short to be timed alone
    while not each or time.perf_counter() + each[-1] * in_a_row < end:
        each.append(timed(in_a_row))
    return statistics.median(sorted(each)[: (len(each) + 1) // 2])


def measure_speed(device: DeviceCapability, index: int, budget_s: float) -> DeviceCapability:
    """The device with its speeds; `index` is PyTorch's number of a GPU, `budget_s` the time of one figure.

    Two rounds, of which the faster counts: what disturbs a machine for a moment only ever makes it slower.
    """
    place = torch.device("cpu") if device.kind == "cpu" else torch.device("cuda", index)
    room_bytes = (device.memory_bytes or 2**30) // 16  # measuring must not push anybody out of memory
    bench = _Bench(place, room_bytes, budget_s / 2)
    calls: dict[str, Callable[[], float]] = {
        f"flops_per_s.{dtype}": lambda dtype=dtype: bench.flops_per_s(dtype) for dtype in NUMBER_FORMATS
    }
    calls |= {"memory_bytes_per_s": bench.memory_bytes_per_s, "op_overhead_s": bench.op_overhead_s}
    if place.type == "cuda":
        calls["host_to_device_bytes_per_s"] = lambda: bench.transfer_bytes_per_s("cpu", place)
        calls["device_to_host_bytes_per_s"] = lambda: bench.transfer_bytes_per_s(place, "cpu")
    rounds = [{name: _try(name, call) for name, call in calls.items()} for _ in range(2)]
    if place.type == "cuda":
        torch.cuda.empty_cache()
    figures = {name: _best(name, [values[name] for values in rounds]) for name in calls}
    sources = {**device.sources, **_measured(figures)}
    flops = {dtype: figures.pop(f"flops_per_s.{dtype}") for dtype in NUMBER_FORMATS}
    return replace(device, flops_per_s=flops, **figures, sources=sources)


def _best(name: str, values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    best = min if name == "op_overhead_s" else max  # all others are speeds
    return best(known) if known else None


def try_libraries(device: DeviceCapability, index: int) -> DeviceCapability:
    """Which optional libraries run on the device.  After all speeds: a kernel that fails may take CUDA along."""
    place = torch.device("cpu") if device.kind == "cpu" else torch.device("cuda", index)
    calls: dict[str, Callable[[], torch.Tensor | None]] = {
        "bitsandbytes": lambda: _four_bit_linear(place),
        "deepspeed": lambda: _imported("deepspeed"),
        "schedulefree": lambda: _imported("schedulefree"),
    }
    if place.type == "cuda":
        calls["flash_attn"] = lambda: _flash_attention(place)
        calls["liger_kernel"] = lambda: _liger_norm(place)
    found = {name: _try_library(name, call) for name, call in calls.items()}
    return replace(device, libraries={name: library for name, library in found.items() if library is not None})


def _imported(name: str) -> None:
    """It asks for a compiler or a CUDA toolkit when it is loaded, and not only then; the rest shows in training."""
    importlib.import_module(name)


def _measured(figures: Mapping[str, float | None]) -> dict[str, Source]:
    return {name: "measured" for name, value in figures.items() if value is not None}


@dataclass(frozen=True)
class _Bench:
    """What is timed on one device."""

    place: torch.device
    room_bytes: int  # for one array
    budget_s: float

    def flops_per_s(self, dtype: str) -> float:
        """2 m k n a product; of the largest size of which one is expected to fit in the budget and in memory.

        On a CPU as in training: several maps in turn, whose weights are not in the caches when they are needed.
        """
        reached, is_cpu = 0.0, self.place.type == "cpu"
        for m, k, n in _CPU_PRODUCTS if is_cpu else _GPU_PRODUCTS:
            count = self._num_maps(dtype, k * n) if is_cpu and reached else 1  # the first says how fast it is at all
            flops = 2 * m * k * n * (1 if dtype == "int8" else 3) * count
            if reached and flops / reached > self.budget_s:
                break
            try:
                maps = [_products(dtype, self.place, m, k, n) for _ in range(count)]
                reached = flops / self._seconds_each(lambda maps=maps: [run() for run in maps], self.budget_s / 2)
            except torch.OutOfMemoryError:
                if not reached:
                    raise
                break
        return reached

    def _num_maps(self, dtype: str, num_weights: int) -> int:
        """How many maps of this size do not fit into caches together, nor take more than the room there is."""
        each = num_weights * torch.empty(0, dtype=getattr(torch, dtype)).element_size()
        return max(1, int(min(_COLD_BYTES, self.room_bytes // 4) // each))

    def memory_bytes_per_s(self) -> float:
        """STREAM's triad a = b + s c on three arrays beyond the caches: two read, one written."""
        size = min(_ARRAY_BYTES, self.room_bytes) // 4
        a, b, c = (torch.ones(size, dtype=torch.float32, device=self.place) for _ in range(3))
        return 3 * 4 * size / self._seconds_each(lambda: torch.add(b, c, alpha=3.0, out=a), self.budget_s)

    def op_overhead_s(self) -> float:
        """Many in a row, as in training: on a GPU the time to launch one, not to wait for one."""
        tiny = torch.zeros(8, device=self.place)
        return self._seconds_each(lambda: tiny.add_(1.0), self.budget_s / 4)

    def transfer_bytes_per_s(self, source: torch.device | str, to: torch.device | str) -> float:
        """Between pinned memory of the host and the device."""
        size = min(_ARRAY_BYTES, self.room_bytes)
        from_, into = (
            torch.empty(size, dtype=torch.uint8, device=end, pin_memory=str(end) == "cpu") for end in (source, to)
        )
        return size / self._seconds_each(lambda: into.copy_(from_, non_blocking=True), self.budget_s)

    def _seconds_each(self, operation: Callable[[], object], budget_s: float) -> float:
        if self.place.type == "cpu":
            return seconds_each(operation, budget_s)
        return seconds_each(operation, budget_s, lambda: torch.cuda.synchronize(self.place))


def _products(dtype: str, place: torch.device, m: int, k: int, n: int) -> Callable[[], object]:
    """The three products by which a linear layer trains; in int8 only the forward one, as int8 is used.

    All three, because a device may be fast at one layout only: fp16 on a CPU was seen at 33, 0.4 and 6 GFLOP/s.
    """
    if dtype == "int8":
        x_MK, w_NK = (torch.randint(-127, 127, shape, dtype=torch.int8, device=place) for shape in ((m, k), (n, k)))
        return lambda: torch.ops.aten._int_mm(x_MK, w_NK.t())
    number = getattr(torch, dtype)
    x_MK, w_NK, y_MN = (torch.randn(shape, device=place).to(number) for shape in ((m, k), (n, k), (m, n)))
    return lambda: (torch.mm(x_MK, w_NK.t()), torch.mm(y_MN, w_NK), torch.mm(y_MN.t(), x_MK))


def _four_bit_linear(place: torch.device) -> torch.Tensor:
    bitsandbytes = importlib.import_module("bitsandbytes")
    dtype = torch.float32 if place.type == "cpu" else torch.float16
    layer = bitsandbytes.nn.Linear4bit(64, 64, bias=False, compute_dtype=dtype, quant_type="nf4").to(place)
    return layer(torch.ones(4, 64, dtype=dtype, device=place))


def _flash_attention(place: torch.device) -> torch.Tensor:
    flash_attn = importlib.import_module("flash_attn")
    qkv_BLHD = torch.ones(1, 16, 1, 64, dtype=torch.float16, device=place)
    return flash_attn.flash_attn_func(qkv_BLHD, qkv_BLHD, qkv_BLHD, causal=True)


def _liger_norm(place: torch.device) -> torch.Tensor:
    transformers = importlib.import_module("liger_kernel.transformers")
    return transformers.LigerRMSNorm(64).to(place)(torch.ones(4, 64, device=place))


def _try(what: str, measure: Callable[[], float]) -> float | None:
    try:
        return measure()
    except Exception as error:  # whatever a driver or a kernel makes of it: this figure is unknown, the others are not
        _log.info("%s: not measured: %s: %s", what, type(error).__name__, error)
        return None


def _try_library(library: str, call: Callable[[], torch.Tensor | None]) -> Library | None:
    """Whether it is installed, loads and computes something finite; None where there was no memory left to try."""
    if importlib.util.find_spec(library) is None:
        return Library("absent")
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):  # stdout is for the figures
            warnings.simplefilter("ignore")
            result = call()
        if result is not None and not result.isfinite().all():
            raise ArithmeticError("its result is not a number")
        return Library("runs")
    except torch.OutOfMemoryError as error:
        _log.info("%s: not tried: %s", library, error)
        return None
    except Exception as error:  # as above: it does not run here, and that is the finding
        _log.info("%s does not run: %s: %s", library, type(error).__name__, error)
        said = str(error).strip().splitlines()
        return Library("broken", printable(f"{type(error).__name__}: {said[0] if said else 'no message'}"[:200]))
