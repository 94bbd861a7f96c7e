"""What the documents promise: their size, their links, the paths, verbs and options that they name."""

import re
import shlex
import subprocess
import tomllib
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import typer
import yaml

from tests.cli import called
from tests.house import ROOT

GUIDES = sorted((ROOT / "orchestrator/guides").glob("*.md"))
READMES = [ROOT / "README.md", ROOT / "README.ja.md"]
OTHERS = ("k8s/README.md", "CONTRIBUTING.md", "CHANGELOG.md", "orchestrator/LOG.md", "orchestrator/DECISIONS.md")
ALL = [*READMES, *GUIDES, *(ROOT / name for name in OTHERS)]
SUBJECTS = ("planning", "search", "cluster", "kubernetes", "methods", "adapter-bank", "reports-and-cost", "export")
SUBJECTS += ("data-formats", "troubleshooting", "architecture", "job-file", "serving", "other-tools", "first-hour")
# Placeholders, and what appears in a user's folders and nowhere in this project.
NOT_HERE = re.compile(r"[A-Z]{2,}|\.\.\.|[*{<$~]|^(runs|datasets)/|^/")


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def width(line: str) -> int:
    return sum(2 if unicodedata.east_asian_width(one) in "WF" else 1 for one in line)


def makefile() -> str:
    return (ROOT / "Makefile").read_text(encoding="utf-8").replace("\\\n", " ")


def blocks(text: str) -> list[str]:
    return re.findall(r"^```\w*\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def commands(path: Path) -> Iterator[list[str]]:
    """The command lines of the program that a document shows, in blocks and in running text."""
    text = path.read_text(encoding="utf-8")
    shown = [line.removeprefix("$ ") for block in blocks(text) for line in block.splitlines()]
    shown += [
        " ".join(part.split()) for part in re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))
    ]
    for line in shown:
        for part in re.split(r"&&|\|", line.partition(" #")[0]):
            words = shlex.split(part.replace("'", "")) if part.count('"') % 2 == 0 else []
            if words[:3] == ["python", "-m", "orchestrator"]:
                words = words[2:]
            if words[:1] == ["orchestrator"] and words[1:] and "orchestrator  " not in line:
                yield words[1:]


def verb(words: list[str]) -> tuple[click.Command, list[str]]:
    import orchestrator.cli.app as cli

    found = typer.main.get_command(cli.app) if isinstance(cli.app, typer.Typer) else cli.app
    while hasattr(found, "commands") and words and not words[0].startswith("-"):
        assert words[0] in found.commands, f"there is no verb {words[0]!r}"
        found, words = found.commands[words[0]], words[1:]
    return found, words


def test_every_subject_has_its_page():
    assert {path.stem for path in GUIDES} == set(SUBJECTS)


@pytest.mark.parametrize("path", READMES, ids=named)
def test_a_readme_fits_a_reader(path):
    lines = path.read_text(encoding="utf-8").splitlines()

    assert len(lines) <= 140
    assert not [line for line in lines if width(line) > 100]


def skeleton(path: Path) -> dict[str, list[str]]:
    """What two languages of a document have in common."""
    text = path.read_text(encoding="utf-8")
    plain = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    quoted = {" ".join(one.split()) for one in re.findall(r"`([^`]+)`", plain)}
    return {
        "parts": re.findall(r"^(##? |```|- \*\*|<img|\[[^\]]+\]: .*)", text, flags=re.MULTILINE),
        "table": re.findall(r"^\|([^|]*`[^|]*)\|", text, flags=re.MULTILINE),
        "quoted": sorted(quoted),
        "typed": [re.split(" +#", line)[0] for block in blocks(text)[:5] for line in block.splitlines()],
    }


def test_both_readmes_say_the_same():
    english, japanese = map(skeleton, READMES)

    assert len(english["table"]) == 8 and len(english["typed"]) > 20
    assert english == japanese


@pytest.mark.parametrize("path", [path for path in ALL if path not in READMES], ids=named)
def test_lines_fit_a_window(path):
    lines = path.read_text(encoding="utf-8").splitlines()

    assert lines
    assert not [line for line in lines if width(line) > 120]


