"""How many workers share one CPU, and which runs each takes; their results are those of one worker."""

import logging
from dataclasses import replace

import pytest

from clusters.capability import DeviceCapability, NodeCapability
from clusters.safe.masking import log_apart
from orchestrator.errors import NothingFits, Stopped
from orchestrator.lifecycle import run as path_of_a_job
from orchestrator.lifecycle.background import run_side_by_side
from orchestrator.lifecycle.hooks import Quiet
from orchestrator.lifecycle.together import side_by_side
from orchestrator.lifecycle.together import submit as path_of_jobs
from orchestrator.lifecycle.together.side_by_side import best_division
from orchestrator.lifecycle.together.submit import submit_together
from orchestrator.runs.events import Note
from orchestrator.runs.run_folder import RunFolder
from tests.orchestrator.lifecycle.together.conftest import UNLIKE
from tests.orchestrator.lifecycle.together.test_submit import assert_same, submissions

OPEN = {name: ["cluster.num_workers=auto"] for name in UNLIKE}


@pytest.mark.parametrize(
    ("seconds", "most", "expected"),
    [
        ({1: 10, 2: 20}, 2, (1, 1.0)),  # products alone: nothing is won
        ({1: 10, 2: 19}, 2, (1, 1.0)),  # less than a tenth
        ({1: 10, 2: 14}, 2, (2, 20 / 14)),
        ({1: 10, 2: 14}, 1, (1, 1.0)),
        ({1: 10, 2: 14, 4: 20}, 4, (4, 2.0)),
        ({1: 10, 2: 14, 4: 27}, 4, (2, 20 / 14)),  # four win less than a tenth over two
        ({1: 10, 2: 14, 4: None}, 8, (2, 20 / 14)),  # a fourth of the memory is too little
        ({1: 10, 2: 12, 4: 14, 8: 16}, 8, (4, 40 / 14)),  # more than four were never measured
        ({1: None}, 4, (1, 1.0)),
    ],
)
def test_as_many_workers_as_do_most_steps_in_all(seconds, most, expected):
    assert best_division(seconds.__getitem__, most) == pytest.approx(expected)


def test_a_worker_has_its_part_of_the_cores_the_memory_and_the_bandwidth():
    cpu = DeviceCapability("cpu", "EPYC", 24, flops_per_s={"float32": 100.0, "bfloat16": None}, memory_bytes_per_s=40.0)
    node = NodeCapability("pc", 5, 25, (cpu,), load_w=90.0, price_per_hour=0.5)

    part = node.part_of_cpu(2)

    assert (part.num_cores, part.memory_bytes) == (2, 12) and part.cpu
    assert (part.cpu.memory_bytes, part.cpu.memory_bytes_per_s) == (12, 20.0)
    assert part.cpu.flops_per_s == {"float32": 40.0, "bfloat16": None}  # two of five cores
    assert (part.load_w, part.price_per_hour) == (45.0, 0.25)
    assert node.part_of_cpu(1) == node
    tenth = node.part_of_cpu(10)  # they take turns on five cores
    assert (tenth.num_cores, tenth.cpu.flops_per_s["float32"], tenth.cpu.core_share) == (1, 10.0, 0.5)


@pytest.fixture
def two_workers(monkeypatch):
    """A machine of four cores on which two workers win, whatever this one predicts."""
    monkeypatch.setattr(side_by_side, "best_division", lambda step_s, most: (min(2, most), 1.4))
    found = path_of_a_job.node_of
    for module in (path_of_a_job, side_by_side):
        monkeypatch.setattr(module, "node_of", lambda held: replace(found(held), num_cores=4))


def test_runs_of_two_workers_come_to_what_each_comes_to_alone(folder, here, alone, two_workers):
    said = []
    found = submit_together(submissions(folder, "beside", **OPEN), said.append)

    assert (
        "3 runs of one base model train in 2 workers side by side, with 2 of 4 cores each: predicted 1.40 x" in said[0]
    )
    assert "cluster.num_workers: 1 keeps them in one" in said[0]
    for name, run in zip(UNLIKE, found, strict=True):
        assert_same(run, alone[name])
        assert run.plan().threads_per_worker == 2 and run.state_by_events() == "finished"


