"""Published measurements of training, as plain records that a cost model can be tried on.

`read(folder)` turns the tables of ../shared/tables into records, one function a file: it knows what those files leave
out (COST_MODEL.md, the notes in the rows, the code of the stacks).  `from_columns(path)` reads any table with the same
columns by general rules alone.  A row that is not usable is counted with its reason, never guessed at: usable means
measured, with model, GPU, method, batch and length known.  No cost model in here, and no torch.

What the peak of every stack is made of, and how it was measured:
  litgpt       max_memory_allocated()/1e9, all in bf16, no checkpointing on one GPU, FSDP + checkpointing on more
  ms-swift     max_memory_reserved() in GiB, base in bf16, LoRA in fp32, autocast; samples over the maximum are dropped
  peft-bench   max_memory_reserved() in bytes, fp32 LoRA on a bf16 base without autocast, rows padded to the longest
  torchtune    peak active memory in GiB, all in bf16, checkpointing
  optimum      HF Trainer, all in fp16 (no autocast), eager attention, random tokens of a fixed length
  nthu         max_memory_allocated() in GiB, HF Trainer fp16, fp32 LoRA, padded to 350
  dissecting   all memory in use on the GPU (mem_get_info) in GiB
"""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

CONFIGS = Path(__file__).resolve().parents[3] / "shared/assets/configs"
UNITS = {"gb": 1e9, "gib": 2.0**30, "mb": 1e6, "mib": 2.0**20, "bytes": 1.0, "b": 1.0}
Row = dict[str, str]


@dataclass(frozen=True)
class Published:
    source: str  # file:line
    model: str  # a folder of ../shared/assets/configs or a key of EXTRA_CONFIGS
    gpu: str
    num_gpus: int
    method: str  # full | lora | qlora
    lora_r: int | None
    targets: str  # "all-linear" | comma list such as "q,v" | "fused" (one matrix for q, k and v)
    quantization: str | None  # nf4 | nf4-dq | fp4 | int8 | gptq-int4 | gptq-int8
    trained_dtype: str  # bytes layout of the trained weights: fp32 | bf16 (pure 16 bits, also fp16) | fp32-master
    compute_dtype: str  # float32 | float16 | bfloat16
    optimizer: str  # adamw | adamw_8bit | paged_adamw | paged_adamw_8bit | sgd | ...
    micro_batch: int
    length: int  # tokens a row that set the peak, padding included
    length_is_exact: bool  # reached for certain: fixed lengths, or the longest sample itself
    mean_length: float | None  # real tokens a sample; of throughput rows
    gradient_checkpointing: bool
    attention: str  # eager | sdpa | flash
    zero_stage: int
    offload: tuple[str, ...]
    logits_bytes_per_entry: float
    stack: str
    metric: str  # memory_bytes (a GPU) | step_s (one micro-batch, optimizer included) | tokens_per_s (all GPUs)
    measured_as: str  # allocated | reserved | nvidia-smi; "" for times
    value: float  # SI
    kind: str  # measured | formula
    torch_compile: bool = False
    note: str = ""
    # What else was done; a model that cannot do it should leave the row out: untied-head, head-quantized, lora-head,
    # lora-dropout, trained-embeddings, optimizer-in-backward, activation-offload, fsdp, norm-head (normalised each
    # step), kbit-fp32 (embeddings, head and norms in fp32), bnb-inputs (inputs of frozen 4-bit layers kept)
    extras: tuple[str, ...] = ()


class Unusable(Exception):
    """Why a row is left out."""


def _llama_like(hidden: int, layers: int, heads: int, kv: int, mlp: int, vocab: int, **other: object) -> dict:
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "intermediate_size": mlp,
        "vocab_size": vocab,
        "tie_word_embeddings": False,
        **other,
    }


