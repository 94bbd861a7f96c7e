"""Predicted against published, and predicted against measured here.

    python tests/benchmarks/predictions.py published [--table FILE.csv] [--worst 20]
    python tests/benchmarks/predictions.py traced          the tracer against real allocations on this CPU
    python tests/benchmarks/predictions.py cpu             time and memory of a grid of real runs on this CPU

Published rows come from other trainers; what those do differently (published.py says it for each) is put into the
footprint here, the formulas are the planner's own.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a file

from clusters.capability import DeviceCapability
from clusters.units import GIB
from strategies.contract import Techniques, Workload
from strategies.cost import memory
from strategies.cost.memory import Footprint, Stack
from strategies.shape import ModelShape
from tests.benchmarks.published import Published, config, from_columns, read

SHARED = Path(__file__).resolve().parents[3] / "shared"
_WEIGHT_BYTES = {"nf4": 0.5 + 4 / 64, "fp4": 0.5 + 4 / 64, "nf4-dq": 0.5 + 1 / 64 + 4 / (64 * 256), "int8": 1.0}
_WEIGHT_BYTES |= {"gptq-int4": 0.5 + 2.5 / 128, "gptq-int8": 1.0 + 2.5 / 128}
_ADAM = {"adamw": 2, "paged_adamw": 0, "adamw_8bit": 1, "paged_adamw_8bit": 0, "sgd": 0}  # states of the weight's width
_GPU = DeviceCapability("cuda", "published", None)


def predict(row: Published) -> tuple[float, float, float]:
    """(expected, low, high) bytes of one GPU, as the row's tool would have reported them."""
    shape = ModelShape.from_config(config(row.model))
    g = {"float32": 4, "float16": 2, "bfloat16": 2}[row.compute_dtype]
    techniques = Techniques(
        dtype=row.compute_dtype,
        attn_implementation={"flash": "flash_attention_2"}.get(row.attention, row.attention),
        packing=False,
        gradient_checkpointing=row.gradient_checkpointing,
        per_device_train_batch_size=row.micro_batch,
        max_length=row.length,
        optim="sgd",  # the states stand in the footprint
        zero_stage=0 if row.stack == "litgpt" else row.zero_stage,
        num_shards=row.num_gpus if row.zero_stage and row.stack != "litgpt" else 1,
        offload=_offload(row),
        torch_compile=row.torch_compile,
    )
    tokens = row.micro_batch * row.length
    logits = row.logits_bytes_per_entry
    if row.stack == "ms-swift":  # accelerate hands the outputs on as fp32 copies, which have gradients too
        logits += 8
    workload = Workload(shape, row.micro_batch, tokens, tokens, row.length, row.micro_batch, 1, row.micro_batch)
    footprint = _footprint(row, shape, g)
    stack = Stack(logits_bytes=logits, repeats_keys=row.attention == "sdpa")
    tensors = memory.estimate(workload, _GPU, techniques, footprint, stack)
    exact = tensors.tensors_bytes
    high = tensors.high_bytes
    if row.stack == "ms-swift" and not row.length_is_exact:
        # Blocks of one length do not fit the next: freed ones pile up.  Half of what changes with length, again.
        moving = tensors.activations_bytes + tensors.logits_bytes
        exact, high = exact + 0.5 * moving, high + moving
    expected = {"allocated": exact, "reserved": 1.06 * exact, "nvidia-smi": 1.06 * exact + 0.7 * GIB}[row.measured_as]
    return expected, tensors.low_bytes, high


def _offload(row: Published) -> str:
    if not row.offload:
        return "none"
    if "activations" in row.offload or "activation-offload" in row.extras:
        return "activations"
    return "parameters" if any("param" in what for what in row.offload) else "optimizer"


