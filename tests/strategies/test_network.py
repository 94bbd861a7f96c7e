"""What waiting for each other costs, against numbers worked out by hand."""

import pytest

from strategies.cost.network import _AVERAGED_PER_S, Network


def test_a_ring_moves_twice_the_gradients():
    """4 workers, 1 GB over 100 MB/s: 2 * 3/4 * 10 s, and 6 messages of half a round trip."""
    assert Network(4, 1e8, 0.01).all_reduce_s(1e9) == pytest.approx(15 + 6 * 0.005)
    assert Network(1, 1e8, 0.01).all_reduce_s(1e9) == 0


def test_zero_3_gathers_the_weights_for_every_micro_batch():
    network = Network(2, 1e9, 0)

    assert network.gather_s(1e9) == pytest.approx(0.5)


def test_gathered_weights_wait_only_where_computing_is_shorter():
    fast, slow = Network(8, 150e9, 0), Network(2, 118e6, 0)

    hidden, shown = fast.gather_wait_s(30e9, 1.0), slow.gather_wait_s(30e9, 1.0)

    assert hidden == pytest.approx(fast.gather_s(30e9) / 30)  # the first layer's
    assert shown == pytest.approx(slow.gather_s(30e9) - 1.0)


def test_what_the_backward_pass_hides_is_not_waited_for():
    network = Network(2, 1e8, 0)
    whole, last = network.all_reduce_s(60e6), network.all_reduce_s(10e6)

    # Six buckets are six round trips, the step's numbers one more; 20 ms for everything that is not the network.
    after = network.latency_s + 0.02
    assert network.exposed_s(60e6, 0.0, 10e6) == pytest.approx(whole + 5 * network.latency_s + after)
    assert network.exposed_s(60e6, 0.5, 10e6) == pytest.approx(whole + 5 * network.latency_s - 0.3 + after)
    assert network.exposed_s(60e6, 10.0, 10e6) == pytest.approx(last + after)  # the last bucket leaves at the end


def test_buckets_are_not_smaller_than_their_round_trip_is_worth():
    assert Network(3, 1.25e6, 0.08).bucket_bytes(190e3) == 200_000
    assert Network(3, 125e6, 0.0004).bucket_bytes(6e6) == 1_000_000
    assert Network(3, 125e6, 0.0004).bucket_bytes(6e9) == 25 * 2**20


def test_products_of_adapters_travel_once_for_each_other_worker_and_are_averaged():
    """3 workers, 1 MB adapters of rank 8 over 1 MB/s: 2 s for those of the two others; 9 x 8 x 250,000 to average."""
    network = Network(3, 1e6, 0.0)

    assert network.averaged_products_s(1e6, 8) == pytest.approx(2.0 + network.step_s + 18e6 / _AVERAGED_PER_S)
