"""Every training method on real tasks: held-out loss after equal steps and after equal seconds of computing.

    python tests/benchmarks/bank_tasks.py TASKS
    python tests/benchmarks/methods.py rates TASKS [--names lora full ...]        the best of three rates, another seed
    python tests/benchmarks/methods.py compare TASKS --json FILE [--tasks sst2 sms-spam snips-intent] [--seeds 3]
    python tests/benchmarks/methods.py table FILE ...                             Markdown of what `compare` measured

SmolLM2-135M-Instruct on one thread, by the product's own loop, 8 rows a step, linear decay with three steps of warm-up.
Seconds are the CPU seconds of the process between its first step and its last, evaluations left out, so that other
programs beside it do not count; "equal" is what LoRA of the same task and seed took.  State is what trains, with what
the optimizer keeps of it.  Each run is written to FILE as soon as it is over; those that it holds are not run again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a file

import torch

from orchestrator.data.dataset import Dataset, build
from orchestrator.data.order import Order
from orchestrator.data.readers.files import read_rows
from orchestrator.data.rendering.template import Renderer
from orchestrator.data.samples import TokenizeOptions
from orchestrator.job.model_files import locate
from orchestrator.runs.events import Evaluation, StepReport
from orchestrator.training.evaluate import evaluate_loss
from orchestrator.training.loop import train
from orchestrator.training.parallel import ProcessGroup
from orchestrator.training.state import Hooks, Progress, Schedule, Training
from strategies import METHODS
from strategies.step import document_attention
from strategies.train_setup import TrainSettings, TrainSetup
from strategies.workload import Techniques

ROOT = Path(__file__).resolve().parents[2]
MODEL = "smollm2-135m-instruct"
TASKS = ("sst2", "sms-spam", "snips-intent")
ROWS, HELD_OUT, LENGTH, WARM_UP, LOOK = 8, 24, 256, 3, 4
STEPS, STEPS_OF_RATES = 16, 12


@dataclass(frozen=True)
class Contender:
    """A method with its options and the peak learning rate that `rates` found."""

    method: str
    options: dict[str, Any]
    rate: float


_RANK = {"lora_r": 8, "lora_alpha": 16}
CONTENDERS: dict[str, Contender] = {
    "LoRA r8": Contender("lora", _RANK, 2e-3),
    "LoRA r8, rsLoRA": Contender("lora", {**_RANK, "use_rslora": True}, 1e-3),
    "DoRA r8": Contender("lora", {**_RANK, "use_dora": True}, 2e-3),
    "full": Contender("full", {}, 1e-4),
    "GaLore r64": Contender("experimental_galore", {"rank": 64, "update_proj_gap": 50}, 3e-3),
    "APOLLO r64": Contender("experimental_apollo", {"rank": 64}, 3.3e-4),
    "LSP-Offload": Contender("experimental_lsp_offload", {}, 3.3e-4),
    "SHiRA r8": Contender("experimental_shira", {"shira_r": 8}, 1.7e-3),
    "boosted r1": Contender("experimental_boosted_lora", {"lora_r": 1, "restart_every": 8}, 6e-3),
    "MixLoRA, 4 of r2": Contender("experimental_mixlora", {"num_experts": 4, "lora_r": 2, "lora_alpha": 4}, 6e-3),
    "memory, 16384 rows": Contender("experimental_memory", {}, 1e-1),
    "pruned to 70 %": Contender("experimental_pruned_lora", {**_RANK, "mask_every": 2}, 2e-3),
}


def rows_of(folder: Path) -> tuple[Dataset, Dataset]:
    """A task's training rows and the first held-out ones."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(locate(MODEL, ROOT))
    renderer = Renderer(tokenizer, tokenizer.chat_template)
    with tempfile.TemporaryDirectory() as place:
        train_rows, held_out = (
            build(
                read_rows(folder / f"{name}.jsonl"),
                renderer,
                TokenizeOptions("auto", "", LENGTH, "truncate", True),
                Path(place) / name,
            )
            for name in ("train", "eval")
        )
        return train_rows, held_out.select(range(min(HELD_OUT, len(held_out))))


def set_up(one: Contender, seed: int, rate: float, num_samples: int, num_steps: int) -> tuple[TrainSetup, Techniques]:
    from transformers import AutoModelForCausalLM

    document_attention.register()
    techniques = Techniques("float32", "document", True, False, 1, 1024)
    method = METHODS[one.method](**one.options)
    model = AutoModelForCausalLM.from_pretrained(
        locate(MODEL, ROOT), dtype=torch.float32, attn_implementation="document"
    )
    torch.manual_seed(seed)
    settings = TrainSettings(
        rate, 0.0, "adamw_torch_fused", 0.9, 0.999, 1e-8, techniques, seed, num_samples=num_samples, num_steps=num_steps
    )
    return method.setup(model, settings), techniques


