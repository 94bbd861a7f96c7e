"""The goal decides among candidates that fit."""

import pytest

from clusters.units import GIB
from orchestrator.errors import JobError, NothingFits
from orchestrator.job.sections.machines import GoalSection
from orchestrator.job.sections.training import DataSection, ModelSection
from orchestrator.job.spec import JobSpec
from orchestrator.planning.goal import LONG_S, choose_candidate, too_long
from strategies.cost.phases import Phases
from tests.orchestrator.planning.machines import candidate, machine

CHEAP, DEAR = (machine(name, "RTX 3090", price_per_hour=price) for name, price in (("cheap", 1.0), ("dear", 4.0)))
FAST = candidate(step_s=1.0, weights_bytes=8 * GIB, node=DEAR)
SMALL = candidate(step_s=2.0, weights_bytes=2 * GIB, node=DEAR)
RENTED_CHEAPLY = candidate(step_s=3.0, weights_bytes=9 * GIB, node=CHEAP)
ALL = [SMALL, RENTED_CHEAPLY, FAST]


def training_alone(candidate):
    return Phases(training_s=candidate.total_s)


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
    assert choose_candidate(spec(**goal), ALL, training_alone) is best


def test_of_candidates_about_as_fast_the_undivided_one_is_chosen():
    divided, plain = candidate(step_s=1.0, stage=2), candidate(step_s=1.1)

    assert choose_candidate(spec(), [divided, plain], training_alone) is plain
    assert choose_candidate(spec(), [divided, candidate(step_s=1.2)], training_alone) is divided


def test_quality_prefers_the_better_prior_whatever_it_takes():
    slow_full, fast_lora = candidate(step_s=9.0, method="full"), candidate(step_s=1.0)
    better = max((slow_full, fast_lora), key=lambda one: one.quality)

    assert slow_full.quality != fast_lora.quality
    assert choose_candidate(spec(prefer="quality"), [slow_full, fast_lora], training_alone) is better


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
        choose_candidate(spec(**goal), ALL, training_alone)


def test_a_cost_limit_needs_a_known_price():
    with pytest.raises(JobError, match="no machine's price or power is known"):
        choose_candidate(spec(max_cost=1.0), [candidate(node=machine("a"))], training_alone)


def evaluated_slowly_on(slow):
    """Phases in which a candidate's answers take 500 seconds, those of others none."""
    return lambda one: Phases(start_s=20, evaluation_s=500.0 * (one is slow), training_s=one.total_s)


def test_limits_hold_for_the_whole_job_and_the_fastest_training_may_break_them():
    phases = evaluated_slowly_on(FAST)

    assert choose_candidate(spec(), ALL, phases) is FAST
    assert choose_candidate(spec(max_hours=600 / 3600), ALL, phases) is SMALL  # 100 s of training and 520 beside it
    assert choose_candidate(spec(max_hours=640 / 3600), ALL, phases) is FAST
    assert choose_candidate(spec(max_cost=0.3), ALL, phases) is SMALL  # 220 s at 4 an hour, not 620


def test_what_a_whole_job_cannot_keep_is_refused_with_its_phases_and_what_would_shorten_them():
    phases = evaluated_slowly_on(FAST)

    with pytest.raises(NothingFits) as short_training:
        choose_candidate(spec(max_hours=0.1), [FAST], phases)
    with pytest.raises(NothingFits) as long_training:
        choose_candidate(spec(max_cost=0.001), [SMALL], phases)

    assert str(short_training.value).startswith(
        "goal.max_hours is 0.1, and the best that fits takes 0.17 h as a whole job (evaluation 8 min 20 s,"
    )
    assert "Raise the limit, lower eval.max_rows or eval.max_new_tokens" in str(short_training.value)
    assert "costs 0.24 as a whole job (training 3 min 20 s, start 20 s). Raise the limit, lower train." in str(
        long_training.value
    )


def test_two_weeks_are_two_weeks_of_the_whole_job():
    one = candidate(step_s=LONG_S / 100 - 1)

    assert too_long(spec(), one, Phases(training_s=one.total_s)) is None
    why = too_long(spec(), one, Phases(training_s=one.total_s, evaluation_s=3600))
    assert why and f"goal.max_hours: {round(1.05 * (LONG_S + 3500) / 3600 + 0.5)})" in why
