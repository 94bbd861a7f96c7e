"""The eval section's `auto` values, each with its reason."""

import math
import re
from dataclasses import replace
from pathlib import Path

import pytest

from clusters.capability import ClusterCapability, Link
from clusters.units import GIB
from orchestrator.errors import JobError, NothingFits
from orchestrator.job.job_file import parse_job
from orchestrator.job.sections.training import DataSection, EvalSection, ModelSection
from orchestrator.job.spec import JobSpec
from orchestrator.planning.evaluation import (
    HeldOutCounts,
    WholeJobs,
    cache_usable_bytes,
    phases_of,
    resolve_eval_steps,
    resolve_max_new_tokens,
    resolve_metrics,
)
from orchestrator.planning.planner import make_plan
from orchestrator.planning.workload import describe
from strategies.contract import MemoryEstimate
from strategies.cost.phases import saving_s
from tests.orchestrator.planning.machines import MIDDLE, SMALL, candidate, machine

ROWS = HeldOutCounts(num_samples=80, num_tokens=5000, longest_answer=40, num_references=80, is_classification=False)
NO_ROWS = "there are no held-out rows"


def spec(**section):
    return JobSpec(
        model=ModelSection(model_name_or_path="m"), data=DataSection(train="a.jsonl"), eval=EvalSection(**section)
    )


@pytest.mark.parametrize(
    ("section", "rows", "steps", "reason"),
    [
        ({}, ROWS, 38, "4 times over the run, at most a tenth of its time"),
        ({}, replace(ROWS, num_tokens=20_000), 75, "2 times over the run, at most a tenth of its time"),
        ({}, replace(ROWS, num_tokens=10**6), None, "held-out rows cost over a tenth of the training"),
        ({"eval_steps": 7}, ROWS, 7, None),
        ({"eval_steps": None}, ROWS, None, None),
        ({}, None, None, NO_ROWS),
    ],
)
def test_steps_between_held_out_losses(section, rows, steps, reason):
    work, _, _ = describe(spec(), SMALL, [100] * 800, 40_000, 1)  # 150 steps, 240,000 tokens

    found, why = resolve_eval_steps(spec(**section), work, rows)

    assert found == steps
    assert why is None if reason is None else reason in why


@pytest.mark.parametrize(
    ("section", "rows", "tokens", "reason"),
    [
        ({}, ROWS, 50, "the longest held-out answer has 40 tokens; a quarter more, 512 at most"),
        ({}, replace(ROWS, longest_answer=2), 16, "has 2 tokens"),
        ({}, replace(ROWS, longest_answer=2000), 512, "has 2000 tokens"),
        ({"max_new_tokens": 9}, ROWS, 9, None),
        ({"max_new_tokens": 9}, None, 9, NO_ROWS),
        ({}, None, 16, NO_ROWS),
    ],
)
def test_the_longest_generated_answer(section, rows, tokens, reason):
    found, why = resolve_max_new_tokens(spec(**section), rows)

    assert found == tokens
    assert why is None if reason is None else reason in why


@pytest.mark.parametrize(
    ("section", "rows", "metrics", "reason"),
    [
        ({}, ROWS, ("exact_match",), "the answers are short"),
        ({}, replace(ROWS, longest_answer=97), ("rouge_l",), "the answers are long texts"),
        ({}, replace(ROWS, is_classification=True), ("accuracy", "macro_f1"), "the rows are labels"),
        ({}, replace(ROWS, num_references=0), (), "the held-out rows have no answers to compare with"),
        ({"metrics": ["bleu"]}, ROWS, ("bleu",), None),
        ({"metrics": []}, None, (), NO_ROWS),
        ({}, None, (), NO_ROWS),
    ],
)
def test_metrics_of_generated_answers(section, rows, metrics, reason):
    assert resolve_metrics(spec(**section), rows) == (metrics, reason)


def test_what_needs_held_out_rows_says_how_to_give_them():
    for resolve, section in ((resolve_metrics, {"metrics": ["bleu"]}), (resolve_eval_steps, {"eval_steps": 5})):
        arguments = (spec(**section), None, None) if resolve is resolve_eval_steps else (spec(**section), None)
        with pytest.raises(JobError, match=r"needs held-out rows; add data.eval, e.g. data.eval: {split: 0.05}"):
            resolve(*arguments)


@pytest.mark.parametrize(("usable", "free"), [(10 * GIB, GIB), (3.5 * GIB, 0.5 * GIB), (2 * GIB, 0.0), (None, GIB)])
def test_generation_uses_what_training_leaves_beside_the_weights(usable, free):
    memory = MemoryEstimate(2 * GIB, 3 * GIB, 3 * GIB, 0, 0, framework_bytes=GIB)

    assert cache_usable_bytes(memory, usable) == free


