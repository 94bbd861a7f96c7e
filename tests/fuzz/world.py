"""What cases damage: a tiny model without weights to speak of, rows, machines, a bank, a finished run.

Everything is written by hand or by the program's own verbs, so that the same inputs can be tried on other versions of
it; nothing here trains.
"""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

HIDDEN, VOCABULARY = 32, 300
_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] }}<|im_end|>{% endgeneration %}{% else %}{{ m['content'] }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 2 * HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "hidden_act": "silu",
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
    "eos_token_id": 2,
    "pad_token_id": 2,
    "bos_token_id": None,
}
ROWS = [{"prompt": f"the cat {i} sees", "completion": f"a bird {i}"} for i in range(12)]
HARDWARE: dict[str, Any] = {
    "nodes": [
        {
            "name": "pc",
            "cores": 8,
            "memory_gib": 32,
            "gpus": [{"name": "RTX 3060", "count": 1, "memory_gib": 12, "bf16_tflops": 40, "power_w": 170}],
            "cpu": {"name": "CPU", "fp32_gflops": 400, "memory_gb_per_s": 40, "instruction_sets": ["avx2"]},
            "disk_write_mb_per_s": 900,
            "power_w": {"idle": 50, "load": 300},
            "price": {"purchase": 1500, "years": 3},
        },
        {"name": "box", "count": 1, "cores": 4, "memory_gib": 16, "price": {"per_hour": 0.5}},
    ],
    "network": {"mbit_per_s": 1000, "round_trip_ms": 0.3},
    "links": [{"between": ["pc", "box"], "mbit_per_s": 100, "round_trip_ms": 2}],
}


class World:
    """Sound things below one folder; made when they are first asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def job(self) -> dict[str, Any]:
        """A job file's values over the tiny model; its rows lie beside it."""
        return {
            "name": "tiny",
            "model": {"model_name_or_path": str(self.model), "dtype": "float32"},
            "data": {"train": "train.jsonl", "eval": "eval.jsonl", "max_length": 64, "chat_template": "tokenizer"},
            "method": {"type": "lora", "lora_r": 4},
            "train": {"global_batch_size": 8, "max_steps": 6, "learning_rate": 0.01},
            "strategy": {"preflight": False},
            "cost": {"currency": "EUR", "power_w": 60},
            "tracking": {"report_to": []},
            "checkpoint": {"output_dir": "runs"},
        }

    @property
    def files(self) -> dict[str, str]:
        """What lies beside a job file."""
        lines = [json.dumps(row) + "\n" for row in ROWS]
        return {"train.jsonl": "".join(lines), "eval.jsonl": "".join(lines[:4]), "hardware.yaml": json.dumps(HARDWARE)}

    @cached_property
    def model(self) -> Path:
        """A model's folder: configuration, byte-level tokenizer, random weights."""
        folder = self.folder / "model"
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(_CONFIG))
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, "pad_token_id": 2}))
        _write_tokenizer(folder)
        write_safetensors(folder / "model.safetensors", _weights())
        return folder

    @cached_property
    def adapter(self) -> dict[str, bytes]:
        """The files of a LoRA adapter for the model."""
        names = [f"model.layers.{layer}.self_attn.{kind}_proj" for layer in range(2) for kind in "qv"]
        shapes = {}
        for name in names:
            outputs = HIDDEN if name.endswith("q_proj") else HIDDEN // 2
            shapes[f"base_model.model.{name}.lora_A.weight"] = [4, HIDDEN]
            shapes[f"base_model.model.{name}.lora_B.weight"] = [outputs, 4]
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": str(self.model),
            "r": 4,
            "lora_alpha": 8,
            "lora_dropout": 0.0,
            "bias": "none",
            "target_modules": ["q_proj", "v_proj"],
            "alpha_pattern": {},
            "rank_pattern": {},
        }
        weights = safetensors(shapes)
        return {"adapter_config.json": json.dumps(config).encode(), "adapter_model.safetensors": weights}

    @cached_property
    def bank(self) -> dict[str, bytes]:
        """The files of a bank with two adapters, without its index, which is made of them."""
        found: dict[str, bytes] = {}
        for name, alpha in (("first", 8), ("second", 16)):
            files = dict(self.adapter)
            config = json.loads(files["adapter_config.json"]) | {"lora_alpha": alpha}
            files["adapter_config.json"] = json.dumps(config).encode()
            whole = hashlib.sha256()
            for part in ("adapter_config.json", "adapter_model.safetensors"):
                whole.update(hashlib.sha256(files[part]).digest())
            digest = whole.hexdigest()
            files["card.json"] = json.dumps(_card(name, digest, str(self.model))).encode()
            found |= {f"bank/objects/{digest[:2]}/{digest}/{part}": content for part, content in files.items()}
        return found

    @cached_property
    def prepared(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """plan.json and data.json of the job, its rows tokenised."""
        from orchestrator.job.job_file import read_job
        from orchestrator.lifecycle.machines import declared
        from orchestrator.lifecycle.prepare import prepare

        place = self.folder / "planned"
        place.mkdir()
        for name, content in {**self.files, "job.yaml": json.dumps(self.job)}.items():
            (place / name).write_text(content)
        asked = read_job(place / "job.yaml", [f"checkpoint.output_dir={place / 'runs'}"])
        ready = prepare(asked, lambda text: None, declared(place / "hardware.yaml"))
        return json.loads(ready.plan.to_json()), replace(ready.data_files, statistics=ready.statistics).as_dict()

    @cached_property
    def run(self) -> dict[str, bytes]:
        """The files of a finished run, below runs/done."""
        times = {"predicted_step_s": 0.03, "measured_step_s": 0.04}
        sample = {"prompt": "the cat", "generated": "a bird", "reference": "a bird"}
        quality = {"eval_loss": 3.2, "exact_match": 0.5, "seconds": 0.4, "rows": 4, "answers": 4, "samples": [sample]}
        result = {
            "steps": 6,
            "tokens": 534,
            "train_seconds": 1.2,
            "memory": {"measured_peak_bytes": 10**9, "predicted_bytes": 7.7e8},
            "time": times,
            "before": quality,
            "after": {**quality, "eval_loss": 2.1},
        }
        step = {"loss": 4.0, "learning_rate": 0.01, "grad_norm": 1.0, "tokens": 90, "supervised_tokens": 20,
        "epoch": 0.5,
                "tokens_per_s": 900.0, "peak_bytes": 10**9, "seconds": 0.1, "samples": "500d9c72"}  # fmt: skip
        events = [
            {"event": "state", "time": 1.7e9, "state": "running", "pid": 2**22 - 3},
            {"event": "ready", "time": 1.7e9, "seconds": 3.0},
            {"event": "quality", "time": 1.7e9, "when": "before", **quality},
            *({"event": "step", "time": 1.7e9 + n, "step": n, **step} for n in range(1, 7)),
            {"event": "eval", "time": 1.7e9 + 7, "step": 6, "eval_loss": 2.1},
            {"event": "quality", "time": 1.7e9 + 8, "when": "after", **quality},
            {"event": "note", "time": 1.7e9 + 8, "text": "a note"},
            {"event": "state", "time": 1.7e9 + 9, "state": "finished"},
        ]
        plan, data = self.prepared
        capability = {"nodes": [], "links": [], "failed": {}}
        job = {**self.job, "data": {**self.job["data"], "train": str(self.folder / "planned" / "train.jsonl")}}
        parts: dict[str, Any] = {"plan.json": plan, "result.json": result, "data.json": data,
                                 "capability.json": capability,
                                 "origin.json": {"folder": str(self.folder / "planned")}}  # fmt: skip
        found = {f"runs/done/{name}": json.dumps(content, indent=1).encode() for name, content in parts.items()}
        found["runs/done/job.yaml"] = json.dumps(job).encode()
        found["runs/done/events.jsonl"] = "".join(json.dumps(event) + "\n" for event in events).encode()
        found |= {f"runs/done/adapter/{name}": content for name, content in self.adapter.items()}
        return found


def safetensors(shapes: dict[str, list[int]]) -> bytes:
    """A file of small numbers that are always the same."""
    header, body = {}, b""
    for place, (name, shape) in enumerate(shapes.items()):
        count = 1
        for size in shape:
            count *= size
        begin = len(body)
        body += struct.pack(f"<{count}f", *(((i * 37 + place) % 101 - 50) / 500 for i in range(count)))
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, len(body)]}
    head = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    return struct.pack("<Q", len(head)) + head + body


