"""What low-rank corrections that are averaged or restarted are good for, a property a subcommand.

    python tests/benchmarks/deltas.py rare-sums [--rounds 4] [--seeds 3] [--rate 3e-3]
        LTE: the loss after equal tokens where three workers come together every 32 steps
    python tests/benchmarks/deltas.py rank-one [--steps 300] [--seeds 3] [--rate 3e-3]
        boosted LoRA: the loss and the gain of each round where a pair of rank 1 is all that trains
    python tests/benchmarks/deltas.py averaging
        the seconds of averaging products and cutting them, beside `strategies/cost/network.py`

stories260K (a Llama of 260 thousand weights) trains on Shakespeare's text, in one process and one thread: workers
take their steps in turn, with the product's own averaging, and seconds on a link are calculated from the bytes that
they would send.  One learning rate for all: the best of three for LoRA of rank 8 in `quality.py`, not searched for
here.  Needs the assets beside the checkout.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a file

import torch
import transformers

from orchestrator.training import local_steps
from orchestrator.training.local_steps import LocalSteps, ProductSteps
from strategies.adapter_bank import algebra
from strategies.adapter_bank.algebra import Factors
from strategies.cost.network import Network
from strategies.methods.boosted_lora import BoostedLora
from strategies.methods.lora import Lora
from strategies.step.step import Update, forward_backward, update
from strategies.step.supervised_logits import Batch, loss_sum, places_of_samples, token_losses
from strategies.techniques.precision import gradient_scaler
from strategies.train_setup import TrainSettings, TrainSetup
from strategies.workload import LocalMerge, Techniques
from tests.benchmarks.quality import fresh, state_bytes, texts

LENGTH, ROWS, WORKERS, LOCAL = 64, 4, 3, 32
TRAIN_ROWS = 1024
TECHNIQUES = Techniques("float32", "sdpa", False, False, ROWS, LENGTH)
LINK = Network(WORKERS, 1e7 / 8, 0.08)


def rows_of(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of LENGTH tokens to train on, and held out."""
    train, held_out = (part.reshape(-1, LENGTH) for part in texts())
    return train[:: len(train) // count][:count], held_out


def batch_of(rows: torch.Tensor, ids: Sequence[int]) -> Batch:
    chosen = rows[list(ids)]
    supervised = torch.ones_like(chosen, dtype=torch.bool)
    supervised[:, 0] = False
    return Batch(chosen, supervised, None, torch.ones_like(chosen), tuple(ids))


@torch.no_grad()
def held_out_loss(model: Any, rows: torch.Tensor) -> float:
    model.eval()
    found = [batch_of(rows, range(start, min(start + 32, len(rows)))) for start in range(0, len(rows), 32)]
    total = sum(loss_sum(model, batch).item() for batch in found)
    model.train()
    return total / sum(batch.targets_S.numel() for batch in found)


def set_up(method: Any, rate: float, seed: int, merge: LocalMerge = "factors") -> TrainSetup:
    torch.manual_seed(seed)
    techniques = replace(TECHNIQUES, local_merge=merge)
    settings = TrainSettings(rate, 0.0, "adamw_torch", 0.9, 0.999, 1e-8, techniques, seed, TRAIN_ROWS)
    setup = method.setup(fresh(), settings)
    setup.model.train()
    return setup


# Workers that come together rarely.


@dataclass(frozen=True)
class MeetingRule:
    """How workers come together: after every step, or after LOCAL steps by a rule."""

    merge: LocalMerge | None  # None = gradients are summed after every step
    outer: tuple[float, float] = (local_steps._OUTER_RATE, local_steps._OUTER_MOMENTUM)


WAYS = {
    "a sum a step": MeetingRule(None),
    "A and B, Nesterov (DiLoCo)": MeetingRule("factors"),
    "A and B, plain mean": MeetingRule("factors", (1.0, 0.0)),
    "products": MeetingRule("product"),
    "products, restarted": MeetingRule("reset"),
}


@dataclass
class InTurn:
    """A group whose workers are setups of this process, as `ProductSteps` asks one."""

    setups: list[TrainSetup]
    size: int = WORKERS
    arrived: list[torch.Tensor] = field(default_factory=list)

    def send(self) -> None:
        self.arrived = [torch.cat([p.detach().flatten() for p in one.parameters.values()]) for one in self.setups]

    def gather_flat(self, own: torch.Tensor) -> list[torch.Tensor]:
        return self.arrived

    def at_own_rank(self, value: float) -> list[float]:
        return [value] * self.size

    def sum(self, values: Sequence[float]) -> list[float]:
        return list(values)


def train_apart(way: MeetingRule, rate: float, seed: int, rounds: int, data: Any) -> dict[str, float]:
    """Held-out loss, bytes of a worker in LOCAL steps, the mean truncation error."""
    setups = [set_up(Lora(lora_r=8, lora_alpha=16), rate, seed, way.merge or "factors") for _ in range(WORKERS)]
    numbers, group, errors = 4 * sum(p.numel() for p in setups[0].parameters.values()), InTurn(setups), list[float]()
    local_steps._OUTER_RATE, local_steps._OUTER_MOMENTUM = way.outer
    if way.merge in ("product", "reset"):
        restarts = "restart" if way.merge == "reset" else None
        apart = [ProductSteps(one, ROWS, group, restarts) for one in setups]  # type: ignore[arg-type]
    else:
        apart = [LocalSteps(one, ROWS) for one in setups]
    orders, scaler = (
        [torch.Generator().manual_seed(1000 * seed + w) for w in range(WORKERS)],
        gradient_scaler("cpu", "float32"),
    )
    for step in range(rounds * LOCAL):
        for setup, order in zip(setups, orders, strict=True):
            batch = batch_of(data[0], torch.randint(len(data[0]), (ROWS,), generator=order).tolist())
            forward_backward(setup, batch, batch.targets_S.numel(), TECHNIQUES, scaler)
        if way.merge is None:
            _average_gradients(setups)
        for setup in setups:
            update(setup, scaler, Update(min(1.0, (step + 1) / 10), 1.0))
        if way.merge and (step + 1) % LOCAL == 0:
            for one in apart:
                one.changes_to_gradients(1 / WORKERS)
            if way.merge == "factors":
                _average_gradients(setups, scale=WORKERS)
            group.send()
            for one in apart:
                one.outer_step(step)
            if report := apart[0].take_report():
                errors.append(report["truncation_error"])
    sent = {None: LOCAL * numbers, "factors": numbers}.get(way.merge, (WORKERS - 1) * numbers)
    link_s = {None: LOCAL * LINK.all_reduce_s(numbers), "factors": LINK.all_reduce_s(numbers)}
    seconds = link_s.get(way.merge, LINK.gather_s(WORKERS * numbers))
    loss, error = held_out_loss(setups[0].model, data[1]), statistics.mean(errors or [0.0])
    return {"loss": loss, "bytes": sent, "link_s": seconds, "error": error}


def _average_gradients(setups: Sequence[TrainSetup], scale: float = 1.0) -> None:
    for parameters in zip(*(setup.parameters.values() for setup in setups), strict=True):
        mean = torch.stack([p.grad for p in parameters]).mean(dim=0) * scale
        for parameter in parameters:
            parameter.grad = mean.clone()


def rare_sums(asked: argparse.Namespace) -> None:
    data = rows_of(TRAIN_ROWS)
    print(f"before {held_out_loss(fresh(), data[1]):.4f}; {asked.rounds} rounds of {LOCAL} steps, {WORKERS} workers")
    print("| way | held-out loss | of each seed | sent in 32 steps | at 10 Mbit | beyond the rank |")
    print("|---|---|---|---|---|---|")
    for name, way in WAYS.items():
        runs = [train_apart(way, asked.rate, seed, asked.rounds, data) for seed in range(asked.seeds)]
        losses, first = [one["loss"] for one in runs], runs[0]
        error = statistics.mean(one["error"] for one in runs)
        print(
            f"| {name} | {_spread(losses)} | {' '.join(f'{loss:.4f}' for loss in losses)} |"
            f" {first['bytes'] / 1e3:.0f} kB | {first['link_s']:.2f} s | {error:.1%} |",
            flush=True,
        )


# A pair of rank one, again and again.

BOOSTED = BoostedLora(lora_r=1, lora_alpha=2.0, restart_every=60)
CONTENDERS: dict[str, Any] = {
    "LoRA r8": Lora(lora_r=8, lora_alpha=16),
    "LoRA r1": Lora(lora_r=1, lora_alpha=2),
    "boosted r1, 60 steps": BOOSTED,
    "boosted r1, 120 steps": replace(BOOSTED, restart_every=120),
    "boosted r1, SVD": replace(BOOSTED, basis="rotate_svd"),
    "boosted r1, hard": replace(BOOSTED, samples="hard"),
}


def train_rounds(method: Any, rate: float, seed: int, steps: int, data: Any) -> dict[str, Any]:
    """Held-out losses every 60 steps, bytes of weights that train with their moments, seconds a step."""
    setup, scaler = set_up(method, rate, seed), gradient_scaler("cpu", "float32")
    order, curve, began = torch.Generator().manual_seed(seed), [], time.process_time()
    state = 0
    for step in range(steps):
        if setup.weighing and setup.weighing.is_due(step):
            _weigh(setup, data[0])
        batch = batch_of(data[0], torch.randint(len(data[0]), (ROWS,), generator=order).tolist())
        forward_backward(setup, batch, batch.targets_S.numel(), TECHNIQUES, scaler)
        between = setup.between
        ready = (lambda step=step, between=between: between.gradients_ready(step)) if between else None
        update(setup, scaler, Update(min(1.0, (step + 1) / 10), 1.0), ready)
        state = max(state, state_bytes(setup) + 4 * sum(p.numel() for p in setup.parameters.values()))
        if between:
            between.step_done(step)
        if (step + 1) % 60 == 0:
            curve.append(held_out_loss(setup.model, data[1]))
    return {"loss": curve[-1], "curve": curve, "bytes": state, "step_s": (time.process_time() - began) / steps}


@torch.no_grad()
def _weigh(setup: TrainSetup, rows: torch.Tensor) -> None:
    setup.model.eval()
    sums = []
    for start in range(0, len(rows), 32):
        batch = batch_of(rows, range(start, start + 32))
        losses_S = token_losses(setup.model, batch).double()
        sums.append(losses_S.new_zeros(32).index_add(0, places_of_samples(batch), losses_S))
    setup.model.train()
    assert setup.weighing
    setup.weighing.weigh(torch.cat(sums), torch.full((len(rows),), LENGTH - 1))


def rank_one(asked: argparse.Namespace) -> None:
    data = rows_of(TRAIN_ROWS)
    print(f"before {held_out_loss(fresh(), data[1]):.4f}; {asked.steps} steps of {ROWS} x {LENGTH} tokens")
    print("| method | held-out loss | every 60 steps, first seed | trained, with moments | CPU a step |")
    print("|---|---|---|---|---|")
    for name, method in CONTENDERS.items():
        runs = [train_rounds(method, asked.rate, seed, asked.steps, data) for seed in range(asked.seeds)]
        curve = " ".join(f"{loss:.3f}" for loss in runs[0]["curve"])
        print(
            f"| {name} | {_spread([one['loss'] for one in runs])} | {curve} |"
            f" {runs[0]['bytes'] / 1e3:.0f} kB | {1e3 * statistics.mean(one['step_s'] for one in runs):.0f} ms |",
            flush=True,
        )


def _spread(losses: Sequence[float]) -> str:
    return f"{statistics.mean(losses):.4f} +- {statistics.pstdev(losses):.4f}"


def averaging(asked: argparse.Namespace) -> None:
    for outputs, inputs in ((576, 576), (1536, 576), (4096, 4096)):
        for rank in (8, 16, 64):
            draw = torch.Generator().manual_seed(0)
            parts = [
                Factors(torch.randn(rank, inputs, generator=draw), torch.randn(outputs, rank, generator=draw))
                for _ in range(WORKERS)
            ]
            least = min(_seconds_of(parts, rank) for _ in range(5))
            rate = (inputs + outputs) * (WORKERS * rank) ** 2 / least
            print(f"{outputs} x {inputs}, rank {rank}, {WORKERS} workers: {1e3 * least:.2f} ms, {rate:.2g} a second")


def _seconds_of(parts: Sequence[Factors], rank: int) -> float:
    began = time.process_time()
    mean = algebra.add(parts, [1 / len(parts)] * len(parts))
    algebra.square(algebra.add([mean, parts[0]], [1.0, -1.0]))
    algebra.near(algebra.truncate(mean, rank)[0], parts[0].a_RI)
    return time.process_time() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("rare-sums", "rank-one", "averaging"))
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rate", type=float, default=3e-3)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    {"rare-sums": rare_sums, "rank-one": rank_one, "averaging": averaging}[asked.what](asked)


if __name__ == "__main__":
    main()
