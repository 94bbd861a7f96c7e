"""A run's nodes are lost, return and join: what is planned then.  Ray's door and the clock are fakes."""

import functools
from dataclasses import replace
from types import SimpleNamespace

import pytest

from clusters.capability import ClusterCapability
from clusters.ray import nodes, probe
from clusters.units import format_s
from orchestrator.errors import HardwareChanged, JobError, NothingFits, RunFailed
from orchestrator.job.job_file import parse_job
from orchestrator.lifecycle import recovery as recovery_module
from orchestrator.lifecycle.recovery import Recovery
from orchestrator.lifecycle.stages.node_layers import with_held_layers
from orchestrator.runs.events import ErrorReport, Replan, StateChange, StepReport, WorkerKilled
from orchestrator.runs.run_folder import RunFolder
from tests.orchestrator.planning.test_choice import MIDDLE, SMALL, machine, plan

JOB = """\
model: {model_name_or_path: m}
data: {train: a.jsonl}
cluster: {address: "head:6379", wait_for_nodes_s: 40, num_workers: %s}
"""
ONE_WAY = """\
cluster: {num_workers: 1}
method: {type: lora}
model: {model_name_or_path: m, dtype: bfloat16, attn_implementation: sdpa}
train: {per_device_train_batch_size: 1, gradient_checkpointing: false, optim: adamw_torch, loss_type: nll}
"""
FAST, SLOW = machine("fast", "RTX 4090"), machine("slow", "RTX 3090")
SPEED = {"fast": 2.0, "slow": 1.0, "third": 0.1}  # steps a second
BOTH = ("fast", "slow")


@functools.cache
def made():
    """A plan for one device, to be divided among others."""
    return plan(SMALL, FAST, text=ONE_WAY)


def divide(first, capability):
    """In place of the planner, which takes seconds: every node takes a part of each step."""
    (part, *_) = made().nodes
    nodes = [replace(part, node=node.name, uuid=node.gpus[0].uuid) for node in capability.nodes]
    return replace(made(), nodes=tuple(nodes), step_s=1 / sum(SPEED[node.node] for node in nodes))


class Cluster:
    """Nodes behind Ray's door, and a clock that only sleeping moves; `later` holds what happens at a time."""

    def __init__(self, *there):
        self.nodes = {node.name: node for node in there}
        self.now, self.later, self.lacking = 100.0, {}, []

    def present(self):
        return {name: f"id of {name}" for name in self.nodes}

    def trainable(self, names):
        return set(names)

    def answering(self, names):
        return set(names)

    def shortage(self, wanted):
        return self.lacking.pop() if self.lacking else None

    def probe_connected(self, known):
        kept = {node.name: node for node in known.nodes}
        return ClusterCapability(tuple(kept.get(name, node) for name, node in self.nodes.items()))

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds
        for when in [when for when in self.later if when <= self.now]:
            self.later.pop(when)()


@pytest.fixture
def start(tmp_path, monkeypatch):
    """A function that starts a run of two workers on nodes of a cluster: its recovery, the cluster and what is said."""

    def started(*there, planned=(FAST, SLOW), num_workers="auto"):
        cluster = Cluster(*there)
        for module in (nodes, probe):
            for name in ("present", "trainable", "answering", "shortage", "probe_connected"):
                if hasattr(module, name):
                    monkeypatch.setattr(module, name, getattr(cluster, name))
        clock = SimpleNamespace(monotonic=cluster.monotonic, sleep=cluster.sleep)
        monkeypatch.setattr(recovery_module, "time", clock)
        (tmp_path / "run").mkdir()
        said, capability = [], ClusterCapability(tuple(planned))
        job, run = parse_job(JOB % num_workers, tmp_path), RunFolder(tmp_path / "run")
        return Recovery(run, job, divide(None, capability), capability, divide, said.append), cluster, said

    return started


def fail(recovery, text="x", error=RunFailed, killed=None):
    """A try that ends with an error; the plan to continue with."""
    recovery.run.record(ErrorReport(text=text, again=True))
    if killed:
        recovery.run.record(WorkerKilled(1, killed))
    return recovery.after(error(text))


def names(made):
    return tuple(sorted(part.node for part in made.nodes))


def replanned(recovery):
    return recovery.run.events_of(Replan)


def test_a_run_that_finds_its_nodes_starts_with_its_plan(start):
    recovery, _, said = start(FAST, SLOW)

    assert recovery.at_start() is recovery.plan
    assert not replanned(recovery) and not said


