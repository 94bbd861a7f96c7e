"""The copies between two GPUs, timed on tensors of this CPU; with GPUs a real pair."""

import pytest
import torch

from clusters.capability import DeviceCapability
from clusters.probe.gpu_links import measure_gpu_links, measure_pair


def test_a_pair_has_a_rate_and_a_round_trip():
    rate, trip_s = measure_pair(torch.device("cpu"), torch.device("cpu"), 0.2)

    assert 1e7 < rate < 1e12
    assert 0 < trip_s < 0.01


def test_one_gpu_has_no_pairs_and_what_has_no_address_is_not_measured():
    card = DeviceCapability("cuda", "card", 2**30)

    assert measure_gpu_links([(card, 0)], 0.1) == ()
    assert measure_gpu_links([(card, 0), (card, 1)], 0.1) == ()


@pytest.mark.gpu
def test_every_pair_of_gpus_is_measured_once():
    count = torch.cuda.device_count()
    if count < 2:
        pytest.skip(f"needs two GPUs, and here are {count}")
    gpus = [(DeviceCapability("cuda", "card", 2**30, pci_bus_id=str(number)), number) for number in range(count)]

    links = measure_gpu_links(gpus, 0.1)

    assert len(links) == count * (count - 1) // 2
    assert all(link.bytes_per_s > 1e9 and link.peer_access is not None for link in links)
