"""What projected training keeps of full training's quality, beside GaLore, APOLLO and LoRA, on a small real model.

    python tests/benchmarks/quality.py [--steps 200] [--seeds 3] [--seconds 20]

stories260K (a Llama of 260 thousand weights) goes on with Shakespeare's text.  Embeddings and norms train in every row
but LoRA's, so "frozen" is what they reach alone; a method's part of the gap is (frozen - method) / (frozen - full).
Learning rates are the best of three, on another seed.  State is what the optimizer keeps on the device, projectors
included, weights and gradients not.  Needs the assets beside the checkout.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from strategies.lsp_offload.method import LspOffload, linear_maps
from strategies.methods.full import Full
from strategies.methods.lora import Lora
from strategies.methods.low_rank_gradients import Apollo, Galore
from strategies.step.step import Update, last_pass, update
from strategies.techniques.precision import gradient_scaler
from strategies.train_setup import TrainSettings, TrainSetup
from strategies.workload import Techniques

ASSETS = Path(__file__).resolve().parents[3] / "shared/assets"
LENGTH, ROWS, HELD_OUT_ROWS = 128, 8, 96
TECHNIQUES = Techniques("float32", "sdpa", False, False, ROWS, LENGTH)


@dataclass(frozen=True)
class Frozen(Full):
    """The layers' linear maps stay as they are; the rest trains."""

    def setup(self, model: Any, settings: TrainSettings) -> TrainSetup:
        setup = super().setup(model, settings)
        for name, (_, weight) in linear_maps(model).items():
            weight.requires_grad_(False)
            setup.parameters.pop(name)
        return setup


def lsp(**knobs: Any) -> LspOffload:
    return LspOffload(subspace_size=32, other_weights="train", check_every=100, **knobs)


CONTENDERS: dict[str, Callable[[], Any]] = {
    "frozen": Frozen,
    "full": Full,
    "LSP, learned": lsp,
    "LSP, random": lambda: lsp(projection="random"),
    "GaLore r16": lambda: Galore(rank=16, update_proj_gap=100),
    "APOLLO r16": lambda: Apollo(rank=16, update_proj_gap=100),
    "LoRA r8": lambda: Lora(lora_r=8, lora_alpha=16),
    "LoRA r64": lambda: Lora(lora_r=64, lora_alpha=128),
}
RATES = {"LoRA r8": (3e-3, 1e-2, 3e-2), "LoRA r64": (3e-3, 1e-2, 3e-2)}
PLAIN_RATES = (1e-3, 3e-3, 1e-2)


def texts() -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of LENGTH tokens: to train on, and held out."""
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "models/stories260K")
    text = (ASSETS / "data/tinyshakespeare/input.txt").read_text()
    ids = torch.tensor(tokenizer(text)["input_ids"])
    rows = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
    return rows[:-HELD_OUT_ROWS], rows[-HELD_OUT_ROWS:]


def fresh() -> Any:
    return AutoModelForCausalLM.from_pretrained(ASSETS / "models/stories260K", dtype=torch.float32)


@torch.no_grad()
def held_out_loss(model: Any, rows: torch.Tensor) -> float:
    model.eval()
    losses = [model(part, labels=part).loss.item() for part in rows.split(32)]
    model.train()
    return statistics.mean(losses)


def trained(
    method: Any, rate: float, seed: int, steps: int, seconds: float, data: tuple[torch.Tensor, torch.Tensor]
) -> dict[str, float]:
    """Held-out losses after `steps` and after `seconds` of training."""
    torch.manual_seed(seed)
    setup = method.setup(fresh(), TrainSettings(rate, 0.0, "adamw_torch", 0.9, 0.999, 1e-8, TECHNIQUES, seed))
    setup.model.train()
    order = torch.Generator().manual_seed(seed)
    scaler, spent, step, found = gradient_scaler("cpu", "float32"), 0.0, 0, {}
    while "steps" not in found or "seconds" not in found:
        began = time.perf_counter()
        ids = data[0][torch.randint(len(data[0]), (ROWS,), generator=order)]
        numbers = Update(min(1.0, (step + 1) / 10), 1.0)
        if setup.learner and setup.learner.is_due(step):
            setup.learner.begin_learning(1)
            setup.model(ids, labels=ids).loss.backward()
            setup.streaming.end_learning()
        last_pass(setup, numbers)
        setup.model(ids, labels=ids).loss.backward()
        update(setup, scaler, numbers)
        step, spent = step + 1, spent + time.perf_counter() - began
        if step == steps:
            found["steps"] = held_out_loss(setup.model, data[1])
        if spent >= seconds and "seconds" not in found:
            found |= {"seconds": held_out_loss(setup.model, data[1]), "steps_in_seconds": step}
    found["step_s"] = spent / step
    found["state_bytes"] = state_bytes(setup)
    if setup.streaming:
        setup.streaming.settle()
        setup.optimizer.close()  # type: ignore[attr-defined]
    return found


def state_bytes(setup: TrainSetup) -> int:
    """Of the optimizer on the device: an LSP weight keeps its projectors there and its moments on the host."""
    total = 0
    for state in setup.optimizer.state.values():
        at_host = ("exp_avg", "exp_avg_sq") if "rows_values" in state else ()
        total += sum(v.numel() * v.element_size() for k, v in state.items() if torch.is_tensor(v) and k not in at_host)
    return total


def compare(steps: int, seeds: int, seconds: float, names: list[str]) -> dict[str, dict[str, float]]:
    data, table = texts(), {}
    for name in names:
        tried = {r: trained(CONTENDERS[name](), r, 99, steps, 0.0, data)["steps"] for r in RATES.get(name, PLAIN_RATES)}
        rate = min(tried, key=lambda r: tried[r] if math.isfinite(tried[r]) else math.inf)
        runs = [trained(CONTENDERS[name](), rate, seed, steps, seconds, data) for seed in range(seeds)]
        table[name] = {key: statistics.mean(run[key] for run in runs) for key in runs[0]}
        table[name] |= {"rate": rate, "spread": statistics.pstdev(run["steps"] for run in runs)}
        print(f"{name}: {table[name]}", flush=True)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=20.0)
    asked = parser.parse_args()
    torch.set_num_threads(2)
    table = compare(asked.steps, asked.seeds, asked.seconds, list(CONTENDERS))
    print(f"before: {held_out_loss(fresh(), texts()[1]):.3f}")
    print(
        f"| | rate | loss, {asked.steps} steps | of the gap | loss, {asked.seconds:g} s | of the gap | step | state |"
    )
    print("|---|---|---|---|---|---|---|---|")
    frozen, full = table["frozen"], table["full"]
    for name, row in table.items():
        part = {key: (frozen[key] - row[key]) / (frozen[key] - full[key]) for key in ("steps", "seconds")}
        print(
            f"| {name} | {row['rate']:g} | {row['steps']:.3f} +- {row['spread']:.3f} | {part['steps']:.0%} |"
            f" {row['seconds']:.3f} | {part['seconds']:.0%} | {row['step_s'] * 1e3:.0f} ms |"
            f" {row['state_bytes'] / 1e3:.0f} kB |"
        )


if __name__ == "__main__":
    main()
