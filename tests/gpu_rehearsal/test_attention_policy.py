"""Which kernel computes attention, as a table; and that the plan counts the keys that are copied."""

import pytest

from clusters.capability import DeviceCapability
from strategies.techniques.attention import Heads, copies_keys, sharing
from strategies.workload import Techniques
from tests.orchestrator.planning.machines import MIDDLE as LLAMA_3_8B

GROUPED, WIDE, VERY_WIDE, ODD = Heads(32, 8, 128), Heads(8, 4, 256), Heads(8, 4, 288), Heads(8, 4, 90)
TABLE = [
    # kind, capability, dtype, heads, torch, what runs
    ("cuda", (8, 0), "bfloat16", GROUPED, (2, 13), "packed"),
    ("cuda", (8, 6), "float16", GROUPED, (2, 13), "packed"),
    ("cuda", (9, 0), "bfloat16", GROUPED, (2, 13), "packed"),
    ("cuda", (12, 0), "bfloat16", GROUPED, (2, 14), "packed"),
    ("cuda", (8, 6), "bfloat16", GROUPED, (2, 12), "shared"),  # an older torch
    ("cuda", (8, 6), "bfloat16", ODD, (2, 13), "shared"),  # not a multiple of 8: SDPA pads it
    ("cuda", (8, 6), "bfloat16", Heads(32, 8, 128, has_dropout=True), (2, 13), "shared"),
    ("cuda", (8, 6), "bfloat16", Heads(32, 8, 128, is_windowed=True), (2, 13), "packed"),
    ("cuda", (8, 6), "bfloat16", Heads(32, 8, 128, is_windowed=True), (2, 12), "expanded"),  # needs a mask
    ("cuda", (8, 0), "bfloat16", WIDE, (2, 13), "packed"),
    ("cuda", (8, 6), "bfloat16", WIDE, (2, 13), "packed"),
    ("cuda", (8, 6), "bfloat16", Heads(8, 4, 256, has_dropout=True), (2, 13), "expanded"),
    ("cuda", (8, 6), "bfloat16", Heads(8, 4, 208), (2, 13), "expanded"),
    ("cuda", (9, 0), "bfloat16", Heads(8, 4, 208), (2, 13), "packed"),
    ("cuda", (8, 0), "bfloat16", VERY_WIDE, (2, 13), "expanded"),
    ("cuda", (7, 5), "float16", GROUPED, (2, 13), "expanded"),  # Turing
    ("cuda", (6, 1), "float32", GROUPED, (2, 13), "expanded"),
    ("cuda", (8, 6), "float32", GROUPED, (2, 13), "expanded"),
    ("cuda", (7, 5), "float16", Heads(32, 32, 128), (2, 13), "shared"),  # nothing is grouped: nothing to copy
    ("cuda", None, "bfloat16", GROUPED, (2, 13), "expanded"),  # unknown is not Ampere
    ("rocm", None, "bfloat16", GROUPED, (2, 13), "expanded"),
    ("cpu", None, "bfloat16", GROUPED, (2, 13), "shared"),
]


@pytest.mark.parametrize(("kind", "capability", "dtype", "heads", "torch", "wanted"), TABLE)
def test_kernel_of_a_device(kind, capability, dtype, heads, torch, wanted):
    assert sharing(kind, capability, dtype, heads, torch) == wanted


@pytest.mark.parametrize(
    ("capability", "dtype", "attention", "copied"),
    [
        ((8, 6), "bfloat16", "document", False),
        ((8, 6), "float32", "document", True),
        ((7, 5), "float16", "document", True),
        ((7, 5), "float16", "sdpa", True),
        ((7, 5), "float16", "eager", False),  # counted with the scores it keeps
    ],
)
def test_the_plan_counts_copied_keys(capability, dtype, attention, copied):
    card = DeviceCapability("cuda", "a card", 2**34, compute_capability=capability)
    techniques = Techniques(dtype, attention, attention == "document", False, 1, 2048)

    assert copies_keys(card, LLAMA_3_8B, techniques) == copied