def test_evaluation_generation_start_and_saving_are_part_of_how_long():
    text = "eval: {max_new_tokens: 64, metrics: [rouge_l], eval_steps: null}\n"

    whole, without = make(text), make("", held_out=None)
    after = make(text.replace("{", "{before: false, "))

    assert whole.whole_s == pytest.approx(sum(whole.phases.parts.values())) and whole.total_s == without.total_s
    assert whole.phases.evaluation_s == pytest.approx(2 * after.phases.evaluation_s)  # base and trained model
    assert after.phases.evaluation_s > 64 * 0.001 and without.phases.evaluation_s == 0
    assert min(whole.phases.start_s, whole.phases.saving_s, whole.phases.preparation_s) > 0
    assert whole.price.electricity / without.price.electricity == pytest.approx(whole.whole_s / without.whole_s)


def test_a_limit_between_the_training_and_the_whole_job_is_not_kept():
    text = "eval: {max_new_tokens: 64, metrics: [rouge_l], eval_steps: null}\ngoal: {%s: %s}\n"
    whole = make(text % ("prefer", "time"))
    of_training = whole.total_s / whole.whole_s

    assert of_training < 0.9
    for limit, value in (("max_hours", whole.whole_s / 3600), ("max_cost", whole.price.total)):
        with pytest.raises(
            NothingFits, match=rf"goal.{limit} is .* the best that fits .* as a whole job \(.*evaluation"
        ):
            make(text % (limit, value * (of_training + 1) / 2))
        assert make(text % (limit, 1.001 * value)).whole_s == whole.whole_s


def test_no_preflight_takes_no_time():
    assert make("strategy: {preflight: false}\n").phases.preflight_s == 0


def stages(text="", samples=1600):
    nodes = machine("a", "RTX 3090"), machine("b", "RTX 3060 12GB")
    job = parse_job(f"model: {{model_name_or_path: m}}\ndata: {{train: a.jsonl}}\n{text}", Path()).spec
    work, _, _ = describe(job, MIDDLE, [512] * samples, 256 * samples, 1)
    return make_plan(job, work, ClusterCapability(nodes, (Link(("a", "b"), 118e6, 3e-4),)), 2048, None, {})


PIPELINE = "strategy: {mode: pipeline}\n"


def test_stages_save_after_about_two_minutes_of_work():
    made = stages(PIPELINE)

    assert 110 < made.save_steps * made.step_s < 130
    assert made.save_steps < made.num_steps / 5
    assert re.fullmatch(
        r"a lost stage takes all back to the last checkpoint of .* MiB: (1 min 5\d s|2 min.*) of work between two",
        made.reasons["checkpoint.save_steps"],
    )


def test_stages_of_a_short_run_save_five_times_like_any_other():
    made = stages(PIPELINE, samples=80)

    assert made.save_steps == math.ceil(made.num_steps / 5)
    assert made.reasons["checkpoint.save_steps"].startswith("five checkpoints of ")


def test_checkpoints_that_take_long_to_write_are_fewer():
    """All weights and their moments: a tenth of the time goes into writing them, and not more."""
    text = "method: {type: full}\nmodel: {model_name_or_path: m}\n" + PIPELINE
    nodes = machine("a", *["A100 SXM 80GB"], memory_gib=256), machine("b", "A100 SXM 80GB", memory_gib=256)
    job = parse_job(f"data: {{train: a.jsonl}}\n{text}", Path()).spec
    work, _, _ = describe(job, MIDDLE, [512] * 100_000, 256 * 100_000, 1)
    made = make_plan(job, work, ClusterCapability(nodes, (Link(("a", "b"), 1e9, 3e-4),)), 2048, None, {})

    assert made.save_steps * made.step_s > 120
    assert saving_s(made.checkpoint_bytes) == pytest.approx(0.1 * made.save_steps * made.step_s, rel=0.05)


def test_what_the_job_states_holds_for_stages_too():
    made = stages(f"{PIPELINE}checkpoint: {{save_steps: 7}}\n")

    assert made.save_steps == 7
    assert "checkpoint.save_steps" not in made.reasons


def make(text, held_out=ROWS):
    card = machine("pc", "RTX 3060 12GB", load_w=300.0, purchase_price=300.0)
    job = parse_job(f"model: {{model_name_or_path: m}}\ndata: {{train: a.jsonl}}\n{text}", Path()).spec
    work, _, _ = describe(job, SMALL, [100] * 800, 40_000, 1)
    return make_plan(job, work, ClusterCapability((card,)), 512, held_out, {})


