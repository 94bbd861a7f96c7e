"""How much of the sum of unequal machines' speeds one job reaches over slow links.

    python tests/benchmarks/uneven.py                  as root: three emulated machines (tests/cluster), some minutes
    python tests/benchmarks/uneven.py --links 1gbit    one network only

Three machines with virtual accelerators that take 60, 60 and 180 ms for a micro-batch of 8 sequences: each computes
for real, then waits until its time has passed, layer by layer, so that gradients appear when they would.  Waiting
machines do not compete, so two cores carry three and ratios are exact.  Loop, shares and sums are the product's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a file

ROWS = 8  # sequences of a micro-batch
TOKENS = 16  # of a sequence
ACCELERATORS_S = {"first": 0.060, "second": 0.060, "third": 0.180}
LINKS = {  # rate in bits/s, delay of each side in seconds: half of it is a quarter of the round trip
    "1gbit": (1e9, 1e-4),
    "100mbit": (1e8, 1e-3),
    "10mbit": (1e7, 20e-3),
}
ROUND_TRIP_S = {name: 4 * delay for name, (_, delay) in LINKS.items()}
TARGETS = {"1gbit": 0.95, "100mbit": 0.90, "10mbit": 0.75}
BASE = 7 * ROWS  # sequences of a step: three micro-batches of each fast machine, one of the slow
MODES = {  # name -> (shares, samples of a step over the base, samples of a local step)
    "equal": ("equal", 1, None),
    "by speed": ("speed", 1, None),
    "by speed, 2x samples": ("speed", 2, None),
    "by speed, 4x samples": ("speed", 4, None),
    "by speed, 8x samples": ("speed", 8, None),
    "by speed, 16x samples": ("speed", 16, None),
    "local steps": ("speed", 8, ROWS),
}


class VirtualAccelerator:
    """Makes a model's layers take the time that a machine would need."""

    def __init__(self, model: Any, seconds: float) -> None:
        self._seconds = seconds  # of ROWS sequences
        layers = [
            module for name, module in model.named_modules() if name.endswith(tuple(f"layers.{i}" for i in range(9)))
        ]
        count = len(layers)
        model.register_forward_pre_hook(self._begin)
        for index, layer in enumerate(layers):
            layer.register_forward_hook(lambda *_, done=(index + 1) / count / 3: self._until(done))
            # Backward runs from the last layer to the first and takes two thirds.
            layer.register_full_backward_hook(lambda *_, done=1 - 2 * index / count / 3: self._until(done))

    def _begin(self, _: Any, arguments: Any) -> None:
        self._began, self._rows = time.perf_counter(), arguments[0].shape[0]

    def _until(self, done: float) -> None:
        due = self._began + done * self._seconds * self._rows / ROWS
        time.sleep(max(0.0, due - time.perf_counter()))


