"""Our training against its peers, in one run: same model, rows, LoRA, number of supervised tokens, machine.

    make bench                  (or: python tests/benchmarks/vs_peers.py [--steps N] [--rounds N] [--json FILE])
    python tests/benchmarks/vs_peers.py --data TASKS/sst2 --steps 16      a task of bank_tasks.py
    python tests/benchmarks/vs_peers.py --first-layer 15 --steps 16       LoRA on the upper half, as the quick start has

Contestants, each in a process of its own, on all cores, in the same number format (bf16 where the CPU has units for it,
or as --dtype says), all with the settings of malloc and of OpenMP's waiting that our launcher sets:
  ours           this project's loop as the planner sets it up (packing, document attention, logits where supervised,
                 common beginnings computed once: its part of the ceiling counts tokens that were not computed)
  ours-separate  the same without common beginnings
  bare           transformers + PEFT, rows padded to the longest of the batch, model(labels=...): what one writes
  strong         the same with logits where supervised only: the fastest loop that a few more lines make
  trl            TRL's SFTTrainer with its defaults (bf16, gradient checkpointing), prompt-completion rows
  trl-tuned      the same in the common format, without checkpointing
  trl-packing    trl-tuned with packing=True
  llama-factory  LLaMA-Factory without checkpointing, where LLAMAFACTORY_PYTHON names the python of an environment that
                 has it: its transformers is an older one
Every contestant sees the same rows once, with the same learning rate, and hands back an adapter; all adapters are then
measured with one function, in fp32, on the same held-out rows.  Steady state leaves the first two steps out.  With
several rounds contestants take turns, and the medians are compared.

Then: our loop's step against a hand-written loop on identical batches (alternating, in one process), and the time from
`submit` to its first step against a plain script's.  Printed beside the machine's measured matrix-product ceiling.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "orchestrator/recipes/requests_to_json"
ROWS_A_STEP, LEARNING_RATE, WARM = 8, 1e-3, 2
CONTESTANTS = ("ours", "ours-separate", "bare", "strong", "trl", "trl-tuned", "trl-packing", "llama-factory")
# Of our launcher (strategies/step/host_memory.py), as glibc reads it from the environment: worth a fifth to a peer too.
MALLOC = {"MALLOC_ARENA_MAX": "1", "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1), "MALLOC_TOP_PAD_": str(256 * 2**20)}
MALLOC |= {"MALLOC_MMAP_MAX_": "0", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0, help="adapter initialisation and order of rows")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default=common_dtype())
    parser.add_argument("--json", type=Path)
    parser.add_argument("--data", type=Path, default=DATA, help="a folder with train.jsonl and eval.jsonl")
    parser.add_argument("--first-layer", type=int, default=0, help="LoRA on this decoder layer and those above it")
    parser.add_argument("--contestants", nargs="+", default=CONTESTANTS, choices=CONTESTANTS)
    parser.add_argument("--only", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    if arguments.only:
        print(json.dumps(CHILDREN[arguments.only.split(":")[0]](arguments)))
        return
    results = compare(arguments)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))


def compare(arguments: argparse.Namespace) -> dict:
    """Run every contestant in turn and print the table."""
    results: dict = {}
    with tempfile.TemporaryDirectory() as scratch:
        results["ceiling_gflops"] = child("ceiling", arguments, scratch)
        print(
            "matrix-product ceiling:", ", ".join(f"{k} {v:.0f} GFLOP/s" for k, v in results["ceiling_gflops"].items())
        )
        chosen = ["ours", *(name for name in CONTESTANTS if name in arguments.contestants and name != "ours")]
        names = [name for name in chosen if name != "llama-factory" or os.environ.get("LLAMAFACTORY_PYTHON")]
        rounds = [{name: finished(name, arguments, scratch) for name in names} for _ in range(arguments.rounds)]
        names = [name for name in names if all(found[name] for found in rounds)]
        for name in names:
            taken = sorted((found[name] for found in rounds), key=lambda one: one["tokens_per_s"])
            results[name] = taken[len(taken) // 2] | child(f"evaluate:{name}", arguments, scratch)
            show(name, results[name], results["ceiling_gflops"])
        ours = results["ours"]["tokens_per_s"]
        results["ratios"] = {name: ours / results[name]["tokens_per_s"] for name in names if name != "ours"}
        print("ours over each:", ", ".join(f"{name} {ratio:.2f}x" for name, ratio in results["ratios"].items()))
        if not os.environ.get("LLAMAFACTORY_PYTHON"):
            print("llama-factory was not run: LLAMAFACTORY_PYTHON names no python that has it")
        results["loop"] = child("loop", arguments, scratch)
        print(f"our loop over a hand-written one, identical batches: {results['loop']['step_ratio']:.3f}")
        results["plain_first_step_s"] = child("first", arguments, scratch)["seconds"]
        results["submit_first_step_s"] = submit_to_first_step(scratch)
        print(
            "first step done after: plain script {plain_first_step_s:.1f} s, submit {submit_first_step_s:.1f} s".format(
                **results
            )
        )
    return results


def show(name: str, result: dict, ceiling: dict) -> None:
    reached = result["tokens_per_s"] * result["flops_per_token"] / 1e9 / ceiling[result["dtype"]]
    taught = result["supervised_tokens"] or "an uncounted number of"
    print(
        f"{name:<13} {result['dtype']} {result['tokens_per_s']:6.0f} tokens/s (median step"
        f" {result['median_tokens_per_s']:.0f}), {taught} supervised tokens, eval loss"
        f" {result['eval_loss']:.4f}, {reached:.0%} of the ceiling, peak {result['peak_gib']:.1f} GiB",
        flush=True,
    )


def finished(name: str, arguments: argparse.Namespace, scratch: str) -> dict:
    """A contestant's result; empty, and said, where a peer failed."""
    try:
        return child(name, arguments, scratch)
    except SystemExit as error:
        if name == "ours":
            raise
        print(error, flush=True)
        return {}


