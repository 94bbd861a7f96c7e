"""Stages of a pipeline while it runs: what nodes hold, who stands by with what, which stage is slow.  Pure."""

from dataclasses import replace

import pytest

from clusters.capability import ClusterCapability, Link
from orchestrator.lifecycle.stages.node_layers import with_held_layers
from orchestrator.lifecycle.stages.slow import NUM_STEPS, find_slow_stage, with_measured_pace
from orchestrator.lifecycle.stages.spare import FREE, stages_by_loss, with_spares
from orchestrator.planning.explain import IDLE
from orchestrator.planning.plan import Plan
from orchestrator.runs.events import StepReport
from tests.orchestrator.planning.machines import MIDDLE, machine
from tests.orchestrator.planning.test_choice import plan

PIPELINE = "strategy: {mode: pipeline}\n"
BIG, SMALL_CARD = machine("big", "RTX 3090"), machine("small", "RTX 3060 12GB")
BOX, TINY_BOX = machine("box"), machine("tiny", memory_gib=4)
RATE = 118e6


PLANS: dict[tuple[str, ...], Plan] = {}


def pipeline(*nodes):
    names = tuple(node.name for node in nodes)
    if names not in PLANS:
        PLANS[names] = plan(MIDDLE, *nodes, text=PIPELINE, link_bytes_per_s=RATE)
    return PLANS[names]


def cluster_of(*nodes):
    names = [node.name for node in nodes]
    links = [Link((a, b), RATE, 3e-4) for i, a in enumerate(names) for b in names[i + 1 :]]
    return ClusterCapability(nodes, tuple(links))


def layers(made):
    return {
        part.node: (part.techniques.stage.first_layer, part.techniques.stage.end_layer)
        for part in made.nodes
        if part.techniques.stage
    }


# Which layers a node has.


def test_nodes_hold_the_layers_that_they_train_or_stand_by_with():
    made = with_spares(pipeline(BIG, SMALL_CARD, BOX), cluster_of(BIG, SMALL_CARD, BOX), MIDDLE)

    held = {node.name: node.held_layers for node in with_held_layers(cluster_of(BIG, SMALL_CARD, BOX), made).nodes}

    assert held == {name: (own,) for name, own in layers(made).items()} | {"box": (layers(made)["big"],)}


def test_a_plan_without_stages_leaves_nobody_with_layers():
    before = with_held_layers(cluster_of(BIG, SMALL_CARD), pipeline(BIG, SMALL_CARD))

    after = with_held_layers(before, plan(MIDDLE, BIG))

    assert [node.held_layers for node in after.nodes] == [(), ()]


def test_what_nodes_hold_survives_a_file():
    cluster = with_held_layers(cluster_of(BIG, SMALL_CARD), pipeline(BIG, SMALL_CARD))

    assert ClusterCapability.from_dict(cluster.as_dict()) == cluster


def test_planned_again_with_the_same_machines_every_layer_stays():
    """The best cut is a little faster than the one that is there, by less than a twentieth."""
    best = pipeline(BIG, SMALL_CARD)
    moved = tuple(with_more_layers(part, 1 if part.node == "big" else -1) for part in best.nodes)
    nodes = with_held_layers(cluster_of(BIG, SMALL_CARD), replace(best, nodes=moved)).nodes

    again = plan(MIDDLE, *nodes, text=PIPELINE, link_bytes_per_s=RATE)

    assert layers(again) == layers(replace(best, nodes=moved)) != layers(best)
    assert best.step_s < again.step_s < 1.05 * best.step_s


def with_more_layers(part, more):
    """So many layers more, at the border between two stages."""
    stage = part.techniques.stage
    border = {"end_layer": stage.end_layer + more} if stage.is_first else {"first_layer": stage.first_layer - more}
    return replace(part, techniques=replace(part.techniques, stage=replace(stage, **border)))


# Who stands by.


def test_a_node_without_a_stage_stands_by_with_the_one_whose_loss_would_hurt_most():
    made = with_spares(pipeline(BIG, SMALL_CARD, BOX), cluster_of(BIG, SMALL_CARD, BOX), MIDDLE)

    (spare,) = [one for one in made.beside if one.does == "stands by"]
    most = max(layers(made).values(), key=lambda own: own[1] - own[0])
    assert (spare.node, spare.stage.first_layer, spare.stage.end_layer) == ("box", *most)
    assert made.left_out["box"].endswith(f". It stands by with layers {most[0]} to {most[1] - 1}")
    per_layer = (4096 * (2 * 4096 + 2 * 1024) + 3 * 4096 * 14336) * 2  # bytes of 16 bits: attention and MLP
    assert spare.num_bytes / per_layer == pytest.approx(most[1] - most[0], abs=3)  # and the output matrix
    assert Plan.from_json(made.to_json()) == made
    assert made.hash == pipeline(BIG, SMALL_CARD, BOX).hash


