"""Facts of a card and of a PyTorch -> one sentence, or none.  The builds are those of published wheels."""

import pytest

from clusters.capability import DeviceCapability
from clusters.hardware.torch_build import TorchBuild, covers, installed_build, why_unusable
from clusters.hardware.torch_gpus import Seen, SeenGpu, index_of, judge

ARCHES_130 = ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120")
CUDA_130 = TorchBuild("2.13.0+cu130", "13.0", None, ARCHES_130)
CPU = TorchBuild("2.13.0+cpu")
ROCM = TorchBuild("2.13.0+rocm7.1", None, "7.1", ("gfx1100", "gfx942"))
CU126 = "install torch 2.13.0 for CUDA 12.6 (https://pytorch.org/get-started/locally/)"
CU129, CU130 = (CU126.replace("12.6", cuda) for cuda in ("12.9", "13.0"))


def card(capability=(8, 6), driver="580.95.05", kind="cuda", **more):
    return DeviceCapability(kind, "a card", 2**33, compute_capability=capability, driver_version=driver, **more)


@pytest.mark.parametrize(
    ("device", "build", "says"),
    [
        (card(), CUDA_130, None),
        (card((12, 1)), CUDA_130, None),  # GB10: kernels of 12.0 run on 12.1
        (card((13, 0)), CUDA_130, None),  # not built yet: from PTX
        (card(driver=None), CUDA_130, None),  # nothing speaks against it
        (card((6, 1)), TorchBuild("2.13.0+cu130", "13.0"), None),  # kernels not known without loading torch
        (card(), CPU, f"torch 2.13.0+cpu is built for CPUs: {CU130}"),
        (card(driver="550.144.03"), CPU, f"torch 2.13.0+cpu is built for CPUs: {CU129}"),
        (card((6, 1)), CPU, f"torch 2.13.0+cpu is built for CPUs: {CU126}"),
        (card(), ROCM, f"torch 2.13.0+rocm7.1 is built for ROCm 7.1: {CU130}"),
        (
            card(driver="550.144.03"),
            CUDA_130,
            "driver 550.144.03 is too old for CUDA 13.0 of torch 2.13.0+cu130, which needs 580 or newer: update the"
            f" driver to 580 or newer, or {CU129}",
        ),
        (
            card(driver="470.256.02"),
            CUDA_130,
            "driver 470.256.02 is too old for CUDA 13.0 of torch 2.13.0+cu130, which needs 580 or newer: update the"
            " driver to 580 or newer",
        ),
        (
            card((6, 1)),
            CUDA_130,
            "torch 2.13.0+cu130 has no kernels for compute capability 6.1 (only sm_75, sm_80, sm_86, sm_90, sm_100,"
            f" sm_120): {CU126}",
        ),
        (
            card((3, 5), "470.256.02"),
            TorchBuild("2.13.0+cu126", "12.6"),
            "driver 470.256.02 is too old for CUDA 12.6 of torch 2.13.0+cu126, which needs 525 or newer: no published"
            " build has kernels for compute capability 3.5",
        ),
        (card(None, None, "rocm"), ROCM, None),
        (
            card(None, None, "rocm"),
            CUDA_130,
            "torch 2.13.0+cu130 is not built for ROCm: install the ROCm build of torch"
            " (https://pytorch.org/get-started/locally/)",
        ),
        (DeviceCapability("cpu", "a CPU", 2**33), CPU, None),
    ],
)
def test_what_stands_between_a_card_and_a_torch_is_one_sentence_with_the_remedy(device, build, says):
    assert why_unusable(device, build) == says


@pytest.mark.parametrize(
    ("arches", "capability", "runs"),
    [
        (("sm_80",), (8, 6), True),
        (("sm_86",), (8, 0), False),
        (("sm_80",), (9, 0), False),
        (("compute_80",), (9, 0), True),
        (("sm_90a",), (9, 0), True),
        (("sm_90a",), (9, 1), False),
        (("gfx1100",), (9, 0), False),
    ],
)
def test_machine_code_runs_within_its_major_version_and_ptx_on_everything_newer(arches, capability, runs):
    assert covers(arches, capability) is runs


def test_the_installed_build_is_read_without_loading_it():
    import torch

    assert installed_build() == TorchBuild(torch.__version__, torch.version.cuda, torch.version.hip)


TWO = (SeenGpu(0, "B", "bb-1"), SeenGpu(1, "A", "aa-1"))
A, B = card(uuid="GPU-aa-1"), card(uuid="GPU-BB-1")
OLD = (DeviceCapability("cuda", "A", 1), DeviceCapability("cuda", "B", 1))
INTEGRATED, RADEON = card(kind="rocm", pci_bus_id="0000:00:02.0"), card(kind="rocm", pci_bus_id="0000:03:00.0")


@pytest.mark.parametrize(
    ("device", "alike", "seen", "index"),
    [
        (A, (A, B), TWO, 1),  # CUDA counts the faster first
        (B, (A, B), TWO, 0),
        (A, (A, B), TWO[:1], None),  # torch sees the other one only
        (A, (A,), (), None),
        (OLD[0], OLD, (SeenGpu(0, "A"), SeenGpu(1, "B")), 0),  # no UUIDs: by position ...
        (OLD[0], OLD, (SeenGpu(0, "B"), SeenGpu(1, "A")), None),  # ... and never another card
        (OLD[1], OLD, (SeenGpu(0, "B"),), None),
        (RADEON, (INTEGRATED, RADEON), (SeenGpu(0, "RX", "37", (0, 3, 0)),), 0),  # HIP leaves out the integrated one
        (INTEGRATED, (INTEGRATED, RADEON), (SeenGpu(0, "RX", "37", (0, 3, 0)),), None),
    ],
)
def test_a_card_is_found_among_those_of_torch_by_what_it_is_not_by_its_place(device, alike, seen, index):
    assert index_of(device, alike, seen) == index


def test_a_card_that_torch_does_not_see_says_so_with_the_words_of_cuda_and_is_looked_at_again():
    found = judge(card(), None, Seen(CUDA_130, error="CUDA unknown error"))

    assert "torch 2.13.0+cu130 does not see it (CUDA unknown error): restart the machine" in found.problem
    assert found.doubt is not None