def test_a_run_that_finds_a_node_lost_waits_and_plans_without_it(start):
    recovery, cluster, said = start(FAST)

    rest = recovery.at_start()

    assert names(rest) == ("fast",) and recovery.run.plan() == rest and cluster.now == 140.0
    assert said == ["slow does not answer; waiting 40 s"]
    assert (replanned(recovery)[0].lost, replanned(recovery)[0].seconds) == (["slow"], 40.0)


def test_a_node_that_is_lost_before_the_workers_start_fails_the_try(start):
    recovery, cluster, _ = start(FAST, SLOW)
    del cluster.nodes["slow"]

    with pytest.raises(RunFailed, match="slow left the cluster before training started"):
        recovery.node_ids()


def test_a_node_that_is_lost_for_good_is_planned_around(start):
    recovery, cluster, said = start(FAST, SLOW)
    del cluster.nodes["slow"]

    again = fail(recovery, "another worker stopped answering")

    assert names(again) == ("fast",) and replanned(recovery)[0].lost == ["slow"]
    assert said == [
        "a worker failed after step 0 (another worker stopped answering); continuing from the last checkpoint",
        "slow does not answer; waiting 40 s",
    ]


def test_a_node_that_comes_back_in_time_trains_on_by_the_same_plan(start):
    recovery, cluster, _ = start(FAST, SLOW)
    before = recovery.plan
    cluster.later[110.0] = lambda: cluster.nodes.update(slow=cluster.nodes.pop("gone"))
    cluster.nodes["gone"] = cluster.nodes.pop("slow")

    assert fail(recovery) is before
    assert 110.0 <= cluster.now < 112.0


def test_a_head_that_gives_no_slot_is_nobody_to_plan_with(start):
    head = replace(machine("head", "RTX 3090"), num_slots=0)
    recovery, cluster, said = start(head, planned=(FAST, SLOW))
    recovery.capability = ClusterCapability((head, FAST, SLOW))
    cluster.later[300.0] = lambda: cluster.nodes.update(fast=FAST)

    rest = recovery.at_start()

    assert names(rest) == ("fast",) and cluster.now == 300.0
    assert said == ["fast, slow does not answer; waiting 40 s"]


def test_a_node_that_joins_and_makes_it_faster_has_the_run_planned_again(start):
    recovery, cluster, said = start(SLOW, FAST, planned=(SLOW,))

    for _ in range(5):
        recovery.look()
        cluster.now += 4
    recovery.run.record(StateChange("replanning"))
    wider = recovery.after(None)

    assert said == [f"fast joined: planning again at the next step, {format_s(wider.num_steps * (1 - 1 / 3))} faster"]
    assert names(wider) == BOTH and replanned(recovery)[0].joined == ["fast"]
    assert not recovery.run.replan_file.exists()


def test_a_node_that_joins_where_workers_lack_is_planned_with(start):
    third = machine("third", "RTX 3090")
    recovery, cluster, said = start(FAST, third, planned=(FAST,), num_workers=2)

    for _ in range(5):
        recovery.look()
        cluster.now += 4

    assert said == ["third joined: planning again at the next step"] and recovery.run.replan_file.exists()


def test_a_node_that_joins_and_makes_it_no_faster_is_refused_once(start):
    third = machine("third", "RTX 3090")
    recovery, cluster, said = start(FAST, SLOW, third)
    for _ in range(5):
        cluster.now += 11
        recovery.look()

    assert said == ["third joined, and would not make the rest of this run faster"]
    assert not recovery.run.replan_file.exists()


def test_a_worker_that_was_killed_twice_has_its_node_planned_with_less_memory(start):
    recovery, _, said = start(FAST, SLOW)
    usable = recovery.capability.nodes[1].devices[0].memory_bytes
    fail(recovery, killed="slow")

    fail(recovery, killed="slow")

    assert recovery.capability.nodes[1].devices[0].memory_bytes == int(0.6 * usable)
    assert said[1] == "a worker on slow was killed twice: planning with 60% of its memory"


