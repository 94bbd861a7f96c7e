"""What learning new facts costs of what a model knew: a memory of rows beside LoRA and full training.

    python tests/benchmarks/forgetting.py [--model stories] [--seeds 3] [--out FILE]    every contender, the table
    python tests/benchmarks/forgetting.py --only "LoRA r8" --rates 1e-3 --out FILE      one of them, into the same file
    python tests/benchmarks/forgetting.py --table --out FILE                            the table of what is there

A model learns 200 made-up facts ("Volata has a long cat.") in batches of 40 until it answers 95 % of them right, every
token of the answer.  Then the loss of texts that it knew is measured again: what that rose by is forgotten.  All
contenders stop at the same accuracy, so what is compared is the price of the same knowledge.  Each has the learning
rate, of those tried, at which it forgets least on a seed that is not shown; one that needs more steps than --steps
counts at the accuracy it has then, which the table says.

`stories` is stories260K (a Llama of 260 thousand weights) and TinyStories, which it was made of; `smollm2` is
SmolLM2-135M-Instruct, facts of people and towns, and WikiText-2, both once seen.  Needs the assets beside the checkout;
smollm2 also the package of its weights.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a file

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from strategies.methods.full import Full
from strategies.methods.lora import Lora
from strategies.shape import ModelShape
from strategies.sparse_memory.costs import MemoryCosts
from strategies.sparse_memory.layer import RowMemory
from strategies.sparse_memory.method import SparseMemory
from strategies.step.step import Update, forward_backward, last_pass, update
from strategies.step.supervised_logits import Batch, loss_sum, supervised_logits
from strategies.techniques.precision import gradient_scaler
from strategies.train_setup import TrainSettings, TrainSetup
from strategies.workload import Techniques

ASSETS = Path(__file__).resolve().parents[3] / "shared/assets"
FACTS, ROWS, ENOUGH, EVERY = 200, 40, 0.95, 10
OLD_ROWS = 64  # texts that are measured; as many others are the background
TECHNIQUES = Techniques("float32", "sdpa", False, False, ROWS, 128)
CHOOSING_SEED = 100


def _words(text: str) -> list[str]:
    return text.split()


SYLLABLES = _words("ba be bi bo da do fa fi ga go ka ki la lo ma mi na no pa po ra ri sa so ta ti va vo za zu")
LOOKS = _words(
    "red blue green yellow big small shiny soft hard old new round flat long short warm cold loud quiet funny"
)
THINGS = _words("ball cat dog hat car tree boat bird fish cake box book bed cup door flower apple bear truck kite")
WORK = _words("baker doctor farmer lawyer painter pilot sailor singer tailor teacher")
TOWNS = _words("Paris London Rome Berlin Madrid Vienna Dublin Oslo Athens Cairo Delhi Tokyo Lima Boston Chicago Dallas")


@dataclass(frozen=True)
class Ground:
    """A model with texts that it knows, and facts that it does not."""

    folder: str
    facts: Batch
    old: tuple[Batch, ...]  # measured
    background: tuple[Batch, ...]


def facts_for(model: str) -> list[tuple[str, str]]:
    """Made-up facts as beginning and end, the same in every run."""
    draw, names = random.Random(0), dict[str, None]()
    while len(names) < FACTS:
        names["".join(draw.choice(SYLLABLES) for _ in range(3)).capitalize()] = None
    if model == "stories":
        return [(f"{name} has a", f" {draw.choice(LOOKS)} {draw.choice(THINGS)}.") for name in names]
    return [(f"{name} is a", f" {draw.choice(WORK)} from {draw.choice(TOWNS)}.") for name in names]


@cache
def ground_of(model: str) -> Ground:
    if model == "stories":
        folder, length = str(ASSETS / "models/stories260K"), 128
        texts = json.loads((ASSETS / "data/tinystories/tinystories_1000.json").read_text())
    else:
        from orchestrator.job.model_files import locate

        folder, length = str(locate("smollm2-135m-instruct", Path())), 96
        texts = (ASSETS / "data/wikitext2/test.txt").read_text().split("\n")
    tokenizer: Any = AutoTokenizer.from_pretrained(folder, model_max_length=1 << 20)
    known = [ids[:length] for ids in map(tokenizer.encode, texts) if len(ids) >= length][: 2 * OLD_ROWS]
    plain = torch.tensor(known)
    batches = [_batch(part, torch.ones_like(part, dtype=torch.bool), torch.ones_like(part)) for part in plain.split(16)]
    half = len(batches) // 2
    return Ground(folder, _batch_of_facts(tokenizer, facts_for(model)), tuple(batches[half:]), tuple(batches[:half]))


def _batch_of_facts(tokenizer: Any, facts: Sequence[tuple[str, str]]) -> Batch:
    begin = [len(tokenizer.encode(start)) for start, _ in facts]
    rows = [torch.tensor(tokenizer.encode(start + end)) for start, end in facts]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    place = torch.arange(ids.shape[1])[None]
    real = place < torch.tensor([len(row) for row in rows])[:, None]
    return _batch(ids, real & (place >= torch.tensor(begin)[:, None]), real.long())


def _batch(ids: torch.Tensor, supervised: torch.Tensor, mask: torch.Tensor) -> Batch:
    supervised = supervised.clone()
    supervised[:, 0] = False
    return Batch(ids, supervised, None, mask, tuple(range(len(ids))))


def pick(batch: Batch, rows: torch.Tensor) -> Batch:
    assert batch.attention_mask_BT is not None
    return _batch(batch.input_ids_BT[rows], batch.supervised_BT[rows], batch.attention_mask_BT[rows])


@torch.no_grad()
def old_loss(model: Any, ground: Ground) -> float:
    model.eval()
    total = sum(loss_sum(model, batch).item() for batch in ground.old)
    model.train()
    return total / sum(batch.targets_S.numel() for batch in ground.old)


@torch.no_grad()
def accuracy(model: Any, ground: Ground) -> float:
    """Of facts whose end is right, token by token: what greedy decoding would write."""
    model.eval()
    right = 0
    for rows in torch.arange(FACTS).split(ROWS):
        batch = pick(ground.facts, rows)
        wrong = supervised_logits(model, batch).argmax(-1) != batch.targets_S
        owner = batch.supervised_BT[:, 1:].nonzero()[:, 0]
        right += len(rows) - len(owner[wrong].unique())
    model.train()
    return right / FACTS


# Contenders.


@dataclass(frozen=True)
class Contender:
    method: Any
    rates: tuple[float, ...]


def contenders_for(num_layers: int) -> dict[str, Contender]:
    lora, memory = (4e-4, 5e-4, 1e-3), (1e-3, 1.5e-3, 3e-3)
    middle = [num_layers // 2]
    return {
        "full": Contender(Full(), (7e-5, 1e-4, 2e-4)),
        "LoRA r8": Contender(Lora(lora_r=8, lora_alpha=16), lora),
        "LoRA r8, middle layer": Contender(
            Lora(lora_r=8, lora_alpha=16, layers_to_transform=middle), (1e-3, 2e-3, 5e-3)
        ),
        "memory, 1024 rows": Contender(SparseMemory(memory_rows=1024), memory),
        "memory, 16384 rows": Contender(SparseMemory(memory_rows=16384), memory),
        "memory, 65536 rows": Contender(SparseMemory(memory_rows=65536), memory),
        "memory, 16384 rows, 256 surprising": Contender(SparseMemory(memory_rows=16384, slots="surprising"), memory),
    }


@dataclass(frozen=True)
class Outcome:
    model: str
    name: str
    rate: float
    seed: int
    steps: int
    accuracy: float
    before: float
    after: float
    trained: int  # numbers that train
    moved: int  # numbers that moved at all
    rows_read: float  # different rows of a pass, over those of the formula; 0 where there are none
    bus_bytes: float  # a step
    step_s: float  # CPU

    @property
    def forgotten(self) -> float:
        return self.after - self.before


def prepare(ground: Ground, method: Any, rate: float, seed: int) -> TrainSetup:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(ground.folder, dtype=torch.float32)
    setup = method.setup(model, TrainSettings(rate, 0.0, "adamw_torch", 0.9, 0.999, 1e-8, TECHNIQUES, seed))
    setup.model.train()
    return setup


def look(setup: TrainSetup, ground: Ground, first: Batch) -> None:
    """What a method does before the first step."""
    if setup.learner:
        setup.learner.begin_learning(1)
        setup.learner.watch(first)
        forward_backward(setup, first, first.targets_S.numel(), TECHNIQUES, gradient_scaler("cpu", "float32"))
        setup.learner.end_learning()
    if setup.held_out_observer:
        for batch in ground.background:
            with setup.held_out_observer.over(batch), torch.no_grad():
                loss_sum(setup.model, batch)


def batches_of(seed: int) -> Iterator[torch.Tensor]:
    order = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(FACTS, generator=order).split(ROWS)


def learn(model: str, name: str, method: Any, rate: float, seed: int, most_steps: int) -> Outcome:
    ground = ground_of(model)
    setup, scaler = prepare(ground, method, rate, seed), gradient_scaler("cpu", "float32")
    before, start = old_loss(setup.model, ground), {key: p.detach().clone() for key, p in setup.parameters.items()}
    known, spent, crossed, step, read = 0.0, 0.0, 0, 0, _count_rows(setup)
    for step, rows in enumerate(batches_of(seed), start=1):
        batch, began = pick(ground.facts, rows), time.process_time()
        if step == 1:
            look(setup, ground, pick(ground.facts, rows[:16]))
            read.clear()
        numbers, crossed = Update(min(1.0, step / 10), 1.0), crossed - _bytes(setup)
        last_pass(setup, numbers)
        forward_backward(setup, batch, batch.targets_S.numel(), TECHNIQUES, scaler)
        update(setup, scaler, numbers)
        spent, crossed = spent + time.process_time() - began, crossed + _bytes(setup)
        if step % EVERY == 0:
            observed, read[:] = list(read), []
            known = accuracy(setup.model, ground)
            read[:] = observed
            if known >= ENOUGH or step >= most_steps:
                break
    if setup.streaming:
        setup.streaming.settle()
    moved = sum(int((p.detach() != start[key]).sum()) for key, p in setup.parameters.items())
    trained = sum(p.numel() for p in start.values())
    return Outcome(
        model, name, rate, seed, step, known, before, old_loss(setup.model, ground), trained, moved,
        _of_formula(setup, method, read), crossed / step, spent / step,
    )  # fmt: skip


def _count_rows(setup: TrainSetup) -> list[tuple[int, int]]:
    """(tokens, different rows) of each pass, as it is made."""
    found: list[tuple[int, int]] = []
    for module in setup.model.modules():
        if isinstance(module, RowMemory):
            router: Any = module.router
            choose = router.choose

            def chosen(x_TD: torch.Tensor, choose: Any = choose) -> torch.Tensor:
                rows_TK = choose(x_TD)
                found.append((len(x_TD), len(rows_TK.unique())))
                return rows_TK

            router.choose = chosen
    return found


def _of_formula(setup: TrainSetup, method: Any, read: Sequence[tuple[int, int]]) -> float:
    if not isinstance(method, SparseMemory) or not read:
        return 0.0
    model: Any = setup.model
    shape = ModelShape.from_config(model.config.to_dict())
    costs = MemoryCosts(shape, TECHNIQUES, method.memory_rows, method.rows_per_token, (0,), False)
    return sum(rows for _, rows in read) / sum(costs.different_rows(tokens) for tokens, _ in read)


def _bytes(setup: TrainSetup) -> int:
    transport = getattr(setup.optimizer, "transport", None)
    return transport.down_bytes + transport.up_bytes if transport else 0


# Results.


def load(out: Path | None) -> list[Outcome]:
    lines = out.read_text().splitlines() if out and out.exists() else []
    return [Outcome(**json.loads(line)) for line in lines]


def keep(outcome: Outcome, out: Path | None) -> Outcome:
    reached = "" if outcome.accuracy >= ENOUGH else " (not reached)"
    print(
        f"{outcome.name}, rate {outcome.rate:g}, seed {outcome.seed}: {outcome.steps} steps, {outcome.accuracy:.1%}"
        f"{reached}, old loss {outcome.before:.4f} -> {outcome.after:.4f} (+{outcome.forgotten:.4f}),"
        f" {outcome.step_s:.2f} s a step",
        flush=True,
    )
    if out:
        with out.open("a") as file:
            file.write(json.dumps(asdict(outcome)) + "\n")
    return outcome


def best_rate(outcomes: Sequence[Outcome]) -> float:
    """Of those at which enough was learnt, the one that forgot least; else the one that learnt most."""
    return min(
        outcomes, key=lambda one: (one.accuracy < ENOUGH, one.forgotten if one.accuracy >= ENOUGH else -one.accuracy)
    ).rate


def show(outcomes: Sequence[Outcome], model: str) -> None:
    print("| contender | rate | old loss rose by | of each seed | accuracy | steps | numbers that moved | CPU a step |")
    print("|---|---|---|---|---|---|---|---|")
    for name in dict.fromkeys(one.name for one in outcomes if one.model == model):
        mine = [one for one in outcomes if one.model == model and one.name == name]
        tried = [one for one in mine if one.seed == CHOOSING_SEED] or mine
        rate = best_rate(tried)
        runs = [one for one in mine if one.seed != CHOOSING_SEED and one.rate == rate] or [
            one for one in tried if one.rate == rate
        ]
        rises, part = [one.forgotten for one in runs], statistics.mean(one.moved / one.trained for one in runs)
        print(
            f"| {name} | {rate:g} | {statistics.mean(rises):.3f} +- {statistics.pstdev(rises):.3f} |"
            f" {' '.join(f'{rise:.3f}' for rise in rises)} | {statistics.mean(one.accuracy for one in runs):.1%} |"
            f" {statistics.mean(one.steps for one in runs):.0f} | {runs[0].trained * part / 1e6:.2f}M of"
            f" {runs[0].trained / 1e6:.2f}M | {1e3 * statistics.mean(one.step_s for one in runs):.0f} ms |"
        )
    read = [one for one in outcomes if one.model == model and one.rows_read and one.seed != CHOOSING_SEED]
    for name in dict.fromkeys(one.name for one in read):
        mine = [one for one in read if one.name == name]
        crossed, part = statistics.mean(one.bus_bytes for one in mine), statistics.mean(one.rows_read for one in mine)
        print(f"{name}: {crossed / 1e6:.2f} MB a step over the bus, {part:.2f} of the formula's rows")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("stories", "smollm2"), default="stories")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=400, help="at most")
    parser.add_argument("--only", help="this contender")
    parser.add_argument("--rates", type=float, nargs="+", help="instead of the contender's")
    parser.add_argument("--out", type=Path, help="a file of results, one a line, that is added to")
    parser.add_argument("--table", action="store_true", help="train nothing")
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    found = load(asked.out)
    if not asked.table:
        config = transformers.AutoConfig.from_pretrained(ground_of(asked.model).folder)
        for name, contender in contenders_for(config.num_hidden_layers).items():
            if asked.only in (None, name):
                found += _runs(asked, name, replace(contender, rates=tuple(asked.rates or contender.rates)), found)
    show(found, asked.model)


def _runs(asked: argparse.Namespace, name: str, contender: Contender, known: Sequence[Outcome]) -> list[Outcome]:
    """What is not known yet: each rate on the seed that chooses, then the best on the others."""
    mine = [one for one in known if (one.model, one.name) == (asked.model, name)]
    made: list[Outcome] = []

    def run(rate: float, seed: int) -> None:
        if not any((one.rate, one.seed) == (rate, seed) for one in mine + made):
            made.append(keep(learn(asked.model, name, contender.method, rate, seed, asked.steps), asked.out))

    first, *others = contender.rates
    for rate in contender.rates if others else ():
        run(rate, CHOOSING_SEED)
    tried = [one for one in mine + made if one.seed == CHOOSING_SEED]
    rate = best_rate(tried) if tried else first
    for seed in range(asked.seeds):
        run(rate, seed)
    return made


if __name__ == "__main__":
    main()
