"""What a model that was pruned while LoRA trained is good for, beside the untouched one, after equal tuning.

    python tests/benchmarks/pruning.py scores [--model smollm2] [--ranks 8] [--after 1 5 20]
        how alike channels are ranked by LoRA's gradients, by magnitude and by the full gradient
    python tests/benchmarks/pruning.py smaller [--model smollm2] [--ratio 0.5] [--steps 40] [--only lora ...]
        held-out loss of a smaller model by the score that chose what left
    python tests/benchmarks/pruning.py speed [--model smollm2] [--ratio 0.5]
        tokens a second of what is handed back, read and written, beside the whole model

stories260K (a Llama of 260 thousand weights) trains on stories like those it was made of, SmolLM2-135M on WikiText-2's
validation part, held out is its test part.  The same rows, rate and steps for all of a seed; a step's passes and update
are the product's.  `ratio` is the part of the channels, 0.5 of SmolLM2's are 30 % of its parameters; of `layer` as many
layers leave as come nearest to that.  Needs the assets beside the checkout.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a file

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from orchestrator.job.model_files import locate
from strategies.contract import Method
from strategies.methods.kept_pairs import pairs_of
from strategies.methods.lora import Lora
from strategies.pruning.groups import channels_of
from strategies.pruning.method import PrunedLora
from strategies.pruning.scores import KEEPS, MapScores
from strategies.shape import ModelShape
from strategies.step.step import Update, forward_backward, update
from strategies.step.supervised_logits import Batch
from strategies.techniques.precision import gradient_scaler
from strategies.train_setup import TrainSettings, TrainSetup
from strategies.workload import Techniques
from tests.benchmarks.quality import ASSETS, held_out_loss

LENGTH, ROWS = 128, 4
TECHNIQUES = Techniques("float32", "sdpa", False, False, ROWS, LENGTH)


@dataclass(frozen=True)
class Subject:
    """A model, and the text that it is tuned on and measured with."""

    folder: Path
    texts: Callable[[], tuple[str, str]]  # to train on, held out
    held_out_rows: int

    def fresh(self) -> Any:
        return AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32)

    def shape(self) -> ModelShape:
        return ModelShape.from_config(json.loads((self.folder / "config.json").read_text()))

    def rows(self) -> tuple[torch.Tensor, torch.Tensor]:
        tokenizer = AutoTokenizer.from_pretrained(self.folder)
        train, held_out = (torch.tensor(tokenizer(text, verbose=False)["input_ids"]) for text in self.texts())
        first, second = (ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH) for ids in (train, held_out))
        return first, second[:: max(1, len(second) // self.held_out_rows)][: self.held_out_rows]


def _stories() -> tuple[str, str]:
    listed = json.loads((ASSETS / "data/tinystories/tinystories_1000.json").read_text())
    stories = [one if isinstance(one, str) else str(one.get("text") or one.get("story")) for one in listed]
    return "\n".join(stories[:-100]), "\n".join(stories[-100:])


def _wikitext() -> tuple[str, str]:
    first, second = ((ASSETS / f"data/wikitext2/{part}.txt").read_text() for part in ("valid", "test"))
    return first[:400_000], second


def subject(name: str) -> Subject:
    if name == "stories260K":
        return Subject(ASSETS / "models/stories260K", _stories, 256)
    return Subject(locate("smollm2-135m-instruct", Path()), _wikitext, 48)


# How alike channels are ranked.


class Watched:
    """Scores of channels while LoRA trains, averaged over steps, by several formulas.

    `full` is |G * W'| with the weights' own gradient, element by element, `paper` the same with dL/dB A + B dL/dA.
    """

    def __init__(self, chosen: Subject, rank: int) -> None:
        shape = chosen.shape()
        self.groups = channels_of(shape, 0.5, 1)
        self.setup = set_up(Lora(rank, 2.0 * rank), chosen.fresh(), 1e-3, 0, 0)
        self.pairs: list[dict[str, Any]] = [{} for _ in range(self.groups.rows)]
        paths = {part.path for part in self.groups.parts}
        for pair in pairs_of(self.setup.model, self.setup.parameters):
            number, _, path = pair.name.partition(f"{shape.family.layers}.")[2].partition(".")
            if path in paths:
                self.pairs[int(number)][path] = pair
                pair.layer.base_layer.weight.requires_grad_(True)
        self.lora, self.magnitude = (
            MapScores([self.groups], self.pairs, torch.device("cpu"), bool(way)) for way in (1, 0)
        )
        self.averages: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def observe(self) -> None:
        self.lora.observe(True)
        found: dict[str, list[torch.Tensor]] = {"full": [], "paper": []}
        for pairs in self.pairs:
            sums: dict[str, dict[str, Any]] = {"full": {}, "paper": {}}
            for path, pair in pairs.items():
                weight = pair.layer.base_layer.weight
                corrected = weight + pair.scale * pair.b_OR @ pair.a_RI
                sums["full"][path] = _sums((weight.grad * corrected).abs())
                seen = pair.b_OR.grad @ pair.a_RI + pair.b_OR @ pair.a_RI.grad
                sums["paper"][path] = _sums((seen * corrected).abs())
                weight.grad = None
            for name, by_path in sums.items():
                parts = [by_path[part.path][part.is_input] for part in self.groups.parts]
                found[name].append(torch.stack([one / one.norm() for one in parts]).sum(dim=0))
        for name, scores in found.items():
            now = torch.stack(scores)
            self.averages[name] = KEEPS * self.averages[name] + (1 - KEEPS) * now if name in self.averages else now

    def correlations(self) -> dict[str, float]:
        """With `full`."""
        others = {"lora": self.lora.of("channels"), "magnitude": self.magnitude.of("channels")}
        others["paper"] = self.averages["paper"]
        return {name: _correlation(one, self.averages["full"]) for name, one in others.items()}


def _sums(whole_OI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return whole_OI.sum(dim=1), whole_OI.sum(dim=0)


def _correlation(first_KN: torch.Tensor, second_KN: torch.Tensor) -> float:
    """Spearman's coefficient of a layer's channels, the mean over the layers."""
    ranks = [side.argsort(dim=1).argsort(dim=1).double() for side in (first_KN, second_KN)]
    return statistics.mean(float(torch.corrcoef(torch.stack(pair))[0, 1]) for pair in zip(*ranks, strict=True))


def rank_correlations(chosen: Subject, rank: int, after: Sequence[int]) -> dict[int, dict[str, float]]:
    """Rank correlations with the full gradient's score after some steps of training with LoRA of a rank."""
    watched, scaler, found = Watched(chosen, rank), gradient_scaler("cpu", "float32"), {}
    rows, order = chosen.rows()[0], torch.Generator().manual_seed(0)
    for step in range(max(after)):
        batch = batch_of(rows[torch.randint(len(rows), (ROWS,), generator=order)])
        forward_backward(watched.setup, batch, batch.targets_S.numel(), TECHNIQUES, scaler)
        update(watched.setup, scaler, Update(1.0, 1.0), watched.observe)
        if step + 1 in after:
            found[step + 1] = watched.correlations()
    return found


