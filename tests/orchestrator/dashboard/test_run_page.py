"""What the page of one run says: machines and stages with what they wait for, the last lines, the plan."""

import random

from orchestrator.dashboard import run_page
from orchestrator.language.catalogue import translator
from orchestrator.runs.events import Evaluation, Member, Note, QualityReport, StateChange, StepReport, WorkerGroup
from orchestrator.runs.run_folder import RunFolder
from orchestrator.runs.summary.event_summary import EventSummary
from tests.benchmarks.reading import TEMPLATE, make_run, one_step
from tests.orchestrator.lifecycle.stages.test_stages import BIG, SMALL_CARD, pipeline

STAGES = {
    "worker_tokens": [512.0, 512.0],
    "worker_s": [0.4, 0.4],
    "worker_peak_bytes": [2.0e9, 1.0e9],
    "step_bytes_sent": 1e6,
    "slowest": 0,
    "stage_busy_s": [0.3, 0.1],
    "stage_wait_s": [0.1, 0.3],
    "stage_bytes_sent": [1e6, 2e6],
    "stage_bytes_received": [2e6, 1e6],
}


def step(number, **more):
    values = one_step(number, 100, 1, random.Random(number), 0.0).to_json() | {"seconds": 0.4} | more
    return StepReport.from_json(values)


def summary_of(*events):
    found = EventSummary()
    found.add((event, "") for event in events)
    return found


def test_a_stage_says_what_it_computes_and_how_long_it_waits_beside_the_plan():
    plan = pipeline(BIG, SMALL_CARD)
    members = [Member(part.node, part.device) for part in plan.nodes]

    found = run_page.now(summary_of(WorkerGroup(members=members), step(1, **STAGES)), plan, str)

    assert [(one["busy"], one["computes"], one["waits"]) for one in found["stages"]] == [
        (0.75, "0.3 s", "0.1 s"),
        (0.25, "0.1 s", "0.3 s"),
    ]
    assert [one["is_slowest"] for one in found["stages"]] == [True, False]
    assert all(one["predicted"]["computes"] != "-" for one in found["stages"])


def test_before_the_first_step_the_machines_are_the_plans():
    found = run_page.now(summary_of(StateChange("running")), RunFolder(TEMPLATE).plan(), str)

    assert [(one["device"], one["share"]) for one in found["machines"]] == [("AMD EPYC", "100%")]
    assert found["stages"] == [] and "facts" not in found


def test_events_become_points_and_lines_and_no_number_is_not_one():
    events = [
        step(1),
        step(2, loss=float("nan")),
        Evaluation(2, 1.5),
        QualityReport("before", 3.0),
        QualityReport("after", 1.0),
        Note("see https://me:secret@host"),
    ]

    found = run_page.since(events, 2)

    assert [one[0] for one in found["losses"]] == [1, 2] and found["losses"][1][1] is None
    assert found["held_out"] == [(2, 1.5), (0, 3.0), (2, 1.0)]
    assert len(found["lines"]) == 4 and found["lines"][-1].endswith("text=see https://***@host")


def test_the_last_lines_of_a_long_run_are_read_from_its_end(tmp_path):
    run = make_run(tmp_path / "run", 3000)

    found = run_page.last_lines(run)

    assert found[-1].split()[2:4] == ["state", "state=finished"]
    assert 1 < len(found) < 20 and not any(" step " in line for line in found)


def test_the_plan_is_said_with_its_reasons_in_japanese():
    plan = RunFolder(TEMPLATE).plan()

    english, japanese = (
        run_page.whole(RunFolder(TEMPLATE), EventSummary(), plan, translator(lang)) for lang in ("en", "ja")
    )

    assert list(english["plan"]["settings"][0]) == ["method.type", "lora", "as the job says"]
    assert japanese["plan"]["settings"][0][2] != "as the job says" and english["plan"]["ways"]
