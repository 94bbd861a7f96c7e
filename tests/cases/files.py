"""The job and data files of each case: what people bring, reduced to what makes it hard, written when a test asks.

A case is a folder of job files (text), rows (a list becomes JSON lines), configs (a dict becomes JSON) and bytes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_DATASETS = """\
import datasets
rows = datasets.Dataset.from_list([{"prompt": f"Room {i}?", "completion": f"Floor {i // 10}"} for i in range(30)])
rows.save_to_disk("saved")
datasets.DatasetDict(train=rows, test=rows.select(range(5))).save_to_disk("saved_dict")
"""
_LLAMA_3 = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
    "max_position_embeddings": 8192, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip
_LLAMA_3_70B = {
    **_LLAMA_3, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
}  # fmt: skip
_QWEN3_30B = {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_size": 2048, "vocab_size": 151936,
    "intermediate_size": 6144, "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8,
    "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
    "max_position_embeddings": 40960, "tie_word_embeddings": False, "decoder_sparse_step": 1, "mlp_only_layers": [],
}  # fmt: skip
_AXOLOTL = """\
base_model: ../models/llama-chatml
model_type: AutoModelForCausalLM
load_in_8bit: false
load_in_4bit: false
datasets:
  - {path: data.jsonl, type: chat_template, field_messages: messages}
