"""Shares follow the measured pace, when that pays and not before."""

import pytest

from orchestrator.training.shares import Shares


def test_shares_are_in_proportion_to_speed():
    assert Shares.by_speed([300.0, 300.0, 100.0]).shares == pytest.approx([3 / 7, 3 / 7, 1 / 7])


def test_the_plan_stays_where_measuring_would_gain_little():
    assert Shares.choose([0.7, 0.3], [68.0, 32.0]).shares == [0.7, 0.3]
    assert Shares.choose([0.5, 0.5], [80.0, 20.0]).shares == [0.8, 0.2]


def test_shares_that_shall_stay_do():
    shares = Shares([0.5, 0.5], is_fixed=True)

    assert not any(shares.observe([500, 500], [5.0, 50.0]) for _ in range(9))
    assert shares.slowest == 1


def test_a_worker_that_slows_down_gets_less_after_three_steps():
    shares = Shares.by_speed([100.0, 100.0])
    told = [shares.observe([500, 500], [5.0, 20.0]) for _ in range(4)]

    assert told == [False, False, True, False]
    slow, fast = shares.shares[1], shares.shares[0]
    assert fast > 1.8 * slow
    for _ in range(20):  # it settles where both take equally long
        shares.observe([int(1000 * share) for share in shares.shares], [10 * shares.shares[0], 40 * shares.shares[1]])
    assert shares.shares[0] == pytest.approx(0.8, abs=0.05)


def test_one_slow_step_changes_nothing():
    shares = Shares.by_speed([100.0, 100.0])
    paces = [(5.0, 5.0), (5.0, 12.0), (5.0, 5.0), (5.0, 5.0), (5.0, 5.0), (5.0, 5.0)]

    assert not any(shares.observe([500, 500], list(seconds)) for seconds in paces)
    assert shares.shares == [0.5, 0.5]


def test_a_worker_without_samples_keeps_its_pace():
    shares = Shares.by_speed([100.0, 50.0])

    assert not any(shares.observe([500, 0], [5.0, 0.0]) for _ in range(5))
    assert shares.shares == pytest.approx([2 / 3, 1 / 3])


def test_every_worker_decides_the_same():
    told = [([500, 300], [5.0, 9.0]), ([520, 310], [5.5, 12.0]), ([480, 290], [5.2, 11.0])] * 3
    first, second = Shares.by_speed([100.0, 90.0]), Shares.by_speed([100.0, 90.0])

    assert [first.observe(*step) for step in told] == [second.observe(*step) for step in told]
    assert first.shares == second.shares
