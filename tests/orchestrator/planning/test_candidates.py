"""Slots, the network between them, and what a step waits for it."""

from dataclasses import replace

import pytest

from clusters.capability import ClusterCapability, Link
from orchestrator.planning.candidates import Slot, Switches, limit_per_node, network_between, waiting_s
from strategies.cost.network import Network
from strategies.cost.time import memory_rate, product_rate
from tests.orchestrator.planning.machines import machine, strategy_plan

A, B, C = machine("a", "RTX 3090", "RTX 3090"), machine("b", "RTX 3090"), machine("c", "RTX 3090")
LINKS = (Link(("a", "b"), 1e9, 1e-4), Link(("b", "c"), 2e9, 3e-4), Link(("a", "c"), 4e9, 2e-4))


OWN = ("dtypes", "attentions", "packings", "checkpointings", "offloads")


def slots(*nodes):
    return [Slot(node, device, device.memory_bytes, 1) for node in nodes for device in node.gpus]


def test_switches_keep_the_values_that_were_used_in_their_order():
    open_switches, plan = Switches(2048), strategy_plan()

    used = open_switches.used_by([plan.techniques, replace(plan.techniques, dtype="float32", packing=True)])

    assert (used.dtypes, used.attentions, used.packings) == (["bfloat16", "float32"], ["sdpa"], [True, False])
    assert (used.checkpointings, used.offloads) == ([False], ["none"])
    assert replace(open_switches, **{name: getattr(used, name) for name in OWN}) == used


@pytest.mark.parametrize(
    ("offers", "names"), [((None, None), "aab"), ((1, None), "ab"), ((0, None), "b"), ((2, 1), "aab"), ((1, 0), "a")]
)
def test_a_node_gives_no_more_slots_than_it_offers(offers, names):
    nodes = (replace(node, num_slots=offer) for node, offer in zip((A, B), offers, strict=True))

    assert "".join(slot.node.name for slot in limit_per_node(slots(*nodes))) == names


@pytest.mark.parametrize("cores", [1, 2, 3, 16])
@pytest.mark.parametrize("workers", [1, 2, 4, 8, 16])
def test_all_workers_of_a_cpu_together_have_no_more_than_the_cpu(cores, workers):
    node = machine("c", cores=cores)
    unknown = replace(node.cpu, flops_per_s={}, memory_bytes_per_s=None)

    part, guess = (
        Slot(node, cpu, 1.0, max(1, cores // workers)).as_part_of_cpu(workers) for cpu in (node.cpu, unknown)
    )

    assert workers * part.device.flops_per_s["float32"] <= node.cpu.flops_per_s["float32"]
    assert workers * part.device.memory_bytes_per_s == node.cpu.memory_bytes_per_s
    typical, of_one = (product_rate(one.device, one.node, "float32")[0] for one in (Slot(node, unknown, 1.0, 1), guess))
    assert workers * of_one <= 1.001 * typical
    assert workers * memory_rate(guess.device)[0] == memory_rate(unknown)[0]


def test_more_workers_than_cores_take_turns():
    node = machine("c", cores=2)

    two, eight = (Slot(node, node.cpu, 1.0, 1).as_part_of_cpu(workers).device for workers in (2, 8))

    assert (two.flops_per_s["float32"], eight.flops_per_s["float32"]) == (2.5e11, 5e11 / 8)
    assert (two.core_share, eight.core_share) == (1.0, 0.25)


def test_a_ring_is_as_fast_as_its_slowest_link():
    network, assumed = network_between(slots(B, C, A), ClusterCapability((A, B, C), LINKS))

    assert network == Network(4, 1e9, 3e-4) and not assumed


def test_an_unknown_link_is_taken_for_a_gigabit_and_said_to_be_assumed():
    network, assumed = network_between(slots(B, C), ClusterCapability((B, C)))

    assert network == Network(2, 118e6, 0.4e-3) and assumed


def test_one_worker_has_no_network_and_cards_of_one_node_have_their_bus():
    cluster = ClusterCapability((A, B))

    assert network_between(slots(B), cluster) == (None, False)
    network, assumed = network_between(slots(A), cluster)
    assert network.num_workers == 2 and network.bytes_per_s > 1e9 and assumed  # over slots that nobody measured


def test_dividing_more_waits_longer():
    network = Network(2, 1e8, 1e-4)
    waits = []
    for stage, share in ((0, None), (1, 0.5), (2, None), (3, None)):
        plan = strategy_plan(step_s=0.01, stage=stage)  # too short to hide what stage 3 gathers
        plan = replace(plan, techniques=replace(plan.techniques, state_share=share), gathered_bytes=1e8)
        waits.append(waiting_s(network, [plan, plan]))

    assert waits == sorted(waits) and waits[0] < waits[1] < waits[3]