# Shapes of well-known models without a folder; each gives the published number of parameters.  Qwen 1, Qwen 1.5 and
# ChatGLM3 are Llamas with biases on q, k and v, which is model type qwen2.
EXTRA_CONFIGS: dict[str, dict] = {
    "qwen-1.8b": _llama_like(2048, 24, 16, 16, 5504, 151936, model_type="qwen2"),
    "qwen-7b": _llama_like(4096, 32, 32, 32, 11008, 151936, model_type="qwen2"),
    "qwen-14b": _llama_like(5120, 40, 40, 40, 13696, 152064, model_type="qwen2"),
    "qwen-72b": _llama_like(8192, 80, 64, 64, 24576, 152064, model_type="qwen2"),
    "chatglm3-6b": _llama_like(4096, 28, 32, 2, 13696, 65024, model_type="qwen2"),
    "qwen3-4b": _llama_like(2560, 36, 32, 8, 9728, 151936, model_type="qwen3", head_dim=128, tie_word_embeddings=True),
    "qwen3-8b": _llama_like(4096, 36, 32, 8, 12288, 151936, model_type="qwen3", head_dim=128),
    "yi-6b": _llama_like(4096, 32, 32, 4, 11008, 64000),
    "yi-34b": _llama_like(7168, 60, 56, 8, 20480, 64000),
    "baichuan2-7b": _llama_like(4096, 32, 32, 32, 11008, 125696),
    "deepseek-coder-1.3b": _llama_like(2048, 24, 16, 16, 5504, 32256),
    "deepseek-coder-6.7b": _llama_like(4096, 32, 32, 32, 11008, 32256),
    "phi-1.5": _llama_like(2048, 24, 32, 32, 8192, 51200, model_type="phi"),
    "stablelm-base-alpha-3b": _llama_like(4096, 16, 32, 32, 16384, 50688, model_type="gpt_neox"),
    "falcon-7b": _llama_like(
        4544, 32, 71, 1, 18176, 65024, model_type="falcon", tie_word_embeddings=True, multi_query=True, bias=False
    ),
    "gpt2-10b": _llama_like(
        4096, 50, 32, 32, 16384, 50304, model_type="gpt2", tie_word_embeddings=True, n_embd=4096, n_layer=50, n_head=32
    ),
    "t5-3b": _llama_like(
        1024, 24, 32, 32, 16384, 32128, model_type="t5", tie_word_embeddings=True, d_kv=128, num_decoder_layers=24
    ),
}
ALIASES = (  # full matches of a cleaned name, to a model of the same shapes
    (r"qwen-?1\.5-(1\.8|7|14|72)b", r"qwen-\1b"),
    (r"(mistral|zephyr)-7b(-v0\.[12]|-beta|-alpha)?", "mistral-7b-v0.1"),
    (r"phi-3-mini(-4k|-128k)?", "phi-3.5-mini"),
    (r"tiny-?llama(-1\.1b)?(-v1\.0)?", "tinyllama-1.1b-chat"),
    (r"(llama|vicuna|alpaca)(-1)?-(7|13)b(-v1\.\d)?", r"llama-2-\3b"),
    (r"llama-70b", "llama-2-70b"),
    (r"llama-3\.3-70b", "llama-3.1-70b"),
    (r"stablelm-(base-)?alpha(-3b)?", "stablelm-base-alpha-3b"),
    (r"gemma(2|3)-(.*)", r"gemma-\1-\2"),
    (r"gpt-?2-774m", "gpt2-large"),
    (r"gpt-?2-1\.5b", "gpt2-xl"),
    (r"gpt-2(-.*)?", r"gpt2\1"),
    (r"starcoder2-7b", "starcoder2"),
    (r"mixtral-8x7b(-v0\.1)?", "mixtral-8x7b"),
    (r"yi-1\.5-(6|34)b", r"yi-\1b"),
)
GPUS = (
    (r"a1000", "A1000"),
    (r"a100.*40", "A100 40GB"),
    (r"a100", "A100 80GB"),
    (r"a800", "A800 80GB"),
    (r"h200", "H200"),
    (r"h100.*pcie", "H100 PCIe"),
    (r"h100", "H100 SXM"),  # what is rented and published, where the form is not named
    (r"h800", "H800"),
    (r"4090", "RTX 4090"),
    (r"4080", "RTX 4080"),
    (r"3090", "RTX 3090"),
    (r"3060", "RTX 3060"),
    (r"a6000", "A6000"),
    (r"a10g", "A10G"),
    (r"a10\b", "A10"),
    (r"a40", "A40"),
    (r"l40s", "L40S"),
    (r"\bl4\b", "L4"),
    (r"\bt4\b", "T4"),
    (r"p100", "P100"),
    (r"v100.*16", "V100 16GB"),
    (r"v100", "V100 32GB"),
    (r"mi210", "MI210"),
    (r"mi300", "MI300X"),
)
STACKS = (
    (r"litgpt", "litgpt"),
    (r"torchtune", "torchtune"),
    (r"swift", "ms-swift"),
    (r"optimum", "optimum"),
    (r"nthu", "nthu"),
    (r"2311\.03687", "dissecting"),
    (r"unsloth", "unsloth"),
    (r"llama-?factory", "llama-factory"),
    (r"prime-?rl", "prime-rl"),
    (r"fitcheck", "fitcheck"),
    (r"answer\.?ai|fsdp.qlora", "answerai"),
    (r"qwen readme|qwenlm", "qwen"),
    (r"lsp", "lsp"),
    (r"deepspeed (docs|tutorial)", "deepspeed"),
    (r"method_comparison", "peft-bench"),
)
# Bytes of logits alive at once, an entry of tokens x vocabulary (COST_MODEL F6).  16: fp32 logits, shifted copy,
# log-softmax, gradient (HF before 4.45).  14: 16-bit logits and three in fp32.  12: Qwen 1 under autocast; torchtune's
# plain loss.  4: 16-bit logits and log-softmax, later logits and gradient (litgpt's and torchtune's chunked losses).
LOGITS = {
    "litgpt": 4.0,
    "torchtune": 4.0,
    "ms-swift": 16.0,
    "optimum": 16.0,
    "dissecting": 16.0,
    "answerai": 16.0,
    "prime-rl": 16.0,
    "lsp": 16.0,
    "qwen": 12.0,
    "deepspeed": 6.0,
    "unsloth": 0.0,
}
MEASURED_AS = {"litgpt": "allocated", "torchtune": "allocated", "dissecting": "nvidia-smi"}
DOUBLE_QUANTIZED = ("torchtune", "unsloth", "ms-swift", "llama-factory")  # by default
SHARDED = ("litgpt", "torchtune", "answerai")  # FSDP on several GPUs
OTHER_METHODS = (
    r"adalora|adapter|\bdora|galore|lisa|llamapro|longlora|lora-?fa|ia3|vera|prefix|prompt|p-?tuning|lokr|loha|\boft|"
    r"boft|lsp|freeze|badam|apollo|analysis|\bdpo|\bppo|\bgrpo|\bkto|awq|aqlm|hqq|2.?bit|3.?bit|infer|platform"
)


def config(model: str, configs: Path = CONFIGS) -> dict:
    """The config.json of a record's model."""
    if model in EXTRA_CONFIGS:
        return EXTRA_CONFIGS[model]
    return json.loads((configs / model / "config.json").read_text())


