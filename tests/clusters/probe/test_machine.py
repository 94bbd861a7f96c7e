"""What is known of a machine by reading.  Fakes are a /proc, a /sys/fs/cgroup and a vendor's tool, never our code."""

import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import pytest

from clusters.hardware import gpus, limits
from clusters.probe.machine import look_at_this_node
from clusters.safe.commands import run_within

ROOT = Path(__file__).resolve().parents[3]
GIB = 2**30
TWO_CARDS = """\
{"index": "0", "uuid": "GPU-aaaa", "name": "NVIDIA GeForce RTX 3060", "memory.free": "11911", "memory.total": "12288",
 "power.limit": "170.00", "driver_version": "550.54.14", "compute_cap": "8.6"},
{"index": "1", "uuid": "GPU-bbbb", "name": "NVIDIA GeForce GTX 1080", "memory.free": "3000", "memory.total": "8192",
 "power.limit": "[N/A]", "driver_version": "550.54.14", "compute_cap": "6.1"}"""
NVIDIA_SMI = """\
#!{python}
import sys
cards = [{cards}]
fields = next(a for a in sys.argv if a.startswith("--query-gpu=")).split("=")[1].split(",")
for field in fields:
    if field not in cards[0]:
        sys.exit(f'Field "{{field}}" is not a valid field to query.')
for card in cards:
    print(", ".join(card[field] for field in fields))
"""