def test_two_nodes_stand_by_with_two_stages():
    nodes = (BIG, SMALL_CARD, BOX, replace(BOX, name="other"))

    made = with_spares(pipeline(*nodes), cluster_of(*nodes), MIDDLE)

    assert sorted(made.stands_by) == ["box", "other"]
    assert len(set(made.stands_by.values())) == 2


def test_a_node_without_room_for_a_stage_is_left_alone():
    nodes = (BIG, SMALL_CARD, TINY_BOX)
    made = pipeline(*nodes)

    assert with_spares(made, cluster_of(*nodes), MIDDLE) == made
    assert "stands by" not in made.left_out["tiny"]


def test_nobody_stands_by_for_a_plan_without_stages():
    made = plan(MIDDLE, BIG, BOX)

    assert "box" in made.left_out
    assert with_spares(made, cluster_of(BIG, BOX), MIDDLE) == made


def test_a_node_that_evaluates_the_base_model_does_both():
    made = pipeline(BIG, SMALL_CARD, BOX)
    assert f"It {IDLE}" == FREE
    busy = replace(made, left_out={"box": "it is slow. It evaluates the base model meanwhile"})

    text = with_spares(busy, cluster_of(BIG, SMALL_CARD, BOX), MIDDLE).left_out["box"]

    assert text.startswith("it is slow. It evaluates the base model meanwhile and stands by with layers ")


def test_layers_that_another_node_has_too_are_no_loss():
    made = pipeline(BIG, SMALL_CARD)
    again = [replace(part, node=f"second {part.node}") for part in made.nodes]

    assert len(stages_by_loss(made)) == 2
    assert stages_by_loss(replace(made, nodes=(*made.nodes, *again))) == []


# Slow stages.


def reports(made, slower, count=NUM_STEPS, tokens=None, **changes):
    """Steps in which each stage computes so many times as long as planned."""
    tokens = tokens or made.tokens_per_s * made.step_s
    scale = tokens / (made.tokens_per_s * made.step_s)
    busy_s = [scale * (part.time.step_s - part.time.update_s) * slower.get(part.node, 1.0) for part in made.nodes]
    zeros = dict.fromkeys(("epoch", "loss", "grad_norm", "learning_rate", "supervised_tokens", "peak_bytes"), 0.0)
    values = {"tokens": tokens, "seconds": 2 * max(busy_s), "tokens_per_s": 0.0, "stage_busy_s": busy_s} | changes
    return [StepReport(step=step, **zeros, **values) for step in range(1, count + 1)]


def test_a_stage_that_takes_longer_in_three_steps_is_slow():
    made = pipeline(BIG, SMALL_CARD)

    pace = find_slow_stage(made, reports(made, {"small": 1.5}))

    assert made.nodes[pace.slowest].node == "small"
    assert [round(ratio, 6) for ratio in pace.ratios] == [1.5 if part.node == "small" else 1.0 for part in made.nodes]
    slowest = max(part.time.step_s - part.time.update_s for part in made.nodes)
    of_small = 1.5 * next(part.time.step_s - part.time.update_s for part in made.nodes if part.node == "small")
    assert pace.step_s == pytest.approx(made.step_s - slowest + of_small)


def test_a_step_that_was_measured_shorter_counts():
    made = pipeline(BIG, SMALL_CARD)

    assert find_slow_stage(made, reports(made, {"small": 1.5}, seconds=0.1)).step_s == pytest.approx(0.1)


def test_the_last_step_of_an_epoch_has_fewer_tokens():
    made = pipeline(BIG, SMALL_CARD)
    fewer = reports(made, {"small": 1.5}, tokens=100.0)

    assert find_slow_stage(made, fewer).ratios == pytest.approx(
        find_slow_stage(made, reports(made, {"small": 1.5})).ratios
    )
    assert find_slow_stage(made, reports(made, {}, tokens=100.0)) is None


@pytest.mark.parametrize(
    "why",
    {
        "as planned": {},
        "within 15 %": {"small": 1.14},
        "one that others need not wait for": {"small": 0.2, "big": 0.3},
    }.items(),
    ids=lambda pair: pair[0],
)
def test_a_pace_about_as_planned_is_none(why):
    made = pipeline(BIG, SMALL_CARD)

    assert find_slow_stage(made, reports(made, why[1])) is None


