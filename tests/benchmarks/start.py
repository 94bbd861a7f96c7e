"""What a job costs before and after its training: `submit` of twenty tiny steps beside a plain script of the same.

    python tests/benchmarks/start.py [--rounds 3]

The model has 110 thousand parameters, so that a step takes milliseconds.  The script imports transformers and PEFT,
loads model and tokenizer, trains LoRA for twenty steps of eight rows, and saves the adapter.  Both take turns; the
medians are compared, with the time of day of `submit`'s events since it was typed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a file

from orchestrator.runs.events import StateChange, StepReport
from orchestrator.runs.run_folder import RunFolder

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "tests/fixtures/earlier/model"
STEPS, ROWS = 20, 8
SCRIPT = f"""\
import json, sys
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({str(MODEL)!r})
model = AutoModelForCausalLM.from_pretrained({str(MODEL)!r}, dtype=torch.float32)
model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
rows = [json.loads(line)["text"] for line in open("train.jsonl")]
for step in range({STEPS}):
    texts = [rows[(step * {ROWS} + row) % len(rows)] for row in range({ROWS})]
    ids = [tokenizer(text).input_ids for text in texts]
    width = max(map(len, ids))
    batch = torch.tensor([row + [0] * (width - len(row)) for row in ids])
    labels = torch.tensor([row + [-100] * (width - len(row)) for row in ids])
    model(input_ids=batch, labels=labels).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
model.save_pretrained("adapter", save_embedding_layers=False)
"""
JOB = f"""\
name: start
model: {{model_name_or_path: {MODEL}, dtype: float32}}
data: {{train: train.jsonl, max_length: 64}}
method: {{type: lora, lora_r: 4}}
train: {{global_batch_size: {ROWS}, max_steps: {STEPS}, learning_rate: 1e-2}}
"""


def plain_s(folder: Path) -> float:
    began = time.time()
    subprocess.run([sys.executable, "script.py"], cwd=folder, check=True, capture_output=True)
    return time.time() - began


def submit_s(folder: Path, options: list[str]) -> dict[str, float]:
    """Seconds since the command was typed: until workers are started, the first and last step, the state, the end."""
    began = time.time()
    command = [sys.executable, "-m", "orchestrator", "submit", "job.yaml", "--json", *options]
    done = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    ended = time.time()
    run = RunFolder(Path(json.loads(done.stdout)["path"]))
    steps, states = run.events_of(StepReport), run.events_of(StateChange)
    times = {"planned": states[0].time, "first step": steps[0].time, "last step": steps[-1].time}
    return {name: at - began for name, at in {**times, "finished": states[-1].time, "end": ended}.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--set", action="append", default=[], help="a setting of the job, e.g. cluster.address=auto")
    asked = parser.parse_args()
    options = [part for setting in asked.set for part in ("--set", setting)]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "script.py").write_text(SCRIPT)
        (folder / "job.yaml").write_text(JOB)
        rows = [
            {"text": f"{number} and {number * number} are two numbers of {number % 7} kinds"} for number in range(64)
        ]
        (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        plain_s(folder), submit_s(folder, options)  # what is cached the first time
        plain, submit = [], []
        for _ in range(asked.rounds):
            plain.append(plain_s(folder))
            submit.append(submit_s(folder, options))
    script_s = statistics.median(plain)
    parts = {name: statistics.median(one[name] for one in submit) for name in submit[0]}
    print(f"plain script {script_s:.1f} s; submit", ", ".join(f"{name} {at:.1f}" for name, at in parts.items()))
    print(f"submit beyond the script: {parts['end'] - script_s:.1f} s")


if __name__ == "__main__":
    main()
