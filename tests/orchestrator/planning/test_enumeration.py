"""Every way to run a workload: groups, shares, equal nodes estimated once, and why others do not fit."""

from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from clusters.capability import ClusterCapability, Link
from clusters.units import GIB
from orchestrator.job.job_file import parse_job
from orchestrator.planning.candidates import Division
from orchestrator.planning.enumeration import Enumeration
from orchestrator.planning.planner import offered_slots, switches_of
from orchestrator.planning.settings import Assignment, Rejections, preferred_plan
from orchestrator.planning.workload import describe
from strategies import METHODS
from strategies.cost.network import Network
from strategies.methods.lora import Lora
from tests.orchestrator.planning.machines import LARGE, SMALL, machine, strategy_plan

LORA = "method: {type: lora}\n"


def spec_of(text):
    return parse_job(f"model: {{model_name_or_path: m}}\n{text}", Path()).spec


def enumeration(shape, *nodes, text=LORA, methods=None, links=()):
    spec = spec_of(f"data: {{train: a.jsonl, max_length: 2048}}\n{text}")
    cluster = ClusterCapability(nodes, links)
    work, _, _ = describe(spec, shape, [512] * 1600, 1600 * 256, 1)
    slots = offered_slots(spec, cluster)
    return Enumeration(work, slots, cluster, methods or spec.methods(), switches_of(spec, 2048))


def groups(found):
    return {tuple(part.slot.node.name for part in candidate.placed) for candidate in found.fitting}


def offloads(found):
    return {part.plan.techniques.offload for candidate in found.fitting for part in candidate.placed}


@dataclass(frozen=True)
class CountedLora(Lora):
    """LoRA that notes where it is estimated."""

    def estimate(self, workload, device, node, techniques):
        ESTIMATED.append(node.name)
        return super().estimate(workload, device, node, techniques)


ESTIMATED: list[str] = []


def test_each_device_alone_and_the_fastest_together_are_candidates():
    fast, slow = machine("fast", "RTX 4090"), machine("slow", "RTX 3060")
    links = (Link(("fast", "slow"), 1e10, 1e-4),)

    found = enumeration(SMALL, fast, slow, links=links).run()

    assert groups(found) == {("fast",), ("slow",), ("fast", "slow")}
    together = [one for one in found.fitting if len(one.placed) == 2 and not one.zero_stage]
    assert all(one.placed[0].share > one.placed[1].share > 0 for one in together)
    assert all(sum(part.share for part in one.placed) == pytest.approx(1) for one in together)


def test_nodes_that_differ_only_in_name_are_estimated_once():
    ESTIMATED.clear()
    node = machine("a", "RTX 3090")

    found = enumeration(SMALL, *[replace(node, name=name) for name in "abc"], methods=[CountedLora()]).run()

    assert groups(found) == {("a",), ("a", "b"), ("a", "b", "c")}  # equal ones alone are one way
    assert ESTIMATED and set(ESTIMATED) == {"a"}


def test_a_node_that_does_not_fit_gives_its_reason_to_its_twins():
    node = machine("a", "RTX 3060")

    found = enumeration(LARGE, node, replace(node, name="b")).run()

    assert not found.fitting
    nearest = found.rejections.nearest
    assert nearest["a (RTX 3060 12GB)", "lora"] == nearest["b (RTX 3060 12GB)", "lora"]
    assert "needs" in nearest["a (RTX 3060 12GB)", "lora"].shortage.reason


def test_a_slow_link_in_the_middle_does_not_keep_out_the_node_behind_it():
    nodes = machine("a", "RTX 4090"), machine("b", "RTX 3090"), machine("c", "RTX 3060")
    links = (Link(("a", "b"), 1e5, 1e-3), Link(("b", "c"), 1e5, 1e-3), Link(("a", "c"), 1e10, 1e-4))

    assert ("a", "c") in groups(enumeration(SMALL, *nodes, links=links).run())