def test_two_slow_steps_and_one_as_planned_are_not_enough():
    made = pipeline(BIG, SMALL_CARD)
    steps = reports(made, {"small": 2.0}, count=2)

    assert find_slow_stage(made, steps) is None
    assert find_slow_stage(made, [*steps, *reports(made, {}, count=1)]) is None
    assert find_slow_stage(made, [*reports(made, {}, count=1), *reports(made, {"small": 2.0})]) is not None


def test_of_several_pipelines_each_stage_is_measured_by_its_own_tokens():
    """Shares have followed the slow stage: its pipeline has two thirds of the planned tokens, in the planned time."""
    text = "strategy: {mode: pipeline, pipeline: {replicas: 2, stages: 2}}\n"
    nodes = [machine(name, "RTX 3060 12GB") for name in "abcd"]
    made = plan(MIDDLE, *nodes, text=text, link_bytes_per_s=RATE)
    assert made.replica_of == (0, 0, 1, 1)
    slow, tokens = made.nodes[3].node, made.tokens_per_s * made.step_s
    own = [tokens * (2 / 3 if number == 0 else 1 / 3) for number in made.replica_of]
    busy_s = [
        (part.time.step_s - part.time.update_s) * count / (part.share * tokens)
        for part, count in zip(made.nodes, own, strict=True)
    ]
    busy_s[3] *= 2

    pace = find_slow_stage(made, reports(made, {}, worker_tokens=own, stage_busy_s=busy_s))

    assert made.nodes[pace.slowest].node == slow
    assert pace.ratios == pytest.approx([1.0, 1.0, 1.0, 2.0])
    assert find_slow_stage(made, reports(made, {}, worker_tokens=[tokens / 2] * 4)) is None


def test_layers_of_two_pipelines_have_two_holders_and_nobody_stands_by():
    text = "strategy: {mode: pipeline, pipeline: {replicas: 2, stages: 2}}\n"
    nodes = [*(machine(name, "RTX 3060 12GB") for name in "abcd"), machine("box", cores=2)]
    made = plan(MIDDLE, *nodes, text=text, link_bytes_per_s=RATE)

    assert "box" in made.left_out
    assert with_spares(made, cluster_of(*nodes), MIDDLE) == made


def test_two_pipelines_planned_again_keep_their_machines_and_layers():
    text = "strategy: {mode: pipeline, pipeline: {replicas: 2, stages: 2}}\n"
    nodes = [machine(name, "RTX 3060 12GB") for name in "abcd"]
    best = plan(MIDDLE, *nodes, text=text, link_bytes_per_s=RATE)
    swapped = {"b": "c", "c": "b"}  # a stays with the first layers of its pipeline, the others change
    other = replace(best, nodes=tuple(replace(part, node=swapped.get(part.node, part.node)) for part in best.nodes))

    again = plan(MIDDLE, *with_held_layers(cluster_of(*nodes), other).nodes, text=text, link_bytes_per_s=RATE)

    assert layers(again) == layers(other) != layers(best)


def test_steps_without_seconds_of_stages_say_nothing():
    made = pipeline(BIG, SMALL_CARD)

    assert find_slow_stage(made, reports(made, {}, stage_busy_s=None)) is None
    assert find_slow_stage(plan(MIDDLE, BIG), reports(made, {"small": 2.0})) is None


def test_machines_are_planned_with_at_the_pace_that_was_measured():
    """Twice as slow on one of two equal cards: it is given fewer layers, and the step is shorter than without."""
    nodes = BIG, machine("twin", "RTX 3090")
    made = pipeline(*nodes)
    ratios = [2.0 if part.node == "twin" else 1.0 for part in made.nodes]

    slowed = with_measured_pace(cluster_of(*nodes), made, ratios)
    again = plan(MIDDLE, *slowed.nodes, text=PIPELINE, link_bytes_per_s=RATE)

    def count(which, name):
        first, end = layers(which)[name]
        return end - first

    assert count(again, "twin") < count(made, "twin")
    measured = find_slow_stage(made, reports(made, {"twin": 2.0}, seconds=10 * made.step_s))
    assert again.step_s < measured.step_s / 1.1
    assert with_measured_pace(slowed, made, ratios).nodes[1].devices[0].calibration == {made.techniques.dtype: 4.0}
    assert not slowed.nodes[1].cpu.calibration
