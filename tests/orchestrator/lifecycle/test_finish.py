"""The end of a run: killed between any two writes, the same command does the rest, once."""

import itertools
import json
import multiprocessing
import random
import shutil
import sys
import time

import pytest

from orchestrator.bank.hooks import BANK_HOOKS
from orchestrator.errors import JobError, OrchestratorError
from orchestrator.job.job_file import read_job
from orchestrator.lifecycle import finish
from orchestrator.lifecycle import run as path_of_a_job
from orchestrator.runs.events import FinalEvaluation
from orchestrator.runs.run_folder import RunFolder
from strategies.adapter_bank.store import Bank
from tests.orchestrator.conftest import Listener, train_here


class Killed(BaseException):
    """The process is gone at this moment."""


@pytest.fixture
def job_of(place, finished, put_back, store, tmp_path):
    """The finished run's job with a bank of its own and an experiment in the shared store."""
    numbers = itertools.count()

    def make():
        put_back()
        (finished.path / "ending.json").unlink()
        number = next(numbers)
        wanted = {
            "bank.add": "true",
            "bank.path": str(tmp_path / f"bank-{number}"),
            "tracking.report_to": '["mlflow"]',
            "tracking.mlflow_uri": store[1],
            "tracking.experiment": f"end-{tmp_path.name}-{number}",
        }
        return read_job(place / "job.yaml", [f"{key}={value}" for key, value in wanted.items()])

    return make


def reached(run, job, client):
    """What the end has come to: adapters in the bank, and runs of MLflow with their states and numbers of losses."""
    bank = job.path(job.spec.bank.path)
    names = [card.name for card in Bank(bank).cards()] if (bank / "objects").is_dir() else []
    experiment = client.get_experiment_by_name(job.spec.tracking.experiment)
    runs = client.search_runs([experiment.experiment_id]) if experiment else []
    return (
        names,
        [(one.info.status, len(client.get_metric_history(one.info.run_id, "loss"))) for one in runs],
        [step.name for step in finish.pending(run, job)],
    )


def kill_at(patch, number):
    """Kill before or after the write of that number; whether it came so far."""
    count = itertools.count()
    came = []

    def killing(write):
        def call(*arguments, **named):
            if next(count) == number:
                came.append(number)
                raise Killed
            result = write(*arguments, **named)
            if next(count) == number:
                came.append(number)
                raise Killed
            return result

        return call

    for name in ("write", "append"):
        patch.setattr(RunFolder, name, killing(getattr(RunFolder, name)))
    return came


def test_killed_at_any_write_the_end_is_done_once_by_the_same_command(finished, job_of, store):
    client, points = store[0], 0
    for number in itertools.count():
        job = job_of()
        with pytest.MonkeyPatch.context() as patch:
            came = kill_at(patch, number)
            try:
                finish.finish(finished, job, lambda event: None, BANK_HOOKS)
            except Killed:
                points += 1
        if not came:
            break
        finish.finish(finished, job, lambda event: None, BANK_HOOKS)

        assert reached(finished, job, client) == (["finished"], [("FINISHED", 4)], []), number
    assert points >= 10


def test_what_was_done_is_not_done_again(finished, job_of, store):
    job = job_of()
    finish.finish(finished, job, lambda event: None, BANK_HOOKS)
    events = (finished.path / "events.jsonl").read_bytes()

    finish.finish(finished, job, lambda event: None, BANK_HOOKS)

    assert (finished.path / "events.jsonl").read_bytes() == events
    assert (finished.path / "adapter" / "README.md").is_file()


def test_a_bank_that_cannot_be_is_said_and_tried_again_by_the_same_command(finished, job_of, tmp_path):
    job = job_of()
    bank = job.path(job.spec.bank.path)
    bank.write_text("a file")
    heard = []

    finish.finish(finished, job, heard.append, BANK_HOOKS)
    first = [step.name for step in finish.pending(finished, job)]
    bank.unlink()
    finish.finish(finished, job, heard.append, BANK_HOOKS)

    assert first == ["bank"] and finish.pending(finished, job) == []
    assert next(event.text for event in heard if "bank" in event.text).startswith("bank.add: ")
    assert [card.name for card in Bank(bank).cards()] == ["finished"]