def read(folder: Path) -> tuple[list[Published], dict[str, int]]:
    """Every usable row of our tables, and how many rows were left out, by `file: reason`."""
    records, skipped = [], Counter()
    for name, convert in SOURCES.items():
        found, left_out = _collect(folder / name, convert)
        records += found
        skipped.update(left_out)
    return records, dict(skipped)


def from_columns(path: Path) -> tuple[list[Published], dict[str, int]]:
    """Any table with the same columns, by general rules only: what a row does not say is a default named in `note`."""
    return _collect(path, lambda source, row: [generic(source, row)])


def _collect(path: Path, convert: Callable[[str, Row], list[Published]]) -> tuple[list[Published], dict[str, int]]:
    """The records of a table; one listed again under the same conditions with the same value counts once."""
    records: dict[Published, Published] = {}
    skipped: Counter[str] = Counter()
    with path.open(newline="", encoding="utf-8") as file:
        for line, row in enumerate(csv.DictReader(file), start=2):
            row = {key: (value or "").strip() for key, value in row.items() if isinstance(key, str)}
            try:
                for record in convert(f"{path.name}:{line}", row):
                    if records.setdefault(replace(record, source="", note=""), record) is not record:
                        raise Unusable("same conditions and value as another row")
            except Unusable as reason:
                skipped[f"{path.name}: {reason}"] += 1
    return list(records.values()), dict(skipped)


# --- general rules -----------------------------------------------------------------------------------------------


def generic(source: str, row: Row) -> Published:
    """One row of the common columns as a record."""
    row = {key: row.get(key, "") for key in COLUMNS}
    assumed: list[str] = []
    metric = _metric(row)
    stack = _first(STACKS, f"{row['paper']} {row['table']} {row['method']} {row['source_url']}".lower()) or "hf"
    model = _model(row["model"], row["params_b"])
    method, quantization = _method(row, stack)
    kind = "formula" if re.search(r"formula|estimat", f"{row['kind']} {row['table']}".lower()) else "measured"
    gpu = _first(GPUS, row["gpu"].lower()) or row["gpu"]
    gpus = _count(row["n_gpus"] or "1", "number of GPUs")
    if kind == "formula":  # of model states alone
        batch, length, exact, mean = 0, 0, True, None
    else:
        if not gpu:
            raise Unusable("GPU not given")
        batch = _count(row["batch"], "batch")
        length, exact, mean = _length(row, stack)
    value = _number(row["value"])
    if metric == "memory_bytes":
        value = _bytes(value, row, gpus)
    elif mean is None:
        raise Unusable("time of samples whose mean length is not published")
    else:
        metric, value = _time(value, row, stack, batch * gpus, gpus)
    if value <= 0:
        raise Unusable("no single number (OOM, N/A, a range, or a model split over GPUs)")

    everything = " ".join(row[key] for key in ("method", "precision", "note", "table")).lower()
    zero, offload = _zero(row, 3 if stack in SHARDED and gpus > 1 else 0)
    adapters = method != "full"
    rank = _rank(row) if adapters else None
    if adapters and rank is None:
        rank = 8
        assumed.append("rank 8")
    targets = _targets(everything, model) if adapters else ""
    if adapters and not targets:
        targets = "all-linear"
        assumed.append("all linear layers")
    checkpointing = row["checkpointing"].lower()
    if not checkpointing:
        assumed.append("checkpointing" if stack in ("unsloth", "qwen", "prime-rl") else "no checkpointing")
        checkpointing = "yes" if stack in ("unsloth", "qwen", "prime-rl") else "no"
    if gpus > 1 and "multi-gpu" in checkpointing:
        checkpointing = "yes"
    extras = ("activation-offload",) if re.search(r"activation.?offload", everything) else ()
    if re.search(r"optim\w* in (the )?backward", everything):
        extras += ("optimizer-in-backward",)
    first_qwen = model.startswith("qwen-") and not re.search(r"1\.5|half", row["model"])  # its own modelling code
    return Published(
        source=source,
        model=model,
        gpu=gpu,
        num_gpus=gpus,
        method=method,
        lora_r=rank,
        targets=targets,
        quantization=quantization,
        trained_dtype=_trained(everything, adapters, zero, stack),
        compute_dtype=_compute(everything, gpu),
        optimizer=_optimizer(everything),
        micro_batch=batch,
        length=length,
        length_is_exact=exact,
        mean_length=mean,
        gradient_checkpointing=bool(re.match(r"yes|full|true|on\b|unsloth|1|.*\(yes", checkpointing)),
        attention=_attention(row["flash"]),
        zero_stage=zero,
        offload=offload,
        logits_bytes_per_entry=LOGITS["qwen"] if first_qwen else LOGITS.get(stack, 14.0),
        stack=stack,
        metric=metric,
        measured_as=_measured_as(row["metric"].lower(), stack) if metric == "memory_bytes" else "",
        value=value,
        kind=kind,
        torch_compile="compile" in everything,
        note="; ".join(filter(None, [row["note"], "assumed: " + ", ".join(assumed) if assumed else ""])),
        extras=extras,
    )


COLUMNS = (
    *("paper", "table", "gpu", "n_gpus", "model", "params_b", "seq_len", "batch", "method", "zero_stage", "offload"),
    *("precision", "checkpointing", "flash", "lora_rank", "metric", "value", "unit", "source_url", "found_in"),
    *("kind", "note"),
)