def write_safetensors(file: Path, shapes: dict[str, list[int]]) -> None:
    file.write_bytes(safetensors(shapes))


def _weights() -> dict[str, list[int]]:
    shapes = {"model.embed_tokens.weight": [VOCABULARY, HIDDEN], "model.norm.weight": [HIDDEN]}
    for layer in range(2):
        start = f"model.layers.{layer}."
        shapes |= {
            f"{start}self_attn.q_proj.weight": [HIDDEN, HIDDEN],
            f"{start}self_attn.k_proj.weight": [HIDDEN // 2, HIDDEN],
            f"{start}self_attn.v_proj.weight": [HIDDEN // 2, HIDDEN],
            f"{start}self_attn.o_proj.weight": [HIDDEN, HIDDEN],
            f"{start}mlp.gate_proj.weight": [2 * HIDDEN, HIDDEN],
            f"{start}mlp.up_proj.weight": [2 * HIDDEN, HIDDEN],
            f"{start}mlp.down_proj.weight": [HIDDEN, 2 * HIDDEN],
            f"{start}input_layernorm.weight": [HIDDEN],
            f"{start}post_attention_layernorm.weight": [HIDDEN],
        }
    return shapes


def _write_tokenizer(folder: Path) -> None:
    """Bytes as tokens, and three marks."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate([*marks, *alphabet])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(marks)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>",
              "model_max_length": 256, "chat_template": _TEMPLATE}  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def _card(name: str, digest: str, model: str) -> dict[str, Any]:
    return {
        "name": name,
        "base_name": model,
        "base_digest": "b" * 64,
        "ranks": [4],
        "targets": ["q_proj", "v_proj"],
        "num_parameters": 896,
        "data_digest": "d" * 64,
        "evidence_digest": None,
        "num_rows": 12,
        "scores": {"before": {"eval_loss": 3.2}, "after": {"eval_loss": 2.1}},
        "licence": "Apache-2.0",
        "method": "lora",
        "made_from": [],
        "run_id": "done",
        "added": "2026-01-01T00:00:00+00:00",
        "digest": digest,
    }
