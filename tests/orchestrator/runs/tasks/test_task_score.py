"""Base and tuned model on a task: differences row by row where rows have a value, read as they were written."""

import pytest

from orchestrator.errors import JobError
from orchestrator.report.tasks import task_blocks
from orchestrator.runs.mirror.numbers import numbers_of
from orchestrator.runs.run_folder import RunFolder
from orchestrator.runs.tasks.task_score import FILE, ModelScore, compared, read_tasks, write_tasks
from orchestrator.views.tasks import cells


@pytest.fixture
def run(tmp_path):
    return RunFolder(tmp_path)


def measured(*rows, stderr=0.1):
    return ModelScore(sum(rows) / len(rows), stderr, len(rows), rows)


def test_rows_that_all_gain_are_sure_where_their_standard_errors_are_not():
    before, after = (0.0, 0.2, 0.4, 0.6), (0.3, 0.5, 0.7, 0.91)

    paired = compared("t", "acc", measured(*before, stderr=0.5), measured(*after, stderr=0.5))
    apart = compared("t", "acc", ModelScore(0.3, 0.5, 4), ModelScore(0.6025, 0.5, 4))

    assert paired.is_paired and not paired.may_be_chance
    assert not apart.is_paired and apart.may_be_chance
    assert apart.low == pytest.approx(0.3025 - 1.96 * 0.5 * 2**0.5)


def test_without_an_error_there_is_no_interval():
    found = compared("t", "perplexity", ModelScore(9.0, None, 4), ModelScore(8.0, None, 4))

    assert (found.difference, found.low, found.may_be_chance) == (-1.0, None, False)


def test_scores_are_read_as_they_were_written_the_newest_of_each(run):
    for after in (0.5, 1.0):
        run.record(compared("t", "acc", measured(0.0, 1.0), measured(after, after), where="here", limit=2))
    write_tasks(run)

    (found,) = read_tasks(run)
    assert (found.after, found.where, found.limit, found.rows) == (1.0, "here", 2, 2)
    assert cells(found, str)[:3] == ("t", "acc", "2")
    texts = [getattr(block, "text", "") for block in task_blocks(str, run)]
    assert "No more than 2 rows of a task." in texts

    (run.path / FILE).write_text('{"tasks": [{"task": 1}]}')
    with pytest.raises(JobError, match="evaluate"):
        read_tasks(run)


def test_trackers_get_both(run):
    run.record(compared("gsm8k", "exact_match,strict-match", measured(0.0, 1.0), measured(1.0, 1.0)))

    numbers = {one.name: one.value for one in numbers_of(run.events()[0], lambda: None, [])}
    assert numbers == {
        "before/gsm8k/exact_match/strict-match": 0.5,
        "after/gsm8k/exact_match/strict-match": 1.0,
    }