@pytest.mark.parametrize("path", ALL, ids=named)
def test_links_lead_somewhere(path):
    text = path.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    links += re.findall(r"^\[[^\]]+\]: (\S+)$", text, flags=re.MULTILINE)

    for link in links:
        target, _, anchor = link.partition("#")
        if target.startswith("http"):
            continue
        file = (path.parent / target).resolve() if target else path
        assert file.exists(), link
        titles = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), flags=re.MULTILINE) if anchor else []
        assert not anchor or anchor in {re.sub(r"[^\w -]", "", one).lower().replace(" ", "-") for one in titles}, link


@pytest.mark.parametrize("path", ALL, ids=named)
def test_paths_that_are_named_exist(path):
    text = path.read_text(encoding="utf-8")
    found = re.findall(r"(?:(?:orchestrator|strategies|clusters|tests|k8s)/)[\w./*-]*[\w/]", text)

    for one in found:
        if not NOT_HERE.search(one):
            assert (ROOT / one).exists() or (path.parent / one).exists(), one


@pytest.mark.parametrize("path", ALL, ids=named)
def test_verbs_and_options_that_are_named_exist(path):
    for words in commands(path):
        command, rest = verb(words)

        known = {option for one in command.params for option in [*one.opts, *one.secondary_opts]}
        known |= {"--help"} | ({"--install-completion"} if hasattr(command, "commands") else set())
        wrong = [word for word in rest if re.match(r"--?[a-z]", word) and word.partition("=")[0] not in known]
        assert not wrong, f"orchestrator {' '.join(words)}: {wrong}"


def test_that_search_sees_commands():
    found = [words[0] for path in ALL for words in commands(path)]

    assert len(found) > 60
    assert {"submit", "plan", "search", "bank", "adapt", "head", "join", "report"} <= set(found)


@pytest.mark.parametrize("path", [path for path in GUIDES if path.stem != "troubleshooting"], ids=named)
def test_a_guide_begins_with_the_command_that_does_it(path):
    title, empty, fence, command, *_ = path.read_text(encoding="utf-8").splitlines()

    assert title.startswith("# ") and not empty
    assert fence == "```console" and command.startswith("$ ")


def test_the_light_tests_are_files_that_exist():
    shown = subprocess.run(["make", "--dry-run", "light"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    listed = [word for word in shown.split() if word.startswith("tests/")]

    assert len(listed) > 10
    assert not [path for path in listed if not (ROOT / path).exists()]


def test_continuous_integration_runs_what_a_person_runs():
    assert (ROOT / ".ci/run").read_text().rstrip().endswith("exec make test")
    assert re.search(r"^test: check$", makefile(), flags=re.MULTILINE)


def test_the_reference_of_the_job_file_is_current():
    page = (ROOT / "orchestrator/guides/job-file.md").read_text(encoding="utf-8")

    shown = called("schema", "--markdown", cwd=ROOT, check=0).stdout

    assert page == shown, "write it anew: orchestrator schema --markdown > orchestrator/guides/job-file.md"


def test_commits_are_checked_by_the_tools_of_make_check_and_no_package_host():
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    hooks = [hook for repo in config["repos"] for hook in repo["hooks"]]

    assert {repo["repo"] for repo in config["repos"]} == {"local"}
    assert {hook["language"] for hook in hooks} == {"system"}
    assert [hook["entry"].split()[2] for hook in hooks] == ["ruff", "ruff", "pyright", "pytest"]


@pytest.mark.parametrize(
    ("package", "kinds", "least"),
    [("orchestrator", ("md", "yaml", "html", "css", "js", "png", "jsonl", "csv"), 20), ("strategies", ("toml",), 2)],
)
def test_the_wheel_holds_every_file_of_a_package_that_is_not_code(package, kinds, least):
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    packed = {path for pattern in settings["package-data"][package] for path in (ROOT / package).glob(pattern)}

    needed = {path for kind in kinds for path in (ROOT / package).rglob(f"*.{kind}")}
    assert len(needed) >= least
    assert needed <= packed
