"""Which rows are tried: what fits into the time and into a planned micro-batch, whatever the rows are."""

from dataclasses import replace

import pytest

from orchestrator.planning.plan import Plan
from orchestrator.training.proofs.sample import choose_sample, layouts_of, uneven_shares
from strategies.workload import Techniques

PACKED = Techniques("float32", "document", True, False, 4, 64)


@pytest.fixture
def plan(finished) -> Plan:
    return finished.plan()


def at(plan, tokens_per_s, rows=8, max_length=512):
    """The plan at another speed, in larger micro-batches."""
    techniques = replace(plan.techniques, per_device_train_batch_size=rows, max_length=max_length)
    parts = tuple(replace(part, techniques=techniques) for part in plan.nodes)
    return replace(plan, nodes=parts, tokens_per_s=tokens_per_s, global_batch_size=8)


def test_a_quick_machine_tries_eight_rows_a_step_in_the_jobs_order(plan):
    lengths, order = [100] * 50, list(range(49, -1, -1))

    sample = choose_sample(lengths, order, at(plan, 10_000.0))

    assert sample.rows_a_step == 8
    assert sample.rows == tuple(order[:32])
    assert sample.num_tokens == 3200


def test_a_slow_machine_tries_fewer_and_shorter_rows_in_the_same_time(plan):
    lengths = [10 * (row % 20 + 1) for row in range(200)]
    quick, slow = (choose_sample(lengths, range(200), at(plan, speed)) for speed in (10_000.0, 20.0))

    assert slow.num_tokens < quick.num_tokens
    assert slow.expected_s - quick.expected_s < 120
    assert slow.rows_a_step >= 2


def test_where_even_the_shortest_rows_take_longer_they_are_tried_and_the_time_says_so(plan):
    sample = choose_sample([900, 500, 800, 700], range(4), at(plan, 1.0))

    assert sample.rows_a_step == 2
    assert 1 in sample.rows
    assert sample.expected_s > 1000


def test_a_steps_rows_fit_into_one_planned_micro_batch(plan):
    sample = choose_sample([100] * 50, range(50), at(plan, 10_000.0, rows=1, max_length=512))

    assert sample.rows_a_step * 100 <= 512


def test_shares_that_are_planned_unequal_stay_and_equal_ones_become_unequal():
    assert uneven_shares((0.8, 0.2)) == (0.8, 0.2)
    assert uneven_shares((0.5, 0.5)) == pytest.approx((0.7, 0.3))
    assert sum(uneven_shares((0.25,) * 4)) == pytest.approx(1)


def test_layouts_are_one_micro_batch_several_and_rows():
    layouts = layouts_of(PACKED, [[10, 20, 30, 4], [5, 5, 5, 5]])

    assert layouts.whole.micro_batch_tokens == 64
    assert (layouts.pieces.micro_batch_tokens, layouts.num_pieces) == (32, 3)
    assert layouts.apart == replace(
        PACKED, packing=False, attn_implementation="sdpa", per_device_train_batch_size=1, max_length=30
    )


def test_padded_rows_have_no_third_layout():
    padded = replace(PACKED, packing=False, attn_implementation="sdpa")

    assert layouts_of(padded, [[10, 20], [3, 4]]).apart is None
