"""How long an adapter takes out of a bank, and how much memory: synthetic weights of real shapes.

    python tests/benchmarks/bank.py generate --shapes 135m --adapters 100       target: 5 s
    python tests/benchmarks/bank.py generate --shapes 7b --adapters 500         target: 60 s; needs 10 GB of disk
    python tests/benchmarks/bank.py cards --adapters 10000

Quality is `orchestrator bank evaluate`, over a bank that `bank build` made.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path

import numpy
import torch
from safetensors.torch import save_file

from strategies.adapter_bank.adapter import CONFIG, Adapter
from strategies.adapter_bank.card import CARD, AdapterCard
from strategies.adapter_bank.generation import generate
from strategies.adapter_bank.shares import coefficients
from strategies.adapter_bank.store import Bank

_SMALL = {"q": (576, 576), "k": (576, 192), "v": (576, 192), "o": (576, 576)}
_SMALL |= {"gate": (576, 1536), "up": (576, 1536), "down": (1536, 576)}
# name -> layers, rank, map -> inputs, outputs
SHAPES = {
    "135m": (10, 8, _SMALL),
    "7b": (32, 16, {"q": (4096, 4096), "k": (4096, 1024), "v": (4096, 1024)}),
}


def an_adapter(folder: Path, shapes: str, seed: int) -> Adapter:
    layers, rank, maps = SHAPES[shapes]
    draw = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(layers):
        for name, (inputs, outputs) in maps.items():
            key = f"base_model.model.model.layers.{layer}.{name}_proj.lora_"
            tensors[f"{key}A.weight"] = torch.randn(rank, inputs, generator=draw).bfloat16()
            tensors[f"{key}B.weight"] = torch.randn(outputs, rank, generator=draw).bfloat16()
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / CONFIG).write_text(f'{{"peft_type": "LORA", "r": {rank}, "lora_alpha": {rank}}}')
    return Adapter(folder)


def generation(work: Path, shapes: str, count: int) -> None:
    adapters = [an_adapter(work / str(seed), shapes, seed) for seed in range(count)]
    size = sum(file.stat().st_size for file in work.rglob("*.safetensors"))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    distances = numpy.random.default_rng(0).random(count)
    made = generate(adapters, coefficients.normalised(distances), work / "made")
    print(
        f"{count} adapters of {shapes} shapes, {size / 1e9:.2f} GB: {made.seconds:.1f} s, {made.peak_bytes / 2**30:.2f}"
        f" GiB at its peak (before {before / 2**30:.2f}); {len(made.coefficients)} count, {made.relative_error:.0%} of"
        f" the exact sum beyond rank {made.rank}"
    )


def cards(work: Path, count: int) -> None:
    """Cards alone: what listing and finding cost does not depend on the weights."""
    bank, digests = Bank(work / "bank", create=True), [f"{n * 7919:064x}"[::-1] for n in range(count)]
    for n, digest in enumerate(digests):
        card = AdapterCard(f"task-{n}", "tiny", "b" * 64, [8], ["q_proj"], 1000, f"{n:064d}", digest=digest)
        bank.folder(digest).mkdir(parents=True)
        (bank.folder(digest) / CARD).write_text(json.dumps(card.as_dict(), indent=1))
    for what, do in {
        "list": lambda: bank.cards(),
        "find by name": lambda: bank.find(f"task-{count // 2}"),
        "find by digest": lambda: bank.find(digests[count // 3][:12]),
        "by data": lambda: bank.of_data("b" * 64, f"{count // 2:064d}"),
    }.items():
        began = time.perf_counter()
        do()
        print(f"{count} adapters: {what:14} {(time.perf_counter() - began) * 1e3:8.1f} ms")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["generate", "cards"])
    parser.add_argument("--shapes", choices=list(SHAPES), default="135m")
    parser.add_argument("--adapters", type=int, default=100)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if asked.what == "cards":
            cards(Path(folder), asked.adapters)
        else:
            generation(Path(folder), asked.shapes, asked.adapters)
