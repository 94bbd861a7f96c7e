import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.data.order import Order, hash_ids
from orchestrator.data.packing import best_fit_decreasing, micro_batches, padded_tokens, split_by_share

lengths = st.lists(st.integers(1, 100), max_size=60)


def test_each_item_goes_where_it_fits_best():
    assert best_fit_decreasing([5, 7, 3, 4, 1], 10) == [[1, 2], [0, 3, 4]]


@given(lengths)
def test_bins_hold_everything_once_and_overflow_never(items):
    bins = best_fit_decreasing(items, 100)

    assert sorted(index for group in bins for index in group) == list(range(len(items)))
    assert all(sum(items[i] for i in group) <= 100 for group in bins)
    assert len(bins) <= 2 * -(-sum(items) // 100) + 1


def test_an_item_longer_than_the_bin_stands_alone():
    assert best_fit_decreasing([15, 3], 10) == [[0], [1]]


@given(lengths, st.lists(st.floats(0.1, 8), min_size=1, max_size=4))
def test_shares_deal_every_sample_once(items, shares):
    dealt = split_by_share(items, shares)

    assert sorted(index for group in dealt for index in group) == list(range(len(items)))


def test_a_worker_three_times_as_fast_gets_three_times_the_tokens():
    dealt = split_by_share([10] * 40, [3.0, 1.0])

    assert [len(group) for group in dealt] == [30, 10]


def test_padding_is_counted_and_packing_has_none():
    items = [8, 2, 4, 6]
    groups = micro_batches(items, 2, 10, packing=False)

    assert groups == [[0, 3], [2, 1]]
    assert padded_tokens(items, groups, packing=False) == 24
    assert padded_tokens(items, micro_batches(items, 2, 10, packing=True), packing=True) == 20


def test_an_epoch_sees_every_sample_once_and_epochs_differ():
    order = Order(num_samples=10, global_batch_size=4, seed=1, num_train_epochs=2)

    first = [i for step in range(3) for i in order.sample_ids(step)]
    second = [i for step in range(3, 6) for i in order.sample_ids(step)]

    assert order.num_steps == 6
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second


@pytest.mark.parametrize(("epochs", "max_steps", "steps"), [(1, -1, 3), (0.5, -1, 2), (3, 2, 2), (1, 50, 50)])
def test_steps_follow_epochs_unless_max_steps_is_given(epochs, max_steps, steps):
    assert Order(10, 4, 0, epochs, max_steps).num_steps == steps


def test_order_depends_on_the_seed_alone():
    assert Order(50, 8, 3, 1).sample_ids(2) == Order(50, 8, 3, 1).sample_ids(2)
    assert Order(50, 8, 3, 1).sample_ids(2) != Order(50, 8, 4, 1).sample_ids(2)
    assert hash_ids([1, 2]) != hash_ids([2, 1])
