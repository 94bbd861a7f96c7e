"""A job of a memory through `submit`, Ray and all, to what it hands back; `evaluate` finds the same."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from orchestrator.runs.events import LearningReport, QualityReport
from orchestrator.runs.run_folder import RunFolder
from tests.conftest import rows, write_jsonl
from tests.processes import orchestrator


@pytest.fixture(scope="module")
def place(model_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("jobs")
    write_jsonl(folder / "train.jsonl", rows(40))
    write_jsonl(folder / "old.jsonl", rows(8, start=100))
    (folder / "job.yaml").write_text(
        f"model: {{model_name_or_path: {model_folder}, dtype: float32}}\n"
        "data: {train: train.jsonl, eval: old.jsonl, max_length: 64}\n"
        "method: {type: experimental_memory, memory_rows: 1024, rows_per_token: 4, slots: surprising,"
        " updated_rows: 100}\n"
        "train: {global_batch_size: 8, max_steps: 12, learning_rate: 2e-2}\n"
        "checkpoint: {save_steps: 4}\n"
        "eval: {max_new_tokens: 8, eval_steps: 6}\n"
    )
    return folder


def test_a_memory_is_submitted_trained_stored_and_evaluated(place):
    shown = orchestrator("plan", "job.yaml", cwd=place, check=0).stdout
    done = orchestrator("submit", "job.yaml", "--json", cwd=place, check=0)
    told = json.loads(done.stdout)
    run = RunFolder(Path(told["path"]))

    assert "Loads with this program alone" in " ".join(shown.split()) and "experimental_memory" in shown
    steps = run.steps()
    assert run.state() == "finished" and sorted(steps) == list(range(1, 13))
    assert all(0 < step.rows_moved <= 100 and step.bus_up_bytes > 0 for step in steps.values())
    assert ["routers take off" in event.text for event in run.events_of(LearningReport)] == [True, False]
    assert {one.when for one in run.events_of(QualityReport)} == {"before", "after"}
    assert "gives the logits of what was trained" in told["result"]["handed_back"]["check"]["text"]
    tensors = load_file(run.path / "adapter" / "adapter_model.safetensors")
    assert tensors["model.layers.1.mlp.memory.rows"].shape == (1024, 128)
    again = orchestrator("evaluate", run.path, "--json", cwd=place, check=0)
    assert json.loads(again.stdout)["eval_loss"] == pytest.approx(told["result"]["after"]["eval_loss"], abs=1e-5)
    refused = orchestrator("merge", "plain", run.path, cwd=place, check=2)
    assert "is not merged: each token reads rows of its own choice" in " ".join(refused.stderr.split())