def run(
    one: Contender, data: tuple[Dataset, Dataset], seed: int, rate: float, num_steps: int, look: int = LOOK
) -> dict[str, Any]:
    """Held-out losses by step, CPU seconds by step, and the bytes of what trains with its moments."""
    setup, techniques = set_up(one, seed, rate, len(data[0]), num_steps)
    seconds, losses = [0.0], {}
    base = evaluate_loss(setup, data[1], techniques, ProcessGroup())
    mark = [time.process_time()]

    def record(event: Any) -> None:
        now = time.process_time()
        if isinstance(event, StepReport):
            seconds.append(seconds[-1] + now - mark[0])
        elif isinstance(event, Evaluation):
            losses[event.step] = event.eval_loss
        if isinstance(event, StepReport | Evaluation):
            mark[0] = time.process_time()

    def factor(step: int) -> float:
        return min(1.0, (step + 1) / WARM_UP) * (num_steps - step) / num_steps

    order = Order(len(data[0]), ROWS, seed, num_train_epochs=100, max_steps=num_steps)
    hooks = Hooks(record, lambda now: "none", lambda: None)
    schedule = Schedule(factor, 1.0, seed, 10**9, look, None)
    train(Training(setup, data[0], data[1], order, schedule, techniques, ProcessGroup(), Progress(), hooks))
    return {"base": base, "losses": losses, "seconds": seconds, "state_bytes": state_bytes(setup)}


def state_bytes(setup: TrainSetup) -> int:
    """Bytes of trained weights and of what the optimizer and the method keep of them."""
    tensors = [value for state in setup.optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    return sum(one.numel() * one.element_size() for one in (*setup.parameters.values(), *tensors))


def rates(folder: Path, names: Sequence[str], num_steps: int) -> None:
    """The held-out loss at three rates around the stated one, of a seed and a task that `compare` does not judge by."""
    data = rows_of(folder / "yelp")
    for name in names:
        one = CONTENDERS[name]
        found = {rate: run(one, data, 99, rate, num_steps, num_steps)["losses"][num_steps] for rate in around(one.rate)}
        best = min(found, key=lambda rate: found[rate])
        print(f"{name:18}", {f"{rate:.1e}": round(loss, 3) for rate, loss in found.items()}, f"{best:.1e}", flush=True)


def around(rate: float) -> tuple[float, float, float]:
    return rate / 3, rate, rate * 3


def compare(folder: Path, file: Path, tasks: Sequence[str], names: Sequence[str], seeds: int, num_steps: int) -> None:
    """Every contender on every task and seed that the file does not hold yet."""
    known = json.loads(file.read_text()) if file.exists() else {}
    for task in tasks:
        data = rows_of(folder / task)
        for seed in range(seeds):
            for name in names:
                key = f"{task}|{seed}|{name}|{num_steps}"
                if key in known:
                    continue
                known[key] = run(CONTENDERS[name], data, seed, CONTENDERS[name].rate, num_steps)
                file.write_text(json.dumps(known))
                told = known[key]
                last = told["losses"][num_steps]
                print(
                    f"{task} {seed} {name:18} {told['base']:.3f} -> {last:.3f}, {told['seconds'][-1]:.1f} s", flush=True
                )


def at_seconds(one: dict[str, Any], limit: float) -> float:
    """The held-out loss at the last look within so many seconds of computing; before any look, that of the base."""
    within = [int(step) for step in one["losses"] if one["seconds"][int(step)] <= limit]
    return one["losses"][str(max(within))] if within else one["base"]


def table(files: Sequence[Path]) -> Iterator[str]:
    """A row for each method: held-out loss of each task (mean of its seeds, and half of what they differ by) after
    equal steps, and after the seconds of computing that LoRA's same run took.
    """
    known = {key: one for file in files for key, one in json.loads(file.read_text()).items()}
    runs = {tuple(key.split("|")): one for key, one in known.items()}
    tasks, names = (list(dict.fromkeys(key[place] for key in runs)) for place in (0, 2))
    yield f"| method | {' | '.join(tasks)} | equal seconds | seconds a step | state | runs |"
    yield f"|---|{'---|' * (len(tasks) + 4)}"
    for name in names:
        own = {key: one for key, one in runs.items() if key[2] == name}
        steps, seconds = [], []
        for task in tasks:
            here = {key: one for key, one in own.items() if key[0] == task}
            limits = {key: runs.get((task, key[1], "LoRA r8", key[3])) for key in here}
            steps.append(shown([one["losses"][key[3]] for key, one in here.items()]))
            equal = [at_seconds(one, limit["seconds"][-1]) for key, one in here.items() if (limit := limits[key])]
            seconds.append(f"{statistics.mean(equal):.3f}" if equal else "-")
        step_s = statistics.median(one["seconds"][-1] / (len(one["seconds"]) - 1) for one in own.values())
        size = max(one["state_bytes"] for one in own.values()) / 2**20
        cells = [name, *steps, ", ".join(seconds), f"{step_s:.2f}", f"{size:.1f} MiB", str(len(own))]
        yield f"| {' | '.join(cells)} |"


def shown(values: Sequence[float]) -> str:
    """Mean and half of the range; nothing where none was measured."""
    if not values:
        return "-"
    spread = (max(values) - min(values)) / 2
    return f"{statistics.mean(values):.3f}" + (f" ± {spread:.3f}" if len(values) > 1 else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["rates", "compare", "table"])
    parser.add_argument("places", type=Path, nargs="+", help="the folder of tasks; of `table` the files")
    parser.add_argument("--tasks", nargs="+", default=TASKS)
    parser.add_argument(
        "--names", nargs="+", default=[name for name, one in CONTENDERS.items() if one.method in METHODS]
    )
    parser.add_argument("--steps", type=int, help=f"default: {STEPS}, of `rates` {STEPS_OF_RATES}")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    if given.what == "table":
        print("\n".join(table(given.places)))
        return
    torch.set_num_threads(1)
    if given.what == "rates":
        rates(given.places[0], given.names, given.steps or STEPS_OF_RATES)
    else:
        compare(given.places[0], given.json, given.tasks, given.names, given.seeds, given.steps or STEPS)


if __name__ == "__main__":
    main()
