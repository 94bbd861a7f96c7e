"""Nodes that stand by read their stage once, and the run says what came of it.  Ray's door is a fake."""

import json
from dataclasses import replace
from typing import ClassVar

import pytest

from clusters.ray import nodes
from orchestrator.data.data_files import DataFiles
from orchestrator.lifecycle.stages.spare import StandBy
from orchestrator.planning.plan import Beside
from orchestrator.runs.events import Note
from orchestrator.runs.run_folder import RunFolder
from strategies.workload import StagePart
from tests.orchestrator.planning.machines import TINY, machine
from tests.orchestrator.planning.test_choice import plan

STAGE = StagePart(1, 2, 1, 2)
IDS = {"box": "id of box"}


class CallHere:
    """In place of a call on another node: it is made here, and has ended when it is asked for."""

    made: ClassVar[list[str]] = []

    def __init__(self, node_id, call, *arguments, num_gpus=0):
        self.made.append(node_id)
        self._failure = self._result = None
        try:
            self._result = call(*arguments)
        except OSError as error:
            self._failure = str(error)

    def has_ended(self):
        return True

    def error(self):
        return self._failure

    def result(self):
        return self._result


@pytest.fixture
def stand_by(tmp_path, monkeypatch, request):
    """A function that makes a run with a model's folder, and what stands by for it."""
    monkeypatch.setattr(nodes, "CallOn", CallHere)
    monkeypatch.setattr(CallHere, "made", [])

    def made(model):
        run = RunFolder(tmp_path)
        files = DataFiles(train=str(tmp_path), model=str(model))
        run.write("data.json", files.to_json())
        return StandBy(run), run

    return made


def planned(stage=STAGE, node="box"):
    return replace(plan(TINY, machine("a")), beside=(Beside(node, "stands by", stage=stage, num_bytes=1e6),))


def notes(run):
    return [event.text for event in run.events_of(Note)]


def test_a_stage_is_read_once_a_node_and_again_where_it_is_another(stand_by, model_folder):
    spares, run = stand_by(model_folder)
    for stage in (STAGE, STAGE, StagePart(0, 2, 0, 1)):
        spares.begin(planned(stage), IDS)
        spares.poll()

    assert CallHere.made == ["id of box"] * 2
    config = json.loads((model_folder / "config.json").read_text())
    width, rows = config["hidden_size"], config["vocab_size"]
    layer = 2 * width * width + 2 * width * width // 2 + 3 * width * config["intermediate_size"] + 2 * width
    num_bytes = 4 * (layer + width + rows * width)  # with the last norm, and the matrix that is both ends
    assert notes(run)[0].startswith(f"box stands by with layer 1: {num_bytes / 1024:.1f} KiB read in ")
    assert notes(run)[1].startswith("box stands by with layer 0: ")


def test_a_node_without_the_models_folder_says_so(stand_by, tmp_path):
    spares, run = stand_by(tmp_path / "elsewhere")

    spares.begin(planned(), IDS)
    spares.poll()
    spares.poll()

    assert notes(run) == [f"box does not stand by: the model's folder {tmp_path / 'elsewhere'} is not on its disk"]


def test_a_node_that_is_not_there_is_not_asked(stand_by, model_folder):
    spares, run = stand_by(model_folder)

    spares.begin(planned(node="gone"), IDS)
    spares.poll()

    assert not CallHere.made
    assert not notes(run)
