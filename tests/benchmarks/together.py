"""Jobs over one base model, one after the other and together: times of `bank build`, of passes, and memory.

    python tests/benchmarks/together.py bank --steps 24      8 data sets of SmolLM2-135M; minutes; bar: 1.5x
    python tests/benchmarks/together.py passes               4 jobs of 16 tokens a step and more; bar: 1.5x at 16
    python tests/benchmarks/together.py memory --jobs 8      resident bytes of 1 and of 8 jobs, predicted and measured

The two ways take turns, each in a process of its own where memory or a start is measured: ratios of one run count.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks import bank_tasks

ROOT = Path(__file__).resolve().parents[2]
NUM_SETS = 8
_BUILD = """
import json, sys
from pathlib import Path
from orchestrator.cli.options import load_job
from orchestrator.bank.build import build_bank
from orchestrator.bank.hooks import BANK_HOOKS
from orchestrator.bank.library import add_run, bank_of
from orchestrator.lifecycle.hooks import Quiet
from orchestrator.lifecycle.run import submit

way, sets, *overrides = sys.argv[1:]
if way == "together":
    build_bank(Path(sets), lambda more: load_job("bank", [*overrides, *more]), lambda text: print(text, file=sys.stderr))
else:
    for one in sorted(Path(sets).glob("*/")):
        files = [f"data.{key}={json.dumps(str(one / name))}" for key, name in (("train", "train.jsonl"), ("eval", "eval.jsonl"))]
        job = load_job("bank", [*overrides, *files, f"name={json.dumps(one.name)}"])
        add_run(bank_of(job, create=True), submit(job, Quiet(), f"bank-{one.name}", BANK_HOOKS), one.name)
