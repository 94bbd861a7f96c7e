"""Every `auto` is resolved with a reason, from what the machines report."""

import dataclasses
import json
import re
from pathlib import Path

import pytest

from clusters.capability import ClusterCapability, DeviceCapability, NodeCapability
from orchestrator.errors import JobError, NothingFits
from orchestrator.job.job_file import parse_job
from orchestrator.planning import planner, workload
from orchestrator.planning.evaluation import HeldOutCounts
from orchestrator.planning.plan import VERSION, Plan
from strategies.shape import ModelShape

GIB = 2**30
SMOL = ModelShape(576, 30, 9, 3, 64, 1536, 49152, True)
OLD_CPU = DeviceCapability("cpu", "old", 24 * GIB)
NEW_CPU = DeviceCapability("cpu", "new", 24 * GIB, instruction_sets=("avx512_bf16",))
TURING = DeviceCapability("cuda", "RTX 2080", 8 * GIB, compute_capability=(7, 5))
AMPERE = DeviceCapability("cuda", "RTX 3090", 24 * GIB, compute_capability=(8, 6))
HELD_OUT = HeldOutCounts(80, 5000, 40, 80, False)


def plan(text="", *devices, shape=SMOL, held_out=HELD_OUT, lengths=(70,) * 800):
    spec = parse_job("model: {model_name_or_path: m}\ndata: {train: a.jsonl}\n" + text, Path()).spec
    node = NodeCapability("here", 4, 24 * GIB, (*devices, OLD_CPU) if devices else (OLD_CPU,))
    if devices and devices[0].kind == "cpu":
        node = NodeCapability("here", 4, devices[0].memory_bytes, devices)
    num_workers, _ = planner.resolve_workers(spec, node)
    max_length, _ = planner.resolve_max_length(spec, {"max_position_embeddings": 8192})
    work, _, _ = workload.describe(spec, shape, list(lengths), len(lengths) * 30, num_workers)
    return planner.make_plan(spec, work, ClusterCapability((node,)), max_length, held_out, {})


@pytest.mark.parametrize(
    ("device", "dtype", "word"),
    [
        (OLD_CPU, "float32", "no bf16"),
        (NEW_CPU, "bfloat16", "avx512_bf16"),
        (TURING, "float16", "no bf16 units"),
        (AMPERE, "bfloat16", "hardware"),
    ],
)
def test_precision_follows_the_device(device, dtype, word):
    made = plan("", device)

    assert made.techniques.dtype == dtype
    assert word in made.reasons["model.dtype"]


def test_what_the_job_states_is_kept_and_has_no_reason():
    made = plan("method: {lora_r: 8}\ntrain: {gradient_checkpointing: true}\n")

    assert made.techniques.gradient_checkpointing
    assert "train.gradient_checkpointing" not in made.reasons


def test_one_cpu_is_one_worker_and_two_gpus_are_two():
    assert plan().num_workers == 1
    assert plan("", TURING, TURING).num_workers == 2
    assert plan("strategy: {mode: single}\n", TURING, TURING).num_workers == 1
    assert plan("cluster: {num_workers: 2}\n").threads_per_worker == 2


def test_checkpointing_is_turned_on_only_when_it_must_be():
    llama = ModelShape(4096, 32, 32, 32, 128, 11008, 32000, False)

    lora = "method: {type: lora}\n"

    assert not plan(lora, AMPERE).techniques.gradient_checkpointing
    assert plan(lora, AMPERE, shape=llama, lengths=(2000,) * 100).techniques.gradient_checkpointing


def test_the_plan_says_what_keys_and_values_of_generated_answers_take():
    roomy, stated = plan("", AMPERE), plan("eval: {max_new_tokens: 64, metrics: [exact_match]}\n", AMPERE)
    long = plan("eval: {max_new_tokens: 60000, metrics: [rouge_l]}\n", AMPERE)

    said = r"up to 128 prompts at a time: their keys and values take \d+"
    assert re.search(said, roomy.reasons["eval.max_new_tokens"])
    assert "eval.max_new_tokens" not in stated.reasons
    assert "an answer that does not fit is not scored" in long.reasons["eval.max_new_tokens"]


def test_the_workers_of_a_node_share_its_memory():
    """DeepSpeed divides a model that every worker has loaded on the host first: one does that here, four cannot."""
    llama = ModelShape(4096, 32, 32, 32, 128, 11008, 32000, False)
    job = "method: {type: lora}\ntrain: {optim: adamw_torch_fused}\nstrategy: {offload: parameters, mode: %s}\n"

    assert plan(job % "single", AMPERE, shape=llama).num_workers == 1
    with pytest.raises(NothingFits, match=r"the \d workers on here need .* GiB of the node's own memory together"):
        plan(job % "zero3", *[AMPERE] * 4, shape=llama)


