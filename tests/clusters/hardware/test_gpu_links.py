"""What GPUs of one machine exchange: measured before declared before the board's own before a guess."""

from dataclasses import replace

import pytest

from clusters.capability import ClusterCapability, Link, NodeCapability
from clusters.hardware import datasheet
from clusters.hardware.gpu_links import HOST_REACHED, NVLINK_REACHED, PEER_REACHED, slowest_inside
from clusters.hardware.hardware_file import ImpossibleHardware, hardware_of


def node(card, count, **figures):
    devices = [datasheet.device(datasheet.find(card)) for _ in range(count)]
    named = tuple(replace(device, pci_bus_id=f"0000:0{number}:00.0") for number, device in enumerate(devices))
    return NodeCapability("a", 16, 2**36, named, **figures)


def declared(card, count, **link):
    values = {"name": "a", "cores": 16, "memory_gib": 64, "gpus": [{"name": card, "count": count}], "gpu_link": link}
    (machine,) = hardware_of({"nodes": [values]}).nodes
    return machine


def inside(machine):
    found = slowest_inside(machine, machine.gpus)
    return found.bytes_per_s, found.is_assumed


@pytest.mark.parametrize(
    ("card", "line_rate"), [("V100 SXM 32GB", 150e9), ("A100 SXM 80GB", 300e9), ("H100 SXM", 450e9), ("H200", 450e9)]
)
def test_boards_whose_machines_always_have_nvlink_have_it(card, line_rate):
    assert inside(node(card, 8)) == (pytest.approx(NVLINK_REACHED * line_rate), False)


@pytest.mark.parametrize(
    ("card", "rate"),
    [("RTX 3090", 31.5e9), ("RTX 3060 12GB", 31.5e9), ("RTX 2080 Ti", 15.75e9), ("RTX 3050 8GB", 15.75e9)],
)
def test_other_boards_are_taken_to_meet_over_pcie_by_way_of_the_host_and_that_is_a_guess(card, rate):
    assert inside(node(card, 2)) == (pytest.approx(HOST_REACHED * rate, rel=0.01), True)


def test_two_kinds_of_boards_have_no_nvlink_in_common():
    mixed = replace(node("H100 SXM", 1), devices=(*node("H100 SXM", 1).devices, *node("A100 SXM 80GB", 1).devices))

    assert inside(mixed)[1]


def test_measured_pairs_count_before_all_else_and_the_slowest_of_those_that_take_part_decides():
    ids = [f"0000:0{number}:00.0" for number in range(3)]
    links = (
        Link((ids[0], ids[1]), 45e9, 9e-6, peer_access=True),
        Link((ids[0], ids[2]), 9e9, 3e-5, peer_access=False),
        Link((ids[2], ids[1]), 10e9, 2e-5, peer_access=False),
    )
    machine = node("RTX 3090", 3, gpu_links=links, gpu_link_bytes_per_s=1e9)

    assert inside(machine) == (9e9, False)
    bridged = slowest_inside(machine, machine.gpus[:2])
    assert (bridged.bytes_per_s, bridged.round_trip_s, bridged.is_assumed) == (45e9, 9e-6, False)
    assert ClusterCapability.from_dict(ClusterCapability((machine,)).as_dict()).nodes == (machine,)


def test_pairs_of_which_one_was_not_measured_leave_what_is_declared():
    machine = node("RTX 3090", 3, gpu_links=(Link(("0000:00:00.0", "0000:01:00.0"), 45e9),), gpu_link_bytes_per_s=7e9)

    assert inside(machine) == (7e9, False)


@pytest.mark.parametrize(
    ("card", "count", "link", "bytes_per_s"),
    [
        ("RTX 3090", 2, {"nvlink": True}, NVLINK_REACHED * 56.25e9),
        ("A100 PCIe 80GB", 2, {"nvlink": True}, NVLINK_REACHED * 300e9),
        ("H100 SXM", 8, {"nvlink": True}, NVLINK_REACHED * 450e9),
        ("RTX 4090", 4, {"gb_per_s": 12}, 12e9),
        ("RTX 4090", 2, {"pcie": "4x16", "peer_access": True}, PEER_REACHED * 31.5e9),
        ("RTX 4090", 2, {"pcie": "4x8"}, HOST_REACHED * 15.75e9),
    ],
)
def test_a_hardware_file_states_how_gpus_meet(card, count, link, bytes_per_s):
    rate, is_assumed = inside(declared(card, count, **link))

    assert rate == pytest.approx(bytes_per_s, rel=0.01) and not is_assumed


def test_a_stated_slot_is_the_way_to_the_host_too():
    (gpu, _) = declared("RTX 4090", 2, pcie="3x4").gpus

    assert gpu.host_to_device_bytes_per_s == gpu.device_to_host_bytes_per_s == pytest.approx(3.94e9, rel=0.01)
    assert gpu.sources["host_to_device_bytes_per_s"] == "declared"


@pytest.mark.parametrize(
    ("card", "count", "link", "mistake"),
    [
        ("RTX 4090", 2, {"nvlink": True}, "needs two GPUs that have it, and here are 2: RTX 4090"),
        ("RTX 3090", 4, {"nvlink": True}, "a bridge joins two RTX 3090, and 4 are reached over PCIe"),
        ("RTX 3090", 1, {"nvlink": True}, "needs two GPUs"),
        ("RTX 3090", 2, {"nvlink": "yes"}, "'yes' is neither true nor false"),
        ("RTX 3090", 2, {"pcie": "9x16"}, "'9x16' is not like 4x16: generation 3, 4, 5, then lanes"),
        (
            "RTX 3090",
            2,
            {"pcie": "4x16", "gb_per_s": 3},
            "has pcie and gb_per_s of nvlink, pcie and gb_per_s; give one",
        ),
        ("RTX 3090", 2, {"gb_per_s": 3, "peer_access": True}, "give it with pcie"),
        ("RTX 3090", 2, {"gb_per_s": -1}, "-1 is not above 0"),
        ("RTX 3090", 2, {"nvlnk": True}, "did you mean nvlink"),
    ],
)
def test_a_link_that_cannot_be_is_refused(card, count, link, mistake):
    with pytest.raises(ImpossibleHardware, match=r"nodes\[0\]\.gpu_link") as caught:
        declared(card, count, **link)

    assert mistake in str(caught.value)