def child(name: str, arguments: argparse.Namespace, scratch: str) -> dict:
    """One contestant in a fresh process; its last line of output is its result."""
    numbers = ["--steps", str(arguments.steps), "--seed", str(arguments.seed), "--dtype", arguments.dtype]
    numbers += ["--data", str(arguments.data), "--first-layer", str(arguments.first_layer)]
    command = [sys.executable, __file__, "--only", name, *numbers, "--out", scratch]
    from strategies.step import thread_waits

    environment = {
        **os.environ,
        **MALLOC,
        **thread_waits.environment(),
        "OMP_NUM_THREADS": str(cores()),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def common_dtype() -> str:
    """What this machine trains in fastest: bf16 where its CPU has units for it."""
    sys.path.insert(0, str(ROOT))
    from clusters.probe.machine import look_at_this_node

    cpu = look_at_this_node().cpu
    return "bfloat16" if cpu and cpu.has_bf16_units else "float32"


def cores() -> int:
    from clusters.probe.machine import num_cores

    return num_cores()


# ---- what the contestants share ---------------------------------------------------------------


def rows(data: Path, count: int, file: str = "train.jsonl") -> list[dict]:
    """The rows as conversations, each of which has one answer."""
    lines = [json.loads(line) for line in (data / file).read_text().splitlines()]
    found = [line if "messages" in line else {"messages": as_turns(line)} for line in lines[:count]]
    if file == "train.jsonl" and len(found) < count:
        raise SystemExit(f"{data / file} has {len(found)} rows, and {count} are asked for: lower --steps")
    return found


def as_turns(line: dict) -> list[dict]:
    turns = ("user", line["prompt"]), ("assistant", line["completion"])
    return [{"role": role, "content": text} for role, text in turns]


def model_folder() -> Path:
    from orchestrator.job.model_files import locate

    return locate("smollm2-135m-instruct", ROOT)


def lora_config(first_layer: int):
    from peft import LoraConfig

    return LoraConfig(
        r=16,
        lora_alpha=32,
        target_modules=[f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")],  # all of a Llama
        layers_to_transform=adapted_layers(first_layer),
        task_type="CAUSAL_LM",
    )


def adapted_layers(first_layer: int) -> list[int] | None:
    """Numbers of the layers with LoRA; None = all."""
    from orchestrator.job.model_files import read_config

    return list(range(first_layer, read_config(model_folder())["num_hidden_layers"])) if first_layer else None


def samples(data: Path, count: int) -> list[tuple[list[int], list[bool]]]:
    """Token ids and masks by our renderer, which every contestant's own must equal in number."""
    from transformers import AutoTokenizer

    from orchestrator.data.rendering.template import Renderer
    from orchestrator.data.rows.formats import convert

    tokenizer = AutoTokenizer.from_pretrained(model_folder())
    renderer = Renderer(tokenizer, tokenizer.chat_template)
    rendered = [tokens for line in rows(data, count) for tokens in renderer.render(convert(line, "messages"))]
    return [(tokens.input_ids, tokens.supervised) for tokens in rendered]


def report(
    step_s: list[float], step_tokens: list[int], supervised: int | None, dtype: str, flops_per_token: float
) -> dict:
    import resource

    steady = list(zip(step_s, step_tokens, strict=True))[WARM:]
    return {
        "tokens_per_s": sum(n for _, n in steady) / sum(s for s, _ in steady),
        "median_tokens_per_s": statistics.median(n / s for s, n in steady),
        "supervised_tokens": supervised,
        "dtype": dtype,
        "flops_per_token": flops_per_token,
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "steps": len(step_s),
    }


def useful_flops_per_token(first_layer: int, data: Path) -> float:
    """What LoRA needs per real token: forward, input gradients, adapters; logits only where supervised."""
    from orchestrator.job.model_files import read_config
    from strategies.cost.time import flops_per_token
    from strategies.cost.work import Work
    from strategies.shape import ModelShape
    from strategies.workload import Techniques, Workload

    shape = ModelShape.from_config(read_config(model_folder()))
    adapters = (shape.num_layers - first_layer) * sum(16 * (m.inputs + m.outputs) for m in shape.linears)
    known = samples(data, 40)
    tokens, taught = sum(len(ids) for ids, _ in known), sum(sum(mask) for _, mask in known)
    work = Workload(shape, len(known), tokens, taught, max(len(ids) for ids, _ in known), 8, 12, 96)
    techniques = Techniques("float32", "document", True, False, 1, 1024)
    own = Work(trains_weights=False, adapter_parameters=adapters, first_layer=first_layer)
    return sum(flops_per_token(work, techniques, own))


def save_adapter(model, out: Path, name: str) -> None:
    model.save_pretrained(str(out / name), save_embedding_layers=False)


# ---- contestants ------------------------------------------------------------------------------


def ours(arguments) -> dict:
    """Our loop on the planner's techniques, without Ray around it."""
    import torch

    from orchestrator.data.order import Order
    from orchestrator.runs.events import StepReport
    from orchestrator.training.loop import train
    from orchestrator.training.model.kernels import row_multiple
    from orchestrator.training.parallel import ProcessGroup
    from orchestrator.training.state import Hooks, Progress, Schedule, Training
    from strategies.workload import Techniques

    shares = arguments.only == "ours"
    techniques = Techniques(arguments.dtype, "document", True, False, 1, 1024, share_prefixes=shares)
    setup = our_setup(techniques, arguments.seed, arguments.first_layer)
    setup.row_multiple = row_multiple(setup, techniques)
    data = our_dataset(arguments.data, arguments.steps * ROWS_A_STEP)
    seconds, tokens, supervised = [], [], []

    def record(event):
        if isinstance(event, StepReport):
            seconds.append(event.seconds)
            tokens.append(event.tokens)
            supervised.append(event.supervised_tokens)

    order = Order(len(data), ROWS_A_STEP, arguments.seed, num_train_epochs=1)
    hooks = Hooks(record, lambda now: "none", lambda: None)
    schedule = Schedule(lambda step: 1.0, 1.0, 0, 10**9, None, None)
    train(Training(setup, data, None, order, schedule, techniques, ProcessGroup(), Progress(), hooks))
    save_adapter(setup.model, arguments.out, arguments.only)
    assert torch.get_num_threads() == cores()
    return report(
        seconds, tokens, sum(supervised), arguments.dtype, useful_flops_per_token(arguments.first_layer, arguments.data)
    )


def our_setup(techniques, seed=0, first_layer=0):
    import torch
    from transformers import AutoModelForCausalLM

    from strategies import METHODS
    from strategies.step import document_attention
    from strategies.train_setup import TrainSettings

    document_attention.register()
    method = METHODS["lora"](lora_r=16, lora_alpha=32, layers_to_transform=adapted_layers(first_layer))
    dtype = getattr(torch, method.load_dtype(techniques))
    model = AutoModelForCausalLM.from_pretrained(
        model_folder(), dtype=dtype, attn_implementation=techniques.attn_implementation
    )
    return method.setup(
        model, TrainSettings(LEARNING_RATE, 0.0, "adamw_torch_fused", 0.9, 0.999, 1e-8, techniques, seed)
    )


def our_dataset(data: Path, count: int, file: str = "train.jsonl"):
    from transformers import AutoTokenizer

    from orchestrator.data.dataset import TokenizeOptions, build
    from orchestrator.data.readers.files import read_rows
    from orchestrator.data.rendering.template import Renderer

    tokenizer = AutoTokenizer.from_pretrained(model_folder())
    renderer = Renderer(tokenizer, tokenizer.chat_template)
    with tempfile.TemporaryDirectory() as folder:
        lines = list(read_rows(data / file))[:count]
        return build(
            iter(lines), renderer, TokenizeOptions("auto", "", 1024, "truncate", True), Path(folder) / "samples"
        )


def bare(arguments) -> dict:
    """What one writes by hand: padded batches, labels, AdamW, one loop; adapters are fp32, as PEFT makes them."""
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(arguments.seed)
    dtype = getattr(torch, arguments.dtype)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(model_folder(), dtype=dtype), lora_config(arguments.first_layer)
    )
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE, weight_decay=0.0
    )
    loss_of = loss_where_supervised if arguments.only == "strong" else loss_of_labels
    everything = samples(arguments.data, arguments.steps * ROWS_A_STEP)
    seconds, tokens, supervised = [], [], 0
    model.train()
    for step in range(arguments.steps):
        batch = everything[step * ROWS_A_STEP : (step + 1) * ROWS_A_STEP]
        began = time.perf_counter()
        loss_of(model, *padded(batch)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - began)
        tokens.append(sum(len(i) for i, _ in batch))
        supervised += sum(sum(mask) for _, mask in batch)
    save_adapter(model, arguments.out, arguments.only)
    return report(
        seconds, tokens, supervised, arguments.dtype, useful_flops_per_token(arguments.first_layer, arguments.data)
    )


