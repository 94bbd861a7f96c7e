"""Predicted against published, and predicted against measured here.

    python tests/benchmarks/predictions.py published [--table FILE.csv] [--worst 20]
    python tests/benchmarks/predictions.py traced          the tracer against real allocations on this CPU
    python tests/benchmarks/predictions.py cpu             time and memory of a grid of real runs on this CPU
    python tests/benchmarks/predictions.py again           several runs of one job, what each plan said beside it
    python tests/benchmarks/predictions.py card FILE.json  what tests/first_contact.py measured on a card

Published rows come from other trainers; what those do differently is put into the footprint and the work (stacks.py),
the formulas are the planner's own.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a file

from clusters.units import GIB
from strategies.shape import ModelShape
from strategies.workload import Techniques, Workload
from tests.benchmarks import memory_errors, time_errors
from tests.benchmarks.published import from_columns, read

SHARED = Path(__file__).resolve().parents[3] / "shared"


def published(table: Path | None, worst: int) -> None:
    rows, skipped = from_columns(table) if table else read(SHARED / "tables")
    rows = [row for row in rows if row.kind == "measured"]
    memory_errors.report(rows, worst)
    time_errors.report(rows, worst)
    print(f"\n{sum(skipped.values())} rows of the tables are not used, published.py has the reasons")


SMOLLM2 = {  # a third of its 30 layers: the grid takes minutes instead of a quarter of an hour
    "model_type": "llama",
    "hidden_size": 576,
    "num_hidden_layers": 10,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "intermediate_size": 1536,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
}
SHORT = (96, 41, 70, 64, 83, 52, 77, 69)
LAYOUTS = {  # name -> (lengths of a step's samples, packed, rows of a micro-batch, max_length)
    "8 short packed": (SHORT, True, 1, 1024),
    "8 short padded": (SHORT, False, 8, 1024),
    "8 short one by one": (SHORT, True, 1, 96),
    "2 x 512 packed": ((512, 512), True, 1, 1024),
    "1 x 1024": ((1024,), True, 1, 1024),
}


def grid():
    """(name, method, techniques, lengths): at least 24 ways to train the model."""
    from strategies import METHODS

    for method, (layout, (lengths, packing, rows, length)), dtype, checkpointing in itertools.product(
        ("lora", "full", "qlora"), LAYOUTS.items(), ("float32", "bfloat16"), (False, True)
    ):
        if method != "lora" and layout not in ("8 short packed", "2 x 512 packed"):
            continue
        if method == "qlora" and checkpointing:
            continue
        attention = "document" if packing else "sdpa"
        techniques = Techniques(dtype, attention, packing, checkpointing, rows, length)
        yield f"{method} {dtype} ck={int(checkpointing)} {layout}", METHODS[method](), techniques, lengths


def workload_of(lengths, shape: ModelShape) -> Workload:
    from orchestrator.planning.workload import _padded_ratios

    return Workload(
        shape=shape,
        num_samples=len(lengths),
        num_tokens=sum(lengths),
        num_supervised_tokens=sum(max(1, n // 2) for n in lengths),
        longest_sample=max(lengths),
        global_batch_size=len(lengths),
        num_steps=1,
        num_samples_seen=len(lengths),
        mean_square_length=sum(n * n for n in lengths) / len(lengths),
        fullest_step_tokens=sum(lengths),
        padded_ratio=_padded_ratios(list(lengths), list(lengths), len(lengths)),
    )


def cpu(out: Path | None, steps: int = 4) -> None:
    import torch

    from clusters.probe.node import probe_node
    from strategies.measure.techniques import Side
    from strategies.step import host_memory
    from strategies.techniques.technique import Choice

    node = probe_node()
    device = node.cpu
    torch.set_num_threads(node.num_cores)
    shape = ModelShape.from_config(SMOLLM2)
    found = []
    for name, method, techniques, lengths in grid():
        work = workload_of(lengths, shape)
        plan = method.estimate(work, device, node, techniques)
        side = Side(Choice(work, method, techniques), device, SMOLLM2, lengths)
        with host_memory.kept():
            side.step()
            seconds = sorted(side.step() for _ in range(steps))
        peak = side.peak_bytes()
        del side
        found.append(
            (
                name,
                plan.time.step_s,
                statistics.median(seconds),
                seconds[0],
                plan.memory.tensors_bytes,
                peak,
                plan.time.parts,
            )
        )
        print(
            f"{name:<40} {plan.time.step_s:6.2f} s predicted {statistics.median(seconds):6.2f} median"
            f" {seconds[0]:6.2f} best | tensors {plan.memory.tensors_bytes / GIB:5.2f} GiB predicted"
            f" {peak / GIB:5.2f} measured",
            flush=True,
        )
    if out:
        out.write_text(json.dumps(found, indent=1))
    judge(found)


_LLAMA = {
    "model_type": "llama",
    "hidden_size": 128,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 384,
    "vocab_size": 1024,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
}
_EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 96}
FAMILIES = {  # small models whose modules differ: norms, MLPs, heads, experts
    "llama": _LLAMA,
    "mistral": {**_LLAMA, "sliding_window": None},
    "qwen2": _LLAMA,
    "qwen3": {**_LLAMA, "head_dim": 32},
    "gemma3_text": {**_LLAMA, "head_dim": 32, "hidden_activation": "gelu_pytorch_tanh"},
    "phi3": {**_LLAMA, "pad_token_id": 0},
    "olmo2": _LLAMA,
    "gpt2": {"n_embd": 128, "n_layer": 6, "n_head": 4, "vocab_size": 1024},
    "gpt_neox": {**_LLAMA, "hidden_act": "gelu"},
    "opt": {**_LLAMA, "ffn_dim": 384, "word_embed_proj_dim": 128, "activation_function": "relu"},
    "mixtral": {**_LLAMA, **_EXPERTS},
    "qwen3_moe": {**_LLAMA, **_EXPERTS, "head_dim": 32},
}


def traced() -> None:
    """The tracer beside what PyTorch's CPU allocator hands out for the same step, and the formula beside the tracer.

    32 ways to train one model, then every family.
    """
    from strategies import METHODS
    from strategies.measure import trace
    from strategies.train_setup import TrainSettings
    from tests.strategies.test_trace import CONFIG, allocated_peak

    errors = []
    for method, dtype, checkpointing, loss, length in itertools.product(
        ("lora", "full"), ("float32", "bfloat16"), (False, True), ("nll", "chunked_nll"), (64, 200, 400)
    ):
        if loss == "chunked_nll" and length != 200:
            continue
        techniques = Techniques(dtype, "document", True, checkpointing, 4, 1024, loss_type=loss)
        settings = TrainSettings(1e-4, 0.0, "adamw_torch_fused", 0.9, 0.999, 1e-8, techniques, 1)
        lengths = trace.even(4, length, 0.5)
        fake = trace.trace(CONFIG, METHODS[method](), settings, lengths).peak_bytes
        real = allocated_peak(METHODS[method](), settings, lengths)
        errors.append(fake / real - 1)
        print(f"{method:5} {dtype:9} ck={int(checkpointing)} {loss:12} 4 x {length:4} {errors[-1]:+.2%}")
    _traced_families(errors)
    sizes = [abs(error) for error in errors]
    print(f"{len(errors)} steps: mean |error| {statistics.mean(sizes):.2%}, largest {max(sizes):.2%}")


def _traced_families(errors: list[float]) -> None:
    """One step of every family: adds the tracer's errors, prints the formula's beside them."""
    from clusters.capability import DeviceCapability, NodeCapability
    from strategies import METHODS
    from strategies.measure import trace
    from strategies.train_setup import TrainSettings
    from tests.strategies.test_trace import allocated_peak

    device = DeviceCapability("cpu", "here", 64 * GIB)
    node = NodeCapability("here", 4, 64 * GIB, (device,))
    formulas = []
    for family, values in FAMILIES.items():
        config = {**values, "model_type": family}
        shape = ModelShape.from_config(config)
        techniques = Techniques("bfloat16", "document", True, False, 4, 1024)
        settings = TrainSettings(1e-4, 0.0, "adamw_torch_fused", 0.9, 0.999, 1e-8, techniques, 1)
        lengths = trace.even(4, 200, 0.5)
        fake = trace.trace(config, METHODS["lora"](), settings, lengths).peak_bytes
        real = allocated_peak(METHODS["lora"](), settings, lengths, config)
        work = workload_of(lengths.tokens, shape)
        formula = METHODS["lora"]().estimate(work, device, node, techniques).memory.tensors_bytes
        errors.append(fake / real - 1)
        formulas.append(formula / fake - 1)
        print(f"{family:12} tracer {errors[-1]:+.2%}  formula {formulas[-1]:+.1%}", flush=True)
    print(f"formula beside the tracer: mean |error| {statistics.mean(map(abs, formulas)):.1%}")


def card(file: Path) -> None:
    """What a card took beside what was predicted for it."""
    from tests.first_contact_parts.checks import read as read_checks

    about, checks = read_checks(file)
    small = ", a dry run: its sizes say nothing of cost" if about["small"] else ""
    print(f"{about['card']}, torch {about['torch']} for {about['built_for']}{small}")
    found = []
    for check in checks:
        if {"predicted_step_s", "measured_step_s", "predicted_bytes", "measured_bytes"} <= check.figures.keys():
            predicted_s, measured_s = check.figures["predicted_step_s"], check.figures["measured_step_s"]
            predicted, measured = check.figures["predicted_bytes"], check.figures["measured_bytes"]
            found.append((check.name, predicted_s, measured_s, measured_s, predicted, measured))
            print(
                f"{check.name:<40} {predicted_s:8.4f} s predicted {measured_s:8.4f} measured"
                f" | {predicted / GIB:6.2f} GiB predicted {measured / GIB:6.2f} measured"
            )
    if not found:
        sys.exit(f"{file} holds no prediction beside a measurement: run the part `memory`")
    judge(found)


def again(runs: int) -> None:
    """The same job several times in an empty folder: the first plan knows the probe's figures, later ones the runs."""
    from tests.processes import orchestrator

    job = ["quickstart", "--set", "train.max_steps=16", "--set", "data.eval=null", "--json"]
    with tempfile.TemporaryDirectory() as folder:
        for number in range(1, runs + 1):
            done = orchestrator("submit", *job, cwd=folder, check=0, OMP_NUM_THREADS=None)
            time = json.loads(done.stdout)["result"]["time"]
            predicted_s, measured_s = time["predicted_step_s"], time["measured_step_s"]
            print(
                f"run {number}: {predicted_s:.2f} s a step predicted, {measured_s:.2f} measured"
                f" ({predicted_s / measured_s - 1:+.1%})",
                flush=True,
            )


