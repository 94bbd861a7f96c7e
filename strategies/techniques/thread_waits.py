"""Let a thread that waits for the others sleep: a machine that does something else beside training is the usual one.

GNU's OpenMP, which torch's CPU build uses, lets waiting threads spin.  Where another program has taken a core, each of
the hundreds of parallel regions of a step then spins until the scheduler gives the core back.  Sleeping threads hand it
over at once (OMP_WAIT_POLICY, OpenMP 5.2 section 21.7).
"""

from __future__ import annotations

import os

_VARIABLE = "OMP_WAIT_POLICY"  # read when OpenMP is loaded, so before torch is imported


def environment() -> dict[str, str]:
    """What a process that computes on a CPU starts with; what the user has set stays."""
    return {_VARIABLE: os.environ.get(_VARIABLE, "passive")}