def scores(asked: argparse.Namespace) -> None:
    print(
        f"{asked.model}, {ROWS} x {LENGTH} tokens a step: rank correlation of channels with the full gradient's score"
    )
    print("| rank | steps | lora | the paper's | magnitude |")
    print("|---|---|---|---|---|")
    for rank in asked.ranks:
        for step, found in rank_correlations(subject(asked.model), rank, asked.after).items():
            values = " | ".join(f"{found[name]:.2f}" for name in ("lora", "paper", "magnitude"))
            print(f"| {rank} | {step} | {values} |", flush=True)


# A smaller model.


def contenders(shape: ModelShape, ratio: float) -> dict[str, Method]:
    """Methods by name; of `layer` as many layers as come nearest to the parameters of the channels."""
    target = shape.num_parameters - PrunedLora(ratio=ratio, multiple_of=1).smaller(shape).num_parameters
    layer = shape.num_linear_parameters / shape.num_layers
    layers = round(target / layer) / shape.num_layers
    names = ("lora", "gate", "magnitude", "random")
    pruned = {name: PrunedLora(ratio=ratio, score=name, multiple_of=1, mask_every=2) for name in names}
    return {
        "untouched": Lora(8, 16.0),
        **pruned,
        "layer": PrunedLora(ratio=layers, score="layer", mask_every=2),
    }


def set_up(method: Any, model: Any, rate: float, seed: int, steps: int) -> TrainSetup:
    torch.manual_seed(seed)
    settings = TrainSettings(rate, 0.0, "adamw_torch", 0.9, 0.999, 1e-8, TECHNIQUES, seed, num_steps=steps)
    setup = method.setup(model, settings)
    setup.model.train()
    return setup


def batch_of(rows: torch.Tensor) -> Batch:
    supervised = torch.ones_like(rows, dtype=torch.bool)
    supervised[:, 0] = False
    return Batch(rows, supervised, None, torch.ones_like(rows), tuple(range(len(rows))))


def tuned(chosen: Subject, method: Any, rate: float, seed: int, steps: int, data: Any) -> dict[str, float]:
    """Losses when masks stay and of what is handed back, its parameters; CPU seconds a step, of them between steps."""
    setup, scaler = set_up(method, chosen.fresh(), rate, seed, steps), gradient_scaler("cpu", "float32")
    order, between, found, spent = torch.Generator().manual_seed(seed), setup.between, {}, 0.0
    began = time.process_time()

    def timed(call: Any, step: int) -> None:
        nonlocal spent
        start = time.process_time()
        call(step)
        spent += time.process_time() - start

    for step in range(steps):
        batch = batch_of(data[0][torch.randint(len(data[0]), (ROWS,), generator=order)])
        forward_backward(setup, batch, batch.targets_S.numel(), TECHNIQUES, scaler)
        ready = partial(timed, between.gradients_ready, step) if between else None
        update(setup, scaler, Update(min(1.0, (step + 1) / 5), 1.0), ready)
        if between:
            timed(between.step_done, step)
        if between and step + 1 == setup.settled_after:
            paused = time.process_time()
            found["closed"] = held_out_loss(setup.model, data[1])
            began += time.process_time() - paused
    found |= {"step_s": (time.process_time() - began) / steps, "between_s": spent / steps}
    with tempfile.TemporaryDirectory() as place:
        model = setup.model
        if between:
            setup.export(Path(place), None)
            model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)
        return found | {"loss": held_out_loss(model, data[1]), "parameters": _count(model)}


