"""What the documents promise: their size, their links, the paths, verbs and options that they name."""

import re

from tests.cli import called
from tests.house import ROOT


def makefile() -> str:
    return (ROOT / "Makefile").read_text().replace("\\\n", " ")


def test_the_light_tests_are_files_that_exist():
    listed = re.search(r"^LIGHT\s*:=(.*)$", makefile(), flags=re.MULTILINE)

    assert listed
    assert len(listed[1].split()) > 10
    assert not [path for path in listed[1].split() if not (ROOT / path).exists()]


def test_continuous_integration_runs_what_a_person_runs():
    assert (ROOT / ".ci/run").read_text().rstrip().endswith("exec make test")
    assert re.search(r"^test: check$", makefile(), flags=re.MULTILINE)


def test_the_reference_of_the_job_file_is_current():
    page = (ROOT / "orchestrator/guides/job-file.md").read_text(encoding="utf-8")

    shown = called("schema", "--markdown", cwd=ROOT, check=0).stdout

    assert page == shown, "write it anew: orchestrator schema --markdown > orchestrator/guides/job-file.md"
