"""What experts of LoRA behind a router are good for, a property a subcommand.

    python tests/benchmarks/experts.py conflict [--only MixLoRA] [--rank 12] [--keys 64] [--steps 400] [--seeds 3]
        two tasks that answer the same prompts differently, told apart by the first token: MixLoRA beside one LoRA of as
        many trained parameters, and beside two LoRAs of half of them, one a task, chosen by that token or by the bank
    python tests/benchmarks/experts.py speed [--dtype float32] [--rows 8] [--repeats 8]
        seconds of a step beside LoRA's by the plan and by the clock, in turns: four layers of SmolLM2-135M's widths

stories260K (a Llama of 260 thousand weights), one process and one thread.  A row is a mark (task A or B), 12 tokens of
Shakespeare, and a key; the answer is one token, a random one for each key and task, so the two tasks have the same
prompts but for the mark.  Held-out rows have other texts before the same keys.  Every contender sees the same rows in
as many steps; of the two LoRAs each sees its own task's half.  Learning rates are the best of three on another seed.
Needs the assets beside the checkout.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a file

import numpy
import torch
import transformers
from strategies.adapter_bank.distances import jensen_shannon

from clusters.probe.node import probe_node
from strategies.adapter_bank.evidence import Evidence, gather
from strategies.measure import trace
from strategies.measure.trace import Lengths
from strategies.methods.lora import Lora
from strategies.mixture.method import MixLora
from strategies.shape import ModelShape
from strategies.step import document_attention, host_memory
from strategies.step.step import Update, forward_backward, update
from strategies.step.supervised_logits import Batch, supervised_logits
from strategies.techniques.precision import gradient_scaler
from strategies.train_setup import TrainSettings, TrainSetup
from strategies.workload import Techniques, Workload
from tests.benchmarks.lora_cost import config
from tests.benchmarks.quality import fresh, texts

TEXT, ROWS = 12, 16  # tokens of text in a row, rows of a step
LENGTH = TEXT + 3
MARKS, FIRST_KEY = (300, 340), 259  # of the tasks; below are bytes, whose embeddings hardly differ
TECHNIQUES = Techniques("float32", "sdpa", False, False, ROWS, LENGTH)
RATES = (3e-3, 1e-2, 3e-2)
MLP = ["gate_proj", "up_proj", "down_proj"]


def contenders(rank: int) -> dict[str, Any]:
    """Of as many trained parameters as one LoRA of a rank, up to 10 % fewer where ranks do not divide."""
    wide, four, eight = rank * 49 // 30, max(1, rank // 3), max(1, rank // 6)
    return {
        f"LoRA r{rank}": Lora(rank, 2 * rank),
        f"LoRA r{wide}, MLP alone": Lora(wide, 2 * wide, lora_target_modules=MLP),
        f"MixLoRA 4 x r{four}": MixLora(4, lora_r=four, lora_alpha=2 * four),
        f"MixLoRA 4 x r{four}, no balance": MixLora(4, lora_r=four, lora_alpha=2 * four, router_aux_loss_coef=0.0),
        f"MixLoRA 8 x r{eight}": MixLora(8, lora_r=eight, lora_alpha=2 * eight),
        f"MixLoRA 3 x r{rank // 2}, MLP alone": MixLora(3, lora_r=rank // 2, lora_alpha=rank, attention=False),
    }


@dataclass(frozen=True)
class TwoTasks:
    """What each key is answered with under each mark, and texts to put before keys."""

    keys_K: torch.Tensor
    answers_2K: torch.Tensor
    train_NT: torch.Tensor
    held_out_NT: torch.Tensor

    @classmethod
    def draw(cls, num_keys: int, seed: int) -> TwoTasks:
        draw = torch.Generator().manual_seed(seed)
        vocabulary = torch.tensor([token for token in range(FIRST_KEY, 512) if token not in MARKS])
        keys_K = vocabulary[torch.randperm(len(vocabulary), generator=draw)[:num_keys]]
        answers_2K = vocabulary[torch.randint(len(vocabulary), (2, num_keys), generator=draw)]
        train, held_out = (rows.reshape(-1, TEXT)[: len(rows) * 8] for rows in (r[:, :96] for r in texts()))
        return cls(keys_K, answers_2K, train, held_out)

    def batch(self, tasks: Sequence[int], keys: torch.Tensor, texts_NT: torch.Tensor) -> Batch:
        """A row for each task, key and text."""
        marks = torch.tensor(MARKS)[list(tasks)]
        answers = self.answers_2K[list(tasks), keys]
        ids = torch.cat([marks[:, None], texts_NT, self.keys_K[keys][:, None], answers[:, None]], dim=1)
        supervised = torch.zeros_like(ids, dtype=torch.bool)
        supervised[:, -1] = True
        return Batch(ids, supervised, None, torch.ones_like(ids), tuple(range(len(ids))))

    def drawn(self, tasks: Sequence[int], draw: torch.Generator) -> Batch:
        """A training batch."""
        keys = torch.randint(len(self.keys_K), (len(tasks),), generator=draw)
        rows = torch.randint(len(self.train_NT), (len(tasks),), generator=draw)
        return self.batch(tasks, keys, self.train_NT[rows])

    def held_out(self, task: int) -> Batch:
        """Every key once, behind a text that was not trained on."""
        keys = torch.arange(len(self.keys_K))
        return self.batch([task] * len(keys), keys, self.held_out_NT[keys % len(self.held_out_NT)])


def set_up(method: Any, rate: float, seed: int) -> TrainSetup:
    torch.manual_seed(seed)
    setup = method.setup(fresh(), TrainSettings(rate, 0.0, "adamw_torch", 0.9, 0.999, 1e-8, TECHNIQUES, seed))
    setup.model.train()
    return setup


def train(setup: TrainSetup, tasks: TwoTasks, pattern: Sequence[int], seed: int, steps: int) -> dict[str, float]:
    """What the balance came to in the last step, where there is one."""
    draw, scaler, told = torch.Generator().manual_seed(seed), gradient_scaler("cpu", "float32"), {}
    for step in range(steps):
        batch = tasks.drawn(pattern, draw)
        forward_backward(setup, batch, batch.targets_S.numel(), TECHNIQUES, scaler)
        update(setup, scaler, Update(min(1.0, (step + 1) / 20) * (1 - step / steps), 1.0))
        if setup.extra_loss:
            told = setup.extra_loss.metrics_of(setup.extra_loss.take())
    return told


@torch.no_grad()
def judge(model: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss of each row, and whether its likeliest token is the answer."""
    model.eval()
    logits_SV = supervised_logits(model, batch).float()
    losses_S = torch.nn.functional.cross_entropy(logits_SV, batch.targets_S, reduction="none")
    return losses_S, logits_SV.argmax(-1) == batch.targets_S


