"""Runs trained in this process, once a session: one to its end, one stopped on its way.  Ray's door is a fake."""

import shutil
from dataclasses import dataclass, field

import pytest

from orchestrator.errors import OrchestratorError
from orchestrator.job.job_file import read_job
from orchestrator.lifecycle import run as path_of_a_job
from orchestrator.runs.run_folder import RunFolder
from tests.conftest import rows, write_jsonl

JOB = """\
name: tiny
model: {{model_name_or_path: {model}, dtype: float32}}
data: {{train: train.jsonl, eval: eval.jsonl, max_length: 64}}
method: {{lora_r: 4}}
train: {{global_batch_size: 4, max_steps: 4, learning_rate: 3e-2}}
eval: {{max_new_tokens: 4, max_rows: 2, eval_steps: 1}}
checkpoint: {{save_steps: 1, save_total_limit: 4, output_dir: {runs}}}
strategy: {{preflight: false}}
tracking: {{report_to: []}}
"""


@dataclass
class Listener:
    """What a terminal would show."""

    said: list[str] = field(default_factory=list)

    def say(self, text):
        self.said.append(text)

    def planned(self, run, job, plan, statistics):
        pass

    def event(self, event):
        self.said.append(getattr(event, "text", None) or "")


def train_here(training, *_):
    """In place of Ray: the one worker, in this process."""
    from orchestrator.training.workers.worker import work

    work(training.run, 0, 1, "", 0)
    training.report()


@pytest.fixture
def without_ray(monkeypatch):
    monkeypatch.setattr(path_of_a_job, "_train_on_ray", train_here)


@pytest.fixture(scope="session")
def store(tmp_path_factory):
    """A store whose tables are there: making them takes seconds."""
    from mlflow.tracking import MlflowClient

    uri = f"sqlite:///{tmp_path_factory.mktemp('store') / 'mlflow.db'}"
    return MlflowClient(uri), uri


@pytest.fixture(scope="session")
def place(model_folder, tmp_path_factory):
    """A job with its data and a model of its own, so that each may be damaged."""
    folder = tmp_path_factory.mktemp("place")
    shutil.copytree(model_folder, folder / "model")
    write_jsonl(folder / "train.jsonl", rows(16))
    write_jsonl(folder / "eval.jsonl", rows(4, start=100))
    (folder / "job.yaml").write_text(JOB.format(model="model", runs=folder / "runs"))
    return folder


@pytest.fixture(scope="session")
def finished(place):
    """A run that trained to its end."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(path_of_a_job, "_train_on_ray", train_here)
        return path_of_a_job.submit(read_job(place / "job.yaml"), Listener(), "finished")


def stopped(job, run_id):
    """A run that is asked to stop when its second step is saved, and so ends after its third."""

    def stop_after_two(training, *rest):
        from orchestrator.training.workers import worker

        save = worker.checkpoint.save

        def saved(folder, held, state):
            if state["step"] == 2:
                training.run.stop_file.touch()
            return save(folder, held, state)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(worker.checkpoint, "save", saved)
            train_here(training, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(path_of_a_job, "_train_on_ray", stop_after_two)
        with pytest.raises(OrchestratorError, match="stopped as asked"):
            path_of_a_job.submit(job, Listener(), run_id)
    run = RunFolder(path_of_a_job.output_dir(job) / run_id)
    assert sorted(run.steps()) == [1, 2, 3]
    return run


@pytest.fixture(scope="session")
def interrupted(place, finished):
    """A run of the same job that was stopped on its way."""
    return stopped(read_job(place / "job.yaml"), "interrupted")


@pytest.fixture(scope="session")
def pristine(place, finished, interrupted, tmp_path_factory):
    """A copy of everything, to put back what a test damaged."""
    folder = tmp_path_factory.mktemp("pristine") / "copy"
    shutil.copytree(place, folder)
    return folder


@pytest.fixture
def put_back(place, pristine):
    """What is damaged in a test is whole again after it; the call does it at once."""

    def again():
        for kept in (path for path in pristine.rglob("*") if path.is_file()):
            file = place / kept.relative_to(pristine)
            if not file.is_file() or file.read_bytes() != kept.read_bytes():
                shutil.rmtree(file) if file.is_dir() else file.unlink(missing_ok=True)
                file.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(kept, file)
        for file in [path for path in place.rglob("*") if path.is_file()]:
            if not (pristine / file.relative_to(place)).exists():
                file.unlink()

    yield again
    again()
