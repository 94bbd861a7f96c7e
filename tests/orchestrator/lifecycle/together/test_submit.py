"""Several jobs in one worker come to what each comes to alone; what becomes of one does not stop the others."""

import json

import pytest

from orchestrator.errors import RunFailed, Stopped
from orchestrator.job.job_file import read_job
from orchestrator.lifecycle.calibration import ratios
from orchestrator.lifecycle.hooks import Quiet
from orchestrator.lifecycle.run import submit
from orchestrator.lifecycle.together import share
from orchestrator.lifecycle.together.submit import Submission, submit_together
from orchestrator.planning.memory_fit import needed_bytes
from orchestrator.runs.events import ErrorReport, Evaluation, Note, PreflightReport
from orchestrator.runs.run_folder import RunFolder
from orchestrator.training.worker_context import HeaviestLoad
from strategies.multi_lora.memory import estimate_together
from tests.cli import called
from tests.orchestrator.lifecycle.together.conftest import UNLIKE


def submissions(folder, start, names=tuple(UNLIKE), **changes):
    """Jobs with the id of their run; `changes` are overrides by name."""
    return [Submission(read_job(folder / f"{n}.yaml", changes.get(n, [])), Quiet(), f"{start}-{n}") for n in names]


def assert_same(found, expected):
    """Losses of every step and evaluation, and the held-out loss in the end."""
    ours, theirs = found.steps(), expected.steps()
    assert [ours[step].loss for step in sorted(ours)] == pytest.approx(
        [theirs[s].loss for s in sorted(theirs)], rel=1e-5
    )
    losses = [{event.step: event.eval_loss for event in run.events_of(Evaluation)} for run in (found, expected)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and losses[0]
    after = [run.result().values["after"]["eval_loss"] for run in (found, expected)]
    assert after[0] == pytest.approx(after[1], rel=1e-5)
    before = [run.result().values["before"]["eval_loss"] for run in (found, expected)]
    assert before[0] == before[1]


def test_runs_that_share_a_base_come_to_what_each_comes_to_alone(folder, here, alone):
    said = []
    found = submit_together(submissions(folder, "together"), said.append)

    assert "3 runs share one base model in one worker (together-one, together-two, together-three)" in said[0]
    for name, run in zip(UNLIKE, found, strict=True):
        assert_same(run, alone[name])
        assert run.state_by_events() == "finished" and run.exported().name == "adapter"
        assert not [event.text for event in run.events_of(Note) if "by themselves" in event.text]


def test_a_preflight_that_another_run_of_the_worker_has_passed_is_not_repeated(folder, here):
    """The second is as large as the first, the third has other weights, the fourth another place for checkpoints."""
    elsewhere = f"checkpoint.output_dir={folder / 'elsewhere'}"
    changes = ([], ["train.learning_rate=1e-4"], ["method.lora_r=3"], [elsewhere])
    jobs = [
        Submission(read_job(folder / "one.yaml", change), Quiet(), f"tried-{i}") for i, change in enumerate(changes)
    ]

    found = submit_together(jobs, print)

    assert [len([*run.events_of(PreflightReport)]) for run in found] == [1, 0, 1, 1]
    notes = [[event.text for event in run.events_of(Note) if "preflight: another run" in event.text] for run in found]
    assert [len(texts) for texts in notes] == [0, 1, 0, 0]
    assert all(run.result().values["after"]["eval_loss"] < 9 for run in found)


@pytest.mark.parametrize(
    ("tokens", "supervised", "held_out", "kind", "holds"),
    [
        (10, 5, 7, "a", True),
        (9, 4, 6, "a", True),
        (11, 5, 7, "a", False),
        (10, 6, 7, "a", False),
        (10, 5, 8, "a", False),
        (10, 5, 7, "b", False),
    ],
)
def test_what_passed_covers_what_is_no_larger(tokens, supervised, held_out, kind, holds):
    assert HeaviestLoad("a", 10, 5, 7).covers(HeaviestLoad(kind, tokens, supervised, held_out)) is holds


def test_times_of_shared_passes_teach_no_prediction(folder, here, alone):
    (run, *_) = submit_together(submissions(folder, "together"), print)
    times = run.result().time

    assert times.measured_step_s > 0 and times.runs_together == 3
    assert times.predicted_step_s is None and times.formula_step_s is None
    assert run.result().memory.predicted_bytes > run.plan().memory.total_bytes
    assert ratios([run.result().values]) == {} and ratios([alone["one"].result().values])


def test_runs_that_were_stopped_continue_together_as_if_they_never_were(folder, here, alone, monkeypatch):
    from orchestrator.training.workers import worker

    save, stopped = worker.checkpoint.save, submissions(folder, "stopped")

    def stop_all_at_the_second_step_of_two(place, held, state):
        if state["step"] == 2 and place.parent.name == "stopped-two":
            for one in stopped:
                (place.parent.parent / one.run_id / "stop").touch()
        return save(place, held, state)

    with pytest.raises(Stopped), monkeypatch.context() as patch:
        patch.setattr(worker.checkpoint, "save", stop_all_at_the_second_step_of_two)
        submit_together(stopped, print)
    runs = [RunFolder(folder / "runs" / one.run_id) for one in stopped]
    ended = {run.run_id: (run.state_by_events(), max(run.steps())) for run in runs}
    assert all(state == "stopped" and 1 <= step < 5 for state, step in ended.values()), ended

    for name, run in zip(UNLIKE, submit_together(stopped, print), strict=True):
        assert_same(run, alone[name])


def test_a_run_that_diverges_ends_and_the_others_finish(folder, here, alone):
    jobs = submissions(folder, "with-diverged", two=["train.learning_rate=1e30", "train.max_grad_norm=0"])

    one, two, three = submit_together(jobs, print)

    assert isinstance(two, RunFailed) and "not a number" in str(two)
    failed = RunFolder(folder / "runs" / "with-diverged-two")
    assert failed.state_by_events() == "failed" and "not a number" in failed.events_of(ErrorReport)[-1].text
    assert_same(one, alone["one"])
    assert_same(three, alone["three"])


def test_what_cannot_share_trains_by_itself_and_is_said_to(folder, here, alone):
    said, jobs = [], submissions(folder, "mixed", two=["method.use_dora=true"], three=["data.packing=false"])

    found = submit_together(jobs, said.append)

    assert [line for line in said if "mixed-two trains by itself: use_dora is more than pairs of A and B" in line]
    assert [line for line in said if "mixed-three trains by itself: its rows are padded" in line]
    assert not [line for line in said if "share" in line]
    assert all(run.state_by_events() == "finished" for run in found)
    assert found[0].result().time.formula_step_s


def test_runs_wait_where_not_all_fit_and_that_is_said_beforehand(folder, here, alone, monkeypatch):
    said = []

    plain = share.num_places

    def on_a_smaller_machine(jobs, device, usable_bytes):
        largest = sorted(jobs, key=lambda job: -job.own_bytes)
        return plain(jobs, device, needed_bytes(estimate_together(largest[:2], device), device.kind))

    monkeypatch.setattr(share, "num_places", on_a_smaller_machine)
    found = submit_together(submissions(folder, "queued"), said.append)

    assert "2 at a time, the others as they end" in said[0]
    for name, run in zip(UNLIKE, found, strict=True):
        assert_same(run, alone[name])


def test_what_is_finished_is_not_trained_again(folder, here, alone, monkeypatch):
    first = submit(read_job(folder / "one.yaml"), Quiet(), "half-one")
    steps = len(first.steps())

    one, two = submit_together(submissions(folder, "half", ("one", "two")), print)

    assert len(one.steps()) == steps
    assert_same(two, alone["two"])


def test_a_job_with_a_mistake_stops_no_other(folder, here):
    jobs = submissions(folder, "mistaken", ("one", "two"), one=["data.train=nowhere.jsonl"])

    one, two = submit_together(jobs, print)

    assert "nowhere.jsonl" in str(one)
    assert two.state_by_events() == "finished"


def test_several_job_files_are_submitted_at_once(folder, here, alone):
    done = called("submit", "one.yaml", "two.yaml", "--run-id", "evening", cwd=folder, check=0)

    assert "2 runs share one base model in one worker (evening-one, evening-two)" in " ".join(done.stderr.split())
    assert "two: step 5/5" in done.stdout
    for name in ("one", "two"):
        assert_same(RunFolder(folder / "runs" / f"evening-{name}"), alone[name])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["one.yaml", "one.yaml"], "name: one is the name of several of the jobs"),
        (["one.yaml", "two.yaml", "--dry-run"], "--dry-run belongs to one job, and 2 are given"),
        (["one.yaml", "two.yaml", "--cluster", "auto"], "--cluster belongs to one job, and 2 are given"),
    ],
)
def test_what_belongs_to_one_job_is_refused_for_several(folder, arguments, said):
    done = called("submit", *arguments, cwd=folder, check=2)

    assert said in " ".join(done.stderr.split())


def test_what_fails_of_several_is_named_in_the_end(folder, here):
    diverging = ["--set", "train.learning_rate=1e30", "--set", "train.max_grad_norm=0", "--run-id", "bad"]
    done = called("submit", "one.yaml", "three.yaml", *diverging, cwd=folder, check=5)

    assert "2 of 2 failed; `--run-id bad` tries them again" in " ".join(done.stderr.split())


def test_several_results_are_one_json_document_with_an_error_in_its_job_s_place(folder, here):
    done = called("submit", "one.yaml", "three.yaml", "--json", "--set", "train.learning_rate=1e30",
                  "--set", "train.max_grad_norm=0", "--run-id", "odd", cwd=folder, check=5)  # fmt: skip
    good = called("submit", "one.yaml", "two.yaml", "--json", "--run-id", "good", cwd=folder, check=0)

    assert [(one["job"], one["exit_code"], bool(one["error"])) for one in json.loads(done.stdout)] == [
        ("one", 5, True),
        ("three", 5, True),
    ]
    assert [(one["job"], one["result"]["steps"]) for one in json.loads(good.stdout)] == [("one", 6), ("two", 5)]