@pytest.fixture
def tool(tmp_path, monkeypatch):
    """Puts a program on PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def put(name, text):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)

    return put


@pytest.fixture
def nvidia_smi(tool):
    return lambda cards=TWO_CARDS: tool("nvidia-smi", NVIDIA_SMI.format(python=sys.executable, cards=cards))


@pytest.fixture
def kernel(tmp_path, monkeypatch):
    """A machine whose kernel says what the test writes; physical memory and cores stay real."""
    monkeypatch.setattr(limits, "PROC", tmp_path / "proc")
    monkeypatch.setattr(limits, "CGROUPS", tmp_path / "cgroup")

    def write(path, text):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text + "\n")

    return write


def test_this_node_has_at_least_a_cpu_with_memory():
    node = look_at_this_node()

    assert 1 <= node.num_cores <= (os.cpu_count() or 1)
    assert node.cpu is not None and node.cpu.kind == "cpu" and not node.cpu.is_measured
    assert node.memory_bytes is not None and 2**28 < node.memory_bytes <= (node.cpu.memory_total_bytes or 0)
    assert node.hardware_hash == look_at_this_node().hardware_hash


def test_importing_the_probe_loads_neither_torch_nor_ray():
    code = (
        "import sys, clusters.probe.machine; print([name for name in ('torch', 'ray', 'numpy') if name in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)

    assert shown.stdout.strip() == "[]"


def test_without_any_cgroup_physical_memory_counts(kernel):
    assert limits.usable_memory_bytes() == limits.physical_memory_bytes()


def test_a_cgroup_limit_below_physical_memory_is_respected(kernel):
    kernel("proc/self/cgroup", "0::/")
    kernel("cgroup/memory.max", str(GIB))

    assert limits.usable_memory_bytes() == GIB


def test_a_cgroup_without_a_limit_takes_nothing_away(kernel):
    kernel("proc/self/cgroup", "0::/")
    kernel("cgroup/memory.max", "max")
    kernel("cgroup/cpu.max", "max 100000")

    assert limits.usable_memory_bytes() == limits.physical_memory_bytes()
    assert limits.num_cores() == len(os.sched_getaffinity(0))


def test_the_limit_of_a_cgroup_around_ours_counts_too(kernel):
    kernel("proc/self/cgroup", "0::/user.slice/job.scope")
    kernel("cgroup/user.slice/job.scope/memory.max", str(3 * GIB))
    kernel("cgroup/user.slice/memory.max", str(2 * GIB))
    kernel("cgroup/other.slice/memory.max", str(GIB))  # not around us

    assert limits.usable_memory_bytes() == 2 * GIB


def test_the_quota_of_a_nested_cgroup_limits_the_cores(kernel):
    kernel("proc/self/cgroup", "0::/pod/container")
    kernel("cgroup/pod/container/cpu.max", "max 100000")
    kernel("cgroup/pod/cpu.max", "150000 100000")

    assert limits.num_cores() == 1


def test_cgroups_of_version_1_are_read(kernel):
    kernel("proc/self/cgroup", "4:memory:/docker/abc\n1:cpu,cpuacct:/docker/abc\n0::/")
    kernel("cgroup/memory/docker/abc/memory.limit_in_bytes", str(GIB))
    kernel("cgroup/memory/memory.limit_in_bytes", "9223372036854771712")  # version 1 for no limit
    kernel("cgroup/cpu,cpuacct/docker/abc/cpu.cfs_quota_us", "100000")
    kernel("cgroup/cpu,cpuacct/docker/abc/cpu.cfs_period_us", "100000")

    assert limits.usable_memory_bytes() == GIB
    assert limits.num_cores() == 1


def test_a_container_that_sees_its_own_cgroup_as_the_root_is_limited(kernel):
    kernel("proc/self/cgroup", "0::/../../docker/abc")
    kernel("cgroup/memory.max", str(GIB))

    assert limits.usable_memory_bytes() == GIB


def test_the_flags_that_matter_are_picked(kernel):
    kernel("proc/cpuinfo", "model name\t: Xeon\nflags\t\t: fpu avx2 fma amx_tile amx_bf16 avx512f")
    cpu = look_at_this_node().cpu

    assert cpu.name == "Xeon"
    assert set(cpu.instruction_sets) == {"avx2", "fma", "amx_tile", "amx_bf16", "avx512f"}
    assert cpu.has_bf16_units


def test_two_gpus_come_before_the_cpu(nvidia_smi):
    nvidia_smi()
    node = look_at_this_node()

    assert [device.name for device in node.gpus] == ["NVIDIA GeForce RTX 3060", "NVIDIA GeForce GTX 1080"]
    assert [device.compute_capability for device in node.gpus] == [(8, 6), (6, 1)]
    assert [device.power_w for device in node.gpus] == [170.0, None]
    assert node.gpus[0].has_bf16_units and not node.gpus[1].has_bf16_units
    assert node.devices[-1] == node.cpu


def test_gpus_are_listed_in_pci_order_with_their_uuids(nvidia_smi):
    late = TWO_CARDS.replace('"8.6"', '"8.6", "mig.mode.current": "[N/A]", "pci.bus_id": "00000000:41:00.0"')
    nvidia_smi(late.replace('"6.1"', '"6.1", "mig.mode.current": "[N/A]", "pci.bus_id": "00000000:01:00.0"'))
    gpus = look_at_this_node().gpus

    assert [gpu.name[-4:] for gpu in gpus] == ["1080", "3060"]
    assert [gpu.uuid for gpu in gpus] == ["GPU-bbbb", "GPU-aaaa"]
    assert gpus[0].pci_bus_id == "00000000:01:00.0"


def test_memory_that_others_hold_on_a_gpu_is_not_ours(nvidia_smi):
    nvidia_smi()
    used = look_at_this_node().gpus[1]

    assert used.memory_bytes == 3000 * 2**20
    assert used.memory_total_bytes == 8192 * 2**20


def test_what_a_gpu_does_not_say_is_none_not_a_guess(nvidia_smi):
    nvidia_smi(TWO_CARDS.replace("11911", "[N/A]").replace("8.6", "[N/A]").replace("12288", "[Not Supported]"))
    gpu = look_at_this_node().gpus[0]

    assert (gpu.memory_bytes, gpu.memory_total_bytes, gpu.compute_capability) == (None, None, None)
    assert gpu.sources == {"power_w": "datasheet"}


def test_a_driver_too_old_for_compute_capability_still_lists_its_gpus(nvidia_smi):
    nvidia_smi(TWO_CARDS.replace("compute_cap", "something"))

    assert [device.compute_capability for device in look_at_this_node().gpus] == [None, None]


@pytest.mark.parametrize(
    ("visible", "shown"), [("1", ["1080"]), ("1,0", ["1080", "3060"]), ("GPU-aa", ["3060"]), ("", []), ("-1,0", [])]
)
def test_gpus_hidden_from_cuda_are_not_ours(nvidia_smi, monkeypatch, visible, shown):
    nvidia_smi()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)

    assert [device.name[-4:] for device in look_at_this_node().gpus] == shown


def test_a_part_of_a_card_that_is_named_is_refused_in_a_sentence(nvidia_smi, monkeypatch):
    nvidia_smi()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-2f0c")
    node = look_at_this_node()

    assert node.gpus == ()
    assert "CUDA_VISIBLE_DEVICES=MIG-2f0c names a part of a card" in node.problems[0]


def test_a_driver_without_a_card_is_no_gpu(tool):
    tool("nvidia-smi", "#!/bin/sh\necho 'No devices were found'\nexit 6\n")

    assert look_at_this_node().gpus == ()


def test_a_hanging_driver_does_not_hang_the_probe(tool, monkeypatch):
    tool("nvidia-smi", "#!/bin/sh\nsleep 60\n")
    monkeypatch.setattr(gpus, "TIMEOUT_S", 0.3)
    start = time.perf_counter()
    node = look_at_this_node()

    assert node.gpus == () and node.cpu is not None
    assert time.perf_counter() - start < 40


def test_a_program_out_of_time_is_ended_with_its_children(tmp_path):
    script = f"sleep 60 & echo $! > {tmp_path}/child; wait"
    with pytest.raises(subprocess.TimeoutExpired):
        run_within(["sh", "-c", script], timeout_s=1)
    child = Path("/proc", (tmp_path / "child").read_text().strip(), "stat")
    patience = time.perf_counter() + 40
    while is_running(child) and time.perf_counter() < patience:
        time.sleep(0.02)  # the kernel ends it in its own time

    assert not is_running(child)


def is_running(stat):
    return stat.exists() and stat.read_text().split()[2] != "Z"  # Z: dead, and nobody has asked for its exit status


def test_an_amd_card_is_read_from_rocm_smi(tool):
    tool(
        "rocm-smi",
        """#!/bin/sh
