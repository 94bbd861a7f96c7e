"""Curves of bounded size, and sets of steps as ranges."""

import json
import math
import random

import pytest

from orchestrator.runs.summary.curves import StepCurve, StepSet


def curve_of(pairs):
    made = StepCurve()
    for step, value in pairs:
        made.add(step, value)
    return made


def again(curve):
    return StepCurve.from_json(json.loads(json.dumps(curve.to_json())))


def shown(curve):
    return json.dumps(curve.to_json())  # NaN equals itself as text


def losses(count, seed=0):
    draw = random.Random(seed)
    return [(step, draw.gauss(2.0, 1.0)) for step in range(1, count + 1)]


def test_a_curve_of_four_thousand_steps_is_every_step():
    pairs = losses(4000)

    assert curve_of(pairs).points() == pairs
    assert curve_of([*pairs, (7, 9.0)]).points() == [*pairs[:6], (7, 9.0), *pairs[7:]]


@pytest.mark.parametrize("count", [4001, 10_000, 123_456])
def test_a_longer_one_keeps_the_lowest_and_the_highest_of_each_stretch(count):
    pairs = losses(count)
    curve = curve_of(pairs)

    stretches = {}
    for step, value in pairs:
        stretches.setdefault(step // curve.width, []).append((value, step))
    wanted = {(step, value) for stretch in stretches.values() for value, step in (min(stretch), max(stretch))}
    assert set(curve.points()) == wanted
    assert curve.width > 1 and len(curve.points()) <= 4000


def test_what_is_no_number_shows_in_its_stretch():
    pairs = [(step, math.nan if step == 5000 else value) for step, value in losses(20_000)]

    points = curve_of(pairs).points()
    assert [step for step, value in points if math.isnan(value)] == [5000]
    assert len([step for step, _ in points if step // 16 == 5000 // 16]) == 3


@pytest.mark.parametrize("back", [1, 100, 3000])
def test_steps_trained_again_take_the_place_of_those_before(back):
    first, second = losses(9000), losses(12_000, seed=1)[9000 - back :]
    last = dict(first) | dict(second)

    curve = curve_of([*first, *second])
    assert all(last[step] == value for step, value in curve.points())
    assert {step // curve.width for step in last} == {step // curve.width for step, _ in curve.points()}


@pytest.mark.parametrize("seed", range(4))
def test_a_curve_built_in_pieces_is_the_same(seed):
    draw = random.Random(seed)
    pairs, step = [], 0
    for _ in range(9_000):
        step = max(0, step + draw.choice((1, 1, 1, 1, 2, 50 if seed % 2 else 1)))
        step -= draw.randrange(500) if draw.random() < 0.002 else 0
        pairs.append((step, draw.choice((math.nan, 1, draw.random(), draw.random()))))
    whole, pieces = curve_of(pairs), StepCurve()

    for start in range(0, len(pairs), 700):
        pieces = again(pieces)
        for step, value in pairs[start : start + 700]:
            pieces.add(step, value)
    assert shown(pieces) == shown(whole)


def test_a_set_of_steps_counts_each_once():
    draw = random.Random(0)
    steps, wanted = StepSet(), set()
    for _ in range(5000):
        step = draw.randrange(-50, 1500)
        assert steps.add(step) == (step not in wanted)
        wanted.add(step)
        steps = StepSet(steps.to_json())

    assert len(steps) == len(wanted)
    found = {step for first, last in steps.to_json() for step in range(first, last + 1)}
    assert found == wanted


def test_steps_in_order_are_one_range():
    steps = StepSet()

    assert [steps.add(step) for step in (1, 2, 3, 2, 3, 4)] == [True, True, True, False, False, True]
    assert steps.to_json() == [[1, 4]] and len(steps) == 4