def _first(table: tuple[tuple[str, str], ...], text: str) -> str:
    return next((name for pattern, name in table if re.search(pattern, text)), "")


def _metric(row: Row) -> str:
    """memory_bytes, or anything else for a time; Unusable when neither."""
    name = row["metric"].lower()
    if re.search(r"avg|mean|99th|after_(init|load)|cpu|host|reduction|saving|extra|_vs_|bandwidth|activation", name):
        raise Unusable("not a peak (average, percentile, part, or host memory)")
    if re.search(r"mem|vram|gpu_ram|reserved|allocated|nvidia_smi|gpu_gb", name):
        return "memory_bytes"
    if re.search(
        r"throughput|tokens?_(per|/)_?s|tok_s|samples_per_s|speed|step_time|iter(ation|s)?_(time|per_s)", name
    ):
        return "time"
    if re.search(r"s_per_it|sec_per|time_per_(step|iter)|s/it|step_s$", name):
        return "time"
    raise Unusable("not a memory, step-time or throughput metric")


def _number(text: str) -> float:
    text = text.replace(",", "").lstrip("~ ").strip()
    if not re.fullmatch(r"\d*\.?\d+(e[+-]?\d+)?", text, re.IGNORECASE):
        raise Unusable("no single number (OOM, N/A, a range, or a model split over GPUs)")
    return float(text)


def _count(text: str, what: str) -> int:
    numbers = set(re.findall(r"\d+", text))
    if not numbers:
        raise Unusable(f"{what} not given")
    if len(numbers) > 1:
        raise Unusable(f"{what} unclear")
    return int(numbers.pop())


def _length(row: Row, stack: str) -> tuple[int, bool, float | None]:
    """The longest length, whether it is reached for certain, and the mean length where known."""
    text = row["seq_len"].lower()
    number = re.search(r"(\d+)\s*(k\b)?", text)
    if number is None:
        raise Unusable("length not given")
    length = int(number[1]) * (1024 if number[2] else 1)
    average = re.search(r"(?:avg|mean|average)\D*(\d+(?:\.\d+)?)", text)
    said = f"{text} {row['note'].lower()}"
    packed = re.search(r"(?<!un)pack|padded|fixed|hard.?pad", f"{said} {row['method'].lower()}") is not None
    varies = re.search(r"<|max|up to|longest|trunc|default|alpaca|average|avg", said) is not None
    exact = packed or not (varies or stack in ("ms-swift", "peft-bench", "litgpt"))
    mean = float(average[1]) if average else float(length) if exact else None
    return length, exact, mean


def _bytes(value: float, row: Row, gpus: int) -> float:
    unit = re.match(r"\s*(bytes|[gm]i?b|b)\b", row["unit"].lower())
    if unit is None:
        raise Unusable("memory of no known unit")
    said = f"{row['unit']} {row['metric']} {row['note']}".lower()
    summed = re.search(r"\bsum(med)?\b|_sum|\btotal of|all gpus", said) and not re.search(r"per[_ ]gpu|a\+b", said)
    return value * UNITS[unit[1]] / (gpus if summed else 1)


def _time(value: float, row: Row, stack: str, samples: int, gpus: int) -> tuple[str, float]:
    """Tokens a second of all GPUs, or seconds of one micro-batch, whichever the row is closer to."""
    unit, said = row["unit"].lower(), f"{row['metric']} {row['unit']} {row['note']} {row['table']}".lower()
    named = f"{row['metric']} {unit}".lower()
    if re.search(r"tflop|%|mfu", unit) or value <= 0:
        raise Unusable("utilisation rather than a time")
    per_gpu = stack == "llama-factory" or re.search(r"(per[_ ]|/)(gpu|device|card)", named)
    if re.match(r"tok", unit):
        return "tokens_per_s", value * (gpus if per_gpu else 1)
    if re.match(r"(samples?|seq\w*|examples?)/", unit):
        return "step_s", samples / (value * (gpus if per_gpu else 1))
    accumulation = re.search(r"\b(?:ga|grad\w*[_ ]accum\w*)\s*[=:]?\s*(\d+)", said)
    steps = int(accumulation[1]) if accumulation else 1
    if re.match(r"(it|iters?|steps?)/s", unit):
        return "step_s", 1 / (value * steps)
    if re.match(r"m?s\b", unit):
        return "step_s", value * (1e-3 if unit.startswith("ms") else 1.0) / steps
    raise Unusable("time of no known unit")


def _model(name: str, billions: str) -> str:
    known = {path.name for path in CONFIGS.iterdir()} if CONFIGS.is_dir() else set()
    known |= set(EXTRA_CONFIGS)
    text = re.sub(r"\((\d+(?:\.\d+)?[bm])\)", r"\1", name, flags=re.IGNORECASE)  # Llama 3.1 (8B)
    text = re.sub(r"\s*\(.*?\)", "", text).strip().lower().rsplit("/", 1)[-1]
    text = re.sub(r"(?<=\d)_(?=\d)", ".", text)
    text = re.sub(r"[\s_]+", "-", text)
    text = re.sub(r"^(meta|unsloth|mosaicml)-", "", text).replace("1half", "1.5")
    text = re.sub(r"^((?:code)?llama|opt|phi|pythia)(?=\d)", r"\1-", text)
    for _ in range(5):
        if text in known:
            return text
        for pattern, target in ALIASES:
            if re.fullmatch(pattern, text) and (resolved := re.sub(pattern, target, text)) in known:
                return resolved
        for suffix in ("-it", "-chat"):
            if text + suffix in known:
                return text + suffix
        shorter = re.sub(
            r"-(hf|chat|instruct|inst|it|base|sft|bf16|fp16|int[48]|gptq|bnb-4bit|4bit|2507)(?=-|$)", "", text
        )
        if shorter == text:
            break
        text = shorter
    if billions and not re.search(r"\d[bm]\b", text):  # "Llama 2" of 7 billion
        sizes = {
            key: float(size[1]) for key in known if (size := re.fullmatch(rf"{re.escape(text)}-(\d+(?:\.\d+)?)b", key))
        }
        near = min(sizes, key=lambda key: abs(sizes[key] - float(billions)), default=None)
        if near and abs(sizes[near] - float(billions)) < 0.15 * sizes[near]:
            return near
    raise Unusable("model has no config")


