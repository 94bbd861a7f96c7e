"""Which trials may share a base model, and how many at a time.  Nothing is trained."""

from dataclasses import replace
from pathlib import Path

import pytest

from clusters.capability import ClusterCapability
from orchestrator.job.job_file import Job
from orchestrator.job.space import Space
from orchestrator.lifecycle.prepare import Sizes
from orchestrator.planning.memory_fit import needed_bytes
from orchestrator.runs.search_folder import Samples
from orchestrator.search.advice import Planning
from orchestrator.search.sharing import MOST_PLACES, Share, has_place, places_of, share_of, why_none_share
from strategies.multi_lora.memory import estimate_together
from tests.orchestrator.planning.test_choice import SMALL, machine
from tests.orchestrator.search.test_before_trials import CONFIG, spec_of

POINT = {
    "method.type": "lora",
    "model.dtype": "bfloat16",
    "data.packing": True,
    "data.max_length": 1024,
    "train.gradient_checkpointing": False,
    "train.per_device_train_batch_size": 4,
}
SAMPLES = {str(n): Samples(model="model", train="train", train_rows=[0], eval_rows=[0]) for n in (512, 1024)}


def share(**changes):
    """Of a point with some keys at other values; steps of 8 rows of 40 tokens."""
    spec, node, sizes = spec_of(), machine("pc", "RTX 3060"), Sizes([40] * 320, 6400, None)
    planning = Planning(spec, CONFIG, SMALL, ClusterCapability((node,)), sizes, sizes, 8)
    point = POINT | {key.replace("__", "."): value for key, value in changes.items()}
    return share_of(Job(spec, Path(), ""), planning, SAMPLES, point, [planning.trial(point, node)])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("method__lora_r", 4),
        ("method__lora_alpha", 64),
        ("method__lora_dropout", 0.1),
        ("method__use_rslora", True),
        ("method__init_lora_weights", "gaussian"),
        ("train__learning_rate", 1e-3),
        ("train__weight_decay", 0.1),
        ("train__lr_scheduler_type", "cosine"),
        ("train__max_grad_norm", 0.0),
    ],
)
def test_what_changes_no_layout_is_shared(key, value):
    assert share(**{key: value}).key == share().key


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model__dtype", "float16"),
        ("train__gradient_checkpointing", True),
        ("train__per_device_train_batch_size", 8),
        ("data__max_length", 512),
        ("method__type", "qlora"),
    ],
)
def test_what_changes_the_layout_is_another_base(key, value):
    other = share(**{key: value})

    assert isinstance(other, Share) and other.key != share().key


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"data__packing": False}, "its rows are padded"),
        ({"method__use_dora": True}, "use_dora is more than pairs"),
        ({"method__type": "full"}, "trains weights of the base model itself"),
        (
            {"train__per_device_train_batch_size": 1, "data__max_length": 512},
            "a row of 512 tokens does not hold the steps of two trials, of 320 each",
        ),
    ],
)
def test_what_cannot_share_says_why(changes, why):
    assert why in share(**changes)


def test_as_many_trials_have_a_place_as_fill_a_row():
    one = replace(share(), most=3, usable_bytes=None)

    assert places_of([one] * 5)[0] == 3 and places_of([replace(one, most=99)] * 20)[0] == MOST_PLACES
    assert has_place(one, [one, one]) and not has_place(one, [one, one, one])


def test_as_many_trials_have_a_place_as_fit_by_prediction():
    small, large = share(method__lora_r=4), share(method__lora_r=256)
    needed = needed_bytes(estimate_together([large.memory, small.memory], small.device), "cuda")
    small, large = (replace(one, usable_bytes=needed) for one in (small, large))

    assert has_place(large, [small]) and not has_place(large, [large])
    places, memory = places_of([small, large, large])
    assert places == 1 and memory.weights_bytes == pytest.approx(large.memory.estimate.weights_bytes)


@pytest.mark.parametrize(
    ("goal", "space", "why"),
    [
        ("time", {"method.lora_r": (4, 8), "train.learning_rate": (1e-4, 1e-3)}, None),
        ("time", {"method.lora_r": (4, 8), "data.packing": (True,)}, None),  # of one value nothing is compared
        ("time", {"method.lora_r": (4, 8), "data.packing": (True, False)}, "times of data.packing can be compared"),
        ("cost", {"model.dtype": ("float32", "bfloat16")}, "goal.prefer is cost"),
        ("memory", {"data.packing": (True, False)}, None),
    ],
)
def test_where_times_are_compared_trials_compute_by_themselves(goal, space, why):
    found = why_none_share(spec_of(f"goal: {{prefer: {goal}}}\n"), Space(space), [])

    assert found is None if why is None else why in found


def test_a_study_of_layouts_is_compared_by_time_and_one_of_ranks_is_not():
    ways = [("baseline", {"data.packing": False}), ("packing", {"data.packing": True})]
    ranks = [(f"rank {rank}", {"data.packing": True, "method.lora_r": rank}) for rank in (4, 8)]

    assert "data.packing" in why_none_share(spec_of(), Space({}), ways)
    assert why_none_share(spec_of(), Space({}), ranks) is None


def test_the_job_keeps_trials_apart_and_a_cluster_does_not():
    assert why_none_share(spec_of("search: {share_base: never}\n"), Space({}), []) == ""
    assert why_none_share(spec_of("cluster: {address: auto}\n"), Space({}), []) is None
