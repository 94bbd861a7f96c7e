"""Refusals are true: what is needed is more than what is there, and every remedy makes the job fit."""

import random
import re
from dataclasses import replace
from pathlib import Path

import pytest

from clusters.capability import ClusterCapability
from clusters.hardware import datasheet
from orchestrator.errors import JobError, NothingFits
from orchestrator.job.job_file import parse_job
from orchestrator.planning.planner import accepts, make_plan
from orchestrator.planning.remedies import PlanInputs, find_remedies
from orchestrator.planning.workload import describe
from strategies.shape import ModelShape
from tests.orchestrator.planning.machines import LARGE, MIDDLE, SMALL, llama, machine

GPT = ModelShape.from_config(
    {"model_type": "gpt2", "n_embd": 1600, "n_layer": 48, "n_head": 25, "n_positions": 8192, "vocab_size": 50257}
)
MODELS = (SMALL, llama(3072, 28, 24, 8, 8192, tied=True), GPT, MIDDLE, llama(5120, 40, 40, 40, 13824, 32000), LARGE)
NODES = {"RTX 3090": 1, "RTX 4060": 1, "RTX 3060 12GB": 2, "RTX 2060 6GB": 1, "RTX A4000": 4, "GTX 1080 Ti": 2}
OPEN_JOBS = ("", "method: {type: lora}", "method: {type: qlora}", "method: {type: full}", "goal: {full_rank: true}")
STATED_JOBS = (
    "method: {type: lora}\nstrategy: {offload: none}\ntrain: {gradient_checkpointing: false}",
    "train: {per_device_train_batch_size: 16, loss_type: nll}\nmethod: {type: qlora}",
    "train: {per_device_train_batch_size: 8, gradient_accumulation_steps: 2}\nmodel: {model_name_or_path: m, dtype:"
    " float32}",
    "cluster: {num_workers: 1}\nmethod: {type: lora}\nstrategy: {offload: none}",
    "strategy: {mode: ddp}\nmethod: {type: full}\ntrain: {optim: adamw_torch_fused}",
)
NEEDS_HAS = re.compile(r"needs? ([\d.]+) (\w+).*?has ([\d.]+) (\w+)")
UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def inputs_of(text, shape, node, max_length, longest=None):
    parts = [text, f"data: {{train: a.jsonl, max_length: {max_length}}}"]
    parts += [] if "model:" in text else ["model: {model_name_or_path: m}"]
    spec = parse_job("\n".join(parts), Path()).spec
    lengths = [longest or max_length] * 400
    work, _, _ = describe(spec, shape, lengths, sum(lengths) // 2, max(1, len(node.gpus)))
    return PlanInputs(spec, work, ClusterCapability((node,)), max_length)


def plan(inputs):
    return make_plan(inputs.spec, inputs.workload, inputs.cluster, inputs.max_length, None, {})


def refusal(inputs):
    with pytest.raises(NothingFits) as caught:
        plan(inputs)
    return str(caught.value)


def instances(count, seed):
    chance = random.Random(seed)
    cards = [card.name for card in datasheet.CARDS]
    for _ in range(count):
        some = [chance.choice(cards)] * chance.choice((1, 1, 2)) if chance.random() < 0.9 else []
        node = machine("a", *some, memory_gib=chance.choice((16, 32, 64)))
        job = chance.choice(OPEN_JOBS + STATED_JOBS)
        length = chance.choice((512, 1024, 2048, 4096, 8192))
        yield inputs_of(job, chance.choice(MODELS), node, length, chance.choice((length, length // 2)))


def check(inputs):
    """The refusal's text against itself, and its remedies against the planner; how many there were."""
    try:
        plan(inputs)
    except JobError:  # a contradiction of the job, whatever the memory
        return None
    except NothingFits as error:
        told = str(error)
        for needs, unit, has, other in NEEDS_HAS.findall(told):
            assert float(needs) * UNITS[unit] > float(has) * UNITS[other], told
        remedies = find_remedies(inputs, accepts)
        assert len(remedies) <= 3 and all(remedy.text in told for remedy in remedies), told
        for remedy in remedies:
            assert plan(remedy.inputs).num_steps, remedy.text
        return len(remedies)
    return None


@pytest.mark.parametrize(
    ("count", "seed"), [(10, 1), pytest.param(200, 2, marks=pytest.mark.slow)], ids=["some", "hundreds"]
)
def test_every_refusal_is_true_and_every_remedy_is_accepted(count, seed):
    found = [number for inputs in instances(count, seed) if (number := check(inputs)) is not None]

    assert len(found) > count / 6  # so many jobs were refused
    assert sum(map(bool, found)) > 0.5 * len(found)  # and most of these have a remedy


def test_stages_of_few_rows_are_found_where_those_of_many_do_not_fit():
    """70B in nf4 on two cards of 24 GB, of which nothing else makes use; what the remedy of a longer job promises."""
    made = plan(inputs_of("", LARGE, machine("a", "Titan RTX", "Titan RTX", memory_gib=16), 704))

    assert made.pipelines and made.techniques.per_device_train_batch_size == 1


@pytest.mark.parametrize(
    ("shape", "card", "length", "longest", "text", "remedy"),
    [
        (
            MIDDLE,
            "RTX 3080 10GB",
            16384,
            8192,
            "method: {type: qlora}\nstrategy: {offload: none}",
            "strategy.offload: auto",
        ),
        (
            SMALL,
            "RTX 2060 6GB",
            4096,
            4096,
            "method: {type: lora}\nstrategy: {offload: none}\ntrain: {gradient_checkpointing: false}",
            "train.gradient_checkpointing: auto",
        ),
        (
            MIDDLE,
            "RTX 3060 12GB",
            4096,
            4096,
            "method: {type: qlora}\ntrain: {per_device_train_batch_size: 16}",
            "train.per_device_train_batch_size: auto and train.global_batch_size: 16",
        ),
        (
            MIDDLE,
            "RTX 3060 12GB",
            2048,
            2048,
            "method: {type: lora}\nstrategy: {offload: none}",
            r"method: \{type: qlora\}",
        ),
        (LARGE, "RTX 4090", 2048, 2048, "", r"3 more RTX 4090 in a"),  # a quarter of the layers on each
        (LARGE, "RTX 4090", 2048, 2048, "strategy: {mode: single}", r"a card of (48|80) GiB, such as .*, in a"),
    ],
)
def test_the_change_that_changes_least_comes_first(shape, card, length, longest, text, remedy):
    told = refusal(inputs_of(text, shape, machine("a", card, memory_gib=16), length, longest))

    assert re.match(remedy, told.rpartition("It would fit with: ")[2].split("; or ")[0]), told


def test_the_length_that_is_proposed_is_the_greatest_that_fits():
    job = "method: {type: qlora}\nstrategy: {offload: none}"
    inputs = inputs_of(job, MIDDLE, machine("a", "RTX 3080 10GB"), 16384)

    length = int(re.search(r"max_length: (\d+)", refusal(inputs))[1])

    def longer(by):
        return inputs_of(job, MIDDLE, machine("a", "RTX 3080 10GB"), length + by)

    assert plan(longer(0)).techniques.max_length == length
    assert "usable" in refusal(longer(64))


def test_a_length_that_cuts_no_sample_says_so():
    job = "method: {type: qlora}\nstrategy: {offload: none}\ntrain: {per_device_train_batch_size: 1, loss_type: nll}"
    inputs = inputs_of(job, MIDDLE, machine("a", "RTX 3080 10GB"), 16384, longest=1024)
    inputs = replace(inputs, workload=replace(inputs.workload, fullest_step_tokens=64 * 1024))  # rows are packed

    told = refusal(inputs.with_values({"data.packing": True}))

    assert re.search(r"data\.max_length: \d+ instead of 16384, which cuts no sample", told)


def test_of_several_methods_the_one_in_few_bits_is_what_a_gpu_lacks_memory_for():
    told = refusal(inputs_of("", LARGE, machine("a", "RTX 4090", memory_gib=16), 2048))

    assert re.match(r"qlora.* on a \(RTX 4090\): needs", told) and "lora with parameters" not in told


def test_what_rules_four_bits_out_stands_beside_the_nearest_miss():
    experts = ModelShape.from_config(
        {
            "model_type": "mixtral", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
            "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 32000, "num_local_experts": 8,
            "num_experts_per_tok": 2,
        }
    )  # fmt: skip

    told = refusal(inputs_of("", experts, machine("a", "RTX 4090", memory_gib=16), 2048))

    assert "qlora on a (RTX 4090): experts are stacked tensors" in told
    assert re.search(r"\nlora with \w+ offload on a \(RTX 4090\): needs", told)


def test_machines_of_one_reason_share_a_line():
    node = machine("a", "RTX 3060 12GB", memory_gib=16)
    inputs = inputs_of("method: {type: full}\nstrategy: {mode: single}", LARGE, node, 2048)
    cluster = ClusterCapability(tuple(replace(node, name=f"n{number}") for number in range(6)))

    told = refusal(replace(inputs, cluster=cluster))

    assert "n2 (RTX 3060 12GB) and 3 more: needs" in told and told.count("needs") == 1


def test_another_devices_count_is_proposed_where_more_of_them_hold_the_job():
    inputs = inputs_of("method: {type: lora}", LARGE, machine("a", "A100 80GB", memory_gib=2000), 2048)
    inputs = inputs.with_values({"strategy.offload": "none"})

    assert "3 more A100" in refusal(inputs) or "1 more A100" in refusal(inputs)