def _footprint(row: Published, shape: ModelShape, g: int) -> Footprint:
    """What the row's stack puts on a GPU."""
    targets = _targets(row, shape)
    linear = shape.num_layers * sum(m.inputs * m.outputs for m in shape.linears)
    rest = shape.num_parameters - linear
    if "untied-head" in row.extras and shape.tied_embeddings:
        rest += shape.vocab_size * shape.hidden_size
    # Frozen and trained weights in one FSDP unit: what is gathered once stays beside the shard.
    mixed_units = row.stack == "litgpt" and "fsdp" in row.extras
    whole = 1 + 1 / row.num_gpus if mixed_units and row.method != "full" else 1 / row.num_gpus if mixed_units else 1
    frozen_bytes = _WEIGHT_BYTES.get(row.quantization or "", g)
    rest_bytes = 4 if "kbit-fp32" in row.extras else g
    if row.method == "full":
        mixed = row.trained_dtype == "fp32-master"
        width = 2 if row.trained_dtype in ("bf16", "fp32-master") else 4
        state = 8 if mixed else _ADAM.get(row.optimizer, 2) * (1 if "8bit" in row.optimizer else width)
        in_backward = "optimizer-in-backward" in row.extras
        return Footprint(
            weights_bytes=width * shape.num_parameters * whole,
            num_trainable=shape.num_parameters,
            trained_bytes=0.02 if in_backward else width + (g if row.num_gpus > 1 and not row.zero_stage else 0),
            stream_bytes=width,
            inputs_per_token=g * (sum(m.inputs for m in shape.linears) if width != g else _distinct(shape.linears)),
            output_is_kept=True,
            product_is_kept=True,
            norms_train=True,
            embeddings_train=True,
            cast_bytes=g * linear if width != g else 0.0,
            master_bytes=state + (4 if mixed else 0),
        )
    rank = row.lora_r or 8
    trained = shape.num_layers * sum(rank * (m.inputs + m.outputs) for m in targets)
    width = 2 if row.trained_dtype == "bf16" else 4
    without_autocast = row.stack in ("peft-bench",) and width == 4 and g == 2
    copies = 4 * sum(m.inputs for m in targets) if without_autocast else g * sum(m.inputs for m in targets)
    inputs = g * _distinct(targets) if width == g else copies
    if "lora-dropout" in row.extras:  # each target drops its own input: the dropped copy, and a mask
        inputs = (g if not without_autocast else 4) * sum(m.inputs for m in targets) + sum(m.inputs for m in targets)
    if "bnb-inputs" in row.extras:
        inputs += g * _distinct(shape.linears)
    head_bytes = 0.0
    if "head-quantized" in row.extras:
        head_bytes = shape.vocab_size * shape.hidden_size * (frozen_bytes - g)
    return Footprint(
        weights_bytes=(frozen_bytes * linear + rest_bytes * rest + head_bytes) * whole + width * trained,
        num_trainable=trained,
        trained_bytes=width,
        stream_bytes=4 if "kbit-fp32" in row.extras else g,
        inputs_per_token=inputs + g * rank * len(targets),
        output_is_kept=any(m.reads == "attended" for m in targets),
        product_is_kept=any(m.reads == "product" for m in targets),
        dequantised_bytes=g * max(m.inputs * m.outputs for m in shape.linears) if row.quantization else 0.0,
        master_bytes=_ADAM.get(row.optimizer, 2) * (1 if "8bit" in row.optimizer else width),
    )


def _distinct(linears) -> int:
    return ModelShape.distinct_inputs(linears)


_ROLES = {"q": 0, "k": 1, "v": 2, "o": 3}


def _targets(row: Published, shape: ModelShape):
    if row.targets in ("", "all-linear"):
        return shape.linears
    names = row.targets.split(",")
    if "fused" in names:
        inward = [m for m in shape.linears if m.reads == "normed"]
        return tuple(inward[:1]) if len(inward) == 1 else tuple(inward)
    by_letter = {"q": "q", "k": "k", "v": "v", "o": "o", "gate": "gate", "up": "up", "down": "down"}
    chosen = []
    for m in shape.linears:
        start = m.name.split("_")[0]
        fused = m.reads == "normed" and len([x for x in shape.linears if x.reads == "normed"]) == 1
        if (
            start in (by_letter.get(n) for n in names)
            or (fused and {"q", "k", "v"} & set(names))
            or (m.reads == "attended" and "o" in names and m not in chosen)
        ):
            chosen.append(m)
    return tuple(chosen) or shape.linears[:1]


