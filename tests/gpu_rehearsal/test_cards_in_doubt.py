"""A card measured while it was busy, hot or on battery: marked, measured again, and believed when it stays so.

The stand-in is the program that measures: what it prints is what a GPU would have made it print.
"""

import json
import os
import subprocess
from dataclasses import asdict, replace

import pytest

from clusters.capability import ClusterCapability
from clusters.hardware import datasheet
from clusters.hardware.torch_build import TorchBuild
from clusters.probe import node as node_probe
from clusters.probe.machine import look_at_this_node
from clusters.probe.measure import doubt_of
from clusters.probe.node import probe_node
from orchestrator.lifecycle.machines import notes
from tests.gpu_rehearsal.cards import MACHINES


def measured(device, part):
    """The card as measuring leaves it when its products reach a part of the datasheet."""
    if device.kind == "cpu":
        return device
    card = datasheet.find(device.name, device.memory_total_bytes)
    flops = {name: peak and part * peak for name, peak in card.flops_per_s.items()}
    sources = device.sources | {f"flops_per_s.{name}": "measured" for name, rate in flops.items() if rate}
    device = replace(device, flops_per_s=flops, sources=sources)
    return replace(device, doubt=doubt_of(device, [1.0]))


@pytest.fixture
def measuring(tmp_path, monkeypatch):
    """A machine with an RTX 3090 whose measuring finds the next of `parts` each time, and notes that it ran."""
    (tmp_path / "bin").mkdir()
    MACHINES["rtx 3090"].install(tmp_path / "bin")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(node_probe, "installed_build", lambda: TorchBuild("2.13.0+cu130", "13.0"))
    parts: list[float] = []

    def program(command, *rest, **more):
        node = look_at_this_node()
        node = replace(node, devices=tuple(measured(device, parts[0]) for device in node.devices))
        del parts[0]
        return subprocess.CompletedProcess(command, 0, json.dumps(asdict(node)), "")

    monkeypatch.setattr(node_probe, "run_within", program)
    return parts


def _told(node):
    """What is remembered of a node: the room on its disk is looked up each time."""
    return replace(node, disk_free_bytes=None)


def test_a_card_far_below_its_datasheet_is_marked_said_and_measured_again(measuring):
    measuring += [0.12, 0.7]
    first, second, third = probe_node(), probe_node(), probe_node()

    assert "reached 12% of the datasheet" in first.gpus[0].doubt
    assert any("It is measured again by the next probe" in note for note in notes(ClusterCapability((first,))))
    assert second.gpus[0].doubt is None and second.gpus[0].flops_per_s["bfloat16"] > 4e13
    assert _told(third) == _told(second) and measuring == []


def test_a_card_that_is_as_slow_a_second_time_is_believed(measuring):
    measuring += [0.3, 0.32]
    first, second, third = probe_node(), probe_node(), probe_node()

    assert first.gpus[0].doubt and not second.gpus[0].doubt
    assert _told(third) == _told(second)


@pytest.mark.parametrize(("part", "is_doubtful"), [(0.39, True), (0.41, False), (1.0, False)])
def test_two_fifths_of_the_datasheet_are_plausible(part, is_doubtful):
    bare = datasheet.device(datasheet.find("RTX 3090"))

    assert bool(measured(replace(bare, sources={}), part).doubt) is is_doubtful
    assert doubt_of(bare, [1.0]) is None  # nothing of it was measured