val_set_size: 0.1
adapter: lora
lora_model_dir:
sequence_len: 512
sample_packing: true
pad_to_sequence_len: true
lora_r: 8
lora_alpha: 16
lora_target_linear: true
gradient_accumulation_steps: 2
micro_batch_size: 2
num_epochs: 1
optimizer: adamw_bnb_8bit
lr_scheduler: cosine
learning_rate: 2e-4
train_on_inputs: false
bf16: auto
gradient_checkpointing: true
logging_steps: 1
flash_attention: true
warmup_steps: 10
special_tokens: {pad_token: <|im_end|>}
"""
_AXOLOTL_KNOWN = """\
base_model: ../models/llama-chatml
data: {train: data.jsonl}
adapter: lora
lora_r: 8
lora_alpha: 16
lora_target_linear: true
sequence_len: 512
sample_packing: true
micro_batch_size: 2
gradient_accumulation_steps: 2
num_epochs: 1
optimizer: adamw_torch
lr_scheduler: cosine
learning_rate: 2e-4
"""
_FACTORY = """\
model_name_or_path: ../models/llama-chatml
data: {{train: data.jsonl}}
finetuning_type: lora
lora_rank: 8
lora_target: {target}
cutoff_len: 512
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
max_steps: 2
tracking: {{report_to: []}}
"""
_FACTORY_WHOLE = """\
model_name_or_path: ../models/llama-chatml
trust_remote_code: true
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all
dataset: my_faq
dataset_dir: data
template: qwen
cutoff_len: 512
max_samples: 1000
output_dir: saves/x
logging_steps: 10
save_steps: 500
plot_loss: true
report_to: none
per_device_train_batch_size: 1
learning_rate: 1.0e-4
num_train_epochs: 3.0
bf16: true
val_size: 0.1
eval_strategy: steps
"""
_STOCK = {"type": "function", "function": {"name": "get_stock", "description": "units in stock",
          "parameters": {"type": "object", "properties": {"item": {"type": "string"}}}}}  # fmt: skip
_SHORT = "train: {max_steps: 2, global_batch_size: 4}"
_UNTRACKED = "tracking: {report_to: []}"


def _job(train: str, *sections: str, model: str = "../models/llama-chatml", data: str = "") -> str:
    lines = [f"model: {{model_name_or_path: {model}}}", f"data: {{train: {train}{data}}}", *sections]
    return "".join(f"{line}\n" for line in lines)


def _talk(*turns: str) -> dict[str, Any]:
    """User and assistant in turn, the user first."""
    return {"messages": [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(turns)]}


def _rooms(count: int) -> list[dict[str, Any]]:
    return [_talk(f"Where is room {n}?", f"Room {n} is on floor {n // 10}.") for n in range(10, 10 + count)]


def _sharegpt(*turns: tuple[str, str]) -> dict[str, Any]:
    return {"conversations": [{"from": role, "value": text} for role, text in turns]}


def _stock_talk(content: str | None) -> dict[str, Any]:
    called = {"name": "get_stock", "arguments": json.dumps({"item": "pens"})}
    calls = [{"id": "c1", "type": "function", "function": called}]
    turns = [
        {"role": "user", "content": "How many pens are left?"},
        {"role": "assistant", "content": content, "tool_calls": calls},
        {"role": "tool", "tool_call_id": "c1", "content": "41"},
        {"role": "assistant", "content": "There are 41 pens."},
    ]
    return {"tools": [_STOCK], "messages": turns}


def _tickets(first: int, count: int) -> list[dict[str, Any]]:
    things = ("lamp", "door", "desk", "fan", "chair")
    return [_talk(f"ticket {n}: the {things[n % 5]} is broken", "repair") for n in range(first, first + count)]


_PHONES = "prompt,completion\n東京支店の電話番号は？,内線二一〇番です。\n会議室の予約は？,総務部へ連絡してください。\n"
_PHONES += "休暇申請の締切は？,毎月二十日です。\n"
_CLERK = {
    "instruction": "And the price?", "input": "", "output": "Nine euros.",
    "system": "You are a clerk at a stationery shop. Answer in three words.",
    "history": [["Do you have notebooks?", "Yes we do."]],
}  # fmt: skip
_HI = {"role": "user", "content": "Hi"}
_HELLO = {"role": "assistant", "content": "Hello"}
_PARTS = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in (_HI, _HELLO)]
_CALL = ("function_call", json.dumps({"name": "stock"}))
_ODD = {  # rows with other tools' roles and keys
    "parts": {"messages": _PARTS},
    "rolecontent": {"conversations": [_HI, _HELLO]},
    "fromvalue": {"messages": _sharegpt(("human", "Hi"), ("gpt", "Hello"))["conversations"]},
    "developer": {"messages": [{"role": "developer", "content": "Be brief."}, _HI, _HELLO]},
    "qa": {"question": "What is 2+2?", "answer": "4"},
    "dolly": {"instruction": "Name a colour", "context": "", "response": "Blue", "category": "qa"},
    "observation": _sharegpt(("human", "Stock of pens?"), _CALL, ("observation", "41"), ("gpt", "41 pens")),
}
_NO_SYSTEM = [*(_talk(f"Room {n}?", f"Floor {n}") for n in range(6)),
              {"messages": [{"role": "system", "content": "Be brief."}, *_talk("Room 9?", "Floor 9")["messages"]]},
              {"messages": [_HI, *_talk("Room 9?", "Floor 9")["messages"]]}]  # fmt: skip
_SURROGATE = [{"prompt": "Say hello", "completion": "hello there"},
              {"prompt": "React to the photo", "completion": "nice one \ud83d"},
              {"prompt": "Say bye", "completion": "bye"}]  # fmt: skip
_WELCOME = _sharegpt(("gpt", "Welcome to the shop!"), ("human", "Do you sell ink?"), ("gpt", "Yes, in aisle two."))
_THOUGHT = "<think>\nTen times four is forty, two times four is eight.\n</think>\n\n48"
_HIDDEN = [{"prompt": f"Where is room {n}?", "completion": f"Floor {n // 10}"} for n in range(10, 40)]
_QA_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ 'Q: ' + m['content'] + '\\n' }}{% else %}"
    "{{ 'A: ' + m['content'] + eos_token + '\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'A: ' }}{% endif %}"
)
_GPT2 = "../models/gpt2"
_STEPS = {  # the keys that make a step, together and against each other
    "a": "gradient_accumulation_steps: 4",
    "b": "per_device_train_batch_size: 2, gradient_accumulation_steps: 4",
    "c": "per_device_train_batch_size: 64",
    "d": "per_device_train_batch_size: 2, gradient_accumulation_steps: 4, global_batch_size: 16",
    "e": "max_steps: 5, num_train_epochs: 10",
    "f": "max_steps: 0",
    "g": "warmup_steps: 500, max_steps: 20",
    "h": "per_device_train_batch_size: 200, gradient_accumulation_steps: 4",
}


def _eos_job(model: str, train: str) -> str:
    scored = "eval: {metrics: [exact_match], max_new_tokens: 16}"
    given = ("method: {type: full}", f"train: {{{train}}}", scored, _UNTRACKED)
    return _job("data.jsonl", *given, model=f"../42-eval-eos/{model}", data=", eval: eval.jsonl")


CASES: dict[str, dict[str, Any]] = {
    "01-shift-jis-csv": {"job.yaml": _job("data.csv"), "data.csv": _PHONES.encode("cp932")},
    "02-utf16-csv": {"job.yaml": _job("data.csv"), "data.csv": _PHONES.replace(",", "\t").encode("utf-16")},
    "05-csv-long-field": {"job.yaml": _job("data.csv")},
    "06-lone-surrogate": {
        "job.yaml": _job("data.jsonl"),
        "loose.yaml": _job("data.jsonl", data=", strict: false"),
        "data.jsonl": _SURROGATE * 4,
    },
    "07-pandas-nan": {
        "job.yaml": _job("data.jsonl"),
        "data.jsonl": [
            {"instruction": "Name the capital of France.", "input": float("nan"), "output": "Paris"},
            {"instruction": "Translate to German.", "input": "good morning", "output": "Guten Morgen"},
        ],
    },
    "08-alpaca-system-history": {"job.yaml": _job("data.jsonl"), "data.jsonl": [_CLERK] * 4},
    "09-tool-calls": {
        "job.yaml": _job("data.jsonl", model="smollm2-135m-instruct"),
        "null.yaml": _job("null.jsonl", model="smollm2-135m-instruct"),
        "data.jsonl": [_stock_talk("")] * 4,
        "null.jsonl": [_stock_talk(None)] * 4,
    },
    "10-kto-and-preference": {
        "kto.yaml": _job("kto.jsonl"),
        "dpo.yaml": _job("dpo.jsonl"),
        "kto.jsonl": [{"prompt": "What is 2+2?", "completion": text, "label": text == "4"} for text in ("4", "No.")]
        * 4,
        "dpo.jsonl": [{"prompt": "What is 2+2?", "chosen": "4", "rejected": "5"}] * 4,
    },
    "12-assistant-first": {
        "job.yaml": _job("data.jsonl", model="../models/llama-defaultsys"),
        "data.jsonl": [_WELCOME] * 4,
    },
    "13-odd-roles-and-keys": {
        **{f"{name}.yaml": _job(f"{name}.jsonl") for name in _ODD},
        **{f"{name}.jsonl": [row] * 3 for name, row in _ODD.items()},
    },
    "14-save-to-disk": {"job.yaml": _job("saved"), "dict.yaml": _job("saved_dict"), "make.py": _DATASETS},
    "15-folder-splits-and-gz": {
        "job.yaml": _job("data", data=", eval: data/test.jsonl"),
        "gz.yaml": _job("data/more.jsonl.gz"),
        "upper.yaml": _job("data/OLD.JSONL"),
    },
    "17-double-bos": {
        "job.yaml": _job("data.jsonl", model="../models/llama-bos"),
        "data.jsonl": [{"text": "<s>[INST] Where is the printer? [/INST] On floor two.</s>"}] * 4,
    },
    "18-empty-assistant": {
        "job.yaml": _job("data.jsonl"),
        "data.jsonl": [_talk("Hi", "Hello", "What is our wifi password?", "")] * 4
        + [_talk("Hi", "Hello", "ok?", " \n")],
    },
    "19-long-text-row": {"job.yaml": _job("data.jsonl")},
    "20-r1-think-cut": {
        "job.yaml": _job("data.jsonl", model="../models/llama-r1"),
        "data.jsonl": [_talk("What is 12*4?", _THOUGHT)] * 8,
    },
    "21-qwen3-multiturn": {
        "job.yaml": _job("data.jsonl", model="../models/llama-qwen3"),
        "data.jsonl": [_talk("Hi", "Hello", "Where is the printer?", "Floor two.")] * 8,
    },
    "22-gemma-no-system": {
        "job.yaml": _job("data.jsonl", model="../models/llama-gemma"),
        "loose.yaml": _job("data.jsonl", model="../models/llama-gemma", data=", strict: false"),
        "data.jsonl": _NO_SYSTEM,
    },
    "26-axolotl-yaml": {"lora.yml": _AXOLOTL, "only-known.yml": _AXOLOTL_KNOWN, "data.jsonl": _rooms(50)},
    "27-llamafactory-yaml": {
        "sft.yaml": _FACTORY_WHOLE,
        "mapped.yaml": _FACTORY.format(target="all"),
        "comma.yaml": _FACTORY.format(target="q_proj,v_proj"),
        "data.jsonl": _rooms(50),
    },
    "31-remote-paths": {
        "s3.yaml": _job('"s3://bucket/train.jsonl"'),
        "https.yaml": _job('"https://example.org/train.jsonl"'),
        "hf.yaml": _job('"hf://datasets/me/x/train.jsonl"'),
        "slice.yaml": _job('"data.jsonl[:10%]"'),
        "typo.yaml": _job("trian.txt"),
        "data.jsonl": _rooms(20),
    },
    "32-prequantised": {
        "gptq.yaml": _job("data.jsonl", model="../32-prequantised/m-gptq"),
        "m-gptq/config.json": {
            **_LLAMA_3,
            "quantization_config": {"bits": 4, "group_size": 128, "quant_method": "gptq", "desc_act": False},
        },
        "data.jsonl": _rooms(20),
    },
    "33-added-tokens": {
        "job.yaml": _job("data.jsonl", _SHORT, _UNTRACKED, model="../models/llama-moretokens"),
        "data.jsonl": [_talk(f"<|ticket|> room {n}", f"<|order|> {n}") for n in range(40)],
    },
    "36-gpt2-conv1d": {
        "job.yaml": _job("data.jsonl", _SHORT, "method: {type: lora, lora_r: 8}", _UNTRACKED, model=_GPT2),
        "layers.yaml": _job(
            "data.jsonl", _SHORT, "method: {type: lora, lora_r: 8, layers_to_transform: [1]}", _UNTRACKED, model=_GPT2
        ),
        "data.jsonl": _rooms(50),
    },
    "39-weights-not-loaded": {
        "prefix.yaml": _job("data.jsonl", _SHORT, model="../39-weights-not-loaded/prefix"),
        "shapes.yaml": _job("data.jsonl", _SHORT, model="../39-weights-not-loaded/shapes"),
        "data.jsonl": _rooms(50),
    },
    "41-template-not-exported": {
        "over.yaml": _job(
            "data.jsonl", _SHORT, "method: {type: lora, lora_r: 8}", _UNTRACKED, data=", chat_template: chat.jinja"
        ),
        "chat.jinja": _QA_TEMPLATE,
        "data.jsonl": _rooms(50),
    },
    "42-eval-eos": {
        "same.yaml": _eos_job("same", "max_steps: 40, global_batch_size: 8, learning_rate: 0.01"),
        "learnt-other.yaml": _eos_job("learnt-other", "max_steps: 1, global_batch_size: 8, learning_rate: 1.0e-9"),
        "data.jsonl": _tickets(0, 64),
        "eval.jsonl": _tickets(64, 16),
    },
    "49-mlflow-deleted": {
        "job.yaml": _job("data.jsonl", _SHORT, 'tracking: {experiment: shop, mlflow_uri: "sqlite:///mlflow.db"}'),
        "data.jsonl": _rooms(50),
    },
    "58-qwen3-moe-size": {
        "job.yaml": _job("data.jsonl", "method: {type: lora}", model="m"),
        "m/config.json": _QWEN3_30B,
        "data.jsonl": [_CLERK] * 4,
    },
    "59-wrong-reason": {
        "job.yaml": _job("data.jsonl", "method: {type: lora}", model="m"),
        "m/config.json": _LLAMA_3_70B,
        "data.jsonl": [_CLERK] * 4,
    },
    "64-accumulation": {
        **{f"{name}.yaml": _job("data.jsonl", f"train: {{{keys}}}") for name, keys in _STEPS.items()},
        "data.jsonl": _rooms(20) * 5,
    },
    "65-plan-modules-to-save": {
        "job.yaml": _job("data.jsonl", "method: {type: lora, lora_r: 16}", model="m"),
        "m/config.json": _LLAMA_3,
        "data.jsonl": _rooms(50),
    },
    "67-hidden-copies": {
        "job.yaml": _job("data"),
        "clean.yaml": _job("clean"),
        "data/train.jsonl": _HIDDEN,
        "clean/train.jsonl": _HIDDEN,
    },
}


def write_case(start: str, parent: Path) -> Path:
    """Write the one case whose name starts so into a folder of that name below `parent`."""
    (name,) = [name for name in CASES if name.startswith(start)]
    folder = parent / name
    folder.mkdir(parents=True)
    for path, content in CASES[name].items():
        file = folder / path
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(_bytes_of(content))
    return folder


def _bytes_of(content: Any) -> bytes:
    if isinstance(content, bytes):
        return content
    if isinstance(content, list):
        content = "".join(f"{json.dumps(row)}\n" for row in content)
    return (json.dumps(content) if isinstance(content, dict) else content).encode()