def _method(row: Row, stack: str) -> tuple[str, str | None]:
    name = re.sub(r"\bno\b[^,;)]*", "", row["method"].lower().split("|")[0])
    if re.search(OTHER_METHODS, name):
        raise Unusable("method is not full, LoRA or QLoRA")
    text = f"{name} {row['precision'].lower()}"
    bits8 = re.search(r"int8|8.?bit", text) and not re.search(r"adamw?.{0,2}8|8.?bit.{0,2}adam", text)
    quantization = None
    if re.search(r"gptq", text):
        quantization = "gptq-int8" if bits8 else "gptq-int4"
    elif re.search(r"nf4|fp4|bnb|int4|4.?bit|qlora|q-lora", text):
        double = stack in DOUBLE_QUANTIZED or re.search(r"-dq|double|nested", f"{text} {row['note'].lower()}")
        quantization = "fp4" if re.search(r"\bfp4", text) else "nf4-dq" if double else "nf4"
    elif bits8:
        quantization = "int8"
    if re.search(r"(?<![a-z])(q-?|rs)?lora(?![a-z])|peft", text):
        return ("qlora" if quantization else "lora"), quantization
    if quantization:
        raise Unusable("quantised weights in full training")
    if not name or re.search(r"full|zero|fsdp|ddp|naive|baseline|sft|fine.?tun|fp16|bf16|optimi|^\+|adamw", name):
        return "full", None
    raise Unusable("method is not full, LoRA or QLoRA")


def _zero(row: Row, default: int) -> tuple[int, tuple[str, ...]]:
    text = row["method"].lower()
    named = re.search(r"(?:zero|stage|\bz)[- ]?([0-3])", text)
    stage = int(row["zero_stage"]) if row["zero_stage"].isdigit() else int(named[1]) if named else 0
    stage = stage or (3 if "fsdp" in text else default)
    where = row["offload"].lower() or ("cpu" if re.search(r"(?<!activation )offload", text) else "none")
    if where in ("none", "no", "false"):
        return stage, ()
    stage = stage or 2  # ZeRO-Offload
    parts = tuple(part for part in ("optimizer", "param") if part in where)
    return stage, parts or (("optimizer", "param") if stage == 3 else ("optimizer",))


def _rank(row: Row) -> int | None:
    if row["lora_rank"].isdigit():
        return int(row["lora_rank"])
    said = re.search(r"\br(?:ank)?\s*=?\s*(\d+)\b", f"{row['method']} {row['note']}".lower())
    return int(said[1]) if said else None


def _targets(text: str, model: str) -> str:
    fused = model.startswith(("qwen-", "baichuan", "chatglm"))
    if re.search(r"all[- ](7 )?(linear|layers|modules)|target=all|all-linear", text):
        return "all-linear"
    if re.search(r"\bqkv\b|c_attn|w_pack|query_key_value|q,k,v|q_proj\W+k_proj\W+v_proj\W*(\]|$)", text):
        return "fused" if fused else "q,k,v"
    if re.search(r"q,\s*v\b|query,\s*value|\[.q_proj., .v_proj.\]|\[.v_proj., .q_proj.\]", text):
        return "q,v"
    return ""


def _trained(text: str, adapters: bool, zero: int, stack: str) -> str:
    if stack in ("litgpt", "torchtune") or re.search(r"bf16-true|pure|16-true", text):
        return "bf16"
    if (zero and "fsdp" not in text) or re.search(r"mixed|\bamp\b(?!=false)|master", text):
        return "fp32-master"
    return "fp32" if adapters or re.search(r"fp32|float32", text) else "bf16"


def _compute(text: str, gpu: str) -> str:
    if re.search(r"fp32|float32", text) and not re.search(r"bf16|bfloat16|fp16|float16", text):
        return "float32"
    if re.search(r"bf16|bfloat16", text):
        return "bfloat16"
    return "float16" if re.search(r"fp16|float16", text) or gpu.startswith(("V100", "T4", "P100")) else "bfloat16"


def _optimizer(text: str) -> str:
    eight, paged = re.search(r"8.?bit.{0,2}adam|adamw?.?8", text), "paged" in text
    if eight or paged:
        return ("paged_" if paged else "") + "adamw" + ("_8bit" if eight else "")
    return next((name for name in ("sgd", "adafactor", "lion") if re.search(rf"\b{name}\b", text)), "adamw")


def _attention(text: str) -> str:
    text = text.lower()
    if re.match(r"no\b|false|eager|0", text):
        return "eager"
    return "flash" if re.match(r"yes|true|fa|flash|1|xformers", text) else "sdpa"


def _measured_as(metric: str, stack: str) -> str:
    if re.search(r"alloc|active", metric):
        return "allocated"
    if "reserved" in metric:
        return "reserved"
    return "nvidia-smi" if "smi" in metric else MEASURED_AS.get(stack, "reserved")


