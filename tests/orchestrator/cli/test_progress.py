"""The progress of a run in a log and in a terminal: how far, how fast, how long still; predicted beside measured."""

import io
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from clusters.capability import ClusterCapability
from orchestrator.cli.progress import Lines, Live
from orchestrator.job.job_file import Job, parse_job
from orchestrator.planning.planner import make_plan
from orchestrator.planning.workload import describe
from orchestrator.progress.updates import ProgressUpdate, every, report, reporting_to
from orchestrator.runs.events import (
    BetweenReport,
    CheckpointReport,
    ModelReady,
    PhaseProgress,
    QualityReport,
    StateChange,
    StepReport,
)
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


def a_plan(num_steps=1000, step_s=2.0):
    work, _, _ = describe(SPEC, SMALL, [100] * 800, 40_000, 1)
    plan = make_plan(SPEC, work, ClusterCapability((machine("pc", "RTX 3060 12GB"),)), 512, None, {})
    return replace(plan, num_steps=num_steps, step_s=step_s, phases=Phases(training_s=num_steps * step_s))


def one_step(step, time):
    numbers = {"epoch": 0.1, "grad_norm": 1.0, "learning_rate": 1e-4, "tokens": 512, "supervised_tokens": 400}
    return StepReport(step=step, loss=1.5, seconds=2.0, tokens_per_s=256.0, peak_bytes=2**31, time=time, **numbers)


def lines_of(kind, watch, **console):
    out = io.StringIO()
    lines = kind(Console(file=out, width=200, **console))
    lines._begin(a_plan())
    watch(lines)
    return out.getvalue()


def test_without_a_terminal_training_is_a_line_every_ten_seconds_with_all_that_one_asks_for():
    def watch(lines):
        lines.event(StateChange("running", time=90.0))
        lines.event(ModelReady(1.0, time=98.0))
        for step in range(1, 1001):
            lines.event(one_step(step, 100.0 + 2.0 * step))

    found = [line for line in lines_of(Lines, watch).splitlines() if line.startswith("step ")]

    assert found[0] == "step 1/1000 0%: loss 1.5000, 256 tokens/s, 2.0 GiB, about 33 min 18 s left"
    assert found[1] == "step 6/1000 1%: loss 1.5000, 256 tokens/s, 2.0 GiB, 2 s a step, 33 min 08 s left"
    assert found[-1] == "step 1000/1000 100%: loss 1.5000, 256 tokens/s, 2.0 GiB, 2 s a step"
    assert len(found) == 1 + 999 // 5 + 1


def test_without_a_terminal_other_phases_are_lines_too_and_short_ones_none():
    def watch(lines):
        lines.progress(ProgressUpdate("tokenising", 256, 10_000), at=0.0)
        lines.progress(ProgressUpdate("tokenising", 5256, 10_000), at=5.0)
        lines.progress(ProgressUpdate("tokenising", 7756, 10_000), at=10.0)
        lines.progress(ProgressUpdate("download", 2**20, 2**32, "bytes"), at=11.0)
        lines.progress(ProgressUpdate("download", 2**30 + 2**20, 2**32, "bytes"), at=27.0)
        for at in (100.0, 112.0, 125.0):
            lines.event(PhaseProgress("answers", 4 * (at - 100.0) / 12, 80, time=at))
        lines.event(PhaseProgress("saving", 0, None, time=130.0))
        lines.event(PhaseProgress("evaluation", 30, 40, time=135.0))

    assert lines_of(Lines, watch).splitlines() == [
        "tokenising 78%: 7,756 / 10,000 rows, 750 rows/s, 3 s left",
        "download 25%: 1.0 GiB / 4.0 GiB, 64.0 MiB/s, 48 s left",
        "generating answers 5%: 4 / 80 prompts, 3 min 48 s left",
        "generating answers 10%: 8 / 80 prompts, 3 min 35 s left",
    ]


def test_in_a_terminal_a_phase_has_the_bar_until_another_begins():
    seen = []

    def watch(lines):
        def see():
            seen.append([task.description for task in lines._bar.tasks])

        lines.progress(ProgressUpdate("tokenising", 256, 1000), at=0.0)
        see()
        lines.say("searching the machines")
        see()
        lines.event(StateChange("running", time=1.0))
        lines.event(PhaseProgress("evaluation", 4, 40, time=3.0))
        see()
        lines.event(QualityReport("before", 2.0, time=9.0))
        see()
        lines.event(one_step(1, 10.0))
        see()
        lines.event(PhaseProgress("saving", 0, None, time=13.0))
        see()
        lines.event(CheckpointReport(1, "step-1", time=14.0))
        lines.event(one_step(2, 15.0))
        see()
        lines.close()

    found = lines_of(Live, watch, force_terminal=True)

    assert seen == [["tokenising"], [], ["evaluation"], [], ["training"], ["saving"], ["training"]]
    assert "searching the machines" in found and "2/1000" in found


def test_what_works_tells_who_surrounds_it_and_nobody_else(monkeypatch):
    heard = []
    report("evaluation", 1, 2)
    with reporting_to(heard.append):
        report("evaluation", 1, 2)
    report("evaluation", 2, 2)

    now = 0.0
    monkeypatch.setattr("orchestrator.progress.updates.time.monotonic", lambda: now)
    listen = every(2.0, heard.append)
    for now in (1.0, 2.0, 3.0, 4.5):
        listen(ProgressUpdate("answers", now))

    assert heard == [ProgressUpdate("evaluation", 1, 2), ProgressUpdate("answers", 2.0), ProgressUpdate("answers", 4.5)]
