"""A search over a tiny model.  Ray's doors are fakes: trials run in this process."""

import contextlib
import time
from functools import partial
from types import SimpleNamespace
from typing import ClassVar

import pytest

from orchestrator.job.job_file import read_job
from orchestrator.search import run as path_of_a_search
from orchestrator.search.run import resume, search
from tests.conftest import rows, write_jsonl

JOB = """\
name: tiny
model: {{model_name_or_path: {model}, dtype: float32}}
data: {{train: train.jsonl, eval: eval.jsonl, max_length: 64, packing: true}}
cluster: {{num_workers: 1}}
method: {{type: lora}}
train: {{global_batch_size: 4, num_train_epochs: 2, per_device_train_batch_size: 4, gradient_checkpointing: false}}
checkpoint: {{output_dir: {runs}}}
tracking: {{report_to: []}}
search:
  space: {{method.lora_r: [2, 8], train.learning_rate: [1.0e-3, 1.0e-2]}}
  trial_steps: 8
  eval_rows: 6
  scheduler: none
"""


class Listener:
    """What a terminal would show."""

    def __init__(self, folder=None, stop_after=None):
        self.said, self.num_ended, self._stop_after, self._runs = [], 0, stop_after, folder

    def say(self, text):
        self.said.append(text)

    def advised(self, space, advised):
        pass

    def ended(self, trial, done, progress):
        self.num_ended += 1
        if self.num_ended == self._stop_after:
            max(self._runs.glob("search-tiny-*"), key=lambda path: path.stat().st_mtime).joinpath("stop").touch()
            time.sleep(1.0)  # until the main thread has seen it


class TrainerHere:
    """In place of a process of Ray's: the resident trainer in this one."""

    calls: ClassVar[list] = []  # what all trainers of a test were sent

    def __init__(self, folder, resources, first, places, memory):
        from orchestrator.search.resident import ResidentTrainer

        self._folder, self._trainer, self._call = folder, ResidentTrainer(places, memory, 1), None
        self.calls.append(f"{places} places")

    def advance(self, begin, proceed, leave):
        from orchestrator.search.tuning import trial_config

        self._call = [trial_config(self._folder, one) for one in begin], proceed, leave
        self.calls.append(([one.number for one in begin], proceed, leave))

    def poll(self, timeout_s):
        return self._trainer.advance(*self._call)

    def end(self):
        self.calls.append("end")


def trials_here(folder, searching, slots, num_trials, decisions):
    """In place of Ray Tune: a trial after the other, by itself."""
    from orchestrator.search.trial_run import TrialRun, trial_of
    from orchestrator.search.tuning import trial_config

    while not searching.enough() and (one := searching.next_trial()):
        searching.started(one.number)
        trial, stops = TrialRun(trial_config(folder, one), next(iter(one.plans))), False
        while not stops:
            report = trial.step()
            stops = decisions.stops(one.number, report) or report["done"]
        searching.ended(trial_of(report))


@pytest.fixture(scope="session")
def search_place(model_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("search")
    write_jsonl(folder / "train.jsonl", rows(40))
    write_jsonl(folder / "eval.jsonl", rows(8, start=100))
    (folder / "job.yaml").write_text(JOB.format(model=model_folder, runs=folder / "runs"))
    return folder


@contextlib.contextmanager
def doors(trainer):
    from orchestrator.search import tuning

    connection = SimpleNamespace(slot_resources={"train_slot": 1.0})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(path_of_a_search, "connect", lambda *_: contextlib.nullcontext(connection))
        patch.setattr(tuning, "RayTrainer", trainer)
        patch.setattr(tuning, "tune_trials", trials_here)
        yield


@pytest.fixture
def trainer():
    """The class of the trainers of a test."""
    return type("Trainer", (TrainerHere,), {"calls": []})


@pytest.fixture
def searching_with(search_place):
    """Run the search with a trainer's class and some keys at other values: its folder, and what was shown."""

    def run(trainer, *overrides, stop_after=None):
        listener = Listener(search_place / "runs", stop_after)
        with doors(trainer):
            return search(read_job(search_place / "job.yaml", overrides), listener), listener

    return run


@pytest.fixture
def search_with(trainer, searching_with):
    return partial(searching_with, trainer)


@pytest.fixture
def resumed(trainer):
    def run(folder):
        with doors(trainer):
            return resume(folder, Listener())

    return run


@pytest.fixture(scope="session")
def each_alone(search_place):
    """The search in which each trial has a process of its own."""
    with doors(None):
        return search(read_job(search_place / "job.yaml", ["search.share_base=never"]), Listener())
