"""A model in stages: the simulated step beside a real one, what the executor costs, and what int8 on the wire costs.

    python tests/benchmarks/pipeline.py simulation     virtual stages, 2 and 3 processes of this machine
    python tests/benchmarks/pipeline.py overhead       one stage beside plain micro-batches
    python tests/benchmarks/pipeline.py wire           held-out loss after training, by the form of hidden states
    python tests/benchmarks/pipeline.py links          three unequal machines, emulated links, other ways (needs root)

simulation: the executor that trains, on a tiny model whose layers sleep in place of large ones; a stage's seconds are
its sleeps and what the tiny model takes by itself, measured before.  The link is the loopback.
overhead: steps of both in turn, of the same tiny model; the median of their ratios.
wire: the quick start's rows as bytes, a Llama of 4 layers from random weights, two stages, 3 seeds.

Sleeps and ratios want an idle machine: look at `uptime` first.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a file

import torch
import torch.distributed as dist

import orchestrator
from strategies.cost.pipeline import Boundary, Pass, simulate
from strategies.measure.trace import Lengths
from strategies.methods.full import Full
from strategies.methods.lora import Lora
from strategies.model.architecture import decoder_layers
from strategies.pipeline.cut import load_stage
from strategies.pipeline.layer_randomness import LayerRandomness
from strategies.pipeline.stages import WholeExport, make_stage
from strategies.pipeline.wire_size import message_bytes
from strategies.step.passes import passes_of
from strategies.step.step import Update, update
from strategies.step.supervised_logits import Batch
from strategies.techniques.precision import gradient_scaler
from strategies.train_setup import StepPasses, TrainSettings, TrainSetup
from strategies.workload import StagePart, Techniques, Wire
from tests.processes import run_ranks

TECHNIQUES = Techniques("float32", "sdpa", False, False, 1, 256)
LOOPBACK_BYTES_PER_S, LATENCY_S = 1.5e9, 50e-6
TOKENS = 48
RECIPES = Path(orchestrator.__file__).parent / "recipes"


@dataclass(frozen=True)
class Case:
    """Virtual stages: milliseconds of a forward pass of each, the backward pass takes twice as long."""

    forward_ms: tuple[float, ...]
    num_micro_batches: int
    ahead: int = 0

    def passes(self, own: tuple[float, float] = (0.0, 0.0)) -> list[Pass]:
        return [Pass(one / 1e3 + own[0], 2 * one / 1e3 + own[1]) for one in self.forward_ms]


CASES = (
    Case((60, 60), 8),
    Case((60, 60), 8, ahead=1),
    Case((90, 40), 8),
    Case((60, 60, 60), 8),
    Case((40, 90, 50), 8),
    Case((40, 90, 50), 12, ahead=1),
)


class Sleep(torch.autograd.Function):
    """Seconds that pass forward and backward."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, forward_s: float, backward_s: float) -> torch.Tensor:
        ctx.backward_s = backward_s
        time.sleep(forward_s)
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        time.sleep(ctx.backward_s)
        return gradients[0], None, None


def llama(folder: Path, layers: int, width: int, vocabulary: int, seed: int = 0) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def settings_of(techniques: Techniques, learning_rate: float = 1e-3) -> TrainSettings:
    return TrainSettings(learning_rate, 0.0, "adamw_torch", 0.9, 0.999, 1e-8, techniques, seed=1)


def set_up(folder: Path, method: Any, stage: StagePart | None, learning_rate: float = 1e-3) -> TrainSetup:
    settings = settings_of(replace(TECHNIQUES, stage=stage), learning_rate)
    arguments: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": "sdpa"}
    if stage is None:
        from transformers import AutoModelForCausalLM

        return method.setup(AutoModelForCausalLM.from_pretrained(folder, **arguments), settings)

    def load(kind: Any, config: Any, tensors: dict[str, torch.Tensor]) -> Any:
        return kind.from_pretrained(None, config=config, state_dict=tensors, output_loading_info=True, **arguments)

    setup = method.setup(load_stage(folder, stage, load), settings)
    return make_stage(setup, settings, [range(stage.count)], WholeExport(folder, method, settings))


