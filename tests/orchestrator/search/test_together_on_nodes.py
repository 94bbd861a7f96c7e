"""On a cluster each node has a trainer; trials come to what each comes to by itself.  Ray's doors are fakes."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from clusters.capability import ClusterCapability
from clusters.probe.node import probe_node
from clusters.ray import gpu_reservation, nodes
from orchestrator.search import tuning
from tests.orchestrator.search.test_together import assert_as_alone

ON_A_CLUSTER = "cluster.address=auto"
FOUR_AND_MORE = "search.space={method.lora_r: [2, 4, 8], train.learning_rate: [1.0e-3, 1.0e-2]}"


@pytest.fixture
def two_nodes(monkeypatch):
    """This machine as two nodes of a cluster that Ray reaches; the first may be given other memory."""

    def reach(**changes):
        here = replace(probe_node(), num_slots=1)
        left, right = replace(here, name="left", **changes), replace(here, name="right")
        monkeypatch.setattr("clusters.ray.probe.probe_cluster", lambda *_, **__: ClusterCapability((left, right)))
        monkeypatch.setattr(nodes, "present", lambda: {"left": "id-left", "right": "id-right"})

    return reach


@pytest.fixture
def places(trainer):
    """Where each trainer of a test began, and the trials that it was sent."""
    found = {}

    class Trainer(trainer):
        def __init__(self, folder, slots, first, places, memory):
            super().__init__(folder, slots, first, places, memory)
            (self.node,) = first.plans
            found.setdefault(self.node, [])

        def advance(self, begin, proceed, leave):
            assert all(set(one.plans) == {self.node} for one in begin)
            found[self.node] += [one.number for one in begin]
            super().advance(begin, proceed, leave)

    return Trainer, found


def test_each_node_has_a_trainer_and_all_trials_are_as_alone(two_nodes, searching_with, places, each_alone):
    two_nodes()
    trainer, found = places

    folder, listener = searching_with(trainer, ON_A_CLUSTER, "cluster.num_workers=2")

    assert set(found) == {"left", "right"}
    assert sorted(found["left"] + found["right"]) == [1, 2, 3, 4]
    assert min(map(len, found.values())) == 2  # a second trainer begins before the first one's places are full
    told = " ".join(listener.said)
    assert "left: trials of one layout share" in told and "right: trials of one layout share" in told
    assert_as_alone(folder, each_alone)


def test_a_node_too_small_for_two_trials_has_none_that_share(two_nodes, searching_with, places):
    here = probe_node()
    small = replace(here.cpu, memory_bytes=400 * 2**20)
    two_nodes(devices=(small,), memory_bytes=400 * 2**20)
    trainer, found = places

    folder, _ = searching_with(trainer, ON_A_CLUSTER, FOUR_AND_MORE)

    assert set(found) == {"right"}
    assert len(folder.trials()) == 6


def test_a_trainer_is_placed_on_its_node_and_is_given_what_a_slot_takes(monkeypatch, two_nodes, searching_with):
    two_nodes()
    asked = []

    class Actor:
        def options(self, **options):
            asked.append(options)
            return self

        def remote(self, *_):
            raise InterruptedError

    fake = SimpleNamespace(remote=lambda _: Actor())
    monkeypatch.setattr(tuning, "ray", fake)
    monkeypatch.setattr(gpu_reservation, "offers_gpus", lambda _: False)

    with pytest.raises(Exception, match="InterruptedError"):
        searching_with(tuning.RayTrainer, ON_A_CLUSTER)

    (options,) = asked
    assert options["label_selector"] == {"ray.io/node-id": "id-left"}
    assert options["resources"] == {"train_slot": 1.0} and options["max_restarts"] == 0
