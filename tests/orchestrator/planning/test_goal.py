"""The goal decides among candidates that fit."""

import pytest

from clusters.units import GIB
from orchestrator.errors import JobError, NothingFits
from orchestrator.job.sections.machines import GoalSection
from orchestrator.job.sections.training import DataSection, ModelSection
from orchestrator.job.spec import JobSpec
from orchestrator.planning.goal import choose_candidate
from tests.orchestrator.planning.machines import candidate, machine

CHEAP, DEAR = (machine(name, "RTX 3090", price_per_hour=price) for name, price in (("cheap", 1.0), ("dear", 4.0)))
FAST = candidate(step_s=1.0, weights_bytes=8 * GIB, node=DEAR)
SMALL = candidate(step_s=2.0, weights_bytes=2 * GIB, node=DEAR)
RENTED_CHEAPLY = candidate(step_s=3.0, weights_bytes=9 * GIB, node=CHEAP)
ALL = [SMALL, RENTED_CHEAPLY, FAST]


def spec(**goal):
    return JobSpec(
        model=ModelSection(model_name_or_path="m"), data=DataSection(train="a.jsonl"), goal=GoalSection(**goal)
    )


@pytest.mark.parametrize(
    ("goal", "best"),
    [
        ({"prefer": "time"}, FAST),
        ({"prefer": "memory"}, SMALL),
        ({"prefer": "cost"}, RENTED_CHEAPLY),
        ({"prefer": "memory", "max_hours": 0.03}, FAST),
        ({"prefer": "time", "max_cost": 0.1}, RENTED_CHEAPLY),
    ],
)
def test_the_best_of_those_that_keep_the_limits_is_chosen(goal, best):
    assert choose_candidate(spec(**goal), ALL) is best


def test_of_candidates_about_as_fast_the_undivided_one_is_chosen():
    divided, plain = candidate(step_s=1.0, stage=2), candidate(step_s=1.1)

    assert choose_candidate(spec(), [divided, plain]) is plain
    assert choose_candidate(spec(), [divided, candidate(step_s=1.2)]) is divided


def test_quality_prefers_the_better_prior_whatever_it_takes():
    slow_full, fast_lora = candidate(step_s=9.0, method="full"), candidate(step_s=1.0)
    better = max((slow_full, fast_lora), key=lambda one: one.quality)

    assert slow_full.quality != fast_lora.quality
    assert choose_candidate(spec(prefer="quality"), [slow_full, fast_lora]) is better


@pytest.mark.parametrize(
    ("goal", "error", "message"),
    [
        ({"max_hours": 0.001}, NothingFits, "goal.max_hours is 0.001, and the best that fits takes 0.028 h"),
        ({"max_cost": 0.01}, NothingFits, "goal.max_cost is 0.01, and the best that fits costs 0.08"),
        ({"min_quality": 0.99}, NothingFits, "goal.min_quality is 0.99, and the best that fits promises"),
    ],
)
def test_a_limit_that_nothing_keeps_is_named_with_the_best_value(goal, error, message):
    with pytest.raises(error, match=message):
        choose_candidate(spec(**goal), ALL)


def test_a_cost_limit_needs_a_known_price():
    with pytest.raises(JobError, match="no machine's price or power is known"):
        choose_candidate(spec(max_cost=1.0), [candidate(node=machine("a"))])
