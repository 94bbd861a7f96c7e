"""The table of what was compared: judged by its tolerance, the newest of each, read as it was written."""

import pytest

from orchestrator.errors import JobError
from orchestrator.runs.mirror.numbers import numbers_of
from orchestrator.runs.proofs.proof import FILE, TITLES, judged, not_run, proofs_of, read_table, write_table
from orchestrator.runs.run_folder import RunFolder


@pytest.fixture
def run(tmp_path):
    return RunFolder(tmp_path)


def test_a_difference_within_the_tolerance_passes_and_any_other_is_named():
    assert judged("packing", "a and b", 1e-4, 1e-4, "sums").outcome == "passed"
    assert judged("packing", "a and b", 1.1e-4, 1e-4, "sums").outcome == "differs"

    broken = judged("packing", "a and b", float("nan"), 1e-4, "sums")
    assert (broken.outcome, broken.difference) == ("differs", None)
    assert "not a finite number" in broken.reason


def test_the_newest_of_each_check_is_kept_in_the_order_of_the_table(run):
    for proof in (
        judged("merged", "logits", 0.0, 1e-4, "rounding"),
        not_run("packing", "rows are padded"),
        judged("packing", "rows", 1.0, 1e-4, "sums"),
        judged("packing", "other rows", 0.0, 1e-4, "sums"),
        not_run("packing", "rows are padded now"),
        not_run("uneven", "several processes"),
        not_run("uneven", "one machine"),
    ):
        run.record(proof)

    found = [(one.check, one.outcome, one.reason) for one in proofs_of(run)]
    assert found == [("packing", "passed", None), ("uneven", "not run", "one machine"), ("merged", "passed", None)]


def test_no_two_checks_share_a_title():
    assert len(set(TITLES.values())) == len(TITLES)


def test_the_file_is_read_as_it_was_written_and_a_damaged_one_is_named(run):
    run.record(judged("resume", "steps", 0.0, 0.0, "bit by bit"))
    write_table(run)

    (read,) = read_table(run)
    assert (read.check, read.difference, read.title) == ("resume", 0.0, "resumed = uninterrupted")

    (run.path / FILE).write_text('{"checks": [{"check": 3}]}')
    with pytest.raises(JobError, match=r"verify\.json.*orchestrator verify"):
        read_table(run)


def test_a_run_without_proofs_has_no_table(run):
    write_table(run)

    assert not (run.path / FILE).exists()
    assert read_table(run) == []


def test_trackers_get_the_difference_and_whether_it_passed(run):
    run.record(judged("resume", "steps", 0.5, 0.0, "bit by bit"))
    run.record(not_run("uneven", "one machine"))

    numbers = {one.name: one.value for one in numbers_of(run.events()[0], lambda: None, [])}
    assert numbers == {"verify/resume": 0.5, "verify/resume_passed": 0.0}
