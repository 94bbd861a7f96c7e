"""Several pipelines beside each other in a plan: when, on what, with which shares, and what is refused."""

import itertools
import json
import time

import pytest

from clusters.capability import ClusterCapability, Link
from orchestrator.errors import JobError, NothingFits
from orchestrator.planning.evaluation import HeldOutCounts
from orchestrator.planning.plan import Plan, settings_of
from orchestrator.runs.worker_stats import stages_of_run, timelines
from strategies.cost.pipeline import WORTH_A_DEVICE
from tests.orchestrator.planning.machines import MIDDLE, SMALL, machine
from tests.orchestrator.planning.test_pipelines import ETHERNET, HOME_LAB, QWEN, WITHOUT_BOX, lab, plan

TWO = "strategy: {mode: pipeline, pipeline: {replicas: 2}}"
FEW_GRADIENTS = "method: {type: lora, lora_r: 2, target_modules: [q_proj, v_proj]}\n"


def pairs(inside_mbit, between_mbit, cards=("RTX 3060 12GB",) * 4):
    """Machines a and b, c and d, with one rate in each pair and another one between them; hosts of little memory."""
    nodes = [machine(name, card, memory_gib=8) for name, card in zip("abcd", cards, strict=True)]
    links = [
        Link((one, other), ETHERNET * 1e6 / 8 * (inside_mbit if one + other in ("ab", "cd") else between_mbit), 3e-4)
        for one, other in itertools.combinations("abcd", 2)
    ]
    return ClusterCapability(tuple(nodes), tuple(links))


def pipelines_of(made):
    """The machines of each pipeline."""
    return [[part.node for part in made.nodes if part.replica == number] for number in range(len(made.pipelines))]


def assert_holds_together(made, num_layers):
    assert made.replica_of == tuple(sorted(made.replica_of)), "each pipeline's workers follow each other"
    shares = []
    for number, run in enumerate(made.pipelines):
        parts = [part for part in made.nodes if part.replica == number]
        stages = [part.techniques.stage for part in parts]
        assert [stage.index for stage in stages] == list(range(len(stages)))
        assert {stage.count for stage in stages} == {len(stages)} == {len(run.passes)}
        assert [stages[0].first_layer, stages[-1].end_layer] == [0, num_layers]
        assert all(one.end_layer == other.first_layer for one, other in itertools.pairwise(stages))
        assert len({(stage.ahead, stage.wire) for stage in stages}) == 1
        assert len({part.share for part in parts}) == 1
        assert all(part.memory.total_bytes <= part.memory_usable_bytes for part in parts)
        shares.append(parts[0].share)
    assert sum(shares) == pytest.approx(1.0)
    assert shares == sorted(shares, reverse=True)
    layouts = {
        (t.packing, t.per_device_train_batch_size, t.max_length, t.optim)
        for t in (part.techniques for part in made.nodes)
    }
    assert len(layouts) == 1


def test_stated_pipelines_over_unequal_devices_hold_together_and_share_by_speed():
    made = plan(QWEN["14B"], pairs(1000, 1000, ("RTX 3090", "RTX 3060 12GB", "RTX 3060 12GB", "RTX 3060 12GB")), TWO)

    assert len(made.pipelines) == 2
    assert_holds_together(made, 48)
    fast, slow = (run.simulation.step_s for run in made.pipelines)
    assert made.nodes[0].share > 0.5 > made.nodes[-1].share
    assert fast == pytest.approx(slow, rel=0.15), "they end together, up to a micro-batch"
    assert max(fast, slow) < made.step_s < 1.2 * max(fast, slow)
    assert Plan.from_json(made.to_json()) == made
    assert made.backend == "gloo"


def test_what_is_trained_saved_and_computed_is_that_of_one_copy():
    same = "method: {type: lora}\ntrain: {global_batch_size: 64, gradient_checkpointing: true}\n"
    two, one = (plan(MIDDLE, pairs(1000, 1000), same + text) for text in (TWO, ONE))

    assert len(two.pipelines) == 2
    assert two.num_trainable_parameters == one.num_trainable_parameters
    assert two.checkpoint_bytes == one.checkpoint_bytes
    assert two.flops_per_token == pytest.approx(one.flops_per_token)


ONE = "strategy: {mode: pipeline, pipeline: {replicas: 1}}"


def test_one_device_may_hold_all_layers_beside_a_pipeline():
    """A 24 GB card has the 4-bit weights of a 14B alone; two small ones have them together."""
    made = plan(QWEN["14B"], lab(1000, WITHOUT_BOX), f"method: {{type: qlora}}\n{TWO}")

    assert_holds_together(made, 48)
    assert sorted(map(len, pipelines_of(made))) == [1, 2]
    alone = next(run for run in made.pipelines if len(run.passes) == 1)
    assert alone.boundaries == ()