def loss_of_labels(model, ids, attend, labels):
    return model(input_ids=ids, attention_mask=attend, labels=labels, use_cache=False).loss


def loss_where_supervised(model, ids, attend, labels):
    """Without logits of tokens that teach nothing."""
    import torch

    plain = model.get_base_model()
    hidden = plain.model(input_ids=ids, attention_mask=attend, use_cache=False).last_hidden_state
    targets = labels[:, 1:].reshape(-1)
    kept = (targets != -100).nonzero().squeeze(-1)
    logits = plain.lm_head(hidden[:, :-1].reshape(-1, hidden.shape[-1])[kept])
    return torch.nn.functional.cross_entropy(logits.float(), targets[kept])


def llama_factory(arguments) -> dict:
    """LLaMA-Factory on the same rows, in an environment of its own."""
    out = arguments.out / arguments.only
    count = arguments.steps * ROWS_A_STEP
    (arguments.out / "rows.json").write_text(json.dumps(rows(arguments.data, count)))
    inputs = {
        "model": str(model_folder()),
        "rows": str(arguments.out / "rows.json"),
        "out": str(out),
        "dtype": arguments.dtype,
        "seed": arguments.seed,
        "learning_rate": LEARNING_RATE,
        "rows_a_step": ROWS_A_STEP,
        "layers": adapted_layers(arguments.first_layer),
    }
    command = [os.environ["LLAMAFACTORY_PYTHON"], str(Path(__file__).with_name("peer_llamafactory.py"))]
    own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}  # it has packages of its own
    done = subprocess.run([*command, json.dumps(inputs)], capture_output=True, text=True, env=own)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    found = json.loads(done.stdout.strip().splitlines()[-1])
    lengths = [len(ids) for ids, _ in samples(arguments.data, count)]
    per_step = [sum(lengths[at : at + ROWS_A_STEP]) for at in range(0, count, ROWS_A_STEP)]
    made = report(
        found["seconds"], per_step, None, arguments.dtype, useful_flops_per_token(arguments.first_layer, arguments.data)
    )
    return made | {"peak_gib": found["peak_gib"]}


