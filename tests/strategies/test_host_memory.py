"""What a process that computes on a CPU starts with."""

import json

from strategies.step import host_memory
from tests.processes import outcome, start_python

MANY_SIZES = """\
import json, torch
weights = torch.randn(576, 576, dtype=torch.bfloat16)

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

def multiply(sizes):
    for tokens in sizes:
        torch.randn(tokens, 576, dtype=torch.bfloat16) @ weights

multiply([600])
before = resident()
multiply(range(100, 400))
print(json.dumps(resident() - before))
"""


def test_products_of_ever_new_sizes_do_not_fill_the_memory(tmp_path):
    """On a CPU with bf16 units 300 sizes took 225 MB without these settings, 75 with them."""
    done = outcome(start_python("-c", MANY_SIZES, cwd=tmp_path, **host_memory.process_environment()))

    assert done.returncode == 0, done.output
    assert json.loads(done.stdout) < 150e6