def test_auto_makes_a_pipeline_of_each_pair_where_links_between_them_are_slow():
    """Hidden states of four stages would cross 100 Mbit/s; of two pipelines only the few gradients do."""
    cluster = pairs(10_000, 100)

    made, one = (plan(MIDDLE, cluster, FEW_GRADIENTS + text) for text in ("", "strategy: {pipeline: {replicas: 1}}"))

    assert sorted(map(sorted, pipelines_of(made))) == [["a", "b"], ["c", "d"]]
    assert_holds_together(made, 32)
    assert made.step_s < WORTH_A_DEVICE * one.step_s
    assert made.reasons["strategy.mode"] == "2 pipelines of 2 and 2 stages: nothing else fits"
    assert made.reasons["strategy.pipeline.replicas"].startswith("2: a step takes ")
    assert made.reasons["strategy.pipeline.stages"].count("50% of the samples, a micro-batch: layers 0 to ") == 2
    assert any("stages on" in other.what and "pipelines" not in other.what for other in made.alternatives)


def test_holders_of_a_layer_stand_where_links_are_fast_when_gradients_are_what_is_sent_most():
    made = plan(MIDDLE, pairs(10_000, 100), "method: {type: lora, lora_r: 64}\n" + TWO)

    assert all({*one} not in ({"a", "b"}, {"c", "d"}) for one in pipelines_of(made))
    assert_holds_together(made, 32)


def test_auto_keeps_one_pipeline_where_several_gain_nothing():
    made, two = (plan(MIDDLE, pairs(1000, 1000), f"method: {{type: lora}}\n{text}") for text in ("", TWO))

    assert len(made.pipelines) == 1
    assert made.step_s < two.step_s
    assert made.reasons["strategy.pipeline.replicas"].startswith("1: several beside each other")


@pytest.mark.parametrize(("name", "count"), [("14B", 2), ("32B", 1), ("72B", 1)])
def test_the_home_lab_has_a_second_pipeline_where_the_cpu_box_holds_a_whole_model(name, count):
    """LoRA of the 14B is about as fast as QLoRA, and expected to be better; the CPU takes a thirtieth of its tokens."""
    made = plan(QWEN[name], HOME_LAB)

    assert len(made.pipelines) == count
    assert [part.node for part in made.nodes if part.techniques.stage and part.techniques.stage.count == 1] == (
        ["cpu-box"] if count == 2 else []
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("strategy: {mode: pipeline, pipeline: {replicas: 2, stages: 2}}", [2, 2]),
        ("cluster: {num_workers: 4}\nstrategy: {mode: pipeline, pipeline: {stages: 2}}", [2, 2]),
        ("cluster: {num_workers: 3}\nstrategy: {mode: pipeline, pipeline: {replicas: 2}}", [1, 2]),
        ("strategy: {mode: pipeline, pipeline: {replicas: 3}}", [1, 1, 2]),
    ],
)
def test_what_the_job_states_of_pipelines_is_kept(text, expected):
    made = plan(SMALL, pairs(1000, 1000), f"method: {{type: lora}}\n{text}")

    assert sorted(map(len, pipelines_of(made))) == expected
    assert_holds_together(made, 16)
    shown = settings_of(made)
    assert shown["strategy.pipeline.replicas"] == len(expected)
    assert shown["cluster.num_workers"] == sum(expected)


def test_stages_that_differ_are_shown_as_a_sum():
    made = plan(SMALL, pairs(1000, 1000), "cluster: {num_workers: 3}\nmethod: {type: lora}\n" + TWO)

    assert settings_of(made)["strategy.pipeline.stages"] in ("1 + 2", "2 + 1")
    assert {part.share_text.split(", ")[1] for part in made.nodes} == {f"{part.share:.0%}" for part in made.nodes}


def test_each_pipeline_has_its_rows_and_its_part_of_the_picture():
    made = plan(MIDDLE, pairs(1000, 1000), f"method: {{type: lora}}\n{TWO}")

    rows, (predicted, _) = stages_of_run(made, []), timelines(made, [])

    assert [row.place for row in rows] == ["0.0", "0.1", "1.0", "1.1"]
    assert [(one.replica, one.stage) for one in predicted] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert [row.predicted_busy_s for row in rows] == [
        pytest.approx(part.time.step_s - part.time.update_s) for part in made.nodes
    ]