def work(rank: int, head: str, port: int, modes: list[str], steps: int) -> None:
    """One machine: its speed alone, then each mode with the others; prints JSON."""
    import torch
    import torch.distributed as dist

    from orchestrator.data.order import Order
    from orchestrator.runs.events import StepReport
    from orchestrator.training.loop import train
    from orchestrator.training.parallel import ProcessGroup
    from orchestrator.training.shares import Shares
    from orchestrator.training.state import Hooks, Progress, Schedule, Training
    from strategies.cost.network import Network
    from strategies.workload import Techniques

    torch.set_num_threads(1)
    speeds_s = list(ACCELERATORS_S.values())
    link = sys.argv[-1]
    network = Network(3, LINKS[link][0] / 8, ROUND_TRIP_S[link])
    techniques = Techniques("float32", "sdpa", False, False, ROWS, TOKENS)
    schedule = Schedule(lambda step: 1.0, 1.0, 0, 10**9, None, None)
    data = samples(128 * BASE)
    setup = model(speeds_s[rank])
    gradient_bytes = 4 * sum(p.numel() for p in setup.parameters.values())

    def run(
        group: ProcessGroup, samples_a_step: int, shares: Shares | None, count: int, local: int | None = None
    ) -> list[Any]:
        events: list[Any] = []
        hooks = Hooks(events.append, lambda now: "", lambda: None)
        order = Order(len(data), samples_a_step, 1, 1000, count)
        train(Training(setup, data, None, order, schedule, techniques, group, Progress(), hooks, shares, local))
        return [event for event in events if isinstance(event, StepReport)]

    alone = [ROWS / report.seconds for report in run(ProcessGroup(), ROWS, None, 6)[1:]]
    dist.init_process_group("gloo", init_method=f"tcp://{head}:{port}", rank=rank, world_size=3)
    bucket = network.bucket_bytes(gradient_bytes)
    group = ProcessGroup(rank, 3, bucket_bytes=bucket)
    all_alone = group.gather(statistics.median(alone))
    found = {}
    for mode in modes:
        kind, factor, local = MODES[mode]
        fair = [1 / 3] * 3 if kind == "equal" else [speed / sum(all_alone) for speed in all_alone]
        reports = run(group, factor * BASE, Shares(list(fair), is_fixed=True), max(5, steps // factor), local)[2:]
        step_s = statistics.median(report.seconds for report in reports)
        counts = [round(report_tokens / TOKENS) for report_tokens in reports[-1].worker_tokens]
        # As in a job: the workers tell each other the pace they measured.
        compute_s = max(count / pace for count, pace in zip(counts, all_alone, strict=True))
        # Apart, nothing hides the sum: it begins when the last local step has ended.
        exposed_s = network.all_reduce_s(gradient_bytes) + network.step_s
        if not local:
            exposed_s = network.exposed_s(gradient_bytes, min(speeds_s), bucket)
        found[mode] = {
            "sequences_per_s": factor * BASE / step_s,
            "fraction": factor * BASE / step_s / sum(all_alone),
            "step_s": step_s,
            "predicted_s": compute_s + exposed_s,
            "counts": counts,
        }
    if rank == 0:
        print(json.dumps({"alone": all_alone, "gradient_bytes": gradient_bytes, "modes": found}), flush=True)
    dist.barrier()
    dist.destroy_process_group()


def model(seconds: float) -> Any:
    """A small Llama with adapters of about 0.19 MB, as slow as the machine is to be."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from strategies import METHODS
    from strategies.train_setup import TrainSettings
    from strategies.workload import Techniques

    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=64, num_hidden_layers=8, num_attention_heads=4, num_key_value_heads=4,
                         intermediate_size=128, vocab_size=128, max_position_embeddings=64)  # fmt: skip
    bare = LlamaForCausalLM(config)
    techniques = Techniques("float32", "sdpa", False, False, ROWS, TOKENS)
    settings = TrainSettings(1e-4, 0.0, "adamw_torch_fused", 0.9, 0.999, 1e-8, techniques, 1)
    setup = METHODS["lora"](lora_r=5).setup(bare, settings)
    VirtualAccelerator(setup.model, seconds)
    return setup


def samples(count: int) -> Any:
    """Equal sequences: what is measured is the division of work, not of lengths."""
    import pyarrow

    from orchestrator.data.counts import Statistics
    from orchestrator.data.dataset import _SCHEMA, Dataset

    rows = [[(7 * row + place) % 128 for place in range(TOKENS)] for row in range(count)]
    table = pyarrow.table(
        {
            "input_ids": rows,
            "supervised": [[False] + [True] * (TOKENS - 1)] * count,
            "num_supervised": [TOKENS - 1] * count,
            "fingerprint": list(range(count)),
            "prompt_length": [1] * count,
            "reference": [None] * count,
            "source": ["made here"] * count,
        },
        schema=_SCHEMA,
    )
    return Dataset(table, Statistics(count, count), "even")


def measure(link: str, modes: list[str], steps: int, home: Path) -> dict[str, Any]:
    """One network: three machines on it, every mode."""
    from tests.cluster.emulator import EmulatedCluster, Machine

    rate, delay = LINKS[link]
    with EmulatedCluster([Machine(name, 1, rate, delay) for name in ACCELERATORS_S], home) as cluster:
        processes = [
            cluster.run(
                name,
                [sys.executable, __file__, "--work", str(rank), "--head", cluster.address("first"),
                 "--steps", str(steps),
                 "--modes", ";".join(modes), "--links", link],
                stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                text=True,
            )
            for rank, name in enumerate(ACCELERATORS_S)
        ]  # fmt: skip
        out, _ = processes[0].communicate(timeout=900)
        for process in processes:
            process.wait(timeout=60)
    return json.loads(out.strip().splitlines()[-1])


def picked(found: dict[str, Any]) -> str:
    """What the planner takes where nobody stated the samples of a step: its own rule, on the predicted seconds."""
    from orchestrator.planning import planner

    best = "by speed"
    for factor in planner._MORE_SAMPLES:
        mode = f"by speed, {factor}x samples"
        if mode not in found:
            continue

        def pace(name: str) -> float:
            return found[name]["predicted_s"] / MODES[name][1]

        if pace(mode) < pace(best) / planner._WORTH_LARGER_STEPS:
            best = mode
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modes", default=";".join(MODES), help="names, parted by ;")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--work", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--head", help=argparse.SUPPRESS)
    parser.add_argument("--links", default=",".join(LINKS))
    asked = parser.parse_args()
    modes = asked.modes.split(";")
    if asked.work is not None:
        work(asked.work, asked.head, 29500, modes, asked.steps)
        return
    from tests.cluster.emulator import unavailable

    reason = unavailable()
    if reason:
        sys.exit(f"machines cannot be emulated here: {reason}")
    for link in asked.links.split(","):
        with tempfile.TemporaryDirectory() as home:
            found = measure(link, modes, asked.steps, Path(home))
        alone = ", ".join(f"{speed:.1f}" for speed in found["alone"])
        print(f"{link}: alone {alone} sequences/s, gradients {found['gradient_bytes'] / 1e6:.2f} MB")
        chosen = picked(found["modes"])
        for mode, told in found["modes"].items():
            print(
                f"  {mode:<22} {told['fraction']:6.1%} of the sum ({told['counts']} sequences a step),"
                f" step {told['step_s']:.3f} s, predicted {told['predicted_s']:.3f}"
                f" ({told['predicted_s'] / told['step_s'] - 1:+.0%})"
                f"{f'  <- the planner, target {TARGETS[link]:.0%}' if mode == chosen else ''}"
            )


if __name__ == "__main__":
    main()