echo '{"card0": {"VRAM Total Memory (B)": "17163091968", "VRAM Total Used Memory (B)": "163091968",'
echo ' "Card Series": "Radeon RX 6800 XT", "Max Graphics Package Power (W)": "255.0",'
echo ' "Unique ID": "0x61a2", "PCI Bus": "0000:03:00.0"}, "system": {"Driver": "6"}}'
""",
    )
    gpu = look_at_this_node().gpus[0]

    assert (gpu.kind, gpu.name, gpu.power_w) == ("rocm", "Radeon RX 6800 XT", 255.0)
    assert (gpu.memory_bytes, gpu.memory_total_bytes) == (17_000_000_000, 17_163_091_968)
    assert (gpu.uuid, gpu.pci_bus_id) == ("GPU-61a2", "0000:03:00.0")


def test_the_gpu_of_a_mac_is_refused_in_a_sentence_and_not_passed_over(monkeypatch):
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    node = look_at_this_node()

    assert node.gpus == () and "MPS" in node.problems[0] and "CPU alone" in node.problems[0]


def test_a_driver_that_fails_is_said_in_its_own_words(tool):
    tool("nvidia-smi", "#!/bin/sh\necho 'Failed to initialize NVML: Driver/library version mismatch'\nexit 18\n")

    (problem,) = look_at_this_node().problems
    assert (
        problem
        == "nvidia-smi failed, its GPUs are not used: Failed to initialize NVML: Driver/library version mismatch"
    )


def test_another_gpu_is_other_hardware(nvidia_smi):
    nvidia_smi()
    with_two = look_at_this_node()
    nvidia_smi(TWO_CARDS.replace("GTX 1080", "RTX 4090"))

    assert look_at_this_node().hardware_hash != with_two.hardware_hash


def test_less_free_memory_is_the_same_hardware(nvidia_smi):
    nvidia_smi()
    before = look_at_this_node()
    nvidia_smi(TWO_CARDS.replace("11911", "500"))
    after = look_at_this_node()

    assert after.hardware_hash == before.hardware_hash
    assert after.gpus[0].memory_bytes == 500 * 2**20