def padded(batch):
    import torch

    width = max(len(ids) for ids, _ in batch)
    ids, attend = torch.zeros(len(batch), width, dtype=torch.long), torch.zeros(len(batch), width, dtype=torch.long)
    labels = torch.full((len(batch), width), -100)
    for row, (tokens, mask) in enumerate(batch):
        ids[row, : len(tokens)], attend[row, : len(tokens)] = torch.tensor(tokens), 1
        labels[row, : len(tokens)] = torch.where(torch.tensor(mask), torch.tensor(tokens), -100)
    return ids, attend, labels


def trl(arguments) -> dict:
    """TRL's SFTTrainer as its documentation uses it, on a CPU."""
    import warnings

    warnings.simplefilter("ignore")
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    packing, is_tuned = arguments.only == "trl-packing", arguments.only != "trl"
    tuned = {"gradient_checkpointing": False, "bf16": arguments.dtype == "bfloat16"} if is_tuned else {}
    count = arguments.steps * ROWS_A_STEP
    talks = [row["messages"] for row in rows(arguments.data, count)]
    data = Dataset.from_list([{"prompt": talk[:-1], "completion": talk[-1:]} for talk in talks])
    mean_length = sum(len(ids) for ids, _ in samples(arguments.data, count)) / count
    config = SFTConfig(
        output_dir=str(arguments.out / "trl"),
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        num_train_epochs=1,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        # The same tokens a step: eight rows, or one packed row that holds eight.
        per_device_train_batch_size=1 if packing else ROWS_A_STEP,
        max_length=round(mean_length * ROWS_A_STEP) if packing else 1024,
        packing=packing,
        seed=arguments.seed,
        **tuned,
    )
    marks, tokens = [], []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            marks.append(time.perf_counter())

        def on_step_end(self, *_, **__):
            marks.append(time.perf_counter())

    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(
            model_folder(), dtype=getattr(torch, arguments.dtype) if is_tuned else torch.float32
        ),
        args=config,
        train_dataset=data,
        processing_class=AutoTokenizer.from_pretrained(model_folder()),
        peft_config=lora_config(arguments.first_layer),
        callbacks=[Clock()],
    )
    original, supervised = trainer.compute_loss, [0]

    def counted(model, inputs, *rest, **more):
        attend = inputs.get("attention_mask")
        tokens.append(int(attend.sum()) if attend is not None else inputs["input_ids"].numel())
        supervised[0] += int((inputs["labels"] != -100).sum())
        return original(model, inputs, *rest, **more)

    trainer.compute_loss = counted
    trainer.train()
    save_adapter(trainer.model, arguments.out, arguments.only)
    seconds = [end - begin for begin, end in zip(marks[::2], marks[1::2], strict=True)]
    dtype = arguments.dtype if is_tuned else "bfloat16"
    return report(seconds, tokens, supervised[0], dtype, useful_flops_per_token(arguments.first_layer, arguments.data))


