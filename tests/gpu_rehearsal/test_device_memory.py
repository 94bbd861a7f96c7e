"""A process takes no more of a card than its plan has, its context included."""

import pytest
import torch

from clusters.units import GIB
from strategies.techniques.device_memory import limit, share_of


@pytest.mark.parametrize(
    ("usable", "total", "share"),
    [
        (None, 24 * GIB, None),  # nobody knew: no end is made up
        (24.7 * GIB, 24 * GIB, 1.0),
        (6.7 * GIB, 24 * GIB, 0.25),  # a display and others hold the rest
        (0.5 * GIB, 24 * GIB, 0.0),
    ],
)
def test_the_share_leaves_room_for_the_context(usable, total, share):
    assert share_of(usable, total) == (None if share is None else pytest.approx(share))


def test_a_cpu_has_no_end():
    assert limit(torch.device("cpu"), 1.0) is None
