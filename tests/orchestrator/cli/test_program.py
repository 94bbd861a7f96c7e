"""The verbs in groups, and hints that can be typed where the user stands."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.cli import program
from tests.cli import called
from tests.house import ROOT


def test_each_verb_stands_in_one_group_with_a_sentence_that_fits(tmp_path):
    shown = called("--help", cwd=tmp_path, check=0, COLUMNS="80").stdout
    import orchestrator.cli.app as cli

    visible = {name for name, command in cli.app.commands.items() if not command.hidden}
    listed = [name for verbs in program.GROUPS.values() for name in verbs]
    assert sorted(listed) == sorted(visible)
    assert all(len(line) <= 80 for line in shown.splitlines())
    assert all(title in shown for title in program.GROUPS)


@pytest.mark.parametrize("name", program.MODULES)
def test_the_table_of_modules_names_the_verbs_that_each_holds(name):
    module = importlib.import_module(f"orchestrator.cli.{name}")

    held = program.commands_of(module)

    assert sorted(held) == sorted(program.MODULES[name])


def test_every_module_with_verbs_is_in_the_table():
    files = (ROOT / "orchestrator/cli").glob("*.py")

    assert {file.stem for file in files if "\nverbs = typer" in file.read_text()} == set(program.MODULES)


@pytest.mark.parametrize(
    ("text", "typed"),
    [
        ("Next: orchestrator validate job.yaml", "Next: .venv/bin/orchestrator validate job.yaml"),
        ("`orchestrator init FILE` writes one", "`.venv/bin/orchestrator init FILE` writes one"),
        ("the orchestrator decides", "the orchestrator decides"),
        ("orchestrator plans", "orchestrator plans"),
        (".venv/bin/orchestrator plan x", ".venv/bin/orchestrator plan x"),
    ],
)
def test_commands_of_a_sentence_are_spelt_as_they_are_typed(text, typed):
    assert program.as_typed(text, ".venv/bin/orchestrator") == typed
    assert program.as_typed(text, program.NAME) == text


@pytest.mark.parametrize("is_found", [True, False])
def test_a_hint_works_where_the_user_stands(is_found, tmp_path):
    script = Path(sys.executable).with_name("orchestrator")
    path = str(script.parent) if is_found else "/usr/bin:/bin"
    command = [sys.executable, "-m", "orchestrator", "init", "job.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment(path), check=True)
    hint = done.stdout.partition("Next: ")[2].split(" validate ")[0]

    assert hint == ("orchestrator" if is_found and script.is_file() else hint)
    again = subprocess.run(
        f"{hint} schema --field seed", shell=True, capture_output=True, text=True, cwd=tmp_path, env=environment(path)
    )
    assert again.returncode == 0, again.stderr
    assert "train.seed" in again.stdout


def environment(path):
    return os.environ | {"PATH": path, "PYTHONPATH": str(ROOT)}
