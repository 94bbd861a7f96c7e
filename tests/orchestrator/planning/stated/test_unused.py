"""Stated keys that nothing looks at are an error or are named."""

from pathlib import Path

import pytest

from clusters.capability import ClusterCapability
from orchestrator.errors import JobError
from orchestrator.job.job_file import parse_job
from orchestrator.planning import planner
from orchestrator.planning.evaluation import HeldOutCounts
from orchestrator.planning.stated import unused
from orchestrator.planning.workload import describe
from tests.orchestrator.planning.machines import TINY, machine

GPU, TWO_GPUS, CPU = machine("a", "RTX 3090"), machine("b", "RTX 3090", "RTX 3090"), machine("c")
HELD_OUT = "data: {train: a.jsonl, eval: b.jsonl}\n"


def spec_of(text):
    data = "" if "data:" in text else "data: {train: a.jsonl}\n"
    model = "" if "model:" in text else "model: {model_name_or_path: m}\n"
    return parse_job(f"{model}{data}{text}", Path()).spec


def planned(text, node):
    spec, cluster = spec_of(text), ClusterCapability((node,))
    slots = len(planner.slots_of(spec, cluster))
    work, _, _ = describe(spec, TINY, [128] * 160, 160 * 64, slots)
    held_out = HeldOutCounts(20, 20 * 128, 30, 20, False) if spec.data.eval else None
    return spec, planner.make_plan(spec, work, cluster, 512, held_out, {}), work, cluster


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("model: {model_name_or_path: m, model_revision: v2}\n", "model.model_revision is v2, and m does not come"),
        ("eval: {num_samples: 5}\n", "eval.num_samples needs held-out rows"),
        ("eval: {max_rows: 50}\n", "eval.max_rows needs held-out rows"),
        ("eval: {max_new_tokens: 50}\n", "eval.max_new_tokens needs held-out rows"),
        (f"{HELD_OUT}eval: {{metrics: [], max_rows: 50}}\n", r"eval.max_rows is stated, and eval.metrics is \[\]"),
    ],
)
def test_what_the_job_itself_rules_out_is_a_mistake(text, says):
    with pytest.raises(JobError, match=says):
        raise JobError(unused.job_mistakes(spec_of(text), is_local_model=True))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "eval: {max_new_tokens: auto}\n",
        f"{HELD_OUT}eval: {{metrics: [exact_match], max_rows: 50, num_samples: 1, max_new_tokens: 9}}\n",
        "train: {optim: lion_32bit, adam_beta1: 0.8}\n",
        "train: {optim: muon, adam_beta1: 0.8, adam_epsilon: 1e-7}\n",
        "train: {adam_beta1: 0.8}\n",
    ],
)
def test_what_is_used_is_none(text):
    assert unused.job_mistakes(spec_of(text), is_local_model=True) == [] == unused.job_notices(spec_of(text))


def test_a_revision_of_a_model_on_the_hub_is_used():
    spec = spec_of("model: {model_name_or_path: org/m, model_revision: v2}\n")

    assert unused.job_mistakes(spec, is_local_model=False) == []


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("train: {optim: sgd, adam_beta1: 0.8}\n", "train.adam_beta1 is 0.8, and sgd does not use it"),
        ("train: {optim: lion_32bit, adam_epsilon: 1e-7}\n", "train.adam_epsilon is 1e-07, and lion_32bit does not"),
        ("train: {optim: schedule_free_sgd, adam_beta2: 0.9}\n", "schedule_free_sgd does not use it"),
        ("eval: {before: false}\n", "eval.before is not used: there are no held-out rows"),
        ("cluster: {wait_for_slots: 3}\n", "cluster.wait_for_slots is 3, and cluster.address is local"),
        ("tracking: {report_to: [wandb], mlflow_uri: 'http://m:5000'}\n", "tracking.mlflow_uri is not used"),
        ("tracking: {report_to: [], experiment: shop}\n", "tracking.experiment is not used"),
    ],
)
def test_what_changes_nothing_is_named(text, says):
    (notice,) = unused.job_notices(spec_of(text))

    assert says in notice