def judge(found) -> None:
    """Mean errors, and how well the predicted order agrees with the measured one."""
    from scipy.stats import kendalltau

    predicted, measured = [entry[1] for entry in found], [entry[2] for entry in found]
    errors = [abs(p / m - 1) for p, m in zip(predicted, measured, strict=True)]
    memory_errors = [abs(entry[4] / entry[5] - 1) for entry in found]
    print(
        f"{len(found)} runs: time mean |error| {statistics.mean(errors):.1%}, median {statistics.median(errors):.1%},"
    )
    print(f"Kendall tau of the order {kendalltau(predicted, measured).statistic:.3f};")
    print(f"tensors' peak mean |error| {statistics.mean(memory_errors):.1%}, worst {max(memory_errors):.1%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["published", "traced", "cpu", "again", "card"])
    parser.add_argument("file", type=Path, nargs="?", help="card: what tests/first_contact.py wrote")
    parser.add_argument("--table", type=Path)
    parser.add_argument("--worst", type=int, default=20)
    parser.add_argument("--runs", type=int, default=3, help="again: of the same job")
    parser.add_argument("--out", type=Path, help="cpu: write every run as JSON")
    asked = parser.parse_args()
    if asked.what == "traced":
        traced()
    if asked.what == "cpu":
        cpu(asked.out)
    if asked.what == "again":
        again(asked.runs)
    if asked.what == "card":
        if asked.file is None:
            parser.error("card: give the file that tests/first_contact.py wrote")
        card(asked.file)
    if asked.what == "published":
        if not asked.table and not (SHARED / "tables").is_dir():
            sys.exit("the published tables are not on this machine; give --table FILE.csv")
        published(asked.table, asked.worst)


if __name__ == "__main__":
    main()
