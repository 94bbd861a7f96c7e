"""LLaMA-Factory as a contestant of vs_peers.py, run by the python of an environment that has it.

It imports nothing of ours.  Its argument is a JSON object; the last line that it prints is one with the seconds of each
step.
"""

import json
import resource
import sys
import time
from pathlib import Path

from llamafactory.train.tuner import run_exp  # pyright: ignore[reportMissingImports]
from transformers import TrainerCallback

inputs = json.loads(sys.argv[1])
folder = Path(inputs["rows"]).parent
columns = {"messages": "messages"}
tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
known = {"rows": {"file_name": "rows.json", "formatting": "sharegpt", "columns": columns}}
known["rows"]["tags"] = {**tags, "system_tag": "system"}
(folder / "dataset_info.json").write_text(json.dumps(known))
marks: list[float] = []


class Clock(TrainerCallback):
    def on_step_begin(self, *_, **__):
        marks.append(time.perf_counter())

    def on_step_end(self, *_, **__):
        marks.append(time.perf_counter())


# It has no key for layers: maps of some layers are named one by one.
MAPS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PARTS = [
    f"layers.{layer}.{'mlp' if name[0] in 'gud' else 'self_attn'}.{name}"
    for layer in inputs["layers"] or ()
    for name in MAPS
]
TARGET = ",".join(PARTS) or "all"
run_exp(
    {
        "model_name_or_path": inputs["model"],
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "lora",
        "lora_rank": 16,
        "lora_alpha": 32,
        "lora_target": TARGET,
        "dataset": "rows",
        "dataset_dir": str(folder),
        "template": "smollm2",
        "cutoff_len": 1024,
        "output_dir": inputs["out"],
        "per_device_train_batch_size": inputs["rows_a_step"],
        "gradient_accumulation_steps": 1,
        "learning_rate": inputs["learning_rate"],
        "lr_scheduler_type": "constant",
        "num_train_epochs": 1,
        "bf16": inputs["dtype"] == "bfloat16",
        "disable_gradient_checkpointing": True,
        "seed": inputs["seed"],
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_shuffling": True,
        "overwrite_output_dir": True,
    },
    callbacks=[Clock()],
)
print(
    json.dumps(
        {
            "seconds": [end - begin for begin, end in zip(marks[::2], marks[1::2], strict=True)],
            "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        }
    )
)
