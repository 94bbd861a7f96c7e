"""The rows of a folder's runs: what is there, and that looking again reads nothing that did not change."""

import os
import shutil
import time

import pytest

from orchestrator.dashboard import board as board_module
from orchestrator.dashboard.board import Board
from orchestrator.runs.search_folder import SearchFolder, Trial
from tests.benchmarks.reading import TEMPLATE, copy_runs, make_run
from tests.orchestrator.dashboard.served import Training


@pytest.fixture
def folder(tmp_path):
    copy_runs(make_run(tmp_path / "run-00000", 8), 5)
    return tmp_path


def states(rows):
    return {row["run"]: row.get("state", "gone") for row in rows}


def test_nothing_is_read_again_that_did_not_change(folder, monkeypatch):
    board, read = Board(folder), []
    rows, serial = board.since(0)
    monkeypatch.setattr(board_module, "facts_of_whole_run", lambda run: read.append(run.run_id))

    again, same = board.since(serial)

    assert len(rows) == 5 and again == [] and same == serial and read == []


def test_a_look_ends_soon_and_the_newest_runs_are_read_first(folder, monkeypatch):
    for number in range(5):
        os.utime(folder / f"run-{number:05}" / "job.yaml", (number, number))
    monkeypatch.setattr(board_module, "_LOOK_S", -1.0)
    board, serial, found = Board(folder), 0, []
    for _ in range(6):
        rows, serial = board.since(serial)
        found.append(([row["run"] for row in rows], board.is_behind))

    assert found == [([f"run-{number:05}"], True) for number in (4, 3, 2, 1, 0)] + [([], False)]


def test_runs_that_come_change_and_go_are_told(folder):
    board = Board(folder)
    _, serial = board.since(0)
    shutil.rmtree(folder / "run-00004")
    shutil.copytree(folder / "run-00001", folder / "new")
    with (folder / "run-00002" / "events.jsonl").open("a") as stream:
        stream.write('{"event": "state", "time": 1.8e9, "state": "failed", "text": "no memory"}\n')

    changed, latest = board.since(serial)

    assert states(changed) == {"run-00004": "gone", "new": "finished", "run-00002": "failed"}
    assert board.since(latest)[0] == []
    assert states(board.since(0)[0])["run-00000"] == "finished"


def test_a_driver_that_dies_leaves_an_interrupted_run(folder):
    board = Board(folder)
    with Training(folder / "live") as training:
        training.train(2)
        assert states(board.since(0)[0])["live"] == "running"

    assert states(board.since(0)[0])["live"] == "interrupted"


def test_a_live_run_is_read_on_from_where_it_was(folder):
    with Training(folder / "live") as training:
        board = Board(folder)
        training.train(2)
        board.since(0)
        found = board.follow(training.run)
        training.train(2)

        assert board.row(training.run)["step"] == 4 and board.follow(training.run) is found
        assert found.num_bytes == (training.run.path / "events.jsonl").stat().st_size


def test_a_folder_that_becomes_a_run_later_is_found(tmp_path, monkeypatch):
    (tmp_path / "late").mkdir()
    board = Board(tmp_path)
    assert board.since(0)[0] == []
    shutil.copytree(make_run(tmp_path / "elsewhere" / "run", 8).path, tmp_path / "late", dirs_exist_ok=True)
    later = time.monotonic() + board_module._AGAIN_S + 1
    monkeypatch.setattr(board_module.time, "monotonic", lambda: later)

    assert states(board.since(0)[0]) == {"late": "finished"}


def test_a_run_that_was_sent_says_where(folder):
    run = make_run(folder / "sent", 8)
    (run.path / "events.jsonl").unlink()
    run.take_back("result.json")
    run.write(
        "remote.json",
        '{"address": "http://10.0.0.1:8265", "storage": "/data/runs", "attempts": ["sent-1"], "is_closed": false}',
    )

    row = next(row for row in Board(folder).since(0)[0] if row["run"] == "sent")

    assert (row["state"], row["where"]) == ("sent", "http://10.0.0.1:8265")


def test_a_search_is_a_row_with_its_trials_and_the_least_loss(tmp_path):
    search = SearchFolder(tmp_path / "search-tiny")
    search.path.mkdir()
    search.begin({"search.yaml": (TEMPLATE / "job.yaml").read_text(), "origin.json": '{"folder": "."}'})
    for number, loss in enumerate((2.0, float("nan"), 1.5)):
        search.add(Trial(number, {}, "finished", eval_loss=loss))
    board = Board(tmp_path)

    (row,), serial = board.since(0)
    search.add(Trial(3, {}, "finished", eval_loss=1.25))

    assert (row["kind"], row["step"], row["after"], row["state"]) == ("search", 3, 1.5, "interrupted")
    assert [(one["step"], one["after"]) for one in board.since(serial)[0]] == [(4, 1.25)]
    assert board.run("search-tiny").kind == "search"


def test_only_the_last_runs_looked_at_stay_in_memory(tmp_path):
    runs = [make_run(tmp_path / f"run-{number}", 4) for number in range(board_module._MOST_FOLLOWED + 3)]
    board = Board(tmp_path)
    for run in runs:
        board.follow(run)
        board.plan(run)

    assert len(board._followed) <= board_module._MOST_FOLLOWED and len(board._plans) <= board_module._MOST_FOLLOWED + 1
