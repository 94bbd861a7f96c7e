"""The goal decides among candidates that fit."""

from dataclasses import replace

import pytest

from clusters.units import GIB
from orchestrator.errors import JobError, NothingFits
from orchestrator.job.sections.machines import GoalSection
from orchestrator.job.sections.training import DataSection, ModelSection
from orchestrator.job.spec import JobSpec
from orchestrator.planning.goal import LONG_S, choose_candidate, too_long, what_decides, why_not_beside
from orchestrator.planning.price import price_of
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


def test_a_cost_limit_needs_a_whole_price_and_asks_for_what_is_unknown():
    with pytest.raises(JobError) as bare:
        choose_candidate(spec(max_cost=1.0), [candidate(node=machine("a"))], training_alone)
    with pytest.raises(JobError) as drawing:
        choose_candidate(spec(max_cost=1.0), [candidate(node=UNPRICED)], training_alone)

    assert str(bare.value) == (
        "goal.max_cost is 1, and of no way that fits the whole cost is known (unknown: the price of a and the draw of"
        " a). State it in the hardware file, or as cost.nodes.NAME (per_hour, or purchase and load_w)"
    )
    assert "(unknown: the price of free)" in str(drawing.value) and "load_w" not in str(drawing.value)


UNPRICED = machine("free", "RTX 3090", load_w=400.0)
PRICED_UNMETERED = replace(machine("bought", "RTX 3090", purchase_price=900.0), devices=machine("b").devices)


def together(*nodes, step_s=1.0):
    """One way to train on a card of each."""
    alone = [candidate(step_s, node=node) for node in nodes]
    return replace(alone[0], placed=tuple(one.placed[0] for one in alone))


def test_a_machine_of_unknown_price_keeps_no_cost_limit():
    free, paid = candidate(1.0, node=UNPRICED), candidate(9.0, node=CHEAP)

    assert choose_candidate(spec(max_cost=0.5), [free, together(UNPRICED, CHEAP), paid], training_alone) is paid
    with pytest.raises(NothingFits, match=r"goal.max_cost is 0.1, and the best that fits costs 0.25"):
        choose_candidate(spec(max_cost=0.1), [free, together(UNPRICED, CHEAP), paid], training_alone)


def test_a_known_rent_counts_beside_an_unknown_one():
    price = price_of(spec(), together(DEAR, UNPRICED, machine("c")), 3600)

    assert price.machines == 4.0 and price.electricity == pytest.approx(0.4 * 0.3) and price.energy_wh is None
    assert (price.is_whole, price.without_price, price.without_draw) == (False, ("free", "c"), ("c",))
    assert price.unknown == "the price of free, c and the draw of c"
    assert price_of(spec(), FAST, 3600).is_whole  # rented: its draw is in its rate


def test_the_cheapest_is_one_whose_price_is_known():
    free, paid = candidate(1.0, node=UNPRICED), candidate(9.0, node=DEAR)

    assert choose_candidate(spec(prefer="cost"), [free, together(UNPRICED, CHEAP), paid], training_alone) is paid
    assert what_decides(spec(prefer="cost"), [free, paid]) is None


def test_without_a_whole_price_what_is_known_of_all_decides_and_without_that_time():
    slow, fast = candidate(2.0, node=machine("a", load_w=100.0)), candidate(1.0, node=machine("b", load_w=500.0))
    bought = candidate(1.5, node=PRICED_UNMETERED)
    cost = spec(prefer="cost")

    assert choose_candidate(cost, [slow, fast], training_alone) is slow
    assert what_decides(cost, [slow, fast]).endswith("Until then electricity decides")
    assert choose_candidate(cost, [slow, fast, bought], training_alone) is fast
    assert what_decides(cost, [slow, fast, bought]).endswith("Until then time decides")
    assert what_decides(spec(), [slow, fast]) is None


def evaluated_slowly_on(slow):
    """Phases in which a candidate's answers take 500 seconds, those of others none."""
    return lambda one: Phases(start_s=20, evaluation_s=500.0 * (one is slow), training_s=one.total_s)


def test_the_fastest_and_the_limits_are_of_the_whole_job():
    phases = evaluated_slowly_on(FAST)

    assert choose_candidate(spec(), ALL, training_alone) is FAST
    assert choose_candidate(spec(), ALL, phases) is SMALL  # 220 s with evaluation and start, not 620
    assert choose_candidate(spec(max_hours=600 / 3600), ALL, phases) is SMALL  # 100 s of training and 520 beside it
    assert choose_candidate(spec(max_hours=640 / 3600), [FAST], phases) is FAST
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


@pytest.mark.parametrize(
    ("goal", "beside", "why"),
    [
        ({}, CHEAP, "but the whole job would take 4 min 40 s with it, 3 min 20 s without"),
        ({"max_hours": 0.06}, CHEAP, "with it, 3 min 20 s without: goal.max_hours is 0.06"),
        ({"max_cost": 0.3}, CHEAP, "but the job would cost 0.39 EUR with it, 0.22 without: goal.max_cost is 0.3"),
        ({"prefer": "cost"}, CHEAP, "but the job would cost 0.39 EUR with it, 0.22 without"),
        ({"prefer": "cost"}, UNPRICED, "but what the job would cost with it is not known: the price of free"),
        ({"prefer": "memory"}, CHEAP, "but 34% of the fullest device's memory would be used with it, 8% without"),
    ],
)
def test_a_machine_that_shortens_steps_is_not_used_for_what_the_goal_has_against_it(goal, beside, why):
    other = together(DEAR, beside)
    other = replace(other, placed=(candidate(1.0, 8 * GIB, node=DEAR).placed[0], other.placed[1]))
    phases = evaluated_slowly_by(other, 180.0)

    found = why_not_beside(spec(**goal), SMALL, other, phases)

    assert found.startswith("a step would take 1 s with it, 2 s without, but ")
    assert found.endswith(why)


def evaluated_slowly_by(slow, seconds):
    return lambda one: Phases(training_s=one.total_s, evaluation_s=seconds * (one is slow))


def test_a_machine_that_makes_steps_longer_is_not_used_for_that():
    slow = replace(together(DEAR, CHEAP, step_s=3.0), sync_s=1.0)

    why = why_not_beside(spec(prefer="memory"), SMALL, slow, training_alone)

    assert why == "a step would take 4 s with it, 1 s of it waiting for the network, 2 s without"