def test_what_fits_nowhere_says_how_much_is_missing():
    huge = ModelShape(8192, 80, 64, 8, 128, 28672, 128256, False)

    with pytest.raises(NothingFits, match=r"needs \d+\.\d GiB, has \d+\.\d GiB usable"):
        plan("", AMPERE, shape=huge)


def test_the_reason_that_is_given_is_the_one_that_decided():
    huge = ModelShape(8192, 80, 64, 8, 128, 28672, 128256, False)

    with pytest.raises(NothingFits) as caught:
        plan("method: {type: lora}\n", AMPERE, shape=huge)

    told = str(caught.value)
    assert "lora with weights offload on here (RTX 3090): needs" in told
    assert "has 22.0 GiB usable of the node's own memory" in told
    for needs, has in re.findall(r"needs ([\d.]+) GiB, has ([\d.]+) GiB", told):
        assert float(needs) > float(has), told


def test_micro_batches_halve_until_they_fit():
    small = DeviceCapability("cuda", "GTX 1060", 3 * GIB, compute_capability=(6, 1))

    rows = [
        plan("", device, lengths=(2000,) * 800).techniques.per_device_train_batch_size for device in (AMPERE, small)
    ]

    assert rows[0] > rows[1] >= 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("eval: {eval_steps: 5}\n", "eval.eval_steps needs held-out rows"),
        ("eval: {metrics: [bleu]}\n", "eval.metrics needs held-out rows"),
        ("eval: {early_stopping_patience: 2}\n", "early_stopping_patience needs"),
        ("checkpoint: {load_best_model_at_end: true}\n", "load_best_model_at_end needs"),
        ("model: {attn_implementation: flash_attention_2, model_name_or_path: m}\n", "needs a GPU"),
        ("strategy: {mode: single}\ncluster: {num_workers: 2}\n", "set one of them to auto"),
    ],
)
def test_contradictions_name_both_sides(text, words):
    base = "" if text.startswith("model") else "model: {model_name_or_path: m}\n"
    spec = parse_job(base + "data: {train: a.jsonl}\n" + text, Path()).spec
    node = NodeCapability("here", 4, 24 * GIB, (OLD_CPU,))

    with pytest.raises(JobError, match=words):
        num_workers, _ = planner.resolve_workers(spec, node)
        work, _, _ = workload.describe(spec, SMOL, [70] * 80, 2400, num_workers)
        planner.make_plan(spec, work, ClusterCapability((node,)), 1024, None, {})


def test_held_out_rows_are_measured_as_often_as_a_tenth_of_the_time_allows():
    often = plan(held_out=HeldOutCounts(8, 500, 40, 8, False))
    never = plan(held_out=HeldOutCounts(8000, 500_000, 40, 8, False))

    assert often.eval_steps is not None and often.load_best_model_at_end
    assert never.eval_steps is None and not never.load_best_model_at_end
    assert plan(held_out=None).metrics == ()


def test_metrics_follow_what_the_rows_are():
    assert plan(held_out=HeldOutCounts(8, 500, 3, 8, True)).metrics == ("accuracy", "macro_f1")
    assert plan(held_out=HeldOutCounts(8, 500, 30, 8, False)).metrics == ("exact_match",)
    assert plan(held_out=HeldOutCounts(8, 500, 300, 8, False)).metrics == ("rouge_l",)
    assert plan(held_out=HeldOutCounts(8, 500, 30, 0, False)).metrics == ()


def test_a_plan_survives_its_file_and_its_hash_follows_its_content():
    made = plan()

    assert Plan.from_json(made.to_json()) == made
    assert Plan.from_json(made.to_json()).hash == made.hash != plan("train: {optim: sgd}\n").hash
    with pytest.raises(JobError, match="version"):
        Plan.from_json(made.to_json().replace(f'"version": {VERSION}', '"version": 0'))


def two_nodes(held_out=HELD_OUT, more=""):
    """A plan for one worker on two equal nodes."""
    text = "model: {model_name_or_path: m}\ndata: {train: a.jsonl}\ncluster: {address: auto, num_workers: 1}\n"
    spec = parse_job(text + more, Path()).spec
    nodes = tuple(NodeCapability(name, 4, 24 * GIB, (OLD_CPU,)) for name in ("left", "right"))
    work, _, _ = workload.describe(spec, SMOL, [70] * 800, 800 * 30, 1)
    return planner.make_plan(spec, work, ClusterCapability(nodes), 512, held_out, {})


def test_a_node_that_does_not_train_measures_the_base_model_beside_it():
    made = two_nodes()

    (beside,) = made.beside
    assert beside.does == "measures" and beside.part is made.measuring
    assert {beside.node, made.nodes[0].node} == {"left", "right"}
    assert beside.part.node == beside.node and beside.part.share == 0.0
    assert "evaluates the base model meanwhile" in made.left_out[beside.node]
    assert Plan.from_json(made.to_json()) == made
    assert two_nodes(held_out=None).beside == two_nodes(more="eval: {before: false}\n").beside == ()


