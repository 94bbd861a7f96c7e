"""Results on a terminal: names, prompts and answers are text, whatever they hold."""

import io
import json

import pytest
from rich.console import Console

from orchestrator.runs.run_folder import RunFolder
from orchestrator.runs.summary.event_summary import EventSummary
from orchestrator.views.result import RUN_HEAD, result_view, run_cells, scores_view, status_lines
from orchestrator.views.screen import print_rows
from tests.orchestrator.report.test_pages import HOSTILE


def shown(view):
    out = io.StringIO()
    Console(file=out, width=400, force_terminal=False).print(view)
    return out.getvalue()


@pytest.mark.parametrize("text", HOSTILE)
def test_a_result_is_shown_without_markup_and_control_characters(text, tmp_path, capsys, monkeypatch):
    sample = {"prompt": text, "generated": text, "reference": text + "!"}
    after = {"eval_loss": 1.0, "rouge_l": 0.5, "samples": [sample], "compared": {"rouge_l": text}, "without_room": 2}
    monkeypatch.setenv("COLUMNS", "400")
    result = {
        "steps": 1, "tokens": 10, "train_seconds": 1.0, "after": after,
        "before": {"eval_loss": 2.0, "samples": [sample]},
        "memory": {"measured_peak_bytes": 1, "predicted_bytes": 2},
    }  # fmt: skip
    run = RunFolder(tmp_path / "run")
    (run.path / "adapter").mkdir(parents=True)
    run.write("result.json", json.dumps(result))

    row = {"run": text, "state": "finished", "step": 1, "num_steps": 1, "loss": None, "started": None}
    print_rows(RUN_HEAD, [run_cells(row)])
    seen = shown(result_view(run, EventSummary())) + shown(scores_view(run.result().after)) + capsys.readouterr().out

    assert not any(ord(character) < 32 and character != "\n" for character in seen) and "\u202e" not in seen
    assert seen.count("[bold]name[/bold]") == ("[bold]" in text) * 10
    assert "2 prompts fill the model's context" in seen


def test_the_state_of_a_run_is_written_for_people_with_its_share_and_time_left():
    row = {
        "run": "a", "state": "running", "step": 250, "num_steps": 1000, "loss": 1.23456789, "tokens_per_s": 1234.5678,
        "started": "2026-11-30 10:00:00", "path": "runs/a",
        "eta_s": 185, "eta_is_measured": False, "exact_match": 0.925,
    }  # fmt: skip

    assert status_lines(row) == [
        ("run", "a"),
        ("state", "running"),
        ("step", "250/1000 (25%)"),
        ("time left", "about 3 min 05 s"),
        ("loss", "1.2346"),
        ("tokens_per_s", "1,235"),
        ("started", "2026-11-30 10:00:00"),
        ("path", "runs/a"),
        ("exact_match", "92.5%"),
    ]
    assert ("time left", "3 min 05 s") in status_lines(row | {"eta_is_measured": True})
    assert ("step", "0/?") in status_lines({"run": "a", "state": "running", "step": 0, "num_steps": None})