# --- one function a file -----------------------------------------------------------------------------------------


def _claims(source: str, row: Row) -> list[Published]:
    raise Unusable("claims and scores, no measurement of a run")


def _kernels(source: str, row: Row) -> list[Published]:
    raise Unusable("benchmark of one kernel, no model")


def _dissecting(source: str, row: Row) -> list[Published]:
    """Paper B by a secondary source.  COST_MODEL B1: the length is 350, whatever the book says.  The harness
    (AaronZLT/llm-toolkit) pads hard and prints (total - free memory) / 1024^3, so "GB" is GiB and holds the context.
    Without DeepSpeed everything is in bf16 (10 B a parameter with DDP's buckets); ZeRO keeps an fp32 master.
    """
    if row["table"].startswith("fine-tuning"):
        raise Unusable("batch and length not given")
    record = generic(source, row | {"unit": row["unit"].replace("GB", "GiB"), "note": ""})
    return [replace(record, mean_length=350.0, note="length 350 as COST_MODEL argues; unit taken as GiB")]


def _nthu(source: str, row: Row) -> list[Published]:
    """Reproductions of B; conditions from the notes, COST_MODEL B5, and the logs of the repository: pretraining ran on
    3 GPUs (world_size=3), its memory is DeepSpeed's MaxMemAllocated (GiB) and its tokens/s count 350 a sample.  The
    fine-tuning counts 284.3 real tokens a padded row of 350.  LoRA is fp32 (PEFT's default), under fp16 autocast.
    """
    if "RQ" in row["method"]:
        raise Unusable("8-bit frozen weights in 'full' training: only embeddings and norms train")
    pretraining = row["table"] == "pretrain"
    if pretraining:
        row = row | {"n_gpus": "3", "unit": row["unit"].replace("GB", "GiB")}
    record = generic(source, row | {"note": "" if pretraining else "all linear"})
    record = replace(record, length_is_exact=True, mean_length=350.0 if pretraining else 284.3, note="")
    return [replace(record, measured_as="allocated" if record.measured_as else "", logits_bytes_per_entry=14.0)]


def _lsp(source: str, row: Row) -> list[Published]:
    """LSP-Offload, table 4 only: its own ZeRO-Offload (weights in bf16 on the GPU, gradients and Adam on the host) and
    PEFT LoRA.  Batch and length from the README's profiling commands; max_memory_allocated()/1e9 as its code prints.
    LoRA is r=8 on all seven linear layers with dropout (finetune_deepseekcoder_lora.py).
    """
    if row["table"] != "Table 4":
        raise Unusable("part of an analysis, a ratio or a score")
    lora = "LoRA" in row["method"]
    record = generic(source, row | {"note": "all linear" if lora else ""})
    return [
        replace(
            record,
            measured_as="allocated",
            trained_dtype="fp32" if lora else "fp32-master",
            note="its own ZeRO-Offload, not DeepSpeed's; how it measured is read off its code",
            extras=("lora-dropout",) if lora else (),
        )
    ]


def _qwen_readme(source: str, row: Row) -> list[Published]:
    """Step times of Qwen's README inside derived_step_time_fit.csv (tokens:ms, seconds an iteration over ga=8): one
    A100 80GB, batch 1, fixed lengths, checkpointing, FA2, r=64 on all linear layers (finetune.py).  LoRA in bf16 alone
    (PEFT 0.5); Q-LoRA on GPTQ int4 in fp16 with ZeRO-2; full training by finetune_ds.sh, ZeRO-3 on one GPU.  Printed to
    0.1 s an iteration: the shortest have an error of 5 %.
    """
    if not row["source"].startswith("Qwen README"):
        raise Unusable("same numbers as e_optimum_benchmark_llama2.csv")
    name = row["method"].lower()
    quantized, full = name.startswith("q-lora"), name.startswith("full")
    records = []
    for pair in row["tokens:ms (published)"].split(";"):
        tokens, milliseconds = pair.split(":")
        columns = {
            "paper": "Qwen README",
            "gpu": row["gpu"],
            "n_gpus": "1",
            "model": row["model"],
            "seq_len": tokens,
            "batch": "1",
            "method": "gptq qlora all-linear" if quantized else "full" if full else "lora all-linear",
            "zero_stage": "2" if quantized else "3" if full else "0",
            "precision": "fp16" if quantized else "bf16",
            "checkpointing": "yes",
            "flash": "yes",
            "lora_rank": "64",
            "metric": "step_time",
            "value": milliseconds,
            "unit": "ms",
        }
        record = generic(f"{source}@{tokens}", columns)
        extras = () if full else ("lora-dropout",)
        if "(emb)" in name:
            extras += ("trained-embeddings",)
        targets = "" if full else "all-linear"
        records.append(
            replace(record, targets=targets, extras=extras, note="mean of ga=8 micro-batches and one update")
        )
    return records


def _deepspeed(source: str, row: Row) -> list[Published]:
    """Estimator rows are formulas; of the tutorials only whole iterations count (COST_MODEL I 12: nvidia-smi of a card
    that the allocator has filled says nothing).  Megatron GPT-2 in fp16 with master weights, 1024 tokens by default.
    """
    if "estimator" in row["table"]:
        record = generic(source, row | {"method": "full"})
        return [replace(record, gpu="any", trained_dtype="fp32-master", measured_as="allocated", mean_length=None)]
    if row["metric"] == "nvidia_smi":
        raise Unusable("nvidia-smi of a full card (COST_MODEL I 12)")
    if row["metric"] != "iteration_time":
        raise Unusable("part of a step, a default, or a bar of a chart")
    record = generic(source, row | {"seq_len": "1024", "method": row["method"].replace("ZeRO-Offload", "ZeRO-2")})
    note = "1024 tokens are Megatron's default, not shown; one step has one micro-batch"
    return [replace(record, trained_dtype="fp32-master", attention="eager", note=note)]