def test_what_is_left_of_a_build_is_planned_for_all_cores_again(folder, here, two_workers, monkeypatch):
    def stop_before_the_first_step(workers, say):
        for worker in workers:
            for live in worker.runs:
                live.run.record_stop()
        return [None] * len(workers)

    with monkeypatch.context() as patch:
        patch.setattr(path_of_jobs, "_train_on_ray", stop_before_the_first_step)
        with pytest.raises(Stopped):
            submit_together(submissions(folder, "left", **OPEN), print)
    runs = [RunFolder(folder / "runs" / f"left-{name}") for name in UNLIKE]
    assert [run.plan().threads_per_worker for run in runs] == [2, 2, 2]

    (found,) = submit_together(submissions(folder, "left", names=("one",), **OPEN), print)

    assert found.plan().threads_per_worker == 4 and found.state_by_events() == "finished"


def test_one_of_them_that_is_resumed_by_itself_has_all_cores(folder, here, two_workers, monkeypatch):
    def stop_at_once(workers, say):
        for live in (live for worker in workers for live in worker.runs):
            live.run.record_stop()
        return [None] * len(workers)

    with monkeypatch.context() as patch:
        patch.setattr(path_of_jobs, "_train_on_ray", stop_at_once)
        with pytest.raises(Stopped):
            submit_together(submissions(folder, "halved", names=("one", "two"), **OPEN), print)
    run = RunFolder(folder / "runs" / "halved-one")
    assert run.plan().threads_per_worker == 2

    path_of_a_job.resume(run, Quiet())

    assert run.plan().threads_per_worker == 4 and run.state_by_events() == "finished"
    notes = [event.text for event in run.events_of(Note) if "planned again" in event.text]
    assert notes[-1:] == [
        "planned again for 4 of 4 cores; workers side by side: 1",
    ]


def test_runs_that_a_part_of_the_memory_would_change_stay_in_one_worker(folder, here, monkeypatch):
    real = path_of_a_job.replan

    def with_checkpointing(run, job, bank, plan, cluster):
        again = real(run, job, bank, plan, cluster)
        parts = (replace(one, techniques=replace(one.techniques, gradient_checkpointing=True)) for one in again.nodes)
        return replace(again, nodes=tuple(parts))

    said = []
    monkeypatch.setattr(path_of_a_job, "replan", with_checkpointing)
    submit_together(submissions(folder, "changed", names=("one", "two"), **OPEN), said.append)

    assert "2 runs share one base model in one worker" in said[0]


def test_a_job_that_states_one_worker_shares_with_one_that_leaves_it_open(folder, here, two_workers):
    said = []
    submit_together(submissions(folder, "stated", names=("one", "two"), one=OPEN["one"]), said.append)

    assert "2 runs share one base model in one worker" in said[0]


def test_runs_that_do_not_fit_a_part_of_the_memory_stay_in_one_worker(folder, here, monkeypatch):
    def none_fits(*_):
        raise NothingFits("half of the memory")

    said = []
    monkeypatch.setattr(path_of_a_job, "replan", none_fits)
    found = submit_together(submissions(folder, "tight", names=("one", "two"), **OPEN), said.append)

    assert "2 runs share one base model in one worker" in said[0]
    assert all(run.state_by_events() == "finished" for run in found)


def test_calls_side_by_side_say_each_what_went_wrong():
    def fail():
        raise ValueError("one")

    first, second, third = run_side_by_side([lambda: None, fail, lambda: None])

    assert first is third is None and str(second) == "one"


def test_logs_of_two_threads_stay_apart_until_the_last_has_ended(tmp_path):
    logger = logging.getLogger("tests.apart")
    first, second = log_apart("tests.apart", tmp_path / "a"), log_apart("tests.apart", tmp_path / "b")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)

    logger.info("still there")
    assert not logger.propagate
    second.__exit__(None, None, None)

    assert logger.propagate and not logger.handlers
    assert "still there" in (tmp_path / "b").read_text() and "still there" not in (tmp_path / "a").read_text()