"""  # noqa: E501


def bank(num_steps: int, num_rows: int, dtype: str) -> None:
    """`bank build` of the first data sets, and a submit for each in one process; the losses beside each other."""
    with tempfile.TemporaryDirectory() as place:
        sets = Path(place) / "sets"
        for name in list(bank_tasks.TASKS)[:NUM_SETS]:
            rows = list(bank_tasks.rows_of(name))[: num_rows + 20]
            (sets / name).mkdir(parents=True)
            for file, part in (("train.jsonl", rows[20:]), ("eval.jsonl", rows[:20])):
                (sets / name / file).write_text("".join(json.dumps(row) + "\n" for row in part))
        took, losses = {}, {}
        for way in ("together", "one by one"):
            folder = Path(place) / way.replace(" ", "-")
            overrides = [
                f"train.max_steps={num_steps}",
                f"model.dtype={dtype}",
                f"checkpoint.output_dir={folder / 'runs'}",
                f"bank.path={folder / 'bank'}",
                "tracking.report_to=[]",
            ]
            began = time.perf_counter()
            subprocess.run([sys.executable, "-c", _BUILD, way, str(sets), *overrides], cwd=place, check=True)
            took[way] = time.perf_counter() - began
            results = sorted((folder / "runs").glob("bank-*/result.json"))
            losses[way] = [json.loads(file.read_text())["after"]["eval_loss"] for file in results]
            assert len(results) == NUM_SETS
            print(f"{way}: {took[way]:.1f} s", flush=True)
        apart = max(abs(a - b) for a, b in zip(*losses.values(), strict=True))
        print(f"{NUM_SETS} sets, {num_steps} steps each: {took['one by one'] / took['together']:.2f}x;"
              f" held-out losses differ by at most {apart:.1e}")  # fmt: skip


def _base() -> tuple[str, torch.nn.Module]:
    from transformers import AutoModelForCausalLM

    from orchestrator.job import model_files
    from strategies.step import document_attention

    document_attention.register()
    folder = str(model_files.locate("smollm2-135m-instruct", ROOT))
    return folder, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="document")


def _batch(tokens: int, seed: int):
    from strategies.step.supervised_logits import Batch

    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(1000, 20000, (1, tokens), generator=draw)
    supervised = torch.zeros(1, tokens, dtype=torch.bool)
    supervised[:, tokens // 2 :] = True
    return Batch(ids, supervised, (tokens,), None, (seed,))


def _setup(model, rank: int):
    from strategies import METHODS
    from strategies.train_setup import TrainSettings

    method: Any = METHODS["lora"]
    return method(lora_r=rank).setup(
        model, TrainSettings(1e-3, 0.0, "adamw_torch", 0.9, 0.999, 1e-8, _techniques(4096), 0)
    )


def _techniques(limit: int):
    from strategies.workload import Techniques

    return Techniques("float32", "document", True, False, 1, limit, optim="adamw_torch")


def _step(setup, through, tokens: int, seed: int) -> float:
    """One optimizer step of one job; its loss."""
    from strategies.step.step import Update, update
    from strategies.techniques.precision import gradient_scaler
    from strategies.train_setup import StepPasses

    batch, scaler = _batch(tokens, seed), gradient_scaler("cpu", "float32")
    how = StepPasses(batch.targets_S.numel(), _techniques(4096), scaler, lambda _: batch, lambda _: None, [0])
    loss = through.run([[0]], how)
    update(setup, scaler, Update(1.0, 1.0))
    return loss.item()


def _step_together(row, joined, tokens: int, seed: int) -> list[float]:
    """One step of every job, in one row; their losses."""
    from strategies.multi_lora.turns import take_turns

    losses: dict[int, float] = {}

    def call(job: int, turn) -> None:
        joined[job].turn = turn
        losses[job] = _step(joined[job].setup, joined[job], tokens, seed + job)

    turns = take_turns([partial(call, job) for job in range(len(joined))], len(joined), row.run_pass)
    assert not any(turn.error for turn in turns), [turn.error for turn in turns]
    return [losses[job] for job in range(len(joined))]


def passes(num_jobs: int, rounds: int, sizes: list[int]) -> None:
    """Steps of several jobs, each alone on its own model and all in one row; the two ways take turns."""
    from strategies.multi_lora.joint_model import BaseCopies, JointModel
    from strategies.multi_lora.passes import JointRow
    from strategies.multi_lora.turns import Turn
    from strategies.step.passes import SequentialPasses

    base = BaseCopies(_base()[1])
    alone, shared = ([_setup(base.copy(), 4 + 4 * (job % 3)) for job in range(num_jobs)] for _ in range(2))
    row = JointRow(JointModel(base), print)
    joined = [row.join(job, setup, Turn(print))[0] for job, setup in enumerate(shared)]
    assert all(one.is_joined for one in joined)
    for setup in (*alone, *shared):
        setup.model.train()
    for tokens in sizes:
        seconds: dict[str, list[float]] = {"alone": [], "together": []}
        worst = 0.0
        for number in range(rounds):
            began = time.perf_counter()
            losses = [_step(one, SequentialPasses(one), tokens, 100 * number + job) for job, one in enumerate(alone)]
            between = time.perf_counter()
            found = _step_together(row, joined, tokens, 100 * number)
            seconds["alone"].append(between - began)
            seconds["together"].append(time.perf_counter() - between)
            worst = max(worst, *(abs(ours - theirs) for ours, theirs in zip(found, losses, strict=True)))
        of_way = {way: statistics.median(measured[1:]) for way, measured in seconds.items()}
        print(
            f"K = {num_jobs}, {tokens} tokens a job: one after the other {of_way['alone']:.3f} s, together"
            f" {of_way['together']:.3f} s a step of all: {of_way['alone'] / of_way['together']:.2f}x;"
            f" worst difference of a loss {worst:.1e}",
            flush=True,
        )


def memory(num_jobs: int, tokens: int) -> None:
    """Most resident bytes of a process with so many jobs, after a few steps of each."""
    for count in (1, num_jobs):
        code = f"from tests.benchmarks import together; together._hold({count}, {tokens})"
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def _hold(count: int, tokens: int) -> None:
    """Load one base, put jobs on it and train all of them a little; prints what it took."""

    def resident() -> float:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20

    model = _base()[1]
    base_mib = sum(p.nbytes for p in {id(p): p for p in model.parameters()}.values()) / 2**20
    loaded = resident()
    from strategies.multi_lora.joint_model import BaseCopies, JointModel

    base = BaseCopies(model)
    joint = JointModel(base)
    setups = [_setup(base.copy(), 8) for _ in range(count)]
    for job, setup in enumerate(setups):
        joint.join(job, setup)
    held = {
        p.data_ptr(): p.nbytes for one in (model, joint.model, *(s.model for s in setups)) for p in one.parameters()
    }
    print(
        f"{count} jobs: base {base_mib:.0f} MiB, weights of all {sum(held.values()) / 2**20:.0f} MiB"
        f" ({sum(held.values()) / 2**20 / base_mib:.2f}x of the base), resident {resident():.0f} MiB, of which"
        f" {loaded:.0f} with the base alone"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["bank", "passes", "memory"])
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--rows", type=int, default=60)
    parser.add_argument("--dtype", default="auto", help="of `bank`; losses agree to 1e-5 in float32 alone")
    parser.add_argument("--jobs", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4, 16, 64, 256])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    if asked.what == "bank":
        bank(asked.steps, asked.rows, asked.dtype)
    elif asked.what == "passes":
        passes(asked.jobs, asked.rounds, asked.tokens)
    else:
        memory(asked.jobs, asked.tokens[0])
