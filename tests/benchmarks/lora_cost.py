"""What LoRA's own computing costs: ways of multiplying out maps and corrections side by side, a step of each in turn.

    python tests/benchmarks/lora_cost.py steps [--dtype bfloat16] [--rank 16] [--rows 8] [--length 72] [--layers 4]
    python tests/benchmarks/lora_cost.py forms [--dtype float32] [--rank 16 64] [--tokens 72 576 2048]

`steps` are whole training steps of a model with SmolLM2-135M's widths, some of its layers, and as large a part of its
vocabulary: `cast` is PEFT with its casts of the input, `plain` is PEFT without them, `fused` is the technique,
`masters` is `fused` with A and B in bf16 and fp32 masters in the optimizer, and a form by its flags, as in
`merges_forward+merges_backward`, is that order in every map.  `forms` times all orders of one map of 576 to 1536.
One thread; seconds are
those of computing, so that other work on the machine disturbs less.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from strategies.measure import trace
from strategies.measure.trace import Lengths
from strategies.methods.lora import Lora
from strategies.step import host_memory
from strategies.step.step import Update, forward_backward, update
from strategies.techniques import lora_algebra
from strategies.techniques.lora_algebra import CorrectedLinear
from strategies.techniques.lora_forms import FORMS, Form, MapSizes, cheapest
from strategies.techniques.precision import gradient_scaler
from strategies.train_setup import TrainSettings, TrainSetup
from strategies.workload import Techniques

_VOCABULARY_A_LAYER = 49152 // 30
SHAPES = ((576, 576), (576, 1536), (1536, 576))
BY_NAME = {str(form): form for form in FORMS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("steps", "forms"))
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--rank", type=int, nargs="+", default=[16])
    parser.add_argument("--tokens", type=int, nargs="+", default=[72, 576, 2048])
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=72)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--ways", default="plain,cast,fused")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    host_memory.keep()  # as training does: else new pages for every large result are what is measured
    {"steps": steps, "forms": forms}[asked.what](asked)


def config(num_layers: int) -> dict[str, Any]:
    sizes = {"hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3, "intermediate_size": 1536}
    vocabulary = {"vocab_size": _VOCABULARY_A_LAYER * num_layers, "tie_word_embeddings": True}
    return {"model_type": "llama", "num_hidden_layers": num_layers, **sizes, **vocabulary}


@dataclass
class Way:
    """One way of training, stepped in turn with the others."""

    name: str
    setup: TrainSetup
    techniques: Techniques
    masters: Masters | None = None
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    def step(self, batch: Any) -> None:
        began, scaler = time.process_time(), gradient_scaler("cpu", self.techniques.dtype)
        self.losses.append(forward_backward(self.setup, batch, batch.targets_S.numel(), self.techniques, scaler).item())
        (self.masters.update if self.masters else partial(update, self.setup, scaler, Update(1.0, 1.0)))()
        self.seconds.append(time.process_time() - began)


class Masters:
    """A and B in bf16, with fp32 copies that the optimizer moves."""

    def __init__(self, setup: TrainSetup) -> None:
        self._optimizer, self._pairs = setup.optimizer, []
        for group in setup.optimizer.param_groups:
            masters = [torch.nn.Parameter(p.detach().clone()) for p in group["params"]]
            self._pairs += zip(group["params"], masters, strict=True)
            for p in group["params"]:
                p.data = p.data.to(torch.bfloat16)
            group["params"] = masters

    def update(self) -> None:
        for own, master in self._pairs:
            master.grad, own.grad = own.grad.float(), None
        torch.nn.utils.clip_grad_norm_([master for _, master in self._pairs], 1.0)
        self._optimizer.step()
        for own, master in self._pairs:
            own.data.copy_(master)


def way(name: str, techniques: Techniques, asked: argparse.Namespace, rank: int) -> Way:
    method = Lora(lora_r=rank, lora_alpha=2 * rank, fused=name not in ("cast", "plain"))
    settings = TrainSettings(1e-3, 0.0, "adamw_torch_fused", 0.9, 0.999, 1e-8, techniques, seed=1)
    torch.manual_seed(0)
    setup = trace.build(config(asked.layers), asked.layers, method, settings, "cpu")
    setup.model.train()
    if name in BY_NAME:
        lora_algebra.fuse(setup.model, lambda sizes, element_bytes: BY_NAME[name])
    for layer in setup.model.modules():
        if name == "cast" and hasattr(layer, "lora_A"):
            vars(layer).pop("_cast_input_dtype", None)
    return Way(name, setup, techniques, Masters(setup) if name == "masters" else None)


def steps(asked: argparse.Namespace) -> None:
    techniques = Techniques(asked.dtype, "document", True, False, 1, asked.rows * asked.length)
    batch = Lengths((asked.length,) * asked.rows, (asked.length // 2,) * asked.rows).batch(True)
    for rank in asked.rank:
        ways = [way(name, techniques, asked, rank) for name in asked.ways.split(",")]
        for number in range(-1, asked.rounds):
            for one in ways[:: 1 if number % 2 else -1]:
                one.step(batch)
        print(f"{asked.dtype}, rank {rank}, {asked.rows} x {asked.length} tokens")
        for one in ways:
            ratios = [a / b for a, b in zip(one.seconds[1:], ways[0].seconds[1:], strict=True)]
            least = min(one.seconds[1:]) / min(ways[0].seconds[1:])
            losses = f"loss {one.losses[0]:.6f} .. {one.losses[-1]:.6f}"
            beside = f"of {ways[0].name}'s a step: median {statistics.median(ratios):.3f}, least {least:.3f}"
            print(f"{one.name:30} {statistics.median(one.seconds[1:]):.3f} s, {beside}; {losses}", flush=True)


def forms(asked: argparse.Namespace) -> None:
    dtype = getattr(torch, asked.dtype)
    for rank, tokens, (inputs, outputs) in itertools.product(asked.rank, asked.tokens, SHAPES):
        sizes = MapSizes(tokens, inputs, outputs, rank)
        x, a, b = (torch.randn(s, dtype=dtype) for s in ((tokens, inputs), (rank, inputs), (outputs, rank)))
        weight, gradient = torch.randn(outputs, inputs, dtype=dtype), torch.randn(tokens, outputs, dtype=dtype)
        seconds: dict[Form, list[float]] = {form: [] for form in FORMS}
        for _ in range(asked.rounds):
            for form, spent in seconds.items():
                leaves = [one.clone().requires_grad_() for one in (x, a, b)]
                began = time.process_time()
                CorrectedLinear.apply(leaves[0], (weight, None), *leaves[1:], (2.0, form)).backward(gradient)
                spent.append(time.process_time() - began)
        least = {form: min(spent) for form, spent in seconds.items()}
        best, chosen = min(least, key=least.__getitem__), cheapest(sizes, dtype.itemsize)
        shown = {str(form): f"{1e3 * least[form]:.2f}" for form in (Form(), chosen, best)}
        print(f"{sizes}: ms {shown}", flush=True)


if __name__ == "__main__":
    main()
