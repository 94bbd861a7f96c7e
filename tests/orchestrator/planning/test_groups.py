"""Which slots are worth being placed together, and shares with which they finish a step together."""

import pytest

from clusters.capability import Link
from orchestrator.planning.groups import Curve, Pace, balance, share_out
from tests.orchestrator.planning.machines import MIDDLE, SMALL, machine, strategy_plan
from tests.orchestrator.planning.test_enumeration import enumeration

FAST_LINK, SLOW_LINK = (1e10, 1e-5), (1e7, 1e-3)


def links_between(names, islands):
    """Fast links within each island of nodes, slow ones between them."""
    pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
    return tuple(Link(pair, *(FAST_LINK if any(set(pair) <= one for one in islands) else SLOW_LINK)) for pair in pairs)


def test_shares_are_those_with_which_both_finish_together():
    starts_late, steady = Curve([(0.0, 1.0), (0.5, 3.0)]), Curve([(0.0, 0.0), (0.5, 1.0)])

    finish_s, shares = share_out([starts_late, steady], [1, 1], 0.0)

    # 1 + 4 s = 2 (1 - s): s is a sixth, and both end after 5/3 seconds
    assert finish_s == pytest.approx(5 / 3, rel=1e-3)
    assert shares == pytest.approx([1 / 6, 5 / 6], rel=1e-3)


def test_a_share_ends_before_the_step_that_another_micro_batch_takes():
    curve = Curve([(0.0, 1.0), (0.25, 1.0), (0.26, 2.0), (0.5, 2.0)])

    assert curve.share_within(0.9) == 0
    assert curve.share_within(1.0) == pytest.approx(0.25)
    assert curve.share_within(1.5) == pytest.approx(0.255)
    assert curve.share_within(3.0) == pytest.approx(1.0)  # beyond what is known: as from the first to the last


def test_the_slowest_gets_a_sample_and_its_twins_count():
    slow, fast = Curve([(0.0, 50.0), (0.5, 500.0)]), Curve([(0.0, 0.0), (0.5, 1.0)])

    _, shares = share_out([slow, fast], [1, 3], 1 / 16)

    assert shares == pytest.approx([1 / 16, 5 / 16], rel=1e-3)
    assert share_out([slow, fast], [1, 3], 1 / 4)[1] == [1 / 4, 1 / 4]  # no more than a sample each


def test_a_pace_through_two_plans_keeps_what_no_sample_takes_longer():
    half, sixteenth = strategy_plan(step_s=9.0), strategy_plan(step_s=2.0)

    pace = Pace.through(half, 1 / 2, sixteenth, 1 / 16)

    assert pace.step_s(1 / 2) == pytest.approx(9.0) and pace.step_s(1 / 16) == pytest.approx(2.0)
    assert pace.fixed_s == pytest.approx(1.0) and pace.whole_s == pytest.approx(16.0)
    assert Pace.through(half, 1 / 2, half, 1 / 2) == Pace.of(half, 1 / 2)
    assert balance([pace, pace], [1, 1])[0] == pytest.approx(9.0)


def test_a_slot_whose_first_sample_takes_too_long_is_no_better_company_than_another_card():
    """By the link alone each card would rather be with a CPU, whose one sample takes longer than all of the rest."""
    nodes = machine("a", "RTX 4090"), machine("b", "A100 PCIe 80GB"), machine("c", memory_gib=256)
    links = Link(("a", "b"), 3e7, 1e-4), Link(("a", "c"), *FAST_LINK), Link(("b", "c"), *FAST_LINK)
    text = "method: {type: qlora}\ntrain: {global_batch_size: 8}\nstrategy: {mode: zero1}\n"

    found = enumeration(MIDDLE, *nodes, text=text, links=links).run()

    best = min(found.fitting, key=lambda one: one.step_s)
    assert best.device_names == ["RTX 4090", "A100 PCIe 80GB"]


def test_cards_of_one_machine_are_a_group_whatever_is_faster_elsewhere():
    box = machine("box", "RTX 3090", "RTX 3090")
    singles = [machine(name, "RTX 4090") for name in "abcde"]

    found = enumeration(SMALL, *singles, box, links=links_between([*"abcde", "box"], [])).run()

    undivided = [one for one in found.fitting if one.zero_stage == 0]
    assert ["box", "box"] in [[part.slot.node.name for part in one.placed] for one in undivided]


def test_an_island_of_good_links_is_a_group_without_the_fastest_card():
    nodes = [machine("far", "RTX 4090")] + [machine(name, "RTX 3090") for name in "abcdef"]

    found = enumeration(SMALL, *nodes, links=links_between(["far", *"abcdef"], [set("abcdef")])).run()

    together = [one for one in found.fitting if one.zero_stage == 0 and len(one.placed) > 1]
    best = min(together, key=lambda one: one.step_s)
    assert "far" not in [node.name for node in best.nodes]
