"""A worker records how far it is beside training, and trains the same numbers."""

from orchestrator.job.job_file import read_job
from orchestrator.lifecycle import run as path_of_a_job
from orchestrator.runs.events import PhaseProgress
from orchestrator.training.workers import worker
from tests.orchestrator.conftest import Listener


def test_evaluations_answers_and_saving_are_recorded_as_they_go(place, finished, without_ray, monkeypatch):
    monkeypatch.setattr(worker, "_PROGRESS_S", 0.0)

    run = path_of_a_job.submit(read_job(place / "job.yaml"), Listener(), "told")

    found = run.events_of(PhaseProgress)
    last = {one.phase: (one.done, one.total) for one in found}
    assert last == {"evaluation": (4, 4), "answers": (2, 2), "saving": (0, None)}
    assert not finished.events_of(PhaseProgress)  # it was faster than two seconds
    losses = [{step: report.loss for step, report in one.steps().items()} for one in (run, finished)]
    assert losses[0] == losses[1] and len(losses[0]) == 4