# ---- measures ---------------------------------------------------------------------------------


def evaluate(arguments) -> dict:
    """Held-out loss of a contestant's adapter, fp32, one function for all."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from orchestrator.training.evaluate import evaluate_loss
    from orchestrator.training.parallel import ProcessGroup
    from strategies.step import document_attention
    from strategies.train_setup import TrainSetup
    from strategies.workload import Techniques

    document_attention.register()
    base = AutoModelForCausalLM.from_pretrained(model_folder(), dtype=torch.float32, attn_implementation="document")
    model = PeftModel.from_pretrained(base, str(arguments.out / arguments.only.split(":")[1]))
    setup = TrainSetup(model, None, dict(model.named_parameters()), lambda path: None, "peft-lora")  # type: ignore[arg-type]
    techniques = Techniques("float32", "document", True, False, 1, 1024)
    return {
        "eval_loss": evaluate_loss(setup, our_dataset(arguments.data, 80, "eval.jsonl"), techniques, ProcessGroup())
    }


def ceiling(_) -> dict:
    """Best matrix product of the sizes that this model's layers have."""
    import torch

    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.randn(576, 576, dtype=dtype), torch.randn(576, 1536, dtype=dtype)
        best = 0.0
        for _ in range(60):
            began = time.perf_counter()
            for _ in range(5):
                a @ b
            best = max(best, 5 * 2 * 576 * 576 * 1536 / (time.perf_counter() - began) / 1e9)
        found[str(dtype).removeprefix("torch.")] = best
    return found