_CANNOT = {"lora-head", "trained-embeddings", "activation-offload", "norm-head"}


def published(table: Path | None, worst: int) -> None:
    rows, skipped = from_columns(table) if table else read(SHARED / "tables")
    rows = [r for r in rows if r.metric == "memory_bytes" and r.kind == "measured"]
    usable = [r for r in rows if not (_CANNOT & set(r.extras)) and not r.offload]
    found = []
    for row in usable:
        expected, low, high = predict(row)
        found.append((expected / row.value - 1, low <= row.value <= high, row, expected))
    _table("all", found)
    for stack in sorted({row.stack for _, _, row, _ in found}):
        _table(stack, [entry for entry in found if entry[2].stack == stack])
    exact = [entry for entry in found if entry[2].length_is_exact]
    _table("exact lengths", exact)
    print(f"left out: {len(rows) - len(usable)} memory rows with offload or {', '.join(sorted(_CANNOT))};")
    print(f"          {sum(skipped.values())} rows of the tables that published.py does not use, with reasons")
    print("\nworst:")
    for error, inside, row, expected in sorted(found, key=lambda e: -abs(e[0]))[:worst]:
        print(
            f"{error:+6.1%} {'in ' if inside else 'OUT'} {row.value / GIB:6.2f} GiB, predicted {expected / GIB:6.2f}"
            f"  {row.stack} {row.model} {row.method} {row.quantization or ''} b{row.micro_batch} x {row.length}"
            f"{'' if row.length_is_exact else ' max'} ck={int(row.gradient_checkpointing)} {row.attention}"
            f" z{row.zero_stage} n{row.num_gpus} {row.trained_dtype} {row.measured_as} {','.join(row.extras)}"
        )


def _table(name: str, found) -> None:
    errors = [abs(error) for error, *_ in found]
    if not errors:
        return
    inside = sum(ok for _, ok, *_ in found) / len(found)
    signed = statistics.median(error for error, *_ in found)
    print(
        f"{name:<14} {len(found):4} rows  median |error| {statistics.median(errors):5.1%}  mean"
        f" {statistics.mean(errors):5.1%}  median signed {signed:+5.1%}  inside low..high {inside:.0%}"
    )


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
    from orchestrator.workload import _padded_ratios

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
        padded_ratio=_padded_ratios(list(lengths), len(lengths)),
    )


def cpu(out: Path | None, steps: int = 4) -> None:
    import torch

    from clusters.node_probe import probe_node
    from strategies.measuring import Side
    from strategies.techniques import host_memory
    from strategies.techniques.room import Choice

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


def traced() -> None:
    """The tracer beside what PyTorch's CPU allocator hands out for the same step, over 24 ways to train."""
    from strategies import METHODS
    from strategies.contract import TrainSettings
    from strategies.cost import trace
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
    sizes = [abs(error) for error in errors]
    print(f"{len(errors)} steps: mean |error| {statistics.mean(sizes):.2%}, largest {max(sizes):.2%}")


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
    parser.add_argument("what", choices=["published", "traced", "cpu"])
    parser.add_argument("--table", type=Path)
    parser.add_argument("--worst", type=int, default=20)
    parser.add_argument("--out", type=Path, help="cpu: write every run as JSON")
    asked = parser.parse_args()
    if asked.what == "traced":
        traced()
    if asked.what == "cpu":
        cpu(asked.out)
    if asked.what == "published":
        if not asked.table and not (SHARED / "tables").is_dir():
            sys.exit("the published tables are not on this machine; give --table FILE.csv")
        published(asked.table, asked.worst)


if __name__ == "__main__":
    main()