def test_a_damaged_note_of_what_is_done_loses_nothing(finished, job_of, store):
    job = job_of()
    finish.finish(finished, job, lambda event: None, BANK_HOOKS)
    (finished.path / "ending.json").write_text("[")

    finish.finish(finished, job, lambda event: None, BANK_HOOKS)

    assert reached(finished, job, store[0]) == (["finished"], [("FINISHED", 4)], [])


def submit_here(job_file, run_id, overrides):
    """The whole command in a process of its own, without Ray."""
    path_of_a_job._train_on_ray = train_here
    try:
        path_of_a_job.submit(read_job(job_file, overrides), Listener(), run_id, BANK_HOOKS)
    except OrchestratorError as error:
        print(error)
        sys.exit(error.exit_code)


@pytest.fixture(scope="module")
def processes():
    """Processes that have the libraries but no threads of theirs: OpenMP's do not survive a fork."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "orchestrator.training.workers.worker", "transformers", "peft", "mlflow"])
    return context


@pytest.mark.slow
def test_a_hundred_kills_at_any_moment_end_as_the_undisturbed_run(place, finished, store, tmp_path, processes):
    """SIGKILL at a random moment, then the same command again: same adapter, one in the bank, one run of MLflow."""
    moments, kills, number, evaluated_again = random.Random(0), 0, 0, 0
    wanted = (finished.path / "adapter" / "adapter_model.safetensors").read_bytes()
    length_s = 8.0
    while kills < 100:
        number += 1
        bank, experiment = tmp_path / f"bank-{number}", f"kills-{number}"
        overrides = [
            "bank.add=true",
            f"bank.path={bank}",
            'tracking.report_to=["mlflow"]',
            f"tracking.mlflow_uri={store[1]}",
            f"tracking.experiment={experiment}",
            f"checkpoint.output_dir={tmp_path / 'runs'}",
        ]
        for killed in itertools.count():
            began = time.monotonic()
            child = processes.Process(target=submit_here, args=(place / "job.yaml", f"run-{number}", overrides))
            child.start()
            # Only what ends before its moment shortens the length, so it may fall below that of the longest step, which
            # no kill divides (1.4 to 1.8 s for MLflow, with a floor of 1.2 s): a later kill of a run comes later.
            child.join(moments.uniform(0, (1.2 + 0.1 * killed) * length_s))
            if child.exitcode is not None:
                assert child.exitcode == 0
                length_s = max(1.0, 0.8 * length_s + 0.2 * (time.monotonic() - began))
                break
            child.kill()
            child.join()
            kills += 1
            assert killed < 50, "it comes no further"
        run = RunFolder(tmp_path / "runs" / f"run-{number}")
        client = store[0]
        ends = client.search_runs([client.get_experiment_by_name(experiment).experiment_id])
        assert (run.path / "adapter" / "adapter_model.safetensors").read_bytes() == wanted
        assert [card.name for card in Bank(bank).cards()] == [run.run_id]
        assert [one.info.status for one in ends] == ["FINISHED"], (number, kills)
        assert path_of_a_job.is_complete(run, run.job())
        # Bit-equal as each step's loss is measured (eval_steps: 1): a kill in the last evaluation, even three of them,
        # changes none of its batches (tests/orchestrator/training/test_ending.py).
        assert run.result().after.eval_loss == finished.result().after.eval_loss, (number, kills)
        evaluated_again += len(run.events_of(FinalEvaluation)) - 1
        shutil.rmtree(run.path)
    print(f"{kills} kills over {number} runs; {evaluated_again} last evaluations were begun again")


def test_a_run_of_another_job_is_not_finished_for_this_one(place, finished, put_back, without_ray):
    other = read_job(place / "job.yaml", ["train.learning_rate=1e-5"])

    with pytest.raises(JobError, match=r"is of another job \(train.learning_rate is 1e-05, was 0.03\)"):
        path_of_a_job.submit(other, Listener(), "finished")
    same = path_of_a_job.submit(read_job(place / "job.yaml"), Listener(), "finished")

    assert json.loads((same.path / "ending.json").read_text()).keys() == {"card"}
