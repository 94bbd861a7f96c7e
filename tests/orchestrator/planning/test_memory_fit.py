"""Plans fit into the memory of their device, and together into that of their node."""

import math
from dataclasses import replace

import pytest

from clusters.units import GIB
from orchestrator.planning.candidates import Placed, Slot
from orchestrator.planning.memory_fit import device_shortage, host_usable_bytes, needed_bytes, node_shortage
from strategies import METHODS
from tests.orchestrator.planning.machines import machine, strategy_plan

NODE = machine("a", "RTX 3090", "RTX 3090", memory_gib=32)
UNKNOWN = replace(NODE, memory_bytes=None)


def slot(node=NODE):
    return Slot(node, node.devices[0], 10 * GIB, 1)


@pytest.mark.parametrize(
    ("plan", "node", "shortage"),
    [
        (strategy_plan(weights_bytes=10 * GIB), NODE, None),
        (strategy_plan(weights_bytes=11 * GIB), NODE, "needs 11.0 GiB, has 10.0 GiB usable"),
        (strategy_plan(weights_bytes=9 * GIB, high_bytes=14 * GIB), NODE, None),  # a GPU's margin covers that
        (strategy_plan(host_bytes=30 * GIB), NODE, None),  # 2 GiB are left to the system
        (
            strategy_plan(host_bytes=31 * GIB),
            NODE,
            "needs 31.0 GiB, has 30.0 GiB usable of the node's own memory",
        ),
        (strategy_plan(host_bytes=GIB), UNKNOWN, "needs 1.0 GiB of the node's own memory, whose size is unknown"),
    ],
)
def test_a_plan_that_does_not_fit_names_the_memory(plan, node, shortage):
    found = device_shortage(plan, slot(node))

    assert (found and found.reason) == shortage
    assert found is None or found.times > 1


def test_of_two_memories_that_are_too_small_the_one_exceeded_most_is_named():
    host, device = (strategy_plan(weights_bytes=11 * GIB, host_bytes=size * GIB) for size in (300, 31))

    assert "needs 300.0 GiB, has 30.0 GiB" in device_shortage(host, slot()).reason
    assert "needs 11.0 GiB, has 10.0 GiB" in device_shortage(device, slot()).reason


def test_a_shortage_too_small_for_the_figures_is_given_by_itself():
    plan = strategy_plan(weights_bytes=10 * GIB + 3 * 2**20)

    assert device_shortage(plan, slot()).reason == "needs 10.0 GiB, 3.0 MiB more than is usable"


def test_workers_of_a_node_share_its_memory():
    part = Placed(slot(), strategy_plan(host_bytes=16 * GIB), 0.5)
    lora = METHODS["lora"]()

    assert node_shortage([part], 1e9, lora) is None
    assert node_shortage([part, part], 1e9, lora).reason == (
        "the 2 workers on a need 32.0 GiB of the node's own memory together, has 29.3 GiB usable"
    )


@pytest.mark.parametrize("count", range(2, 9))
def test_of_any_number_of_workers_the_host_memory_is_summed(count):
    node = machine("a", *["RTX 3090"] * count, memory_gib=128)  # 126 beside the system, 0.7 for each further process
    lora, each = METHODS["lora"](), (126 - 0.7 * (count - 1)) / count

    def shortage(gib):
        part = Placed(slot(node), strategy_plan(host_bytes=gib * GIB), 1 / count)
        return node_shortage([part] * count, 1e9, lora)

    assert shortage(0.99 * each) is None
    assert f"the {count} workers on a need" in shortage(1.01 * each).reason


def test_a_node_without_room_for_a_process_takes_no_worker():
    tiny, enough = (Placed(slot(machine("a", "RTX 3090", memory_gib=gib)), strategy_plan(), 1.0) for gib in (1, 2))

    shortage = node_shortage([tiny], 1e9, METHODS["lora"]())

    assert shortage.reason == "a has 1.0 GiB of memory of its own, and its system and a worker's process take 2.0 GiB"
    assert shortage.times == 2 and node_shortage([enough], 1e9, METHODS["lora"]()) is None


def test_a_cpu_beside_gpus_counts_with_all_it_holds():
    gpu = Placed(slot(), strategy_plan(host_bytes=16 * GIB), 0.5)
    cpu = Placed(Slot(NODE, NODE.devices[-1], 20 * GIB, 1), strategy_plan(weights_bytes=15 * GIB), 0.5)
    lora = METHODS["lora"]()

    assert node_shortage([gpu], 1e9, lora) is None and node_shortage([cpu], 1e9, lora) is None
    assert "the 2 workers on a need 31.0 GiB" in node_shortage([gpu, cpu], 1e9, lora).reason


def test_cpu_workers_alone_divide_their_memory_by_slots():
    cpu = Placed(Slot(NODE, NODE.devices[-1], 15 * GIB, 1), strategy_plan(weights_bytes=15 * GIB), 0.5)

    assert node_shortage([cpu, cpu], 1e9, METHODS["lora"]()) is None


def test_workers_on_other_nodes_do_not_count():
    parts = [Placed(slot(replace(NODE, name=name)), strategy_plan(host_bytes=16 * GIB), 0.5) for name in "ab"]

    assert node_shortage(parts, 1e9, METHODS["lora"]()) is None


def test_deepspeed_loads_the_whole_model_in_every_worker_s_host_memory():
    lora, num_parameters = METHODS["lora"](), 9 * GIB  # 18 GiB as bfloat16
    plain, divided = (Placed(slot(), strategy_plan(stage=stage), 0.5) for stage in (0, 3))

    assert node_shortage([plain, plain], num_parameters, lora) is None
    assert "the 2 workers on a need 36.0 GiB" in node_shortage([divided, divided], num_parameters, lora).reason
    unknown = Placed(slot(UNKNOWN), strategy_plan(stage=3), 0.5)
    assert "whose size is unknown" in node_shortage([unknown], num_parameters, lora).reason


def test_a_cpu_needs_half_way_to_the_worst_beside_its_margin():
    memory = strategy_plan(weights_bytes=8 * GIB, high_bytes=12 * GIB).memory

    assert needed_bytes(memory, "cuda") == 8 * GIB
    assert needed_bytes(memory, "cpu") == pytest.approx(9.5 * GIB)  # 10 of which the margin is a twentieth
    assert needed_bytes(strategy_plan(weights_bytes=8 * GIB).memory, "cpu") == 8 * GIB


@pytest.mark.parametrize("usable", [0.0, -0.2 * GIB])
def test_nothing_fits_into_memory_of_which_nothing_is_left(usable):
    full = replace(slot(), memory_bytes=usable)

    assert device_shortage(strategy_plan(weights_bytes=GIB), full).times == math.inf


def test_a_plan_on_a_cpu_names_its_worst():
    node = machine("c", memory_gib=32)
    plan = strategy_plan(weights_bytes=9 * GIB, high_bytes=14 * GIB)

    shortage = device_shortage(plan, Slot(node, node.devices[0], 10 * GIB, 1))

    assert shortage.reason == "may need 14.0 GiB at worst, has 10.0 GiB usable"


def test_memory_of_unknown_size_holds_nothing():
    assert host_usable_bytes(UNKNOWN) == 0 and host_usable_bytes(machine("b", memory_gib=1)) == 0