def test_a_node_whose_memory_is_taken_away_is_planned_with_what_it_has(start):
    recovery, cluster, said = start(FAST, SLOW)
    fail(recovery)
    cluster.nodes["slow"] = replace(SLOW, memory_bytes=SLOW.memory_bytes // 4)

    fail(recovery)

    assert recovery.capability.nodes[1].memory_bytes == SLOW.memory_bytes // 4
    assert said[1] == "slow has only 16.0 GiB: planning with that"


def test_three_tries_without_a_step_end_the_run(start):
    recovery, _, _ = start(FAST, SLOW)
    fail(recovery)
    fail(recovery)

    with pytest.raises(RunFailed, match=r"^x \(3 tries in a row made no step\)$"):
        fail(recovery)


def test_a_gpu_that_was_exchanged_is_planned_with(start):
    recovery, cluster, _ = start(FAST, SLOW)
    card, cpu = SLOW.devices
    cluster.nodes["slow"] = replace(SLOW, devices=(replace(card, uuid="GPU-new"), cpu))

    again = fail(recovery, error=HardwareChanged)

    assert [part.uuid for part in again.nodes if part.node == "slow"] == ["GPU-new"]


def test_a_failure_that_no_other_try_helps_ends_the_run(start):
    recovery, _, _ = start(FAST, SLOW)
    recovery.run.record(ErrorReport(text="the loss is not a number", again=False))

    with pytest.raises(RunFailed, match=r"^the loss is not a number$"):
        recovery.after(RunFailed("another worker stopped answering"))


def test_what_is_no_failure_of_training_is_not_recovered_from(start):
    recovery, _, _ = start(FAST, SLOW)

    with pytest.raises(JobError, match="a mistake"):
        recovery.after(JobError("a mistake"))


def test_a_run_that_ended_or_was_stopped_is_over(start):
    recovery, _, _ = start(FAST, SLOW)
    for state in ("finished", "stopped"):
        recovery.run.record(StateChange(state))

        assert recovery.after(None) is None


def test_where_nothing_fits_with_what_is_left_the_run_says_so(start):
    recovery, cluster, _ = start(FAST, SLOW)
    tried = []

    def refuse(first, capability):
        tried.append([node.name for node in capability.nodes])
        raise NothingFits(f"needs more than {len(capability.nodes)} nodes have")

    recovery.replan = refuse
    cluster.nodes["fast"] = replace(FAST, memory_bytes=2**30)

    with pytest.raises(NothingFits, match="more than 1 nodes"):
        recovery._plan_for(cluster.nodes.values())
    assert tried == [["fast", "slow"], ["slow"]]


def test_a_stop_while_nodes_are_busy_stops_the_run(start):
    recovery, cluster, said = start(FAST, SLOW)
    cluster.lacking = ["1 train_slot of slow"] * 200
    cluster.later[110.0] = recovery.run.stop_file.touch

    assert not recovery.wait_until_free({"train_slot": 1.0}, recovery.node_ids())
    assert recovery.run.state_by_events() == "stopped"
    assert said == ["waiting for 1 train_slot of slow. Ctrl-C ends this"]


# A model in stages, by the planner itself.

STAGES = "strategy: {mode: pipeline}\n"
TWIN = machine("twin", "RTX 3090")


def cut(first, capability):
    """The planner, for the model in stages that the first plan is for."""
    nodes = with_held_layers(capability, first).nodes if first else capability.nodes
    return plan(MIDDLE, *nodes, text=STAGES if len(nodes) > 1 else "", link_bytes_per_s=118e6)


@pytest.fixture
def start_stages(start):
    """As `start`, in stages."""

    def started(*there, text=""):
        recovery, cluster, said = start(*there)
        recovery.job, recovery.capability = parse_job(JOB % "auto" + text, recovery.run.path), ClusterCapability(there)
        recovery.replan = cut
        recovery._use(cut(None, recovery.capability))
        return recovery, cluster, said

    return started


def record_steps(recovery, slower, count=3, slower_uuids=None):
    """Steps in which each stage computes so many times as long as planned, and the whole step as that takes."""
    now = recovery.plan
    zeros = dict.fromkeys(("epoch", "loss", "grad_norm", "learning_rate", "supervised_tokens", "peak_bytes"), 0.0)
    planned_s = [part.time.step_s - part.time.update_s for part in now.nodes]
    slower = slower | (slower_uuids or {})
    times = [slower.get(part.uuid, slower.get(part.node, 1.0)) for part in now.nodes]
    busy_s = [own * times_as_long for own, times_as_long in zip(planned_s, times, strict=True)]
    values = {"tokens": now.tokens_per_s * now.step_s, "seconds": now.step_s + max(busy_s) - max(planned_s)}
    for step in range(1, count + 1):
        recovery.run.record(StepReport(step=step, **zeros, **values, tokens_per_s=0.0, stage_busy_s=busy_s))


def num_layers(made):
    return {part.node: part.techniques.stage.num_layers for part in made.nodes}


def test_layers_of_a_slow_stage_go_to_others_at_a_checkpoint(start_stages):
    recovery, cluster, said = start_stages(SLOW, TWIN)
    before = recovery.plan
    record_steps(recovery, {"twin": 2.0})

    recovery.look()
    assert recovery.run.replan_file.exists(), said
    recovery.run.record(StateChange("replanning"))
    again = recovery.after(None)

    assert said[0].startswith("twin takes 2.00 times as long for its layers as planned: planning again")
    assert num_layers(again)["twin"] < num_layers(before)["twin"]
    assert recovery.capability.nodes[1].devices[0].calibration == {"bfloat16": 2.0}
    assert recovery.run.capability().nodes[1].devices[0].calibration == {"bfloat16": 2.0}
    cluster.now += 4
    record_steps(recovery, {})  # as planned now
    recovery.look()
    assert not recovery.run.replan_file.exists()


def test_a_pace_that_no_cut_helps_is_said_once(start_stages):
    recovery, cluster, said = start_stages(SLOW, TWIN)
    record_steps(recovery, {"twin": 1.5, "slow": 1.5})

    for _ in range(3):
        cluster.now += 4
        recovery.look()

    assert len(said) == 1
    assert said[0].endswith("and no other cut would make the rest of this run faster")
    assert not recovery.run.replan_file.exists()
    assert not recovery.capability.nodes[1].devices[0].calibration


@pytest.mark.parametrize("text", ["strategy: {shares: planned}\n", "train: {deterministic: true}\n"])
def test_what_has_to_be_repeatable_is_not_cut_anew(start_stages, text):
    recovery, _, said = start_stages(SLOW, TWIN, text=text)
    record_steps(recovery, {"twin": 3.0})

    recovery.look()

    assert not said
    assert not recovery.run.replan_file.exists()


def test_a_lost_stage_is_taken_over_and_a_node_that_comes_back_taken_in(start_stages):
    big, small, third = machine("big", "RTX 4090"), machine("small", "RTX 3060 12GB"), machine("third", "RTX 3090")
    recovery, cluster, said = start_stages(big, small, third)
    before = recovery.plan
    assert {"big", "third"} <= set(num_layers(before))
    gone = cluster.nodes.pop("third")

    rest = fail(recovery)
    assert "third" not in names(rest)
    assert replanned(recovery)[0].lost == ["third"]
    cluster.nodes["third"] = gone
    for _ in range(5):
        recovery.look()
        cluster.now += 4
    recovery.run.record(StateChange("replanning"))
    back = recovery.after(None)

    assert said[-1].startswith("third joined: planning again at the next step")
    assert "third" in num_layers(back)
    assert replanned(recovery)[1].joined == ["third"]


def test_two_cards_of_one_machine_are_cut_anew_among_themselves(tmp_path):
    """Ray was started here with these two: a third card, which is free now, has no part in it."""
    cards = machine("pc", "RTX 3090", "RTX 3090", "RTX 3090")
    named = [replace(card, uuid=f"GPU-{number}") for number, card in enumerate(cards.gpus)]
    both, three = (replace(cards, devices=(*named[:count], cards.cpu)) for count in (2, 3))
    (tmp_path / "run").mkdir()
    run, first = RunFolder(tmp_path / "run"), cut_here(None, ClusterCapability((both,)))
    job, said = parse_job("model: {model_name_or_path: m}\ndata: {train: a.jsonl}\n", tmp_path), []
    recovery = Recovery(run, job, first, ClusterCapability((three,)), cut_here, said.append)
    slow_card = first.nodes[0].uuid
    record_steps(recovery, {}, slower_uuids={slow_card: 2.5})

    recovery.look()
    run.record(StateChange("replanning"))
    again = recovery.after(None)

    assert len(said) == 1
    assert "pc takes 2.50 times as long" in said[0]
    assert {part.uuid for part in again.nodes} == {"GPU-0", "GPU-1"}
    before, now = (
        next(part.techniques.stage.num_layers for part in made.nodes if part.uuid == slow_card)
        for made in (first, again)
    )
    assert now < before


def cut_here(first, capability):
    nodes = with_held_layers(capability, first).nodes if first else capability.nodes
    return plan(MIDDLE, *nodes, text=STAGES)
