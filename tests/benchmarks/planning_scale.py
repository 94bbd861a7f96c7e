"""How long planning takes, by the number of machines and of their kinds, on one core.

    python tests/benchmarks/planning_scale.py                every case below; a table
    python tests/benchmarks/planning_scale.py --machines 100 one number of machines
    python tests/benchmarks/planning_scale.py --home-lab     the shipped hardware file
    python tests/benchmarks/planning_scale.py --rows         short and long data sets

Machines are GPU machines and CPU boxes of up to twelve kinds.  Links are unknown, declared (all equal) or measured
(each pair another figure, some slow).  The batch is open, or four samples a machine so that all of them may train.
Seconds are of the processor, for the planner alone; the table's last column says what was chosen.
"""

from __future__ import annotations

import argparse
import itertools
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a file

from clusters.capability import ClusterCapability, DeviceCapability, Link, NodeCapability
from clusters.hardware import datasheet
from clusters.hardware.hardware_file import read_hardware
from clusters.units import GIB
from orchestrator.job.job_file import parse_job
from orchestrator.planning import planner, workload
from orchestrator.planning.plan import Plan
from strategies.shape import ModelShape

HOME_LAB = Path(__file__).resolve().parents[2] / "orchestrator" / "recipes" / "hardware" / "home-lab.yaml"
COUNTS = {1: 1.0, 10: 2.0, 100: 5.0, 1000: 30.0}  # machines -> seconds that planning may take
LINKS = ("unknown", "declared", "measured")
# cards, cores, memory in GiB; without a card a CPU trains
KINDS: tuple[tuple[tuple[str, ...], int, int], ...] = (
    (("RTX 3090",), 16, 64),
    ((), 16, 64),
    (("RTX 4090",), 16, 128),
    (("RTX 3060",), 8, 32),
    (("RTX 4090", "RTX 4090"), 32, 128),
    ((), 32, 128),
    (("A100 80GB",) * 4, 64, 512),
    (("RTX 3090", "RTX 3060"), 16, 64),
    (("RTX 4070 Super",), 8, 32),
    ((), 8, 32),
    (("RTX 2080 Ti",), 8, 64),
    (("RTX 3050 Laptop",), 8, 16),
)
LLAMA_8B = {
    "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256,
}  # fmt: skip
LLAMA_1B = {
    **LLAMA_8B,
    "hidden_size": 2048,
    "num_hidden_layers": 16,
    "intermediate_size": 8192,
    "tie_word_embeddings": True,
}


def machine(name: str, kind: int) -> NodeCapability:
    cards, cores, memory_gib = KINDS[kind]
    rate = 4e10 * cores
    cpu = DeviceCapability("cpu", f"{cores} cores", memory_gib * GIB, flops_per_s={"float32": rate})
    devices = []
    for card in cards:
        found = datasheet.find(card)
        assert found is not None, card
        devices.append(datasheet.device(found))
    return NodeCapability(name, cores, memory_gib * GIB, (*devices, cpu))


def cluster(num_machines: int, num_kinds: int, links: str) -> ClusterCapability:
    """Machines of the first kinds in turn, and the links between them."""
    nodes = tuple(machine(f"m{i}", i % num_kinds) for i in range(num_machines))
    if links == "unknown":
        return ClusterCapability(nodes)
    draw = random.Random(0)
    pairs = itertools.combinations([node.name for node in nodes], 2)
    if links == "declared":
        return ClusterCapability(nodes, tuple(Link(pair, 1.25e9, 2e-4, "declared") for pair in pairs))
    found = []
    for pair in pairs:
        rate = 1.25e9 * draw.uniform(0.7, 1.0) * (0.1 if draw.random() < 0.01 else 1.0)
        found.append(Link(pair, rate, draw.uniform(1e-4, 4e-4)))
    return ClusterCapability(nodes, tuple(found))