# litgpt loads a separate output matrix even where the original is tied.
_UNTIED_IN_LITGPT = ("gemma", "llama-3.2", "falcon")


def _litgpt(source: str, row: Row) -> list[Published]:
    """Conditions from litgpt's own code and config_hub: bf16-true throughout, the head in chunks of 128 with LoRA,
    PagedAdamW with bitsandbytes (states in managed memory), which quantises the output matrix too and, in the versions
    of the time (MatMul4Bit: ctx.tensors = (A, B)), keeps the input of every quantised layer.  resource-tables force the
    longest sample into the first batch, so that length is reached; config_hub cuts at 512 (`max_seq_length`).
    """
    if row["metric"] in ("time_1k_iters", "train_runtime"):
        raise Unusable("time of samples whose mean length is not published")
    hub = row["table"] == "config_hub"
    full = row["method"] == "full"
    line = int(source.rsplit(":", 1)[1])
    if hub and full and row["model"] in ("llama-3.2-1b", "llama-3.2-3b", "Phi-3-mini-4k-instruct"):
        raise Unusable("no room for the states of the AdamW its config names")
    if hub and row["n_gpus"] == "4" and row["model"] in ("phi-2", "stablelm-base-alpha-3b") and full:
        raise Unusable("number of GPUs unclear")
    if hub and row["n_gpus"] == "4" and not (full and row["model"] == "gemma-2b"):
        raise Unusable("one-GPU run listed again for four GPUs")
    if hub and row["model"] == "gemma-2b" and 112 <= line <= 115:  # gemma2-2b/*.yaml, misnamed in the README
        row = row | {"model": "gemma-2-2b"}
    record = generic(source, row)
    several = record.num_gpus > 1
    head = "head" in row["note"]
    quantized = record.quantization is not None
    extras = ("fsdp",) if several else ()
    extras += ("untied-head",) if record.model.startswith(_UNTIED_IN_LITGPT) else ()
    extras += ("head-quantized", "bnb-inputs") if quantized else ()
    extras += ("bnb-inputs-twice",) if quantized and hub else ()
    extras += () if full else ("lora-dropout",)
    extras += ("lora-head",) if head else ()
    return [
        replace(
            record,
            targets="" if full else "all-linear" if head else "q,v",
            optimizer="paged_adamw" if quantized else "adamw",
            length_is_exact=not hub,
            gradient_checkpointing=several,
            zero_stage=3 if several else 0,
            logits_bytes_per_entry=8.0 if full else 4.0,
            note="FSDP with original parameters: gradients of frozen weights exist too" if several and not full else "",
            extras=extras,
        )
    ]


def _ms_swift(source: str, row: Row) -> list[Published]:
    """`--max_length` drops longer samples (truncation_strategy delete), so the longest comes near it but the mean is
    unknown: no times.  bf16 weights, fp32 LoRA, autocast; full training is pure bf16 (10 B a parameter with the foreach
    temporary).  bnb is nf4 with double quantisation and fp32 embeddings, head and norms (kbit preparation).  Without
    flash Qwen 1 keeps its scores (57.67 against 37.70 GiB).
    """
    if row["metric"] == "throughput":
        raise Unusable("time of samples whose mean length is not published")
    if row["table"] == "Sequence Parallel":
        raise Unusable("sequence parallel")
    if "gpu_mem" in row["metric"] and "+" in row["value"]:
        raise Unusable("model split over GPUs by layers")
    if row["model"].startswith(("baichuan2-13b", "openbuddy")):
        raise Unusable("model has no config")
    if "unsloth" in row["method"]:
        raise Unusable("settings not printed")
    record = generic(source, row)
    kbit, chatglm = record.quantization == "nf4-dq", record.model == "chatglm3-6b"
    extras = ("lora-dropout",) if record.method != "full" else ()
    extras += ("kbit-fp32",) if kbit else ()
    extras += ("norm-head",) if record.model.startswith("baichuan2") else ()
    note = "attends through sdpa with a mask: its rows grow as if scores were kept" if chatglm else ""
    return [replace(record, attention="eager" if chatglm else record.attention, note=note, extras=extras)]


def _optimum(source: str, row: Row) -> list[Published]:
    """hydra_config.yaml of the artifacts: Trainer with 256 random tokens a row, torch_dtype float16 and no fp16 flag
    (no autocast, all states in fp16), adamw_torch, LoRA r=8 on q and v without dropout (PEFT 0.5: fp16 adapters on an
    fp16 base, fp32 on a quantised one), bitsandbytes' default fp4, no kbit preparation.  Warm-up of 40 steps left out.
    """
    record = generic(source, row | {"note": "q,v"})
    quantized = record.quantization is not None
    return [
        replace(
            record,
            note="",
            quantization="fp4" if record.quantization == "nf4" else record.quantization,
            trained_dtype="fp32" if quantized else "bf16",
            compute_dtype="float16",
        )
    ]


