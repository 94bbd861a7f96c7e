import os

from clusters import probe


def test_this_node_has_at_least_a_cpu_with_memory():
    node = probe.probe_this_node()

    assert 1 <= node.num_cores <= (os.cpu_count() or 1)
    assert node.cpu.kind == "cpu"
    assert node.memory_bytes is None or 2**28 < node.memory_bytes <= os.sysconf("SC_PHYS_PAGES") * os.sysconf(
        "SC_PAGE_SIZE"
    )


def test_a_line_of_nvidia_smi_becomes_a_device():
    gpu = probe._gpu(["NVIDIA GeForce RTX 3060", "11911", "8.6"])

    assert gpu.memory_bytes == 11911 * 2**20
    assert gpu.compute_capability == (8, 6)
    assert gpu.has_fast_bf16


def test_unknown_gpu_memory_is_none_not_a_guess():
    assert probe._gpu(["Orin", "[N/A]", "8.7"]).memory_bytes is None
