"""The Pareto front."""

import pytest

from orchestrator.planning.goal import pareto


@pytest.mark.parametrize(
    ("costs", "front"),
    [
        ([(1, 9), (2, 2), (9, 1)], [(1, 9), (2, 2), (9, 1)]),
        ([(1, 9), (2, 9), (9, 1)], [(1, 9), (9, 1)]),
        ([(3, 3), (2, 2), (1, 1)], [(1, 1)]),
        ([(1, 1), (1, 1)], [(1, 1), (1, 1)]),  # of equals all stay
        ([], []),
    ],
)
def test_what_another_beats_in_every_cost_is_not_on_the_front(costs, front):
    assert pareto(costs, lambda cost: cost) == front