def step_of(setup: TrainSetup, batches: list[Batch], scaler: Any, numbers: Update = Update(1.0, 1.0)) -> float:
    """One step; this worker's part of its loss."""
    random = LayerRandomness(setup.model)
    supervised = sum(batch.targets_S.numel() for batch in batches)
    step = StepPasses(supervised, TECHNIQUES, scaler, lambda ids: batches[ids[0]], lambda _: random.begin(""), [0])
    loss = passes_of(setup).run([[number] for number in range(len(batches))], step)
    update(setup, scaler, numbers)
    return loss.item()


def joined(rank: int, size: int, port: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)


# Simulation.


def virtual_stage(rank: int, size: int, port: int, folder: Path, case: Case, out: str) -> None:
    joined(rank, size, port)
    setup = set_up(folder, Lora(lora_r=2), StagePart(rank, size, rank, rank + 1, case.ahead))
    setup.model.train()
    own = case.passes()[rank]
    seconds = [0.0, 0.0]

    def sleep(_module: Any, _arguments: Any, hidden: torch.Tensor) -> torch.Tensor:
        return Sleep.apply(hidden, *seconds)  # type: ignore[return-value]

    decoder_layers(setup.model)[rank].register_forward_hook(sleep)
    scaler, took = gradient_scaler("cpu", "float32"), []
    batch = Lengths((TOKENS,), (TOKENS // 2,)).batch(False)
    for number in range(7):
        if number == 4:  # before, what the tiny model takes by itself
            seconds[:] = [own.forward_s, own.backward_s]
        dist.barrier()
        began = time.perf_counter()
        step_of(setup, [batch] * case.num_micro_batches, scaler)
        dist.barrier()
        took.append(time.perf_counter() - began)
    if rank == 0:
        bare_s, step_s = statistics.median(took[1:4]), statistics.median(took[4:])
        Path(out, "times.json").write_text(json.dumps([bare_s, step_s]))
    dist.destroy_process_group()


def simulation() -> None:
    print("stages, forward ms      micro-batches ahead  measured  simulated  error   with the model's own time  error")
    worst = 0.0
    for case in CASES:
        size = len(case.forward_ms)
        with tempfile.TemporaryDirectory() as out:
            folder = llama(Path(out, "model"), size, 64, 256)
            run_ranks(virtual_stage, size, folder, case, out)
            bare_s, measured_s = json.loads(Path(out, "times.json").read_text())
        boundaries = [Boundary(message_bytes(TOKENS, 64, "float32"), LOOPBACK_BYTES_PER_S, LATENCY_S)] * (size - 1)
        plain, full = (
            simulate(passes, boundaries, case.num_micro_batches, case.ahead).step_s
            for passes in (case.passes(), case.passes(_own_time(bare_s, size, case.num_micro_batches)))
        )
        worst = max(worst, abs(full / measured_s - 1))
        print(
            f"{case.forward_ms!s:<23} {case.num_micro_batches:>13} {case.ahead:>5} {measured_s:>9.3f} {plain:>10.3f}"
            f" {plain / measured_s - 1:>+6.1%} {full:>28.3f} {full / measured_s - 1:>+6.1%}"
        )
    print(f"largest error {worst:.1%}")


def _own_time(bare_s: float, size: int, num_micro_batches: int) -> tuple[float, float]:
    """What a pass of the tiny model takes, from a step without sleeps: (M + P - 1) slots of forward and backward."""
    slot_s = bare_s / (num_micro_batches + size - 1)
    return slot_s / 3, 2 * slot_s / 3


# Overhead.


def one_stage(rank: int, size: int, port: int, folder: Path, pairs: int, out: str) -> None:
    joined(rank, size, port)
    layers = 4
    setups = [set_up(folder, Lora(lora_r=8), stage) for stage in (None, StagePart(0, 1, 0, layers))]
    scaler, batch = gradient_scaler("cpu", "float32"), Lengths((256,), (64,)).batch(False)
    ratios, plain = [], []
    for number in range(pairs + 2):
        took = {}
        for one in (0, 1) if number % 2 else (1, 0):
            began = time.perf_counter()
            step_of(setups[one], [batch] * 4, scaler)
            took[one] = time.perf_counter() - began
        ratios.append(took[1] / took[0])
        plain.append(took[0])
    Path(out, "ratios.json").write_text(json.dumps([ratios[2:], plain[2:]]))
    dist.destroy_process_group()


def overhead(pairs: int = 30) -> None:
    with tempfile.TemporaryDirectory() as out:
        run_ranks(one_stage, 1, llama(Path(out, "model"), 4, 256, 1000), pairs, out)
        ratios, plain = json.loads(Path(out, "ratios.json").read_text())
    low, middle, high = statistics.quantiles(ratios, n=4)
    print(
        f"one stage beside plain micro-batches, {pairs} pairs of steps of {statistics.median(plain):.3f} s: median"
        f" {middle - 1:+.1%} (quarters {low - 1:+.1%} to {high - 1:+.1%})"
    )


# Wire.


def rows_of(name: str) -> list[Batch]:
    """Requests and answers as bytes, the answers supervised."""
    found = []
    for line in (RECIPES / "requests_to_json" / name).read_text().splitlines():
        _, request, answer = (message["content"].encode() for message in json.loads(line)["messages"])
        ids = torch.tensor([1, *request, 1, *answer, 2])
        is_answer = torch.arange(len(ids)) > len(request) + 1
        found.append(Batch(ids[None], is_answer[None], None, torch.ones_like(ids)[None], (len(found),)))
    return found


def trained(rank: int, size: int, port: int, folder: Path, job: tuple[Wire, int, int, Any], out: str) -> None:
    joined(rank, size, port)
    wire, seed, steps, edges = job
    setup = set_up(folder, Full(), StagePart(rank, size, edges[rank], edges[rank + 1], 1, wire), 3e-3)
    setup.model.train()
    rows, scaler, random = (
        rows_of("train.jsonl"),
        gradient_scaler("cpu", "float32"),
        torch.Generator().manual_seed(seed),
    )
    for step in range(steps):
        batches = [rows[i] for i in torch.randint(len(rows), (8,), generator=random).tolist()]
        step_of(setup, batches, scaler, Update(min(1.0, (step + 1) / 8) * (1 - step / steps), 1.0))
    setup.model.eval()
    held_out = rows_of("eval.jsonl")[:64]
    losses: list[torch.Tensor] = []
    with torch.no_grad():
        setup_passes = passes_of(setup)
        setup_passes.each([[batch] for batch in held_out], partial(_add_loss, losses, setup_passes))
    if rank == size - 1:
        mean = sum(losses).item() / sum(batch.targets_S.numel() for batch in held_out)  # type: ignore[union-attr]
        Path(out, "loss.json").write_text(json.dumps([mean, setup_passes.bytes_sent]))  # type: ignore[attr-defined]
    dist.destroy_process_group()


def _add_loss(losses: list[torch.Tensor], passes: Any, batch: list[Batch]) -> None:
    losses.append(passes.loss_sum(batch[0], TECHNIQUES))


def wire(steps: int, seeds: int) -> None:
    print(f"held-out loss after {steps} steps, nats a byte   " + "  ".join(f"seed {seed}" for seed in range(seeds)))
    base: list[float] = []
    for form in ("float32", "bfloat16", "int8"):
        found, sent = [], 0
        for seed in range(seeds):
            with tempfile.TemporaryDirectory() as out:
                folder = llama(Path(out, "model"), 4, 128, 256, seed)
                run_ranks(trained, 2, folder, (form, seed, steps, (0, 2, 4)), out)
                loss, sent = json.loads(Path(out, "loss.json").read_text())
            found.append(loss)
        base = base or found
        change = statistics.mean(one - other for one, other in zip(found, base, strict=True))
        print(
            f"{form:<9} {'  '.join(f'{loss:.4f}' for loss in found)}   mean {statistics.mean(found):.4f}"
            f" ({change:+.4f})   {sent / 1e6:.1f} MB sent by the last stage",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("simulation", "overhead", "wire", "links"))
    parser.add_argument("--steps", type=int, default=120, help="of each training of `wire`")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    if options.what == "simulation":
        simulation()
    elif options.what == "overhead":
        overhead()
    elif options.what == "links":
        from tests.benchmarks.pipeline_links import report

        report()
    else:
        wire(options.steps, options.seeds)


if __name__ == "__main__":
    main()