def plan_on(machines: ClusterCapability, text: str, config: dict[str, Any], num_rows: int = 6400) -> Plan:
    job = f"model: {{model_name_or_path: m}}\ndata: {{train: a.jsonl, max_length: 2048}}\n{text}"
    spec = parse_job(job, Path()).spec
    num_slots = len(planner.slots_of(spec, machines))
    shape = ModelShape.from_config(config)
    draw = random.Random(1)
    lengths = [draw.randint(64, 960) for _ in range(num_rows)]
    work, _, _ = workload.describe(spec, shape, lengths, sum(lengths) // 2, num_slots)
    return planner.make_plan(spec, work, machines, 2048, None, {})


def time_plan(make: Callable[[], Plan], limit_s: float) -> tuple[float | None, Plan | None]:
    """Seconds of the processor and the plan; None of both beyond the limit."""

    def stop(*_: Any) -> None:
        raise TimeoutError

    signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, limit_s)
    began = time.process_time()
    try:
        made = make()
    except TimeoutError:
        return None, None
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    return time.process_time() - began, made


def cases(counts: list[int]) -> Iterator[tuple[int, int, str, str, str]]:
    for count, kinds, links in itertools.product(counts, (1, 4, 12), LINKS):
        if kinds > count or (count == 1 and links != "unknown"):
            continue
        for batch in ("auto", str(4 * count)) if count > 1 else ("auto",):
            yield count, kinds, links, batch, "8B" if kinds > 1 else "1B"


def describe(made: Plan | None) -> str:
    if made is None:
        return "-"
    return (
        f"{made.method['type']}, {len(made.nodes)} workers, ZeRO-{made.techniques.zero_stage},"
        f" {made.global_batch_size} samples a step, {made.tokens_per_s:.0f} tokens/s"
    )


def print_scale(counts: list[int], limit_s: float) -> bool:
    """The table by machines; False where a case takes longer than it may."""
    print("| machines | kinds | links | batch | model | seconds | may take | chosen |\n|--|--|--|--|--|--|--|--|")
    kept = True
    for count, kinds, links, batch, model in cases(counts):
        machines = cluster(count, kinds, links)
        config = LLAMA_8B if model == "8B" else LLAMA_1B
        text = f"train: {{global_batch_size: {batch}}}\n"
        seconds, made = time_plan(lambda: plan_on(machines, text, config, max(6400, 64 * count)), limit_s)  # noqa: B023
        kept = kept and seconds is not None and seconds <= COUNTS[count]
        took = f"> {limit_s:g}" if seconds is None else f"{seconds:.2f}"
        row = (count, kinds, links, batch, model, took, f"{COUNTS[count]:g}", describe(made))
        print("|", " | ".join(map(str, row)), "|", flush=True)
    return kept


def print_home_lab() -> None:
    print("| home-lab, batch | seconds | chosen |\n|--|--|--|")
    machines = read_hardware(HOME_LAB)
    for batch, model in itertools.product(("auto", "16", "256"), (LLAMA_1B, LLAMA_8B)):
        seconds, made = time_plan(
            lambda: plan_on(machines, f"train: {{global_batch_size: {batch}}}\n", model),  # noqa: B023
            120,
        )
        print(f"| {batch} | {seconds:.2f} | {describe(made)} |", flush=True)


def print_rows() -> None:
    print("| rows | seconds | chosen |\n|--|--|--|")
    machines = cluster(10, 4, "declared")
    for num_rows in (1000, 10_000, 100_000, 1_000_000):
        began = time.process_time()
        made = plan_on(machines, "", LLAMA_8B, num_rows)
        print(f"| {num_rows} | {time.process_time() - began:.2f} | {describe(made)} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--machines", type=int, choices=sorted(COUNTS), help="one number of machines only")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds after which a case is given up")
    parser.add_argument("--home-lab", action="store_true", help="the shipped hardware file")
    parser.add_argument("--rows", action="store_true", help="data sets of 1,000 to 1,000,000 rows")
    args = parser.parse_args()
    if args.home_lab:
        print_home_lab()
    elif args.rows:
        print_rows()
    else:
        raise SystemExit(0 if print_scale([args.machines] if args.machines else sorted(COUNTS), args.limit) else 1)
