"""What a search knows before its first trial: the space, the plan of every point, the sample of the data."""

import statistics
from dataclasses import replace
from pathlib import Path

import pytest

from clusters.capability import ClusterCapability
from orchestrator.errors import JobError, NothingFits
from orchestrator.job.job_file import parse_job, spec_with, text_with
from orchestrator.job.space import canonical, key_of, phrase, space_of
from orchestrator.lifecycle.prepare import Sizes
from orchestrator.planning import planner
from orchestrator.search.advice import Planning, advise, by_kind, plan_for
from orchestrator.search.study import read_study
from orchestrator.search.subset import representative
from strategies.shape import ModelShape
from tests.orchestrator.planning.test_choice import MIDDLE, SMALL, machine

CONFIG = {"max_position_embeddings": 4096}


def spec_of(text=""):
    return parse_job(
        f"model: {{model_name_or_path: m}}\ndata: {{train: a.jsonl, max_length: 1024}}\n{text}", Path()
    ).spec


def space_for(text="", *nodes):
    spec = spec_of(text)
    cluster = ClusterCapability(nodes or (machine("pc", "RTX 3060"),))
    return spec, space_of(spec, [slot.device for slot in planner.slots_of(spec, cluster)], 16)


def planning(spec, shape=SMALL, *nodes):
    sizes = Sizes([400] * 320, 64000, None)
    cluster = ClusterCapability(nodes or (machine("pc", "RTX 3060"),))
    return Planning(spec, CONFIG, shape, cluster, sizes, sizes, 16)


def test_the_open_optimizations_are_the_space_and_what_the_job_states_is_not():
    _, space = space_for("method: {type: lora, lora_r: 4}\ntrain: {gradient_checkpointing: true}\n")

    assert "train.gradient_checkpointing" not in space.choices and "method.lora_r" not in space.choices
    assert space.choices["data.packing"] == (True, False)
    assert set(space.choices["model.dtype"]) == {"float32", "bfloat16", "float16"}


def test_a_rank_is_a_knob_of_methods_that_have_one():
    _, space = space_for("search: {space: {method.type: [full, lora], method.lora_r: [8, 64]}}\n")

    points = [canonical(point) for point in space.points()]

    assert points == [{"method.type": "full"}] + [{"method.type": "lora", "method.lora_r": r} for r in (8, 64)]


@pytest.mark.parametrize(
    ("space", "says"),
    [
        ("{train.learning_rat: [1]}", "did you mean train.learning_rate"),
        ("{learning_rate: [1]}", "write it with its section"),
        ("{train.learning_rate: [-1.0]}", "it should be greater than 0"),
        ("{train.learning_rate: {loguniform: [1e-3, 1e-4]}}", "range is empty"),
        ("{train.seed: [1, 2]}", "must be the same in every trial"),
        ("{cluster.address: [a]}", "must be the same in every trial"),
        ("{objective.type: [dpo, ipo]}", "must be the same in every trial"),
        ("{model.model_name_or_path: [a, b]}", "must be the same in every trial"),
        ("{data.completion_only_loss: [true, false]}", "must be the same in every trial"),
        ("{strategy.local_steps: [2, 8]}", "must be the same in every trial"),
        ("{eval.temperature: [0.0, 1.0]}", "must be the same in every trial"),
        ("{data.max_length: {randint: [64, 512]}}", "list its values"),
        ("{method.lora_r: [0]}", "it should be greater than or equal to 1"),
        ("{model.dtype: [int4]}", "it should be"),
    ],
)
def test_a_space_that_cannot_be_says_which_key_and_why(space, says):
    with pytest.raises(JobError, match=r"search\.space") as error:
        space_for(f"search: {{space: {space}}}\n")

    assert says in str(error.value)


def test_an_empty_list_is_refused_by_the_job_file():
    with pytest.raises(JobError, match=r"search\.space"):
        spec_of("search: {space: {model.dtype: []}}\n")


def test_every_combination_is_planned_and_the_impossible_are_counted_by_reason():
    spec, space = space_for("search: {space: {method.type: [lora, full], data.packing: [true, false]}}\n")

    advised = advise(planning(spec, MIDDLE), space)  # 8B in full needs 128 GB

    assert {advice.point["method.type"] for advice in advised.worth} <= {"lora"} or not advised.worth
    assert sum(advised.impossible.values()) >= 2
    assert any("needs" in reason for reason in advised.impossible)


def test_a_space_without_a_feasible_point_names_the_constraint():
    spec, space = space_for("search: {space: {method.type: [full], model.dtype: [float32, bfloat16]}}\n")

    with pytest.raises(NothingFits, match=r"1 of 2|2 of 2") as error:
        advise(planning(spec, MIDDLE), space)

    assert "needs" in str(error.value)