def test_gradients_cost_a_sum_and_what_was_stated_of_it_is_kept():
    text = "strategy: {mode: pipeline, sync_dtype: bfloat16, pipeline: {replicas: 2}}"
    made = plan(MIDDLE, pairs(100, 100), f"method: {{type: lora}}\n{text}")

    assert made.sync.dtype == "bfloat16"
    assert list(made.sync.options) == ["all-reduce float32", "all-reduce bfloat16"]
    longest_s = max(run.simulation.step_s for run in made.pipelines)
    assert made.step_s > longest_s + 0.5 * made.sync.options["all-reduce float32"]


def test_answers_are_generated_by_all_pipelines_at_once():
    held_out = HeldOutCounts(200, 200 * 512, 100, 200, False)
    text = f"{FEW_GRADIENTS}eval: {{max_rows: 200, max_new_tokens: 64}}\n"

    def evaluation_s(strategy):
        made = plan(MIDDLE, pairs(10_000, 10_000), text + strategy, held_out)
        share = (2 + min(node.techniques.gradient_checkpointing for node in made.nodes)) * made.tokens_per_s
        num_losses = 2 + made.num_steps // made.eval_steps
        return made.phases.evaluation_s - num_losses * held_out.num_tokens / share  # without the held-out losses

    one, two = (
        evaluation_s(f"strategy: {{mode: pipeline, pipeline: {{replicas: {count}, stages: 2}}}}") for count in (1, 2)
    )

    assert two == pytest.approx(one / 2, rel=0.2)


def test_a_plan_of_an_earlier_program_has_its_only_pipeline():
    made = plan(MIDDLE, pairs(1000, 1000), f"method: {{type: lora}}\n{ONE}")
    values = json.loads(made.to_json())
    earlier = {key: value for key, value in values.items() if key != "pipelines"} | {"pipeline": values["pipelines"][0]}

    assert Plan.from_json(json.dumps(earlier)) == made
    assert "pipelines" not in json.loads(plan(SMALL, lab(1000, ["pc"])).to_json())


def test_planning_several_pipelines_takes_about_a_second_of_computing():
    cards = ("RTX 4090", "RTX 3090", "RTX 3080", "RTX 3060 12GB", "RTX 2080 Ti", "RTX 3070")
    nodes = tuple(machine(f"m{number}", card, memory_gib=16) for number, card in enumerate(cards))
    begin = time.process_time()

    made = plan(QWEN["14B"], ClusterCapability(nodes), f"method: {{type: qlora}}\n{TWO}")

    assert time.process_time() - begin < 15  # 1 to 2 on a core of its own
    assert_holds_together(made, 48)


REFUSED = {
    "more devices than there are": (
        "pipeline: {replicas: 2, stages: 3}",
        "strategy.pipeline.replicas is 2 with 3 stages each: that takes 6 devices, and 4 devices can train; lower one",
    ),
    "a copy on each": (
        "pipeline: {replicas: 4}",
        "strategy.pipeline.replicas is 4: one of them at least has two devices, and 4 devices can train; lower it to 3,"
        " or set strategy.mode to ddp",
    ),
    "workers that are no product": (
        "pipeline: {replicas: 2, stages: 2}}\ncluster: {num_workers: 3",
        "strategy.pipeline.replicas is 2 with 2 stages each, and cluster.num_workers 3; set one of them to auto",
    ),
    "too few workers": (
        "pipeline: {replicas: 3}}\ncluster: {num_workers: 3",
        "strategy.pipeline.replicas is 3, and cluster.num_workers 3: one of them at least has two devices; lower it",
    ),
    "fewer samples than pipelines": (
        "pipeline: {replicas: 3}}\ntrain: {global_batch_size: 2",
        "strategy.pipeline.replicas is 3, and a step has 2 samples; lower it, or raise train.global_batch_size",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("mode", ["pipeline", "auto"])
def test_pipelines_that_cannot_be_are_refused_with_what_to_do(name, mode):
    text, sentence = REFUSED[name]
    with pytest.raises(JobError) as caught:
        plan(MIDDLE, HOME_LAB, f"strategy: {{mode: {mode}, {text}}}")

    assert sentence in str(caught.value)


def test_two_copies_that_do_not_fit_are_refused_by_their_number():
    with pytest.raises(NothingFits) as caught:
        plan(MIDDLE, pairs(1000, 1000, ("RTX 3060 12GB",) * 2 + ("RTX 3050 Laptop 4GB",) * 2), LORA_TWICE)

    assert "no cut of the model's 32 layers fits these devices as stages of 2 pipelines" in str(caught.value)
    assert "It would fit with: strategy.pipeline: {replicas: auto}" in str(caught.value)


LORA_TWICE = "method: {type: lora}\nstrategy: {mode: pipeline, offload: none, pipeline: {replicas: 2}}"
