"""How long a run still takes: by the plan until steps were measured, then by them."""

from dataclasses import replace

from orchestrator.runs.events import Evaluation, FinalEvaluation, ModelReady, PhaseProgress, QualityReport, StateChange
from orchestrator.runs.run_folder import RunFolder
from orchestrator.runs.summary.event_summary import EventSummary
from orchestrator.runs.summary.time_left import TimeLeft, time_left
from strategies.cost.phases import Phases
from tests.benchmarks.reading import TEMPLATE, one_step


def plan(**changes):
    phases = Phases(start_s=20.0, evaluation_s=30.0, training_s=100.0, saving_s=5.0)
    return replace(RunFolder(TEMPLATE).plan(), num_steps=100, step_s=1.0, phases=phases, **changes)


def summary_of(*events):
    found = EventSummary()
    found.add((event, "") for event in events)
    return found


def steps(first, last, seconds, began=50.0):
    import random

    return [
        one_step(step, 100, 1, random.Random(0), began + seconds * (step - first + 1))
        for step in range(first, last + 1)
    ]


BEGUN = (StateChange("running", time=0.0), ModelReady(5.0, time=20.0))
MEASURED = (*BEGUN, QualityReport("before", 3.0, extra={"seconds": 8.0}, time=28.0))


def test_before_the_first_step_it_is_the_plans():
    assert time_left(summary_of(BEGUN[0]), plan()) == TimeLeft(100 + 30 + 5 + 20, False)
    assert time_left(summary_of(BEGUN[0]), plan()).text == "about 2 min 35 s"


def test_after_some_steps_it_is_theirs_and_the_last_evaluation_takes_what_the_first_took():
    left = time_left(summary_of(*MEASURED, *steps(1, 11, 4.0)), plan())

    assert left == TimeLeft(89 * 4.0 + 8.0 + 5.0, True)
    assert left.text == "6 min 09 s"


def test_evaluations_between_steps_count():
    first, second = steps(1, 5, 4.0), steps(6, 10, 4.0, began=50.0 + 20.0 + 40.0)
    found = summary_of(*MEASURED, *first, Evaluation(5, 2.0, time=110.0), *second)

    assert time_left(found, plan()).seconds == 90 * (76.0 / 9) + 8.0 + 5.0


def test_two_steps_measure_nothing():
    assert not time_left(summary_of(*MEASURED, *steps(1, 3, 4.0)), plan()).is_measured


def test_a_resumed_run_is_measured_anew():
    found = summary_of(*MEASURED, *steps(1, 50, 4.0), StateChange("running", time=900.0), ModelReady(5.0, time=920.0))
    assert not time_left(found, plan()).is_measured
    found.add((one, "") for one in steps(51, 61, 2.0, began=930.0))

    assert time_left(found, plan()) == TimeLeft(39 * 2.0 + 8.0 + 5.0, True)


def test_what_a_run_does_is_known_from_its_events():
    ways = [
        (BEGUN[:1], "start"),
        (BEGUN, "training"),
        ((*BEGUN, PhaseProgress("answers", 3, 80)), "answers"),
        ((*BEGUN, PhaseProgress("answers", 3, 80), MEASURED[-1]), "training"),
        ((*MEASURED, *steps(1, 2, 1.0), FinalEvaluation(4)), "evaluation"),
        ((*MEASURED, StateChange("finished")), None),
        ((*MEASURED, StateChange("failed")), None),
    ]

    for events, doing in ways:
        assert summary_of(*events).doing == doing
        assert EventSummary.from_json(summary_of(*events).to_json()).doing == doing
    assert summary_of(*BEGUN, PhaseProgress("answers", 3, 80)).progress == PhaseProgress("answers", 3, 80)


def test_at_the_end_only_the_end_is_left():
    done = (*MEASURED, *steps(1, 100, 1.0))

    assert time_left(summary_of(*done), plan()) == TimeLeft(13.0, False)
    assert time_left(summary_of(*done, QualityReport("after", 1.0)), plan()) == TimeLeft(5.0, False)