def test_slots_of_machines_that_the_job_may_be_sent_to_are_waited_for():
    assert unused.job_notices(spec_of("cluster: {wait_for_slots: 3}\n"), is_for_here=False) == []


@pytest.mark.parametrize(
    ("text", "node", "says"),
    [
        ("strategy: {mode: ddp, deepspeed: {steps_per_print: 5}}\n", TWO_GPUS, "strategy.deepspeed is not used"),
        ("strategy: {nvme_path: /fast, offload: none}\n", GPU, "strategy.nvme_path is /fast, and this plan offloads"),
        (
            f"{HELD_OUT}eval: {{eval_steps: 5000, early_stopping_patience: 2}}\n",
            GPU,
            "eval.early_stopping_patience compares .* eval.eval_steps 5000 is more than its 30 steps",
        ),
        (
            f"{HELD_OUT}eval: {{eval_steps: 5000}}\ncheckpoint: {{load_best_model_at_end: true}}\n",
            GPU,
            "checkpoint.load_best_model_at_end compares",
        ),
    ],
)
def test_what_the_job_cannot_get_is_a_mistake(text, node, says):
    spec, plan, _, _ = planned(text, node)

    with pytest.raises(JobError, match=says):
        raise JobError(unused.plan_mistakes(spec, plan))


@pytest.mark.parametrize(
    ("text", "node", "says"),
    [
        ("strategy: {deepspeed: {steps_per_print: 5}}\n", GPU, "strategy.deepspeed is not used"),
        ("strategy: {nvme_path: /fast}\n", GPU, "strategy.nvme_path is /fast"),
        ("strategy: {local_steps: 4}\n", GPU, "strategy.local_steps is 4: several workers train apart"),
        ("strategy: {local_steps: 4, mode: single}\n", TWO_GPUS, "strategy.local_steps is 4: several workers"),
        ("strategy: {sync_dtype: bfloat16}\n", GPU, "strategy.sync_dtype is not used"),
        ("strategy: {shares: planned}\n", CPU, "strategy.shares is not used"),
        ("cost: {nodes: {pc: {per_hour: 1}, '*': {load_w: 90}}}\n", CPU, "cost.nodes: pc is no machine's name here"),
        (
            "data: {train: a.jsonl, packing: true}\ntrain: {global_batch_size: 64, gradient_accumulation_steps: 16}\n"
            "cluster: {num_workers: 1}\nmethod: {type: lora}\n",
            TWO_GPUS,
            "train.gradient_accumulation_steps is 16, and packed rows hold several samples each: a step of 64",
        ),
    ],
)
def test_what_the_plan_has_no_use_for_is_named(text, node, says):
    spec, plan, work, cluster = planned(text, node)

    assert unused.plan_mistakes(spec, plan) == []
    (notice,) = unused.plan_notices(spec, plan, work, cluster)
    assert says in notice


@pytest.mark.parametrize(
    ("text", "node"),
    [
        ("strategy: {local_steps: 4, mode: ddp}\n", TWO_GPUS),
        ("strategy: {local_steps: 4, local_steps_merge: product, local_steps_reset: true}\n", GPU),
        ("strategy: {mode: zero2, deepspeed: {steps_per_print: 5}, sync_dtype: bfloat16, shares: planned}\n", TWO_GPUS),
        (f"{HELD_OUT}eval: {{eval_steps: 30, early_stopping_patience: 2}}\n", GPU),
        ("cost: {nodes: {a: {per_hour: 1}}}\n", GPU),
        ("data: {train: a.jsonl, packing: false}\ntrain: {gradient_accumulation_steps: 4}\n", GPU),
    ],
)
def test_a_plan_that_uses_what_is_stated_says_nothing(text, node):
    spec, plan, work, cluster = planned(text, node)

    assert unused.plan_mistakes(spec, plan) == [] == unused.plan_notices(spec, plan, work, cluster)
