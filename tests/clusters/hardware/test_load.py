"""How much of each core a process gets."""

import os

from clusters.hardware.load import core_shares


def test_threads_that_share_a_core_get_one_together_and_the_largest_share_comes_first():
    own = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(own)})
    try:
        shares = core_shares(2)
    finally:
        os.sched_setaffinity(0, own)

    assert 0 < sum(shares) < 1.1 and shares == sorted(shares, reverse=True) and len(shares) == 2