def test_offloading_is_looked_at_only_where_nothing_fits_without_it():
    roomy = enumeration(SMALL, machine("a", "RTX 3090")).run()
    tight = enumeration(SMALL, machine("a", "RTX 3060", memory_gib=256), text="method: {type: full}\n").run()

    assert roomy.fitting and offloads(roomy) == {"none"}
    assert tight.fitting and "none" not in offloads(tight)


def test_deepspeed_refuses_devices_of_two_kinds():
    nodes = machine("a", "RTX 4090"), machine("b", "RTX 3060")

    found = enumeration(SMALL, *nodes, text=LORA + "strategy: {mode: zero3}\n").run()

    assert not found.fitting
    assert any("needs devices of one kind" in reason for reason in found.rejections.reasons.values())


def test_zero_1_by_memory_gives_the_larger_card_more_of_the_state():
    nodes = machine("a", "A100 80GB"), machine("b", "RTX 3090")

    found = enumeration(SMALL, *nodes, text="method: {type: full}\nstrategy: {mode: zero1}\n").run()

    parts = {part.slot.node.name: part.plan.techniques.state_share for part in found.fitting[0].placed}
    assert parts["a"] > parts["b"] and sum(parts.values()) == pytest.approx(1)


def test_of_plans_about_as_fast_the_one_listed_first_is_preferred():
    plain, faster, fastest = strategy_plan(1.005), strategy_plan(1.0, 3 * GIB), strategy_plan(0.5, 2 * GIB)

    assert preferred_plan([plain, faster], "time") is plain
    assert preferred_plan([plain, faster, fastest], "time") is fastest
    assert preferred_plan([faster, fastest, plain], "memory") is plain
    assert preferred_plan([], "time") is None


def test_where_gradients_wait_for_the_network_fewer_micro_batches_that_hide_more_are_preferred():
    many, few = replace(strategy_plan(1.0), num_micro_batches=8), strategy_plan(1.05)
    many, few = (replace(plan, gradient_bytes=1e8) for plan in (many, few))
    slow = Network(2, 1e8, 1e-4)

    assert preferred_plan([many, few], "time") is many
    assert preferred_plan([many, few], "time", slow) is few
    assert preferred_plan([many, few], "time", replace(slow, bytes_per_s=1e12)) is many


@pytest.mark.parametrize(
    ("text", "share", "rows"),
    [
        ("data: {packing: false}\n", 1.0, {16, 8, 4, 2, 1}),
        ("data: {packing: false}\n", 0.3, {5, 4, 3, 2, 1}),  # halves of five: 3 and 2, not 2, 2 and 1
        ("data: {packing: true}\n", 1.0, {4, 2, 1}),  # of 2048 tokens, four samples each
        ("data: {packing: false}\ntrain: {gradient_accumulation_steps: 4, global_batch_size: 16}\n", 1.0, {4, 2, 1}),
        ("data: {packing: false}\ntrain: {per_device_train_batch_size: 3, global_batch_size: 16}\n", 1.0, {3}),
    ],
)
def test_micro_batches_are_even_parts_of_the_share_and_powers_of_two(text, share, rows):
    spec = spec_of(text.replace("{packing", "{train: a.jsonl, packing"))
    work, _, _ = describe(spec, SMALL, [512] * 1600, 1600 * 256, 1)
    node = machine("a", "A100 80GB")
    (slot,) = offered_slots(spec, ClusterCapability((node,)))
    part = Assignment(replace(work, share=share), slot, METHODS["lora"](), Division(), switches_of(spec, 2048))

    found = {plan.techniques.per_device_train_batch_size for plan in part.fitting_plans(Rejections()).plans}

    assert found == rows


def test_one_combination_stands_for_each_reason():
    rejections = Rejections()
    for label, reason in (("lora on a (X)", "too large"), ("full on a (X)", "too large"), ("full on b (X)", "no bf16")):
        rejections.add(label, reason)

    assert rejections.reasons == {"lora on a (X)": "too large", "full on b (X)": "no bf16"}
    assert rejections.of_slot("b (X)") == "no bf16" and rejections.of_slot("c (X)") is None
