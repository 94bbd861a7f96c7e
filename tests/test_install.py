"""The build of PyTorch that `make` installs where there is no GPU."""

import importlib.util
import subprocess
import sys

import pytest

from tests.house import ROOT


@pytest.fixture
def installer():
    spec = importlib.util.spec_from_file_location("torch_for_cpus", ROOT / ".ci/torch_for_cpus.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def calls(installer, monkeypatch):
    """Every command in place of running it: uv cannot be reached, pip's index has two builds for CPUs."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(installer.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(sys, "platform", "linux")
    made = []

    def run(command, **options):
        made.append(command)
        listed = "torch (2.15.0)\nAvailable versions: 2.15.0, 2.14.0+cpu, 2.13.0+cpu, 2.13.0\n"
        fails = command[0].endswith("uv") or "torch==2.14.0+cpu" in command
        return subprocess.CompletedProcess(command, int(fails), listed)

    monkeypatch.setattr(installer.subprocess, "run", run)
    return made


def test_without_a_gpu_the_newest_build_for_cpus_that_fits_is_installed(installer, calls, monkeypatch):
    monkeypatch.setattr(installer, "has_gpu", lambda: False)

    installer.main()

    assert calls[-1][-2:] == ["torch==2.13.0+cpu", installer.wanted()]
    assert "--torch-backend=cpu" in calls[1]


def test_with_a_gpu_nothing_is_installed_before_the_rest(installer, calls, monkeypatch):
    monkeypatch.setattr(installer, "has_gpu", lambda: True)

    installer.main()

    assert calls == []


def test_the_requirement_is_the_projects(installer):
    assert installer.wanted().startswith("torch>=") and ",<" in installer.wanted()
