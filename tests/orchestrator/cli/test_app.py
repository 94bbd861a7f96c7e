"""The command line as a whole: its verbs, errors as messages with exit codes, completion."""

import errno
import json
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from orchestrator.cli import app as cli
from orchestrator.cli.options import complete_job, complete_key, complete_run, is_job, load_job, parse_numbers
from orchestrator.errors import JobError
from orchestrator.runs.run_folder import RunFolder
from tests.cli import called
from tests.processes import outcome, start_python


def commands():
    app = cli.app
    return (typer.main.get_command(app) if isinstance(app, typer.Typer) else app).commands


def test_every_verb_has_a_help_and_keeps_the_lines_of_its_examples(tmp_path):
    verbs = commands()
    assert len(verbs) > 25

    for name, verb in verbs.items():
        shown = [line.strip() for line in called(name, "--help", cwd=tmp_path, check=0).stdout.splitlines()]
        about = [line.strip() for line in (verb.help or "").splitlines()]
        assert about and about[0][:30] in " ".join(shown)
        assert {line for line in about if "orchestrator " in line and len(line) < 70} <= set(shown)


def test_a_mistake_is_one_message_with_the_exit_code_of_its_kind(tmp_path):
    shown = called("plan", "nowhere.yaml", cwd=tmp_path, check=2)

    assert "nowhere.yaml" in shown.stderr and "Traceback" not in shown.stderr and not shown.stdout


def test_with_json_a_mistake_is_a_document(tmp_path):
    shown = called("plan", "nowhere.yaml", "--json", cwd=tmp_path, check=2)

    found = json.loads(shown.stdout)
    assert found["exit_code"] == 2 and "nowhere.yaml" in found["error"]


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "the disk: no space left on device. Free some space"),
        (PermissionError(errno.EACCES, "Permission denied", "a.json"), "a.json: permission denied. Check that it"),
    ],
)
def test_what_a_disk_refuses_is_a_message_and_no_traceback(tmp_path, monkeypatch, error, says):
    def refuse(*_, **__):
        raise error

    monkeypatch.setattr(RunFolder, "all", refuse)
    shown = called("status", "latest", cwd=tmp_path, check=2)

    assert says in shown.stderr.replace("\n", " ")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no full disk to write to")
@pytest.mark.parametrize("as_json", [(), ("--json",)])
def test_a_full_disk_for_the_output_is_a_message_and_no_traceback(as_json):
    with Path("/dev/full").open("w", encoding="utf-8") as full:
        words = [sys.executable, "-m", "orchestrator", "recipes", *as_json]
        done = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, text=True, check=False)

    assert done.returncode == 2
    assert "no space left on device. Free some space" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--run-id", "a/b"], "--run-id"),
        (["--attach", "a"], "belong to --cluster kuberay"),
        (["--cluster", "http://127.0.0.1:1", "--run-id", "a"], "belongs to --cluster kuberay"),
        (["--cluster", "kuberay:Not_One", "--render", "a.yaml"], "is not a namespace"),
        (
            ["--dry-run", "--render", "a.yaml", "--attach", "b", "--detach", "--run-id", "c"],
            "--render, --detach, --attach, --run-id beside --dry-run: nothing is sent or started",
        ),
        (["--dry-run", "--cluster", "http://127.0.0.1:1"], "http://127.0.0.1:1 beside --dry-run: its machines plan"),
        (["--dry-run", "--cluster", "kuberay"], "--cluster kuberay beside --dry-run"),
        (["--dry-run", "--cluster", "127.0.0.1:1", "--hardware", "home-lab"], "both say which machines to plan for"),
    ],
)
def test_options_that_do_not_go_together_are_refused_before_anything_starts(tmp_path, options, says):
    shown = called("submit", "quickstart", *options, cwd=tmp_path, check=2)

    assert says in shown.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["init", "--recipe", "chat-lora", "--train", "a", "--full"], "--train, --full beside --recipe chat-lora"),
        (["init", "--recipe", "chat-lora", "--model", "smollm2-135m-instruct"], "--model beside --recipe chat-lora"),
        (["schema", "--markdown", "--json"], "--json beside --markdown"),
        (["schema", "--markdown", "--field", "method.lora_r"], "--field method.lora_r beside --markdown"),
        (["techniques", "--measure", "--hardware", "home-lab"], "--hardware home-lab declares others"),
    ],
)
def test_an_option_that_another_makes_useless_is_refused(tmp_path, options, says):
    shown = called(*options, cwd=tmp_path, check=2)

    assert says in shown.output.replace("\n", " ")
    assert list(tmp_path.iterdir()) == []


def test_a_recipe_is_printed_as_json_too(tmp_path):
    shown = json.loads(called("recipes", "quickstart", "--json", cwd=tmp_path, check=0).stdout)
    listed = json.loads(called("recipes", "--json", cwd=tmp_path, check=0).stdout)

    text = called("recipes", "quickstart", cwd=tmp_path, check=0).stdout
    assert shown == {"quickstart": listed["quickstart"] | {"text": text}}


def test_arguments_are_completed_from_recipes_files_runs_and_keys(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quick.yaml").touch()
    RunFolder.create(tmp_path / "runs", "a", "a-1").begin({"job.yaml": "name: a"})

    assert complete_job("quick") == ["quick.yaml", "quickstart"]
    assert complete_run("a") == ["a-1"]
    assert complete_key("train.learning_r") == ["train.learning_rate="]


def test_a_recipe_is_loaded_by_its_name_with_its_overrides():
    job = load_job("quickstart", ["train.max_steps=3"])

    assert job.spec.train.max_steps == 3


@pytest.mark.parametrize(("text", "numbers"), [("", []), ("4", [4]), ("1, 4,8", [1, 4, 8])])
def test_numbers_are_read_from_an_option(text, numbers):
    assert parse_numbers("--lengths", text) == numbers


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "a", "1,,x"])
def test_what_is_not_a_whole_number_above_0_is_refused(text):
    with pytest.raises(JobError, match=r"--lengths .* whole numbers above 0"):
        parse_numbers("--lengths", text)


def test_what_a_library_prints_does_not_stand_inside_the_json(tmp_path):
    """Ray's C++ writes its warnings to file descriptor 1."""
    program = (
        "import atexit, os, sys; from orchestrator.cli.app import main; atexit.register(os.write, 1, b'[2026 W]\\n');"
        " sys.argv = ['orchestrator', 'recipes', '--json']; main()"
    )

    shown = outcome(start_python("-c", program, cwd=tmp_path))

    assert "quickstart" in json.loads(shown.stdout) and "[2026 W]" in shown.stderr


def test_a_recipe_and_a_file_are_jobs_and_a_run_is_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "job.yaml").touch()

    assert [is_job(name) for name in ("quickstart", "job.yaml", "latest", "quickstart-20261130")] == [1, 1, 0, 0]
