"""Planning and reading runs where POSIX's modules are missing, as on Windows: typed in a process that lacks them."""

import json
import os
import re
import shutil
import subprocess
import sys

from tests.conftest import FIXTURES, SMALL_MODEL
from tests.house import ROOT

# What Windows' Python lacks, as far as other libraries on Linux do without it.
WITHOUT = """
import importlib.abc, os, signal, sys
KEPT = sys.argv[1].split(",")  # what other libraries need on Linux, and not on Windows
HIDDEN = ("fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "readline")
class Hide(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name in HIDDEN and name not in KEPT:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
for name in HIDDEN:
    sys.modules.pop(name, None)
sys.meta_path.insert(0, Hide())
for name in ("O_NONBLOCK", "O_CLOEXEC", "O_NOFOLLOW", "O_DIRECTORY", "getuid", "geteuid", "sched_getaffinity",
             "sysconf", "sysconf_names", "fork", "killpg", "setsid", "getloadavg", "pwrite", "pread", "nice", "mkfifo",
             "fchmod"):
    if hasattr(os, name) and name not in KEPT:
        delattr(os, name)
for name in ("SIGHUP", "SIGKILL", "SIGUSR1", "SIGALRM", "SIGPIPE"):
    if name not in KEPT:
        delattr(signal, name)
import json
import orchestrator.cli.app as cli
import typer
cli.app = typer.main.get_command(cli.app)
for words in json.loads(sys.argv[2]):
    sys.argv[:] = ["orchestrator", *words]
    code = 0
    try:
        cli.main()
    except SystemExit as end:
        code = end.code or 0
    sys.stdout.flush()
    print("ended with", code, flush=True)
"""
JOB = f"model: {{model_name_or_path: {SMALL_MODEL}}}\ndata: {{train: {FIXTURES}/earlier/train.jsonl, max_length: 64}}\n"
RUNS = "results"  # a copy: reading a run leaves a summary beside its events


LIGHT = {
    "write and check a job": (["--help"], "Write and check a job"),
    "a recipe": (["recipes"], "quickstart"),
    "a starter": (["init", "new.yaml"], "wrote new.yaml"),
    "an import": (["import", str(FIXTURES / "other_tools/trl/example_config.yaml")], "stanfordnlp/imdb"),
    "a plan": (["plan", "job.yaml", "--hardware", "home-lab"], "micro-batch"),
    "techniques": (["techniques", "--hardware", "home-lab"], "verdict"),
    "doctor": (["doctor"], "clock"),
    "a list of runs": (["list", "--runs", RUNS], "finished"),
    "a run": (["status", "finished", "--runs", RUNS], "adapter"),
    "a run's events": (["logs", "finished", "--runs", RUNS], "state=finished"),
}


def typed(folder, *calls, kept=""):
    """What each call printed, and how it ended: all in one process that lacks the modules."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(folder / "cache"), "COLUMNS": "100"}
    command = [sys.executable, "-c", WITHOUT, kept, json.dumps(calls)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)
    assert done.returncode == 0, done.stderr
    printed = re.split(r"^ended with (\d+)$", done.stdout, flags=re.MULTILINE)
    return list(zip(printed[::2], map(int, printed[1::2]), strict=False)), done.stderr


def test_jobs_are_planned_and_runs_are_read_on_other_systems(tmp_path):
    (tmp_path / "job.yaml").write_text(JOB)
    shutil.copytree(FIXTURES / "earlier/results", tmp_path / RUNS)

    ended, errors = typed(tmp_path, *(words for words, _ in LIGHT.values()))

    assert len(ended) == len(LIGHT)
    for (name, (_, shown)), (printed, code) in zip(LIGHT.items(), ended, strict=True):
        assert code == 0, f"{name}: {errors}"
        assert shown in printed, name


def test_a_job_is_checked_there_and_not_run_and_the_message_says_where(tmp_path):
    (tmp_path / "job.yaml").write_text(JOB + "tracking: {report_to: []}\n")
    (tmp_path / "wrong.yaml").write_text(JOB + "train: {pace: 3}\n")

    calls = ["validate", "job.yaml"], ["validate", "wrong.yaml"], ["submit", "job.yaml"]
    ended, errors = typed(tmp_path, *calls, kept="resource,sysconf,sysconf_names,O_DIRECTORY,SIGKILL,SIGALRM,SIGUSR1")

    assert [code for _, code in ended] == [0, 2, 2], errors
    assert "line 3: train.pace" in errors
    assert "in WSL2" in errors
