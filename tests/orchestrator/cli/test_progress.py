"""Lines of a run's progress: what a phase took beside what was predicted for it."""

import io
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from clusters.capability import ClusterCapability
from orchestrator.cli.progress import Lines
from orchestrator.job.job_file import Job, parse_job
from orchestrator.planning.planner import make_plan
from orchestrator.planning.workload import describe
from orchestrator.runs.events import BetweenReport, ModelReady, QualityReport, StateChange
from orchestrator.runs.run_folder import RunFolder
from strategies.cost.phases import Phases
from tests.orchestrator.planning.machines import SMALL, machine

SPEC = parse_job("model: {model_name_or_path: m}\ndata: {train: a.jsonl, max_length: 512}\n", Path()).spec


def printed(events, phases, tmp_path):
    work, _, _ = describe(SPEC, SMALL, [100] * 800, 40_000, 1)
    plan = make_plan(SPEC, work, ClusterCapability((machine("pc", "RTX 3060 12GB"),)), 512, None, {})
    out = io.StringIO()
    lines = Lines(Console(file=out, width=200))
    lines.planned(RunFolder(tmp_path / "run"), Job(SPEC, Path(), ""), replace(plan, phases=phases), {})
    for event in events:
        lines.event(event)
    return out.getvalue()


def test_the_start_stands_beside_its_prediction_and_an_evaluation_says_how_long_it_took(tmp_path):
    events = (
        StateChange("running", time=100.0),
        ModelReady(6.2, time=131.0),
        QualityReport("before", 2.5, extra={"seconds": 61.02}, time=195.0),
    )

    found = printed(events, Phases(start_s=28.0, training_s=60.0, guesses=("start",)), tmp_path)

    assert "in all   88 s: training 60 s, start 28 s (start: a guess)" in found
    assert "model ready after 6.2 s; start 31 s (predicted 28 s)" in found
    assert "before: eval_loss 2.5000, in 61 s" in found


def test_a_plan_of_an_earlier_version_predicts_no_start(tmp_path):
    found = printed((StateChange("running", time=100.0), ModelReady(6.2, time=131.0)), Phases(), tmp_path)

    assert "model ready after 6.2 s\n" in found and "in all" not in found


def test_what_a_method_did_between_steps_is_a_line(tmp_path):
    event = BetweenReport.of(3, {"text": "8 of 64 channels are cut", "channels": 8})

    assert event == BetweenReport(3, "8 of 64 channels are cut", extra={"channels": 8})
    assert "\nstep 3: 8 of 64 channels are cut\n" in printed((event,), Phases(), tmp_path)
