"""Numbers a person can check: sizes and step times of the published 7B case."""

import pytest

from strategies.lsp_offload.sizing import LayerTimes, Rates, largest_that_hides, seconds_by_lane, step_s

TIMES = LayerTimes(0.010, 0.030)


def test_the_slowest_lane_bounds_the_size():
    slow_cpu = Rates(10e9, 10e9, 1e8)  # 24 of 30 ms at 1e8/s: 2.4e6 elements, a side of 1549
    slow_bus = Rates(1e8, 10e9, 1e12)  # 24 ms at 1e8 bytes/s: 6e5 elements, a side of 774

    assert largest_that_hides([(4096, 4096)], TIMES, slow_cpu, 32).size == 1536
    found = largest_that_hides([(4096, 4096)], TIMES, slow_bus, 32)
    assert (found.size, found.bound) == (768, "down") and "the way to the host" in found.text
    of_four = [(4096, 4096)] * 4  # which share the layer's time
    assert largest_that_hides(of_four, TIMES, slow_cpu, 32).size == 768
    assert largest_that_hides([(1024, 4096)], TIMES, slow_cpu, 32).size == 512  # half of the smallest side


def test_what_the_last_layer_leaves_behind_the_step_bounds_the_size_of_few_layers():
    slow_cpu = Rates(10e9, 10e9, 1e8)  # 1.08e-8 s an element in all lanes; 5 % of 4 x 40 ms: 7.4e5 elements, 861 a side

    found = largest_that_hides([(4096, 4096)], TIMES, slow_cpu, 4)

    assert (found.size, found.bound) == (832, "tail") and "behind the step" in found.text
    lanes = seconds_by_lane(found.size**2, slow_cpu)
    assert step_s(4, TIMES, lanes, overlapped=True) <= 1.05 * 4 * 0.04


def test_a_step_is_the_slowest_lane_and_one_layer_more():
    lanes = seconds_by_lane(1e8, Rates(10e9, 10e9, 1e9))

    assert lanes == pytest.approx({"down": 0.04, "update": 0.1, "up": 0.04})
    assert step_s(10, TIMES, lanes, overlapped=True) == pytest.approx(0.1 + 1.0 + 0.18)
    assert step_s(10, TIMES, lanes, overlapped=False) == pytest.approx(0.4 + 1.8)
    # Clipped: the way down beside the backward pass (0.4 > 0.3), the rest beside the next forward pass (1.0 > 0.1).
    assert step_s(10, TIMES, lanes, overlapped=True, clips=True) == pytest.approx(0.4 + 1.0 + 0.18)