def loop(arguments) -> dict:
    """Our loop's steps between a hand-written loop's, on identical padded batches with the same loss."""
    import torch

    from orchestrator.data.batches import collate
    from orchestrator.data.order import Order
    from orchestrator.data.packing import micro_batches
    from orchestrator.runs.events import StepReport
    from orchestrator.training.loop import train
    from orchestrator.training.parallel import ProcessGroup
    from orchestrator.training.state import Hooks, Progress, Schedule, Training
    from strategies.step.supervised_logits import loss_sum
    from strategies.workload import Techniques

    techniques = Techniques("float32", "sdpa", False, False, ROWS_A_STEP, 1024)
    setup, data = our_setup(techniques), our_dataset(arguments.data, 8 * ROWS_A_STEP)
    order = Order(len(data), ROWS_A_STEP, seed=0, num_train_epochs=1)
    parameters = list(setup.parameters.values())
    theirs, mine = [], []
    hooks = Hooks(
        lambda event: mine.append(event.seconds) if isinstance(event, StepReport) else None,
        lambda now: "",
        lambda: None,
    )
    for step in range(order.num_steps):
        ids = order.sample_ids(step)
        (group,) = micro_batches(data.lengths[ids].tolist(), ROWS_A_STEP, 1024, False)
        setup.model.train()
        began = time.perf_counter()
        batch = collate(data, [ids[i] for i in group], False)
        (loss_sum(setup.model, batch) / int(data.num_supervised[ids].sum())).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        setup.optimizer.step()
        setup.optimizer.zero_grad(set_to_none=True)
        theirs.append(time.perf_counter() - began)
        one = Order(len(data), ROWS_A_STEP, 0, 1, max_steps=step + 1)
        schedule = Schedule(lambda step: 1.0, 1.0, 0, 10**9, None, None)
        train(Training(setup, data, None, one, schedule, techniques, ProcessGroup(), Progress(step=step), hooks))
    ratios = [ours / bare for ours, bare in zip(mine, theirs, strict=True)][1:]
    return {
        "step_ratio": statistics.median(ratios),
        "ours_s": statistics.median(mine),
        "bare_s": statistics.median(theirs),
    }


def first(arguments) -> dict:
    """A plain script: imports, model, adapter, one step.  Timed from its start, which the caller cannot see."""
    began = PROCESS_START
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(model_folder(), dtype=torch.float32), lora_config(arguments.first_layer)
    )
    ids, attend, labels = padded(samples(arguments.data, ROWS_A_STEP))
    model(input_ids=ids, attention_mask=attend, labels=labels).loss.backward()
    return {"seconds": time.time() - began}


def submit_to_first_step(scratch: str) -> float:
    """Seconds from typing `submit` to the first step, caches warm."""
    from orchestrator.runs.events import StepReport
    from orchestrator.runs.run_folder import RunFolder

    job = f"""\
name: bench
model: {{model_name_or_path: smollm2-135m-instruct}}
data: {{train: {DATA / "train.jsonl"}, max_length: 1024}}
train: {{global_batch_size: {ROWS_A_STEP}, max_steps: 1}}
checkpoint: {{output_dir: {scratch}/runs}}
tracking: {{report_to: []}}
"""
    (Path(scratch) / "job.yaml").write_text(job)
    command = [sys.executable, "-m", "orchestrator", "submit", f"{scratch}/job.yaml", "--json"]
    for _ in range(2):  # the first one tokenises
        began = time.time()
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
        run = RunFolder(Path(json.loads(done.stdout)["path"]))
    return run.events_of(StepReport)[0].time - began


PROCESS_START = time.time()
CHILDREN = {
    "ours": ours,
    "ours-separate": ours,
    "bare": bare,
    "strong": bare,
    "trl": trl,
    "trl-tuned": trl,
    "trl-packing": trl,
    "llama-factory": llama_factory,
    "evaluate": evaluate,
    "ceiling": ceiling,
    "loop": loop,
    "first": first,
}

if __name__ == "__main__":
    main()
