"""What is installed: the build of PyTorch, locked versions, both ends of the ranges, and the image."""

import importlib.util
import json
import re
import subprocess
import sys
import tomllib

import pytest
from packaging.requirements import Requirement

from tests.house import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def script(name):
    """A script of .ci as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / ".ci" / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def installer():
    return script("torch_for_cpus")


@pytest.fixture
def versions():
    return script("versions")


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
    monkeypatch.setattr(sys, "argv", ["torch_for_cpus.py"])

    installer.main()

    assert calls[-1][-2:] == ["torch==2.13.0+cpu", installer.wanted()]
    assert "--torch-backend=cpu" in calls[1]


def test_with_a_gpu_nothing_is_installed_before_the_rest(installer, calls, monkeypatch):
    monkeypatch.setattr(installer, "has_gpu", lambda: True)

    installer.main()

    assert calls == []


def test_the_requirement_is_the_projects(installer):
    assert installer.wanted().startswith("torch>=") and ",<" in installer.wanted()


# Versions.


def stated():
    """The requirements of the project and its extras, by name."""
    lines = [*PROJECT["dependencies"], *(one for extra in PROJECT["optional-dependencies"].values() for one in extra)]
    return [Requirement(line) for line in lines]


def test_locked_versions_are_versions_alone_and_within_the_ranges():
    lines = (ROOT / ".ci/locked.txt").read_text().splitlines()

    locked = dict(line.split("==") for line in lines)

    assert all(re.fullmatch(r"[a-z0-9-]+==[\w.!]+", line) for line in lines)
    extras = ("train", "quickstart", "dev")
    needed = [Requirement(one) for name in extras for one in PROJECT["optional-dependencies"][name]]
    assert {one.name for one in needed if one.marker is None} <= set(locked)
    wrong = [
        f"{one}: {locked[one.name]}"
        for one in stated()
        if one.name in locked and not one.specifier.contains(locked[one.name])
    ]
    assert not wrong, "make lock"


def test_the_lower_end_is_each_lower_bound_exactly(versions):
    lines = ["torch>=2.11,<2.15", "ray[train,tune]>=2.60", "PyYAML>=6.0.1", "plain", "only>=1; sys_platform == 'win32'"]

    assert versions.lower_bounds(lines) == ["torch==2.11", "ray==2.60", "pyyaml==6.0.1"]


def test_every_requirement_that_people_install_has_a_lower_bound(versions):
    lines = [line for line in versions.requirements(versions.EXTRAS) if "win32" not in line]

    assert len(versions.lower_bounds(lines)) == len(versions.ranges(lines)) > 25


def test_bounds_that_contradict_each_other_are_named(versions):
    errors = """WARNING: something else
ERROR: Cannot install a because these package versions have conflicting dependencies.

The conflict is caused by:
    transformers 5.23.0 depends on regex>=2025.10.22
    The user requested (constraint) regex==2024.11

To fix this you could try to:
1. loosen the range
"""

    assert versions.conflict(errors).splitlines() == [
        "transformers 5.23.0 depends on regex>=2025.10.22",
        "The user requested (constraint) regex==2024.11",
    ]
    assert versions.conflict("WARNING: x\nERROR: no such version") == "ERROR: no such version"


def test_the_table_shows_both_ends_and_what_their_tests_said(versions):
    outcomes = {
        "oldest": versions.Outcome({"torch": "2.11.0"}, tests="3 passed (1 s)", passed=True),
        "newest": versions.Outcome(problem="a needs b"),
    }

    shown = versions.table(outcomes)

    assert re.search(r"^torch +>=2.11,<\S+ +2.11.0 +-$", shown, flags=re.MULTILINE)
    assert "oldest: 3 passed (1 s)" in shown
    assert "newest: cannot be installed:\na needs b" in shown


def test_the_files_of_tests_at_both_ends_exist(versions):
    assert all((ROOT / file).exists() for file in versions.TESTS)


# The image.


def instructions():
    """(instruction, rest) of the Dockerfile, continued lines joined."""
    text = (ROOT / "k8s/Dockerfile").read_text()
    lines = re.sub(r"^#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", " ").splitlines()
    return [tuple(line.split(maxsplit=1)) for line in lines if line.strip()]


def of(kind):
    return [rest for instruction, rest in instructions() if instruction == kind]


def test_the_image_has_only_known_instructions_and_starts_from_a_pinned_base():
    known = {"FROM", "ARG", "ENV", "RUN", "COPY", "WORKDIR", "USER", "CMD"}

    assert {instruction for instruction, _ in instructions()} <= known
    (base,) = of("FROM")
    name, tag = base.split(":")
    assert name == "python" and re.fullmatch(r"3\.\d+\.\d+-slim-[a-z]+", tag)
    assert Requirement(f"python{PROJECT['requires-python']}").specifier.contains(tag.split("-")[0])


def test_the_image_copies_what_is_there_and_the_context_admits():
    ignored = (ROOT / ".dockerignore").read_text().splitlines()

    sources = [word for rest in of("COPY") for word in rest.split()[:-1]]

    assert {"pyproject.toml", "orchestrator", "strategies", "clusters"} <= set(sources)
    assert not [source for source in sources if not (ROOT / source).exists()]
    assert not [source for source in sources if f"!{source}" not in ignored]


def test_the_images_extras_are_the_projects():
    comments = (ROOT / "k8s/Dockerfile").read_text()
    named = re.findall(r"EXTRAS=([\w,]+)", comments)

    assert len(named) == 2  # the default's and the one for GPUs
    assert {extra for one in named for extra in one.split(",")} <= set(PROJECT["optional-dependencies"])


def test_the_image_runs_the_quick_start_as_a_user_who_is_not_root():
    (user,), (command,) = of("USER"), of("CMD")
    made = " ".join(of("RUN"))

    assert user not in ("root", "0") and f"--uid 1000 {user}" in made
    assert json.loads(command) == ["orchestrator", "submit", "quickstart"]
    assert [kind for kind, _ in instructions()].index("USER") < [kind for kind, _ in instructions()].index("CMD")
    makefile = (ROOT / "Makefile").read_text()
    assert re.search(r"^MODEL +:= (\S+)", makefile, flags=re.MULTILINE)[1] in made


def test_the_image_holds_torch_to_the_projects_range():
    (line,) = [one for one in " && ".join(of("RUN")).split("&&") if "grep" in one]
    command = line.replace("/opt/torch.txt", "/dev/stdout")

    found = subprocess.run(["sh", "-c", command], cwd=ROOT, capture_output=True, text=True, check=True).stdout

    assert [found.strip()] == [one for one in PROJECT["optional-dependencies"]["train"] if one.startswith("torch>")]
    assert of("ENV") == ["PIP_CONSTRAINT=/opt/torch.txt"]