def test_what_another_point_beats_clearly_in_the_same_training_is_not_tried():
    spec, space = space_for(
        "method: {type: lora}\nsearch: {space: {train.gradient_checkpointing: [true, false],"
        " train.per_device_train_batch_size: [1, 8], data.packing: [false]}}\n"
    )

    advised = advise(planning(spec), space)

    worth = [advice.point for advice in advised.worth]
    assert len(worth) + len(advised.dominated) == 4
    for lost in advised.dominated:
        better = [a for a in advised.worth if a.costs[0] * 1.35 < lost.costs[0] and a.costs[1] <= lost.costs[1]]
        assert better
    assert worth[0]["train.gradient_checkpointing"] is False


def test_the_first_to_try_is_the_best_by_the_goal():
    values = "{train.gradient_checkpointing: [true, false], method.type: [lora, qlora]}"
    for prefer, cost in (("time", lambda a: a.costs[0]), ("memory", lambda a: a.costs[1])):
        spec, space = space_for(f"search: {{space: {values}}}\ngoal: {{prefer: {prefer}}}\n")
        advised = advise(planning(spec), space)

        assert cost(advised.worth[0]) == min(map(cost, advised.worth))


def test_a_trial_is_planned_on_one_device_with_the_real_batch():
    spec, space = space_for("", machine("big", "RTX 3090", "RTX 3090"))
    node = machine("big", "RTX 3090", "RTX 3090")

    plan = planning(spec, SMALL, node).trial(next(space.points()), node)

    assert plan.num_workers == 1
    assert (plan.num_steps, plan.global_batch_size) == (spec.search.trial_steps, 16)


def test_a_trial_of_a_job_that_keeps_its_best_weights_or_stops_early_is_planned_without():
    node = machine("pc", "RTX 3060")
    spec = spec_of("eval: {early_stopping_patience: 2}\ncheckpoint: {load_best_model_at_end: true}\n")

    plan = planning(spec, SMALL, node).trial({}, node)

    assert plan.eval_steps is None and not plan.load_best_model_at_end


def test_rows_and_accumulation_make_the_batch_in_every_point():
    node = machine("two", "RTX 3060", "RTX 3060")
    rows, steps = "train.per_device_train_batch_size", "train.gradient_accumulation_steps"
    spec, space = space_for(f"search: {{space: {{{rows}: [4, 8, 16], {steps}: [1, 2, 3, 4]}}}}\n", node)
    advised = advise(planning(spec, SMALL, node), space)

    found = {(one.point[rows], one.point[steps]) for one in [*advised.worth, *advised.dominated]}
    assert found and all(16 % (one * several) == 0 for one, several in found)
    assert all(planning(spec, SMALL, node).trial(one.point, node).global_batch_size == 16 for one in advised.worth)


def test_a_trial_has_a_plan_for_whichever_kind_of_card_it_is_given():
    node = machine("two", "RTX 3060 12GB", "RTX 3090")
    spec, space = space_for("", node)
    plans = [planning(spec, SMALL, node).trial(next(space.points()), one) for one in by_kind(node)]
    like = machine("like", "RTX 3090", "RTX 3090")

    assert [plan_for(plans, [gpu]).nodes[0].device for gpu in node.gpus] == ["RTX 3060 12GB", "RTX 3090"]
    assert plans[0].step_s > plans[1].step_s  # each is held against its own prediction
    assert plan_for(plans, []) is plans[0]
    assert by_kind(like) == [like]


def test_a_sample_has_the_lengths_of_the_whole():
    lengths = [10] * 500 + [100] * 400 + [1000] * 100

    rows = representative(lengths, 100, seed=3)

    assert len(set(rows)) == 100
    assert statistics.mean(lengths[row] for row in rows) == pytest.approx(statistics.mean(lengths), rel=0.03)
    assert rows == representative(lengths, 100, seed=3) != representative(lengths, 100, seed=4)
    assert representative([5, 6], 9, seed=0) == [0, 1]


def test_the_shipped_study_is_one_factor_at_a_time():
    named = read_study("default", spec_of(), [])

    baseline = named[0][1]
    changed = {name: [key for key, value in point.items() if baseline.get(key) != value] for name, point in named[1:]}
    assert changed["bf16"] == ["model.dtype"] and changed["rank 64"] == ["method.lora_r"]
    assert len(changed["QLoRA, checkpointing, 8-bit optimizer (QLoRA paper)"]) > 3
    assert len(read_study("default", spec_of(), [256, 512])) == 2 * len(named)


def test_a_study_with_a_wrong_key_is_refused(tmp_path):
    (tmp_path / "mine.yaml").write_text("baseline: {train.optimm: x}\n")

    with pytest.raises(JobError, match=r"did you mean train\.optim"):
        read_study(str(tmp_path / "mine.yaml"), spec_of(), [])
    with pytest.raises(JobError, match="no such study"):
        read_study("defualt", spec_of(), [])
    (tmp_path / "mine.yaml").write_text("baseline: {model.model_name_or_path: x}\n")
    with pytest.raises(JobError, match="must be the same in every trial"):
        read_study(str(tmp_path / "mine.yaml"), spec_of(), [])


