"""Step time of LSP-Offload against ZeRO-Offload's schedule and no offload, on an emulated device and bus.

    python tests/benchmarks/offload.py [--layers 12] [--scale 12]

The device's work is time that passes: 12.2 ms forward and 28.1 ms backward a layer (llama-7B on an RTX 4090,
arXiv 2406.10181 table 1), divided by `scale`, as are the 202 million weights of a layer.  Real are the lanes, their
threads, the bytes (a bus of 10 GB/s) and AdamW on this machine's CPU, whose rate is measured first.  Images are not
computed: on the device they would take a few passes over the gradient, which is not counted.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from strategies.lsp_offload.adam import AdamNumbers, direction, zero_moments
from strategies.lsp_offload.schedule import Lanes
from strategies.lsp_offload.sizing import LayerTimes, Rates, largest_that_hides, seconds_by_lane, step_s
from strategies.lsp_offload.transport import EmulatedBus
from strategies.step import host_memory

FORWARD_S, BACKWARD_S, LAYER_WEIGHTS, BUS_BYTES_PER_S = 12.2e-3, 28.1e-3, 202e6, 10e9


def adam_rate(num_elements: int) -> float:
    """Elements a second of the update this package makes."""
    side = int(num_elements**0.5)
    state, image, took = zero_moments((side, side), torch.device("cpu")), torch.randn(side, side), []
    out = torch.empty_like(image)
    for _ in range(9):
        start = time.perf_counter()
        direction(state, image, AdamNumbers(1e-4), out)
        took.append(time.perf_counter() - start)
    return side * side / statistics.median(took)


def measured(num_layers: int, side: int, times: LayerTimes, overlapped: bool, steps: int) -> float:
    """Median seconds of a step whose images are side x side."""
    bus, lanes = EmulatedBus(BUS_BYTES_PER_S), Lanes(transition=num_layers // 4, overlapped=overlapped)
    states = [zero_moments((side, side), torch.device("cpu")) for _ in range(num_layers)]
    image, numbers, took = torch.randn(side, side), AdamNumbers(1e-4), []
    for _ in range(steps):
        start = time.perf_counter()
        for layer in range(num_layers):
            lanes.wait(layer)
            time.sleep(times.forward_s)
        for layer in reversed(range(num_layers)):
            time.sleep(times.backward_s)
            host: dict[str, torch.Tensor] = {}

            def down(host: dict[str, torch.Tensor] = host) -> None:
                host["image"] = bus.down(image, None)

            def adam(host: dict[str, torch.Tensor] = host, layer: int = layer) -> None:
                host["change"] = direction(states[layer], host["image"], numbers, bus.buffers.take(image.shape))

            def up(host: dict[str, torch.Tensor] = host) -> None:
                bus.up(host["change"], torch.device("cpu"), lambda there: None)

            lanes.submit(layer, {"down": down, "update": adam, "up": up})
        took.append(time.perf_counter() - start)
    lanes.wait_all()
    lanes.close()
    return statistics.median(took[1:])


def measured_alone(num_layers: int, times: LayerTimes, steps: int) -> float:
    """Median seconds of the same steps without any lane: what passing time really takes here."""
    took = []
    for _ in range(steps):
        start = time.perf_counter()
        for seconds in (times.forward_s, times.backward_s):
            for _ in range(num_layers):
                time.sleep(seconds)
        took.append(time.perf_counter() - start)
    return statistics.median(took)


def main() -> None:
    with host_memory.kept():  # as in a training
        compare()


def compare() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--scale", type=float, default=12.0)
    parser.add_argument("--steps", type=int, default=12)
    asked = parser.parse_args()
    times = LayerTimes(FORWARD_S / asked.scale, BACKWARD_S / asked.scale)
    side = int((LAYER_WEIGHTS / asked.scale) ** 0.5)
    whole_rates = Rates(BUS_BYTES_PER_S, BUS_BYTES_PER_S, adam_rate(side * side))
    sized = largest_that_hides([(side, side)], times, whole_rates, asked.layers)
    native_s = measured_alone(asked.layers, times, asked.steps)
    print(f"{asked.layers} layers of {side} x {side}; AdamW here {whole_rates.adam_elements_per_s / 1e9:.2f} G/s")
    print(sized.text)
    rows = {}
    for name, size, kind, overlapped in (
        ("ZeRO-Offload", side, whole_rates, False),
        ("ZeRO-Offload, layer by layer", side, whole_rates, True),
        ("LSP-Offload", sized.size, whole_rates, True),
    ):
        seconds = measured(asked.layers, size, times, overlapped, asked.steps)
        rows[name] = seconds, step_s(asked.layers, times, seconds_by_lane(size * size, kind), overlapped)
    print(f"{'':<30}{'step':>10}{'native x':>10}{'predicted':>12}{'off by':>8}")
    print(f"{'no offload':<30}{native_s * 1e3:>8.0f}ms{1:>10.2f}")
    for name, (seconds, predicted) in rows.items():
        off = predicted / seconds - 1
        print(f"{name:<30}{seconds * 1e3:>8.0f}ms{seconds / native_s:>10.2f}{predicted * 1e3:>10.0f}ms{off:>8.0%}")
    print(f"LSP-Offload is {rows['ZeRO-Offload'][0] / rows['LSP-Offload'][0]:.1f}x as fast as ZeRO-Offload")


if __name__ == "__main__":
    main()