def evidence_of(batch: Batch, embeddings: numpy.ndarray) -> Evidence:
    """What a bank keeps of rows."""
    learnt = batch.supervised_BT.numpy()
    return gather(((row.numpy(), own) for row, own in zip(batch.input_ids_BT, learnt, strict=True)), embeddings)


def choose_by_bank(tasks: TwoTasks, held_out: Batch, seed: int) -> list[int]:
    """The adapter whose training data is nearest to each prompt, by the bank's distance of all tokens."""
    embeddings = fresh().get_input_embeddings().weight.detach().numpy()
    draw = torch.Generator().manual_seed(seed)
    bank = [evidence_of(tasks.drawn([task] * 512, draw), embeddings) for task in (0, 1)]
    found = []
    for row in range(len(held_out.input_ids_BT)):
        prompt = held_out.input_ids_BT[row : row + 1, :-1]
        one = Batch(prompt, torch.ones_like(prompt, dtype=torch.bool), None, torch.ones_like(prompt), (0,))
        found.append(int(jensen_shannon(evidence_of(one, embeddings), bank).argmin()))
    return found


def run_one(method: Any, rate: float, seed: int, asked: argparse.Namespace) -> dict[str, float]:
    tasks, setup = TwoTasks.draw(asked.keys, seed), set_up(method, rate, seed)
    began = time.process_time()
    told = train(setup, tasks, [0, 1] * (ROWS // 2), seed, asked.steps)
    seconds = (time.process_time() - began) / asked.steps
    losses, right = zip(*(judge(setup.model, tasks.held_out(task)) for task in (0, 1)), strict=True)
    count = sum(parameter.numel() for parameter in setup.parameters.values())
    return {**_mean(losses, right), "step_s": seconds, "parameters": count, **told}


def run_two(rate: float, seed: int, asked: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Two LoRAs, each of its own task's rows: chosen by the mark, and by the bank."""
    tasks, models, count, began = TwoTasks.draw(asked.keys, seed), [], 0, time.process_time()
    for task in (0, 1):
        setup = set_up(Lora(asked.rank // 2, asked.rank), rate, seed)
        train(setup, tasks, [task] * (ROWS // 2), seed + task, asked.steps)
        models.append(setup.model)
        count += sum(parameter.numel() for parameter in setup.parameters.values())
    seconds = (time.process_time() - began) / asked.steps
    rest = {"step_s": seconds, "parameters": count}
    by_mark, by_bank, hits = [], [], []
    for task in (0, 1):
        batch = tasks.held_out(task)
        of_each = [judge(model, batch) for model in models]
        chosen = torch.tensor(choose_by_bank(tasks, batch, seed))
        hits += (chosen == task).tolist()
        by_mark.append(of_each[task])
        by_bank.append(tuple(torch.where(chosen == 0, one, other) for one, other in zip(*of_each, strict=True)))
    found = {"by the mark": by_mark, "by the bank": by_bank}
    rows = {name: {**_mean(*zip(*parts, strict=True)), **rest} for name, parts in found.items()}
    rows["by the bank"]["routed"] = statistics.mean(hits)
    return rows


def _mean(losses: Sequence[torch.Tensor], right: Sequence[torch.Tensor]) -> dict[str, float]:
    return {"loss": torch.cat(list(losses)).mean().item(), "right": torch.cat(list(right)).float().mean().item()}


def conflict(asked: argparse.Namespace) -> None:
    tasks = TwoTasks.draw(asked.keys, 0)
    before = _mean(*zip(*(judge(fresh(), tasks.held_out(task)) for task in (0, 1)), strict=True))
    print(f"before: loss {before['loss']:.3f}, {before['right']:.1%} right; {asked.keys} keys, {asked.steps} steps")
    print("| contender | trained | rate | held-out loss | of each seed | right | CPU a step | told |")
    print("|---|---|---|---|---|---|---|---|")
    for name, method in contenders(asked.rank).items():
        if asked.only not in name:
            continue
        rate = min(RATES, key=lambda one: run_one(method, one, 100, asked)["loss"])
        _show(name, rate, [run_one(method, rate, seed, asked) for seed in range(asked.seeds)])
    name = f"two LoRAs r{asked.rank // 2}"
    if asked.only not in name:
        return
    rate = min(RATES, key=lambda one: run_two(one, 100, asked)["by the mark"]["loss"])
    runs = [run_two(rate, seed, asked) for seed in range(asked.seeds)]
    for way in ("by the mark", "by the bank"):
        _show(f"{name}, {way}", rate, [run[way] for run in runs])


def _show(name: str, rate: float, runs: Sequence[dict[str, float]]) -> None:
    losses, right = [run["loss"] for run in runs], [run["right"] for run in runs]
    first = runs[0]
    told = [f"{key.removeprefix('experts/')} {first[key]:.3g}" for key in first if "/" in key or key == "routed"]
    print(
        f"| {name} | {first['parameters']:.0f} | {rate:g} | {statistics.mean(losses):.3f} +-"
        f" {statistics.pstdev(losses):.3f} | {' '.join(f'{loss:.3f}' for loss in losses)} |"
        f" {statistics.mean(right):.1%} | {1e3 * statistics.mean(run['step_s'] for run in runs):.1f} ms |"
        f" {', '.join(told)} |",
        flush=True,
    )


SPEED: dict[str, Any] = {
    "LoRA r8": Lora(lora_r=8, lora_alpha=16),
    "MixLoRA 4 x r8": MixLora(num_experts=4),
    "MixLoRA 8 x r8": MixLora(),
    "MixLoRA 8 x r8, 4 of them": MixLora(top_k=4),
}


def speed(asked: argparse.Namespace) -> None:
    host_memory.keep()  # as training does
    document_attention.register()
    layers, length = 4, 72
    node, switched = probe_node(), Techniques(asked.dtype, "document", True, False, 1, asked.rows * length)
    settings = TrainSettings(1e-3, 0.0, "adamw_torch_fused", 0.9, 0.999, 1e-8, switched, 1)
    batch = Lengths((length,) * asked.rows, (length // 2,) * asked.rows).batch(True)
    shape, tokens = ModelShape.from_config(config(layers)), asked.rows * length
    work = Workload(shape, asked.rows, tokens, tokens // 2, length, asked.rows, 1, asked.rows)
    setups = {name: trace.build(config(layers), layers, method, settings, "cpu") for name, method in SPEED.items()}
    seconds: dict[str, list[float]] = {name: [] for name in SPEED}
    for number in range(-2, asked.repeats):
        for name in list(SPEED)[:: 1 if number % 2 else -1]:
            setups[name].model.train()
            began, scaler = time.process_time(), gradient_scaler("cpu", asked.dtype)
            forward_backward(setups[name], batch, batch.targets_S.numel(), switched, scaler)
            update(setups[name], scaler, Update(1.0, 1.0))
            if number >= 0:
                seconds[name].append(time.process_time() - began)
    planned = {name: method.estimate(work, node.cpu, node, switched).time.step_s for name, method in SPEED.items()}
    first = next(iter(SPEED))
    print(f"{asked.dtype}, {asked.rows} x {length} tokens, {layers} layers of SmolLM2-135M's widths")
    print("| method | a step | of LoRA's | planned of LoRA's |")
    print("|---|---|---|---|")
    for name, spent in seconds.items():
        ratio = statistics.median(own / other for own, other in zip(spent, seconds[first], strict=True))
        print(f"| {name} | {statistics.median(spent):.3f} s | {ratio:.2f} | {planned[name] / planned[first]:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("conflict", "speed"))
    parser.add_argument("--only", default="", help="contenders whose name holds this")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--keys", type=int, default=64)
    parser.add_argument("--rank", type=int, default=12, help="of the one LoRA; a multiple of 6")
    parser.add_argument("--dtype", default="float32", choices=("bfloat16", "float32"))
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=8)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    {"conflict": conflict, "speed": speed}[asked.what](asked)


if __name__ == "__main__":
    main()
