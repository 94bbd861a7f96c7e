"""Experts of several tasks as one adapter: sparse ones (SHiRA, arXiv 2507.07140) beside LoRA's, held-out loss.

    python tests/benchmarks/bank_tasks.py TASKS
    python tests/benchmarks/sparse_merge.py TASKS --names sst2 sms-spam snips-intent commonsense-qa --work WORK

Each expert is trained by `orchestrator submit bank`, with as many numbers in the same layers; what WORK holds already
is not trained again.  On two cores about a minute an expert.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from orchestrator.data.dataset import Dataset
from orchestrator.data.prepare import datasets
from orchestrator.runs.run_folder import RunFolder
from orchestrator.training.evaluate import evaluate_loss
from orchestrator.training.parallel import ProcessGroup
from strategies.adapter_bank import sparse
from strategies.adapter_bank.adapter import Adapter
from strategies.adapter_bank.generation import Recipe, generate
from strategies.train_setup import TrainSetup
from strategies.workload import Techniques

_LAYERS = list(range(20, 30))
_SPARSE = {"type": "experimental_shira", "shira_r": 8, "layers_to_transform": _LAYERS}
METHODS = {
    "lora": {"type": "lora", "lora_r": 8, "lora_alpha": 16, "layers_to_transform": _LAYERS},
    "shira": _SPARSE,
    "shira, random": {**_SPARSE, "mask": "random"},  # of one seed: all experts have the same entries
    "shira, apart": {**_SPARSE, "mask": "random"},  # of a seed each
}
RATES = {"lora": 2e-3}
_SPARSE_RATE = 5e-3


def expert(tasks: Path, task: str, method: str, work: Path, seed: int) -> Path:
    """The run folder of one expert."""
    name = f"{method.replace(', ', '-')}-{task}"
    if not (done := sorted(work.glob(f"runs/{name}-*/adapter"))):
        keys = {
            "name": name,
            "data.train": str((tasks / task / "train.jsonl").absolute()),
            "data.eval": str((tasks / task / "eval.jsonl").absolute()),
            "method": json.dumps(METHODS[method]),
            "train.learning_rate": RATES.get(method, _SPARSE_RATE),
            "train.seed": seed,
            "tracking.report_to": "[]",
        }
        asked = [part for key, value in keys.items() for part in ("--set", f"{key}={value}")]
        work.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "orchestrator", "submit", "bank", *asked]
        subprocess.run(command, cwd=work, check=True, stdout=subprocess.DEVNULL)
        done = sorted(work.glob(f"runs/{name}-*/adapter"))
    return done[-1].parent


def merged(method: str, adapters: list[Path], work: Path) -> dict[str, Path]:
    """One adapter of all, by each rule."""
    found = {}
    for rule in ("average", "sum", "ties"):
        output = work / f"{method}-{rule}".replace(", ", "-")
        found[rule] = output
        if output.exists():
            continue
        how: Any = "ties" if rule == "ties" else "linear" if rule == "sum" else None
        if method != "lora":  # None: averaged where they meet
            sparse.merge(adapters, output, how, [1.0] * len(adapters))
        else:
            weight = 1 / len(adapters) if rule == "average" else 1.0
            exact = "ties" if rule == "ties" else "cat"
            generate([Adapter(one) for one in adapters], [weight] * len(adapters), output, Recipe(exact))
    return found


def losses(base: str, adapter: Path | None, held_out: list[Dataset]) -> list[float]:
    """Mean loss of each task's supervised tokens, in nats a token."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if adapter:
        model = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()  # type: ignore[operator]
    optimizer = torch.optim.SGD([next(model.parameters())])
    setup = TrainSetup(model, optimizer, dict(model.named_parameters()), lambda *_: None, "model")
    techniques = Techniques("float32", "sdpa", False, False, 8, 256)
    return [evaluate_loss(setup, data, techniques, ProcessGroup()) for data in held_out]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", type=Path)
    parser.add_argument("--names", nargs="+", required=True)
    parser.add_argument("--work", type=Path, required=True)
    asked = parser.parse_args()

    runs = {
        method: [
            expert(asked.tasks, task, method, asked.work, 42 + number * (method == "shira, apart"))
            for number, task in enumerate(asked.names)
        ]
        for method in METHODS
    }
    told = [RunFolder.at(run).data() for run in runs["lora"]]
    held_out = [data for where in told if (data := datasets(where)[1])]
    base = losses(told[0].model, None, held_out)
    rows = [("base", base)]
    for method, folders in runs.items():
        adapters = [folder / "adapter" for folder in folders]
        own = [losses(told[0].model, one, [data])[0] for one, data in zip(adapters, held_out, strict=True)]
        rows.append((f"{method}: each its own", own))
        for rule, folder in merged(method, adapters, asked.work).items():
            rows.append((f"{method}: one, {rule}", losses(told[0].model, folder, held_out)))

    table = Table("held-out loss", *asked.names, "mean")
    for name, found in rows:
        table.add_row(name, *[f"{loss:.3f}" for loss in found], f"{sum(found) / len(found):.3f}")
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
