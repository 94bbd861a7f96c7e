"""How many jobs fit over one base, by what each was planned to take alone."""

from dataclasses import replace

import pytest

from clusters.capability import DeviceCapability
from orchestrator.lifecycle.together.share import num_places
from orchestrator.planning.memory_fit import needed_bytes
from strategies.contract import MemoryEstimate
from strategies.multi_lora.memory import JobMemory, estimate_together

GPU = DeviceCapability("cuda", "card", 8 * 2**30)
# A base of 1000, 10 trained, states of 20; 400 tokens of 2 bytes and logits of 1 byte each.
SMALL = JobMemory(MemoryEstimate(1010, 0, 20, 800, 400), trained_bytes=10, tokens=400, limit=1000)


def test_the_base_counts_once_and_what_trains_for_every_job():
    three = estimate_together([SMALL] * 3, GPU)

    assert three.weights_bytes == 1000 + 3 * 10
    assert three.gradients_bytes == 3 * 10 and three.optimizer_bytes == 3 * 20


def test_a_row_of_several_jobs_is_no_longer_than_the_largest_micro_batch():
    two, three = (estimate_together([SMALL] * count, GPU) for count in (2, 3))

    assert (two.activations_bytes, two.logits_bytes) == (2 * 800, 2 * 400)  # 800 tokens
    assert (three.activations_bytes, three.logits_bytes) == (2 * 1000, 1 * 1000)  # 1000, not 1200


def test_a_row_counts_as_if_all_its_tokens_were_the_costliest():
    costly = replace(SMALL, estimate=replace(SMALL.estimate, activations_bytes=4000))

    assert estimate_together([SMALL, costly], GPU).activations_bytes == 10 * 800


@pytest.mark.parametrize("count", [1, 2, 3])
def test_as_many_find_a_place_as_fit_whichever_they_are(count):
    large = replace(SMALL, trained_bytes=100, estimate=replace(SMALL.estimate, weights_bytes=1100, optimizer_bytes=200))
    jobs = [SMALL, large, SMALL]
    usable = needed_bytes(estimate_together([large, SMALL, SMALL][:count], GPU), "cuda")

    assert num_places(jobs, GPU, usable) == count
    assert num_places(jobs, GPU, usable - 1) == max(1, count - 1)


def test_memory_of_unknown_size_takes_all():
    assert num_places([SMALL] * 5, GPU, None) == 5