def _peft(source: str, row: Row) -> list[Published]:
    """MetaMathQA comparison: only plain LoRA and full training, only the maximum of reserved memory (a whole run,
    cache emptied every 10 steps) and the tokens/s of training.  Texts over 1300 characters are left out so that 768
    tokens suffice.  The Llama-2-70B rows of the docs have their launch commands beside them: 2048 packed, r=8 on all
    linear layers, checkpointing, FA2; LoRA batch 8, QLoRA batch 2, nf4 with double quantisation, bf16 storage.
    """
    if row["table"] == "README":
        raise Unusable("model has no config")
    if row["table"] != "MetaMathQA":
        quantized = "QLoRA" in row["method"]
        row = row | {"model": "llama-2-70b", "seq_len": "2048 packed", "batch": "2" if quantized else "8"}
        row |= {"flash": "yes", "lora_rank": "8", "precision": "nf4-dq bf16" if quantized else "bf16"}
        row |= {
            "unit": "GiB",
            "note": "all-linear; GB of the docs taken as GiB (64 GB is called 80 % of an 80 GB card)",
        }
        record = generic(source, row)
        return [
            replace(
                record,
                stack="hf",
                measured_as="nvidia-smi",
                logits_bytes_per_entry=16.0,
                trained_dtype="bf16" if "FSDP" in row["method"] else "fp32-master",
                offload=("optimizer", "param") if row["offload"] == "cpu" else (),
                extras=("lora-dropout", "fsdp") if "FSDP" in row["method"] else ("lora-dropout",),
            )
        ]
    if row["metric"] == "train_time":
        raise Unusable("wall time with loading and testing")
    name = row["method"].split("/")[0]
    if not re.fullmatch(r"lora/llama-3\.2-3B-rank\d+(-rslora|-target-mlp)?|full-finetuning/.*", row["method"]):
        raise Unusable("method is not full, LoRA or QLoRA")
    record = generic(source, row | {"method": name})
    targets = "gate,up,down" if "target-mlp" in row["method"] else "q,v"
    note = "fp32 LoRA on a bf16 base, no autocast" if name == "lora" else ""
    return [replace(record, targets=targets if name == "lora" else "", note=note, extras=("cache-emptied",))]


# Optimization flags of torchtune's README, in the order in which each adds to the one before.
_FLAGS = ("packed", "compile", "chunked", "checkpointing", "optimizer in backward", "activation offloading", "8-bit")


def _torchtune(source: str, row: Row) -> list[Published]:
    """Everything in bf16, packed rows of exactly batch 2, AdamW fused.  README of September 2024: the recipes'
    defaults, so checkpointing, r=8 on q and v (70B and 405B: 16, with k or o), one 8B full training with PagedAdamW8bit
    stepped in the backward pass; the A6000 rows used other, unprinted options.  Tokens/s are of all GPUs.  Flags table
    (Llama-3.2-3B): cumulative, LoRA r=64 on q, v, o and the MLP, without the optimizer flags.
    """
    table = row["table"]
    if table.endswith(".rst"):
        raise Unusable("length not given")
    if row["gpu"] == "A6000":
        raise Unusable("recipe options not printed (and one at 97 % of the peak: COST_MODEL I 17)")
    method = row["method"].lower()
    if table == "README memory and speed":
        full, small = method.startswith("full"), row["params_b"] == "8.03"
        record = generic(source, row | {"lora_rank": "8" if small else "16", "note": "packed"})
        return [
            replace(
                record,
                targets="" if full else "q,v" if small else "q,k,v",
                optimizer="paged_adamw_8bit" if full and small else "adamw",
                gradient_checkpointing=True,
                zero_stage=3 if record.num_gpus > 1 else 0,
                offload=("optimizer", "param") if "offload" in method else (),
                torch_compile=True,
                note="recipe defaults, not printed",
                extras=(("fsdp",) if record.num_gpus > 1 else ("optimizer-in-backward",) if full else ()),
            )
        ]
    if method.startswith("baseline"):
        raise Unusable("length not given")
    adapters = "lora" in method
    level = 5 if adapters else next(index for index, flag in enumerate(_FLAGS) if flag in method)
    columns = row | {"method": method.split(" ")[0] if adapters else "full", "lora_rank": "64", "note": "packed"}
    record = generic(source, columns)
    backward = () if adapters or level < 4 else ("optimizer-in-backward",)
    return [
        replace(
            record,
            targets="q,v,o,gate,up,down" if adapters else "",
            optimizer="adamw_8bit" if level == 6 else "adamw",
            gradient_checkpointing=level >= 3,
            attention="flash",
            logits_bytes_per_entry=4.0 if level >= 2 else 12.0,
            torch_compile=level >= 1,
            note="block mask of packing through flex attention",
            extras=backward + (("activation-offload",) if level >= 5 else ()),
        )
    ]


SOURCES: dict[str, Callable[[str, Row], list[Published]]] = {
    "a_optimizations_study_2406_02290.csv": _claims,
    "b_dissecting_2311_03687.csv": _dissecting,
    "b_reproductions_nthu_2311_03687.csv": _nthu,
    "c_lsp_offload_2406_10181.csv": _lsp,
    "d_cpu_lora_meta_2507_01806.csv": _claims,
    "derived_step_time_fit.csv": _qwen_readme,
    "e_deepspeed.csv": _deepspeed,
    "e_liger_cross_entropy.csv": _kernels,
    "e_litgpt.csv": _litgpt,
    "e_ms_swift.csv": _ms_swift,
    "e_optimum_benchmark_llama2.csv": _optimum,
    "e_peft_metamathqa.csv": _peft,
    "e_torchtune.csv": _torchtune,
}