def test_a_tokenizer_is_stated_for_metrics_that_count_tokens():
    make("eval: {tokenizer: char, metrics: [bleu]}\n")

    with pytest.raises(JobError, match=r"eval\.tokenizer is char, and no metric here counts tokens \(exact_match\)"):
        make("eval: {tokenizer: char, metrics: [exact_match]}\n")
    with pytest.raises(JobError, match=r"eval\.tokenizer needs held-out rows"):
        make("eval: {tokenizer: char}\n", held_out=None)


def test_how_answers_are_drawn_is_stated_where_some_are():
    make("eval: {temperature: 0.7, top_p: 0.9, metrics: [bleu]}\n")

    with pytest.raises(JobError, match=r"eval\.top_p is 0\.9, and the likeliest token is always taken"):
        make("eval: {top_p: 0.9, metrics: [bleu]}\n")
    with pytest.raises(JobError, match=r"eval\.temperature is 0\.7, and no answers are generated"):
        make("eval: {temperature: 0.7, metrics: []}\n")
    with pytest.raises(JobError, match=r"eval\.temperature needs held-out rows"):
        make("eval: {temperature: 0.7}\n", held_out=None)


def test_machines_answer_their_shares_of_the_prompts_at_once():
    text = "eval: {max_new_tokens: 64, max_rows: 80, metrics: [rouge_l], eval_steps: null}\n"
    job = parse_job(f"model: {{model_name_or_path: m}}\ndata: {{train: a.jsonl}}\n{text}", Path()).spec
    work, _, _ = describe(job, SMALL, [100] * 800, 40_000, 1)
    one = candidate(node=machine("a", "RTX 3090"))
    slow = replace(one.placed[0], slot=candidate(node=machine("c")).placed[0].slot)

    def evaluation_s(share):
        parts = replace(one.placed[0], share=1 - share), replace(slow, share=share)
        return phases_of(job, replace(one, placed=parts), work, ROWS).evaluation_s

    alone = phases_of(job, replace(one, placed=(slow,)), work, ROWS).evaluation_s
    assert evaluation_s(0.05) < 0.3 * evaluation_s(0.5) < 0.3 * alone


@pytest.mark.parametrize("card", ["RTX 3090", "RTX 3060 12GB"])
def test_a_machine_beside_never_makes_the_whole_job_longer(card):
    text = "eval: {max_rows: 200, max_new_tokens: 512, metrics: [rouge_l], eval_steps: null, before: false}\n"
    rows = HeldOutCounts(200, 20_000, 400, 200, False)
    job = parse_job(f"model: {{model_name_or_path: m}}\ndata: {{train: a.jsonl}}\n{text}", Path()).spec
    work, _, _ = describe(job, SMALL, [300] * 1600, 1600 * 128, 1)
    gpu, slow = machine("a", card), machine("b", cores=8)
    links = (Link(("a", "b"), 1.2e9, 1e-4),)

    alone = make_plan(job, work, ClusterCapability((gpu,)), 512, rows, {})
    beside = make_plan(job, work, ClusterCapability((gpu, slow), links), 512, rows, {})

    assert beside.whole_s <= alone.whole_s + 0.15 * (alone.total_s + alone.phases.evaluation_s)


def test_each_candidate_s_phases_are_computed_once():
    work, _, _ = describe(spec(), SMALL, [100] * 800, 40_000, 1)
    jobs, one = WholeJobs(spec(), work, ROWS, {}), candidate()

    assert jobs.phases(one) is jobs.phases(one)
    assert jobs.phases(replace(one, sync_s=1.0)).training_s == one.total_s + one.num_steps


def test_the_order_of_the_machines_changes_no_phase():
    work, _, _ = describe(spec(), SMALL, [100] * 800, 40_000, 1)
    gpu, cpu = (candidate(step_s, node=machine(*of)) for step_s, of in ((1.0, ("a", "RTX 3090")), (4.0, ("c",))))
    saved = replace(gpu.placed[0].plan, techniques=replace(gpu.placed[0].plan.techniques, gradient_checkpointing=True))
    parts = replace(gpu.placed[0], share=0.8, plan=saved), replace(cpu.placed[0], share=0.2)

    one, other = (
        phases_of(spec(), replace(gpu, placed=placed), work, ROWS) for placed in (parts, tuple(reversed(parts)))
    )

    assert one == other
    assert one.start_s > phases_of(spec(), replace(cpu, placed=parts[1:]), work, ROWS).start_s  # a GPU's context
    assert one.preflight_s == phases_of(spec(), replace(cpu, placed=parts[1:]), work, ROWS).preflight_s
