"""The commands that a report prints run where somebody else types them."""

import json
import shlex
import shutil
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from orchestrator.cli.app import app
from orchestrator.job.job_file import read_job
from orchestrator.report.blocks import Code
from orchestrator.report.html import html, report_of
from orchestrator.runs.run_folder import RunFolder
from tests.cases.training import begun
from tests.conftest import CHAT_TEMPLATE, rows, write_jsonl


@pytest.fixture(scope="module")
def planned(model_folder, tmp_path_factory):
    """A run whose job names everything by relative paths, in a folder with a space and a quote in its name."""
    folder = tmp_path_factory.mktemp("Anna's jobs")
    shutil.copytree(model_folder, folder / "model")
    write_jsonl(folder / "train.jsonl", rows(20))
    (folder / "chat.jinja").write_text(CHAT_TEMPLATE)
    (folder / "job.yaml").write_text(
        "model: {model_name_or_path: ./model}\n"
        "data: {train: train.jsonl, chat_template: chat.jinja, eval: {split: 0.2}}\n"
        "train: {max_steps: 1, global_batch_size: 2}\n"
    )
    run, job, _ = begun(folder / "job.yaml", "checkpoint.output_dir=runs")
    return run, job


def commands(run, job):
    blocks = [block for section in report_of(run, job, "en").sections for block in section.blocks]
    return [block.text for block in blocks if isinstance(block, Code) and block.text.startswith("python -m")]


def test_the_printed_command_names_a_job_that_is_valid_from_any_folder(planned, tmp_path, monkeypatch):
    run, job = planned
    monkeypatch.chdir(tmp_path)
    (command,) = commands(run, job)

    words = shlex.split(command)
    done = CliRunner().invoke(app, ["validate", *words[4:]])

    assert words[:4] == ["python", "-m", "orchestrator", "submit"] and len(words) == 5
    assert done.exit_code == 0, done.output
    assert command.replace("'", "&#39;").replace('"', "&#34;") in html(report_of(run, job, "en"))


def test_the_job_of_a_recipe_by_name_starts_its_paths_in_the_recipe(planned, tmp_path):
    from orchestrator.job.schema import recipes

    name, (recipe, *_) = next(iter(recipes().items()))
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    run.write("origin.json", json.dumps({"folder": str(recipe.parent)}))
    run.write("job.yaml", recipe.read_text())

    assert read_job(run.path / "job.yaml").folder == recipe.parent, name


def test_a_job_file_beside_somebody_elses_origin_keeps_its_folder(tmp_path):
    shown = {"folder": ["a"]}, {"folder": "/x", "url": "y"}, ["folder"], "folder"
    for values in shown:
        (tmp_path / "origin.json").write_text(json.dumps(values))
        (tmp_path / "job.yaml").write_text("model: {model_name_or_path: m}\ndata: {train: t.jsonl}\n")

        assert read_job(tmp_path / "job.yaml").folder == tmp_path


@pytest.mark.slow
def test_the_printed_command_trains_again(planned, tmp_path):
    run, job = planned
    (command,) = commands(run, job)

    done = subprocess.run(
        command.replace("python", shlex.quote(sys.executable), 1),
        shell=True,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )

    assert done.returncode == 0, done.stdout + done.stderr
    assert any((tmp_path / "runs").glob("*/result.json"))
