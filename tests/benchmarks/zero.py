"""Memory of ZeRO's stages on real workers, beside what the planner predicts.

    python tests/benchmarks/zero.py            two workers on this machine, each stage, full and LoRA
    python tests/benchmarks/zero.py --workers 4

What is counted is what tensors take at the peak of a step whose optimizer state exists (measure/trace.py), in
each worker by itself: libraries and the heap's gaps are the same with and without sharding.
"""

from __future__ import annotations

import argparse
import socket
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a file

MODEL: dict[str, Any] = {
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
LENGTHS = (96, 96, 96, 96)  # tokens of the samples of a micro-batch, half of each supervised; equal: no mask
TARGET = 0.10


def cases():
    for method in ("full", "lora"):
        for dtype in ("float32", "bfloat16"):
            yield method, dtype, 0, None
            yield method, dtype, 1, (0.75, 0.25)  # ours: by memory
            for stage in (1, 2, 3):
                yield method, dtype, stage, None


def techniques_of(dtype: str, stage: int, shares: Any, rank: int, size: int) -> Any:
    from strategies.workload import Techniques

    return Techniques(
        dtype, "sdpa", False, False, len(LENGTHS), max(LENGTHS),
        zero_stage=stage, num_shards=size if stage else 1, state_share=shares[rank] if shares else None,
    )  # fmt: skip


def predicted(method: str, techniques: Any, size: int) -> Any:
    from clusters.probe.node import look_at_this_node
    from strategies import METHODS
    from strategies.shape import ModelShape
    from strategies.workload import Workload

    node = look_at_this_node()
    tokens = sum(LENGTHS)
    work = Workload(
        shape=ModelShape.from_config(MODEL),
        num_samples=len(LENGTHS) * size,
        num_tokens=tokens * size,
        num_supervised_tokens=size * sum(n // 2 for n in LENGTHS),
        longest_sample=max(LENGTHS),
        global_batch_size=len(LENGTHS) * size,
        num_steps=1,
        num_samples_seen=len(LENGTHS) * size,
        padded_ratio={len(LENGTHS): len(LENGTHS) * max(LENGTHS) / tokens},
        share=1 / size,
    )
    return METHODS[method]().estimate(work, node.devices[0], node, techniques).memory


def work(rank: int, size: int, port: int, out: str, method: str, dtype: str, stage: int, shares: Any) -> None:
    """One worker of one case."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    peak = peak_of(method, techniques_of(dtype, stage, shares, rank, size), shares)
    Path(f"{out}/{rank}").write_text(str(peak))
    dist.destroy_process_group()


def measure(size: int, *case: Any) -> list[int]:
    """Peak bytes of each worker, in fresh processes: DeepSpeed's stage 3 changes torch for good."""
    import torch

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as out:
        torch.multiprocessing.spawn(work, (size, port, out, *case), nprocs=size)
        return [int(Path(f"{out}/{rank}").read_text()) for rank in range(size)]


def peak_of(method: str, techniques: Any, shares: Any) -> int:
    """Bytes of tensors at the peak of the third step."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from strategies import METHODS
    from strategies.engines.shard import shard
    from strategies.measure.trace import Lengths, LiveStorages
    from strategies.step.step import Update, forward_backward, update
    from strategies.techniques.precision import gradient_scaler
    from strategies.train_setup import TrainSettings

    way = METHODS[method]()
    live = LiveStorages()
    with live:
        config = AutoConfig.for_model(**MODEL)
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, way.load_dtype(techniques)))
        settings = TrainSettings(1e-4, 0.0, techniques.optim, 0.9, 0.999, 1e-8, techniques, 1)
        setup = way.setup(model, settings)
        setup = shard(setup, settings, torch.device("cpu"), shares or ())
        batch = Lengths(LENGTHS, tuple(n // 2 for n in LENGTHS)).batch(packing=False)
        scaler = gradient_scaler("cpu", "float32")
        del model
        for _ in range(3):
            live.take_peak()
            forward_backward(setup, batch, 1000, techniques, scaler)
            update(setup, scaler, Update(1.0, 1.0))
            peak = live.take_peak()
    return peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    size = parser.parse_args().workers
    worst = 0.0
    for method, dtype, stage, shares in cases():
        measured = measure(size, method, dtype, stage, shares)
        for rank in range(size if shares else 1):
            found = measured[rank]
            memory = predicted(method, techniques_of(dtype, stage, shares, rank, size), size)
            error = memory.tensors_bytes / found - 1
            worst = max(worst, abs(error))
            who = f"worker {rank}, {shares[rank]:.0%} of the state" if shares else "each worker"
            parts = " ".join(f"{name} {size / 1e6:.0f}" for name, size in memory.parts.items() if name != "framework")
            print(
                f"{method:<5} {dtype:<9} ZeRO-{stage} {who:<27} {found / 1e6:7.1f} MB measured"
                f" {memory.tensors_bytes / 1e6:7.1f} predicted {error:+6.1%}   ({parts})"
            )
    print(f"largest error {worst:.1%} (target {TARGET:.0%})")


if __name__ == "__main__":
    main()
