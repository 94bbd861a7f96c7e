"""Run folders that an earlier version wrote, before its modules moved: read, resumed, evaluated and reported today.

fixtures/earlier holds a model of 32 thousand parameters, its rows, a finished run of four steps and one that was
stopped after two, made in /srv/finetune.  Here they are moved into a test's folder: paths inside are rewritten.
"""

import json
import shutil
from dataclasses import replace

import pytest

from orchestrator.runs import record
from orchestrator.runs.run_folder import RunFolder
from tests.cli import called
from tests.conftest import FIXTURES

EARLIER = FIXTURES / "earlier"
MADE_IN = "/srv/finetune"


@pytest.fixture
def place(tmp_path):
    """A copy whose recorded paths are those of the copy."""
    folder = shutil.copytree(EARLIER, tmp_path / "place")
    for run in RunFolder.all(folder / "results"):
        found = record.read(run.path)
        texts = {name: text.replace(MADE_IN, str(folder)) for name, text in found.files.items()}
        record.write(run.path, replace(found, files=texts))
        for name, text in texts.items():
            run.write(name, text)
    return folder


def losses(run):
    return [report.loss for _, report in sorted(run.steps().items())]


def test_the_folders_are_as_they_were_written():
    runs = RunFolder.all(EARLIER / "results")

    assert [run.run_id for run in runs] == ["finished", "stopped"]
    assert [run.state() for run in runs] == ["finished", "stopped"]
    assert [run.differences() for run in runs] == [[], []]
    assert [sorted(run.steps()) for run in runs] == [[1, 2, 3, 4], [1, 2]]


def test_they_are_listed_and_their_state_is_told(place):
    listed = json.loads(called("list", "--runs", "results", "--json", cwd=place, check=0).stdout)
    told = json.loads(called("status", "stopped", "--runs", "results", "--json", cwd=place, check=0).stdout)

    assert {row["run"]: row["state"] for row in listed} == {"finished": "finished", "stopped": "stopped"}
    assert (told["step"], told["state"]) == (2, "stopped")


def test_the_stopped_run_is_resumed_to_the_losses_it_would_have_had(place, without_ray):
    stopped, finished = (RunFolder(place / "results" / name) for name in ("stopped", "finished"))

    called("resume", "stopped", "--runs", "results", cwd=place, check=0)

    assert stopped.state() == "finished"
    assert losses(stopped) == pytest.approx(losses(finished), rel=1e-6)
    ours, theirs = (run.result().after.eval_loss for run in (stopped, finished))
    assert ours == pytest.approx(theirs, rel=1e-6)


def test_evaluating_the_finished_run_gives_its_numbers(place):
    run = RunFolder(place / "results" / "finished")

    again = json.loads(called("evaluate", "finished", "--runs", "results", "--json", cwd=place, check=0).stdout)

    assert again["eval_loss"] == pytest.approx(run.result().after.eval_loss, rel=1e-5)


def test_the_finished_run_has_a_report(place):
    told = json.loads(called("report", "finished", "--runs", "results", "--json", cwd=place, check=0).stdout)

    page = (place / told["report"]).read_text()
    measured = RunFolder(place / "results" / "finished").result().after.eval_loss
    assert f"{measured:.4f}" in page and "4 / 4" in page
