"""Two jobs of one user on one machine, each with a Ray of its own: no card is trained on twice."""

import contextlib
import dataclasses
import os

import pytest

from clusters.capability import ClusterCapability
from clusters.hardware import waiting
from orchestrator.job.job_file import parse_job
from orchestrator.lifecycle.recovery import Recovery
from orchestrator.runs.run_folder import RunFolder
from orchestrator.training.workers.gpu_locks import hold_gpus, hold_one_each
from tests.gpu_rehearsal.cards import RTX_3090, Machine
from tests.orchestrator.planning.test_choice import SMALL, machine, plan

FIRST, SECOND = "GPU-00000000", "GPU-00000001"  # as the stand-in numbers its cards


@pytest.fixture(scope="module")
def two_cards():
    """A machine with two like cards, and a plan for the first."""
    node = machine("a", "RTX 3090", "RTX 3090")
    first, second, cpu = node.devices
    devices = (dataclasses.replace(first, uuid=FIRST), dataclasses.replace(second, uuid=SECOND), cpu)
    node = dataclasses.replace(node, devices=devices)
    made = plan(SMALL, node, text="cluster: {num_workers: 1}\n")
    assert [part.uuid for part in made.nodes] == [FIRST]
    return made, ClusterCapability((node,))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def uuids(held):
    return [part.uuid for part in held.nodes]


def test_the_second_job_takes_a_like_card_and_the_third_waits_and_says_for_whom(two_cards):
    said = []
    with hold_gpus(*two_cards, said.append, lambda: True) as first, hold_gpus(*two_cards, said.append, bool) as second:
        assert uuids(first) == [FIRST] and uuids(second) == [SECOND] and second.hash == first.hash
        assert said == [f"{SECOND} trains in place of {FIRST}, which another job of yours uses: they are alike"]
        with hold_gpus(*two_cards, said.append, iter([False, True]).__next__) as third:
            assert third is None
        assert len(said) == 2 and f"waiting for {FIRST} (process " in said[1] and f"{SECOND} (process " in said[1]

    with hold_gpus(*two_cards, said.append, lambda: True) as again:
        assert uuids(again) == [FIRST]


def test_a_job_that_gets_only_one_of_two_cards_holds_none():
    with (
        hold_one_each([[SECOND]], print),
        hold_one_each([[FIRST], [SECOND]], print, lambda: True) as both,
    ):
        assert both is None
        with hold_one_each([[FIRST]], print, lambda: True) as free:
            assert free == [FIRST]


def test_a_card_that_becomes_free_is_taken(monkeypatch):
    other = contextlib.ExitStack()
    other.enter_context(hold_one_each([[FIRST]], print))
    monkeypatch.setattr(waiting.time, "sleep", lambda _: other.close())

    with hold_one_each([[FIRST]], print) as held:
        assert held == [FIRST]


def test_where_nothing_can_be_locked_training_goes_on_and_says_what_that_means(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    said = []

    with hold_one_each([[FIRST]], said.append) as held:
        assert held == [FIRST]
    assert len(said) == 1 and f"{FIRST} cannot be locked" in said[0]


def test_a_plan_for_the_cpu_waits_for_nothing():
    with hold_one_each([], print) as held:
        assert held == []


def test_a_run_that_is_asked_to_stop_while_it_waits_is_stopped(two_cards, tmp_path, monkeypatch):
    made, capability = two_cards
    (tmp_path / "run").mkdir()
    run = RunFolder(tmp_path / "run")
    run.stop_file.touch()
    job = parse_job("model: {model_name_or_path: m}\ndata: {train: a.jsonl}\n", tmp_path)
    recovery = Recovery(run, job, made, capability, lambda *_: made, print)
    Machine((RTX_3090, RTX_3090)).install(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    with (
        hold_one_each([[FIRST]], print),
        hold_one_each([[SECOND]], print),
        contextlib.ExitStack() as until_the_end,
    ):
        assert not recovery.lock_gpus(until_the_end)
    assert run.state_by_events() == "stopped"

    with contextlib.ExitStack() as until_the_end:
        assert recovery.lock_gpus(until_the_end)
