"""Every recipe loads, its data is there and fits its format, and the shipped rows are what their maker writes."""

import json
import runpy
import shutil
from pathlib import Path

import pytest

from orchestrator.cli.options import load_job
from orchestrator.job.job_file import parse_job, read_job
from orchestrator.job.schema import RECIPES, recipes, starter
from orchestrator.lifecycle.validate import check
from tests.cli import called


def test_the_recipes_are_found():
    assert {"quickstart", "classify", "chat-lora", "full", "bank"} == set(recipes())


@pytest.mark.parametrize("name", sorted(recipes()))
def test_a_recipe_is_valid_and_starts_with_its_command(name):
    path, about = recipes()[name]

    found = check(read_job(path))

    assert found["valid"] and found["formats"]
    counted = [line for line in found["notices"] if ": supervision: " in line]
    assert counted and all(" 0 rows rejected" in line for line in counted)
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


def test_the_short_starter_is_a_valid_job_of_few_lines_with_each_key_explained(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # of a user who has none yet
    text = starter("m", "a.jsonl")

    assert parse_job(text, tmp_path).spec.data.train == "a.jsonl"
    assert len(text.splitlines()) <= 30
    assert text.startswith("# yaml-language-server: $schema=")
    assert json.loads(Path(text.splitlines()[0].partition("$schema=")[2]).read_text())["properties"]["model"]
    values = [line for line in text.splitlines() if line.startswith("  ")]
    assert len(values) >= 9 and all("  # " in line for line in values)


def test_init_takes_the_one_data_file_that_is_there(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    (tmp_path / "rows-eval.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')

    called("init", cwd=tmp_path, check=0)

    data = read_job(tmp_path / "job.yaml").spec.data
    assert (data.train, data.eval) == ("rows.jsonl", "rows-eval.jsonl")


@pytest.mark.parametrize("name", sorted(recipes()))
def test_a_copied_recipe_brings_its_data_and_is_valid(name, tmp_path):
    called("init", "own.yaml", "--recipe", name, cwd=tmp_path, check=0)

    assert check(read_job(tmp_path / "own.yaml"))["valid"]


def test_a_copied_recipe_overwrites_no_other_data(tmp_path):
    (tmp_path / "requests_to_json").mkdir()
    (tmp_path / "requests_to_json/train.jsonl").write_text("mine")

    done = called("init", "own.yaml", "--recipe", "quickstart", cwd=tmp_path, check=2)

    assert "--force" in done.stderr
    assert not (tmp_path / "own.yaml").exists()
    assert (tmp_path / "requests_to_json/train.jsonl").read_text() == "mine"
