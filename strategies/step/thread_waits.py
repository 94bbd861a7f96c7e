"""Let a thread that waits sleep soon: a machine that does something else beside training is the usual one.

GNU's OpenMP, which torch's CPU build uses, lets waiting threads spin for milliseconds.  Where another program has taken
a core, each of the hundreds of parallel regions of a step then spins until the scheduler gives the core back.  Sleeping
at once (OMP_WAIT_POLICY=passive, OpenMP 5.2 section 21.7) costs every region a waking; so threads spin for some
microseconds, and then sleep: https://gcc.gnu.org/onlinedocs/libgomp/GOMP_005fSPINCOUNT.html
"""

from __future__ import annotations

import os

_SPINS = {"GOMP_SPINCOUNT": "1000"}
# Read when OpenMP is loaded, so before torch is imported.  Where the user has set one of them, theirs stand.
_VARIABLES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")


def environment() -> dict[str, str]:
    """What a process that computes on a CPU starts with; what the user has set stays."""
    return {name: os.environ[name] for name in _VARIABLES if name in os.environ} or _SPINS
