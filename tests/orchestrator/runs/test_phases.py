"""Seconds of each phase of a run, from its events."""

from orchestrator.runs.events import (
    CheckpointReport,
    Evaluation,
    FinalEvaluation,
    HandBack,
    ModelReady,
    Note,
    PreflightReport,
    QualityReport,
    StateChange,
    StepReport,
)
from orchestrator.runs.phases import PhaseClock
from orchestrator.views.result import phases_text
from strategies.cost.phases import Phases


def measured_phases(events):
    clock = PhaseClock()
    for event in events:
        clock.add(event)
    return clock.phases


def step(number, time):
    return StepReport(
        step=number, epoch=0.0, loss=1.0, grad_norm=1.0, learning_rate=1e-4, tokens=1.0, supervised_tokens=1.0,
        seconds=1.0, tokens_per_s=1.0, peak_bytes=1.0, time=time,
    )  # fmt: skip


RUN = (
    StateChange("running", time=100.0),
    Note("which GPU", time=110.0),
    ModelReady(6.0, time=128.0),
    PreflightReport(10.0, 3.0, 512, 1.0, None, 1.0, "went through", time=138.0),
    QualityReport("before", 3.0, time=200.0),
    step(1, 203.0),
    step(2, 206.0),
    Evaluation(2, 2.5, time=216.0),
    CheckpointReport(2, "step-2", time=217.0),
    FinalEvaluation(4, time=219.0),
    HandBack("equal", time=269.0),
    QualityReport("after", 2.0, time=269.0),
    StateChange("finished", step=2, time=269.5),
)


def test_each_interval_belongs_to_the_phase_that_ends_it():
    found = measured_phases(RUN)

    assert found == Phases(
        start_s=28.0, preflight_s=10.0, evaluation_s=62.0 + 10.0 + 50.0, training_s=6.0, saving_s=1.0 + 2.0
    )
    assert found.total_s == 169.0


def test_time_between_a_failure_and_the_next_start_is_nobodys():
    again = (
        *RUN[:7],
        StateChange("failed", text="killed", time=210.0),
        StateChange("running", time=5000.0),
        ModelReady(6.0, time=5030.0),
        step(3, 5033.0),
    )

    found = measured_phases(again)

    assert found.start_s == 28.0 + 30.0
    assert found.training_s == 6.0 + 3.0


def test_a_run_without_held_out_rows_saves_until_it_hands_back():
    found = measured_phases((*RUN[:3], step(1, 130.0), HandBack("equal", time=134.0)))

    assert found.saving_s == 4.0 and found.evaluation_s == 0.0


def test_the_predicted_stands_beside_the_measured():
    predicted = Phases(preparation_s=9.0, start_s=30.0, evaluation_s=100.0, training_s=7.0, saving_s=3.0)

    assert phases_text(measured_phases(RUN), predicted) == (
        "in all 2 min 49 s (predicted 2 min 20 s): start 28 s (30 s), preflight 10 s (0 s),"
        " evaluation 2 min 02 s (1 min 40 s), training 6 s (7 s), saving 3 s (3 s)"
    )
    assert phases_text(measured_phases(RUN), Phases()).startswith(
        "in all 2 min 49 s: evaluation 2 min 02 s, start 28 s"
    )