def test_a_plan_of_an_earlier_program_names_the_node_that_measures_as_its_helper():
    made = two_nodes()
    written = json.loads(made.to_json())
    (beside,) = written.pop("beside")

    assert Plan.from_json(json.dumps({**written, "helper": beside["part"]})) == made
    assert Plan.from_json(json.dumps({**written, "helper": None})) == dataclasses.replace(made, beside=())
    with pytest.raises(JobError, match=r"beside\.0\.part"):
        Plan.from_json(json.dumps({**written, "helper": "left"}))


LLAMA_3B = ModelShape(3072, 28, 24, 8, 128, 8192, 128256, True)


def test_full_rank_leaves_adapters_out():
    assert plan("", AMPERE).method["type"] == "lora"
    assert plan("goal: {full_rank: true}\n", AMPERE).method["type"] == "full"
    with pytest.raises(JobError, match=r"goal\.full_rank: lora changes weights by a low rank"):
        plan("goal: {full_rank: true}\nmethod: {type: lora}\n", AMPERE)


def test_where_full_training_does_not_fit_a_streamed_optimizer_is_proposed_first():
    small = DeviceCapability("cuda", "card", 12 * GIB, compute_capability=(8, 6))
    asked = "goal: {full_rank: true}\nstrategy: {offload: none}\n"

    with pytest.raises(NothingFits, match=r"It would fit with: .*experimental_lsp_offload") as caught:
        plan(asked, small, shape=LLAMA_3B)

    assert "{type: lora}" not in str(caught.value).split("experimental_lsp_offload")[0]


def test_an_automatic_image_is_sized_by_the_bus_and_says_so():
    def size(bus):
        card = DeviceCapability(
            "cuda", "card", 24 * GIB, compute_capability=(8, 6), flops_per_s={"bfloat16": 70e12},
            memory_bytes_per_s=900e9, host_to_device_bytes_per_s=bus, device_to_host_bytes_per_s=bus,
        )  # fmt: skip
        made = plan("method: {type: experimental_lsp_offload}\n", card, shape=LLAMA_3B)
        return made.method["subspace_size"], made.reasons["method.subspace_size"], made

    slow, why, made = size(0.2e9)
    fast, _, _ = size(20e9)

    assert 64 <= slow < fast <= 1536
    assert "would not hide" in why
    assert made.build_method().subspace_size == slow
    assert made.nodes[0].memory.host_bytes > 8 * 28 * 7 * 64**2


def shared_plan(text="", device=OLD_CPU, shape=SMOL, ratios=None):
    spec = parse_job("model: {model_name_or_path: m}\ndata: {train: a.jsonl" + text, Path()).spec
    devices = (device,) if device.kind == "cpu" else (device, OLD_CPU)
    work, _, _ = workload.describe(spec, shape, [100] * 800, 24_000, 1, {1: 1.0, 16: 1.5} if ratios is None else ratios)
    node = NodeCapability("here", 4, 24 * GIB, devices)
    return planner.make_plan(spec, work, ClusterCapability((node,)), 1024, HELD_OUT, {})


def test_common_beginnings_are_computed_once_where_rows_have_enough_in_common():
    shared, separate = shared_plan("}"), shared_plan(", share_prefixes: false}")

    assert shared.techniques.share_prefixes and not separate.techniques.share_prefixes
    assert shared.tokens_per_s > 1.2 * separate.tokens_per_s
    assert shared.computed_part < separate.computed_part == 1.0
    assert "are not computed" in shared.reasons["data.share_prefixes"]
    assert "data.share_prefixes" not in separate.reasons


@pytest.mark.parametrize(
    ("text", "device", "ratios", "why"),
    [
        ("}", OLD_CPU, {1: 1.0, 16: 1.09}, "less than 1.1 is not worth it"),
        ("}", OLD_CPU, {}, "not compared for a rough plan"),
        ("}", AMPERE, None, "neither tested nor measured"),
        ("}\nmethod: {type: lora, lora_dropout: 0.1}", OLD_CPU, None, "one dropout mask"),
    ],
)
def test_rows_are_computed_one_by_one_with_the_reason(text, device, ratios, why):
    made = shared_plan(text, device, ratios=ratios)

    assert not made.techniques.share_prefixes
    assert why in made.reasons["data.share_prefixes"]


