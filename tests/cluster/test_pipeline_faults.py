"""The fault matrix for a model in stages: one on each of two machines, and a third that stands by.

The assertions are those of test_faults.py; the reference is a run in stages to which nothing happens.  Which machines
have a stage is the planner's to say: they are alike.
"""

import os
import signal
import time

import pytest

from tests.cluster.emulator import Machine, unavailable
from tests.cluster.test_chaos import weather
from tests.cluster.test_faults import compare, events, finished, started_lab, tell, training_pid, wait_for_step

pytestmark = [pytest.mark.cluster, pytest.mark.skipif(unavailable() is not None, reason=unavailable() or "")]
NAMES = ("one", "two", "three")
AT_STEP = 25


@pytest.fixture(scope="module")
def lab(tmp_path_factory, model_folder):
    machines = [Machine(name) for name in ("head", *NAMES)]
    with started_lab(machines, tmp_path_factory.mktemp("lab"), model_folder) as lab:
        yield lab


@pytest.fixture(scope="module")
def reference(lab):
    process, run = submit(lab)
    finished(process, run)
    assert sorted(layers(run.plan()).values()) == [(0, 1), (1, 2)]
    return run


def submit(lab, *verb, **changes):
    return lab.submit(*verb, mode="pipeline", **changes)


def layers(plan):
    """Node -> its layers, in the order of stages; empty where the plan has none."""
    stages = {part.node: part.techniques.stage for part in plan.nodes}
    return {node: (stage.first_layer, stage.end_layer) for node, stage in stages.items() if stage}


def in_training(lab, **changes):
    """A run that has trained some steps past a checkpoint, the nodes of its stages, and the one that stands by."""
    lab.until_up(NAMES)
    process, run = submit(lab, **changes)
    wait_for_step(run, AT_STEP, process)
    plan = run.plan()
    (spare,) = plan.stands_by
    assert {*layers(plan), spare} == set(NAMES)
    return process, run, plan


@pytest.mark.parametrize("stage", [0, 1])
def test_a_killed_stage(lab, reference, stage):
    process, run, plan = in_training(lab)
    began = time.time()
    os.kill(training_pid(lab, run, list(layers(plan))[stage]), signal.SIGKILL)
    finished(process, run)

    compare(run, reference)
    assert layers(run.plan()) == layers(plan)
    assert tell(f"stage {stage} killed", run, began)[0] < 10


def test_a_stage_behind_a_pulled_cable(lab, reference):
    process, run, plan = in_training(lab, wait=90)
    name = list(layers(plan))[-1]
    began = time.time()
    lab.cluster.set_link(name, up=False)
    time.sleep(30)
    lab.cluster.set_link(name, up=True)
    finished(process, run)

    compare(run, reference, exact=False, rel=1e-6)
    assert tell("stage behind a cable pulled for 30 s", run, began)[0] < 30
    lab.until_up(NAMES)


def test_a_stage_that_hangs(lab, reference):
    """It is given up after five seconds; the machine that stands by takes a stage."""
    process, run, plan = in_training(lab, wait=5)
    name = list(layers(plan))[-1]
    began = time.time()
    lab.cluster.freeze(name)
    try:
        finished(process, run)
    finally:
        lab.cluster.thaw(name)

    assert set(layers(run.plan())) == set(NAMES) - {name}
    compare(run, reference, exact=False, rel=1e-6)
    assert tell("stage hangs", run, began)[0] < 60
    lab.until_up(NAMES)


def test_a_stage_lost_for_good_goes_to_the_machine_that_stood_by(lab, reference):
    process, run, plan = in_training(lab, wait=5)
    ((spare, stage),) = plan.stands_by.items()
    lost_range = stage.first_layer, stage.end_layer
    lost = next(node for node, own in layers(plan).items() if own == lost_range)
    began = time.time()
    lab.power_off(lost)
    try:
        finished(process, run)
    finally:
        lab.cluster.boot(lost)
        lab.start(lost)

    assert layers(run.plan()) == {node: own for node, own in layers(plan).items() if node != lost} | {spare: lost_range}
    assert any(event.text.startswith(f"{spare} stands by with") for event in events(run, "note"))
    compare(run, reference, exact=False, rel=1e-6)
    tell("stage lost for good", run, began)
    lab.until_up(NAMES)


def test_a_killed_driver_of_stages_and_the_same_run_again(lab, reference):
    process, run, _ = in_training(lab)
    began = time.time()
    lab.signal_driver(signal.SIGKILL)
    process.communicate()
    again, _ = submit(lab, "resume", run.run_id)
    finished(again, run)

    compare(run, reference)
    tell("driver of stages killed", run, began)


@pytest.mark.timeout(3600)
def test_ten_random_faults(lab, reference):
    weather(lab, reference, NAMES, 10, mode="pipeline", rel=1e-6)
    lab.until_up(NAMES)