def test_another_method_keeps_the_knobs_both_have_in_spec_and_text():
    text = "model: {model_name_or_path: m}\ndata: {train: a}\nmethod: {type: lora, lora_r: 4}\n"
    job = parse_job(text, Path())

    assert spec_with(job.spec, {"method.type": "qlora"}).method.lora_r == 4
    assert spec_with(job.spec, {"method.type": "full"}).method.type == "full"
    again = parse_job(text_with(job, {"method.type": "full", "model.dtype": "float32"}), Path())
    assert again.spec == spec_with(job.spec, {"method.type": "full", "model.dtype": "float32"})


def test_a_job_that_is_written_elsewhere_keeps_its_files_and_its_names(tmp_path):
    (tmp_path / "a.jsonl").write_text("{}")
    text = "model: {model_name_or_path: org/model}\ndata: {train: [a.jsonl, {path: a.jsonl}], eval: {split: 0.1}}\n"

    again = parse_job(text_with(parse_job(text, tmp_path), {}), Path("/elsewhere")).spec

    assert again.model.model_name_or_path == "org/model"
    first, second = again.data.train
    assert first == second.path == str(tmp_path / "a.jsonl")


def test_shorter_samples_have_fewer_supervised_tokens_too():
    cut = Sizes([100, 300], 200, None).cut(100)

    assert (list(cut.lengths), cut.num_supervised) == ([100, 100], 100)


def test_equal_points_have_one_name():
    assert key_of({"method.type": "full", "method.lora_r": 8}) == key_of({"method.type": "full"})
    assert phrase({"model.dtype": "bfloat16", "data.packing": True, "train.learning_rate": 1e-4}) == (
        "bfloat16, packing, learning_rate 0.0001"
    )


TOY = ModelShape.from_config(
    {
        "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 4, "intermediate_size": 128,
        "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 512,
    }
)  # fmt: skip


def cpu_box(cores=8):
    """A machine without GPUs."""
    node = machine("box")
    return replace(node, num_cores=cores)


def test_trials_share_a_cpu_where_that_does_more_of_them():
    """A step of a tiny model is mostly operations, which take as long on one core as on eight."""
    node = cpu_box()
    found = planning(spec_of("train: {max_steps: 8}"), TOY, node)
    found.num_trials = 12

    count, gain = found.workers_on(node)

    assert count in (2, 4) and gain >= 1.1
    assert found.trial({}, node).threads_per_worker == 8 // count
    assert [slot.threads for slot in found.slots([node])] == [8 // count] * count


@pytest.mark.parametrize(
    ("text", "compares"), [("", True), ("cluster: {num_workers: 1}", False), ("train: {threads: 8}", False)]
)
def test_trials_have_the_cpu_for_themselves_where_times_count_or_the_job_says_so(text, compares):
    node = cpu_box()
    found = planning(spec_of(text), TOY, node)
    found.compares_times = compares

    assert found.workers_on(node) == (1, 1.0)
    assert found.trial({}, node).threads_per_worker == 8 and len(found.slots([node])) == 1


def test_trials_of_as_many_workers_as_are_stated_have_a_part_of_the_cpu_each():
    node = cpu_box()
    found = planning(spec_of("cluster: {num_workers: 2}"), SMALL, node)

    assert found.workers_on(node) == (2, 1.0)
    assert found.trial({}, node).threads_per_worker == 4
    assert [slot.threads for slot in found.slots([node])] == [4, 4]


def test_a_machine_with_gpus_takes_a_trial_a_gpu():
    node = machine("pc", "RTX 3060")
    found = planning(spec_of(), SMALL, node)

    assert found.workers_on(node) == (1, 1.0) and len(found.slots([node])) == 1


def test_a_machine_without_slots_takes_no_part_of_a_search_s_planning():
    """A cluster's head, for one, that offers none."""
    head, card = replace(cpu_box(), num_slots=0), machine("pc", "RTX 3060")
    found = planning(spec_of("cluster: {address: auto}"), SMALL, head, card)

    assert found.workers_on(head) == (1, 1.0)
    assert found.trial({}, head).num_workers == 1
    assert [slot.node.name for slot in found.slots([head, card])] == ["pc"]


def test_a_point_that_needs_the_whole_memory_keeps_trials_one_at_a_time():
    node = cpu_box(2)
    found = planning(spec_of("method: {type: lora}"), TOY, node)
    found.num_trials, found.points = 4, [{}, {"method.lora_r": 4}]
    assert found.workers_on(node)[0] == 2
    real = found._step_s
    found._workers.clear()
    found._step_s = lambda point, node, count: None if point and count > 1 else real(point, node, count)

    assert found.workers_on(node) == (1, 1.0)


def test_the_last_trial_has_the_whole_machine():
    node = cpu_box(2)
    found = planning(spec_of(), TOY, node)
    found.num_trials = 1

    assert found.workers_on(node) == (1, 1.0)
