"""Every recipe loads, its data is there and fits its format, and the shipped rows are what their maker writes."""

import json
import runpy
import shutil

import pytest

from orchestrator.cli.options import load_job
from orchestrator.job.job_file import parse_job, read_job
from orchestrator.job.schema import RECIPES, recipes, starter
from orchestrator.lifecycle.validate import check


def test_the_recipes_are_found():
    assert {"quickstart", "classify", "chat-lora", "full", "bank"} == set(recipes())


@pytest.mark.parametrize("name", sorted(recipes()))
def test_a_recipe_is_valid_and_starts_with_its_command(name):
    path, about = recipes()[name]

    found = check(read_job(path))

    assert found["valid"] and found["formats"]
    assert all(": supervision: " in line and " 0 rows rejected" in line for line in found["notices"])
    assert len(about) > 30
    commands = (f"orchestrator submit {name}", f"--recipe {name}", f"--job {name}")
    assert any(command in path.read_text() for command in commands)


def test_the_quick_start_rows_are_what_make_py_writes_and_do_not_overlap(tmp_path):
    folder = RECIPES / "requests_to_json"
    shutil.copy(folder / "make.py", tmp_path)

    runpy.run_path(str(tmp_path / "make.py"), run_name="__main__")

    for name in ("train.jsonl", "eval.jsonl", "train_labels.csv", "eval_labels.csv"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()
    train, held_out = (
        [json.loads(line) for line in (folder / f"{n}.jsonl").read_text().splitlines()] for n in ("train", "eval")
    )
    assert (len(train), len(held_out)) == (800, 80)
    for turn in (1, 2):  # neither a request nor an answer occurs on both sides
        seen = {row["messages"][turn]["content"] for row in train}
        assert not seen & {row["messages"][turn]["content"] for row in held_out}
    assert all(json.loads(row["messages"][2]["content"])["action"] for row in train + held_out)


def test_the_starter_file_is_a_valid_job_with_every_key_explained(tmp_path):
    text = starter("m", "a.jsonl", full=True)

    spec = parse_job(text, tmp_path).spec

    assert spec.data.train == "a.jsonl"
    for section in ("data", "method", "train", "checkpoint", "eval", "bank"):
        for key in type(getattr(spec, section)).model_fields:
            assert any(line.strip().startswith(f"{key}:") and "#" in line for line in text.splitlines()), key


def test_a_folder_of_a_recipe_s_name_does_not_hide_it(tmp_path, monkeypatch):
    (tmp_path / "bank").mkdir()
    monkeypatch.chdir(tmp_path)

    assert load_job("bank", []).spec.name == "bank"