def test_stated_sharing_is_kept_or_refused_with_what_is_against_it():
    assert shared_plan(", share_prefixes: true}", ratios={}).techniques.share_prefixes

    with pytest.raises((JobError, NothingFits), match="one dropout mask"):
        shared_plan(", share_prefixes: true}\nmethod: {type: lora, lora_dropout: 0.1}")
    with pytest.raises((JobError, NothingFits), match=r"packed rows|data\.packing"):
        shared_plan(", share_prefixes: true, packing: false}")


def test_a_plan_without_sharing_keeps_its_hash_of_before():
    made = shared_plan(", share_prefixes: false}")
    values = json.loads(made.to_json())
    for part in values["nodes"]:
        del part["techniques"]["share_prefixes"]

    assert Plan.from_json(json.dumps(values)).hash == made.hash


UPPER_HALF = (
    "}\nmethod: {type: lora, layers_to_transform: [15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29]}"
)


def test_what_frozen_layers_make_of_a_sample_is_kept_where_later_epochs_use_it():
    kept = shared_plan(UPPER_HALF)
    again = shared_plan(f"{UPPER_HALF}\ntrain: {{cache_frozen_activations: false}}")

    assert kept.techniques.cache_frozen_activations is True and not again.techniques.cache_frozen_activations
    assert kept.step_s < 0.9 * again.step_s
    why = kept.reasons["train.cache_frozen_activations"]
    assert "once, in 3.0 epochs: about" in why and re.search(r"less for [\d.]+ MiB of memory", why)


LONG = [900] * 8000  # 15 GiB of hidden states in fp32
KEEPS = "train.cache_frozen_activations"


def kept_plan(text=UPPER_HALF, **node):
    """The plan of a job whose kept states take more than a tenth of the memory."""
    spec = parse_job("model: {model_name_or_path: m}\ndata: {train: a.jsonl" + text, Path()).spec
    work, _, _ = workload.describe(spec, SMOL, LONG, 24_000, 1, {})
    here = NodeCapability("here", 4, 24 * GIB, (OLD_CPU,), **node)
    return planner.make_plan(spec, work, ClusterCapability((here,)), 1024, HELD_OUT, {})


def test_what_memory_does_not_hold_is_kept_on_a_disk_that_is_faster_than_computing():
    made = kept_plan(disk_read_bytes_per_s=1e9, disk_write_bytes_per_s=1e9, disk_free_bytes=100 * GIB)

    assert made.techniques.cache_frozen_activations == "disk"
    assert re.search(r"less for 15\.4 GiB of the disk's free 100\.0 GiB", made.reasons[KEEPS])
    assert Plan.from_json(made.to_json()).techniques == made.techniques


@pytest.mark.parametrize(
    "node",
    [
        {"disk_read_bytes_per_s": 1e5, "disk_write_bytes_per_s": 1e5, "disk_free_bytes": 100 * GIB},
        {"disk_read_bytes_per_s": 1e9, "disk_write_bytes_per_s": 1e9, "disk_free_bytes": 15 * GIB},
        {"disk_read_bytes_per_s": 1e9, "disk_write_bytes_per_s": 1e9},
        {"disk_free_bytes": 100 * GIB},
    ],
    ids=["slow", "too little free", "free space unknown", "speed unknown"],
)
def test_on_a_disk_that_is_slow_full_or_unknown_nothing_is_kept(node):
    made = kept_plan(**node)

    assert not made.techniques.cache_frozen_activations
    assert "in a tenth of the memory or half of the free disk" in made.reasons[KEEPS]


def test_a_disk_that_the_job_asks_for_is_taken_or_refused_with_what_it_lacks():
    stated = f"{UPPER_HALF}\ntrain: {{cache_frozen_activations: disk}}"
    assert kept_plan(stated).techniques.cache_frozen_activations == "disk"

    with pytest.raises(NothingFits, match=r"7\.7 GiB of the node's disk, has 5\.0 GiB usable: half of what is free"):
        kept_plan(stated, disk_free_bytes=10 * GIB)


def test_on_a_gpu_results_of_frozen_layers_are_kept_where_the_job_says_so():
    made = shared_plan(f"{UPPER_HALF}\ntrain: {{cache_frozen_activations: true}}", AMPERE)

    assert made.techniques.cache_frozen_activations is True
    assert made.nodes[0].device == AMPERE.name


@pytest.mark.parametrize(
    ("text", "device", "why"),
    [
        (f"{UPPER_HALF}\ntrain: {{num_train_epochs: 1}}", OLD_CPU, "no sample is seen twice"),
        ("}\nmethod: {type: lora}", OLD_CPU, "trains from the first layer on"),
        (UPPER_HALF, AMPERE, "true keeps it in the host's memory"),
    ],
)
def test_frozen_layers_are_passed_again_with_the_reason(text, device, why):
    made = shared_plan(text, device)

    assert not made.techniques.cache_frozen_activations
    assert why in made.reasons["train.cache_frozen_activations"]