def _count(model: Any) -> int:
    return sum(p.numel() for name, p in model.named_parameters() if "lora_" not in name)


def smaller(asked: argparse.Namespace) -> None:
    chosen = subject(asked.model)
    data, shape = chosen.rows(), chosen.shape()
    print(
        f"{asked.model}: before {held_out_loss(chosen.fresh(), data[1]):.4f}; {asked.steps} steps of {ROWS} x {LENGTH}"
        f" tokens, rate {asked.rate:g}, {asked.seeds} seeds, {len(data[1])} rows held out"
    )
    print("| score | parameters | when masks stay | at the end | of each seed | CPU a step | of it between steps |")
    print("|---|---|---|---|---|---|---|")
    for name, method in contenders(shape, asked.ratio).items():
        if asked.only and name not in asked.only:
            continue
        runs = [tuned(chosen, method, asked.rate, seed, asked.steps, data) for seed in range(asked.seeds)]
        losses = [one["loss"] for one in runs]
        closed = f"{statistics.mean(one['closed'] for one in runs):.4f}" if "closed" in runs[0] else "-"
        print(
            f"| {name} | {runs[0]['parameters'] / 1e6:.3g} M | {closed} |"
            f" {statistics.mean(losses):.4f} +- {statistics.pstdev(losses):.4f} |"
            f" {' '.join(f'{loss:.4f}' for loss in losses)} | {statistics.mean(one['step_s'] for one in runs):.2f} s |"
            f" {statistics.mean(one['between_s'] for one in runs):.3f} s |",
            flush=True,
        )


# Its speed.


def speed(asked: argparse.Namespace) -> None:
    chosen, models = subject(asked.model), {}
    rows = chosen.rows()[1]
    for name, method in contenders(chosen.shape(), asked.ratio).items():
        if name not in ("untouched", "random", "layer"):
            continue  # the sizes are those of random
        models[name] = _of_size(chosen, method)
    times: dict[str, dict[str, list[float]]] = {name: {"read": [], "written": []} for name in models}
    for _ in range(asked.repeats):
        for name, model in models.items():  # in turns: other programs come and go
            times[name]["read"].append(_reading_s(model, rows))
            times[name]["written"].append(_writing_s(model, rows))
    print(f"{asked.model}, fp32, {torch.get_num_threads()} threads, medians of {asked.repeats} in turns")
    print("| model | parameters | tokens/s read (4 x 128) | tokens/s written (1 row, 32 after 32) |")
    print("|---|---|---|---|")
    for name, model in models.items():
        read, written = (statistics.median(times[name][what]) for what in ("read", "written"))
        print(f"| {name} | {_count(model) / 1e6:.3g} M | {ROWS * LENGTH / read:.0f} | {32 / written:.1f} |")


def _of_size(chosen: Subject, method: Any) -> Any:
    """The model that a method hands back, of its size and without training."""
    if isinstance(method, Lora):
        return chosen.fresh().eval()
    setup = set_up(method, chosen.fresh(), 1e-4, 0, 1)
    for gradient in setup.parameters.values():
        gradient.grad = torch.ones_like(gradient)
    assert setup.between
    setup.between.gradients_ready(0)
    setup.between.step_done(0)
    with tempfile.TemporaryDirectory() as place:
        setup.export(Path(place), None)
        return AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).eval()


@torch.no_grad()
def _reading_s(model: Any, rows: torch.Tensor) -> float:
    began = time.perf_counter()
    model(rows[:ROWS], logits_to_keep=1)
    return time.perf_counter() - began


@torch.no_grad()
def _writing_s(model: Any, rows: torch.Tensor) -> float:
    prompt = rows[:1, :32]
    began = time.perf_counter()
    model.generate(prompt, max_new_tokens=32, min_new_tokens=32, do_sample=False, pad_token_id=0)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("scores", "smaller", "speed"))
    parser.add_argument("--model", choices=("stories260K", "smollm2"), default="smollm2")
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--ranks", type=int, nargs="*", default=[8])
    parser.add_argument("--after", type=int, nargs="*", default=[1, 5, 20])
    parser.add_argument("--only", nargs="*", default=[])
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    {"scores": scores, "smaller": smaller, "speed": speed}[asked.what](asked)


if __name__ == "__main__":
    main()
