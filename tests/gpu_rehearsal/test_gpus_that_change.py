"""Cards that are hidden from a process, or exchanged between a run and its resumption: seen without Ray."""

import dataclasses
import os
from pathlib import Path

import pytest

from clusters.capability import ClusterCapability
from clusters.hardware.gpus import look_at_gpus
from orchestrator.job.job_file import parse_job
from orchestrator.lifecycle import machines
from orchestrator.lifecycle.machines import planned_gpus
from orchestrator.lifecycle.recovery import Recovery
from orchestrator.runs.run_folder import RunFolder
from tests.gpu_rehearsal.cards import RTX_3090, RX_7900_XTX, RYZEN_GRAPHICS, Machine
from tests.orchestrator.planning.test_choice import SMALL, machine, plan


@pytest.fixture
def install(tmp_path, monkeypatch):
    """A function that puts the tools of a machine on the PATH."""
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    return lambda found: found.install(tmp_path)


@pytest.mark.parametrize(
    ("variables", "shown"),
    [
        ({}, [0, 1]),
        ({"HIP_VISIBLE_DEVICES": "1"}, [1]),
        ({"HIP_VISIBLE_DEVICES": "1,0"}, [1, 0]),
        ({"HIP_VISIBLE_DEVICES": ""}, []),
        ({"ROCR_VISIBLE_DEVICES": "1"}, [1]),
        ({"ROCR_VISIBLE_DEVICES": "uuid of 1", "HIP_VISIBLE_DEVICES": "0"}, [1]),  # HIP counts what ROCr leaves
        ({"ROCR_VISIBLE_DEVICES": "1", "HIP_VISIBLE_DEVICES": "1"}, []),
    ],
)
def test_an_amd_card_that_is_hidden_from_the_process_is_not_seen(variables, shown, install, monkeypatch):
    install(Machine(amd=(RX_7900_XTX, RYZEN_GRAPHICS)))
    there = look_at_gpus()[0]
    for name, value in variables.items():
        monkeypatch.setenv(name, value.replace("uuid of 1", there[1].uuid))

    assert look_at_gpus()[0] == tuple(there[place] for place in shown)


def test_a_run_that_resumes_after_its_card_was_exchanged_is_planned_again(install, tmp_path, monkeypatch):
    old, new = (machine("a", "RTX 3090"), machine("a", "RTX 3090"))
    old, new = (
        dataclasses.replace(node, devices=(dataclasses.replace(node.gpus[0], uuid=uuid), node.cpu))
        for node, uuid in ((old, "GPU-old"), (new, "GPU-00000000"))
    )
    install(Machine((RTX_3090,)))
    monkeypatch.setattr(machines, "probe", lambda *_: ClusterCapability((new,)))  # without measuring anything
    job = parse_job("model: {model_name_or_path: m}\ndata: {train: a.jsonl}\n", Path())
    said = []

    def recovery(node):
        made, there = plan(SMALL, node), ClusterCapability((node,))
        (tmp_path / node.gpus[0].uuid).mkdir()
        run = RunFolder(tmp_path / node.gpus[0].uuid)
        return Recovery(run, job, made, there, lambda _, found: plan(SMALL, *found.nodes), said.append)

    unchanged, exchanged = recovery(new), recovery(old)

    assert unchanged.replace_missing_gpus() is unchanged.plan and not said
    again = exchanged.replace_missing_gpus()
    assert [part.uuid for part in again.nodes] == ["GPU-00000000"] and exchanged.run.plan() == again
    assert planned_gpus(again, exchanged.capability) == list(new.gpus)
    assert said == ["GPU-old, which the plan is for, is no longer in this machine: planning again"]
