"""A summary in memory that grows with its run says what the whole file says."""

import json
import shutil

import pytest

from orchestrator.runs.run_folder import RunFolder
from orchestrator.runs.summary.follow import FollowedRun
from tests.orchestrator.runs.summary.test_event_summary import content_of, summary_of_bytes


@pytest.fixture
def run(tmp_path):
    return RunFolder(tmp_path)


def assert_is_up_to_date(followed):
    whole = summary_of_bytes((followed.run.path / "events.jsonl").read_bytes())
    assert json.dumps(followed.summary.to_json()) == json.dumps(whole.to_json())


def test_it_reads_what_was_appended_and_leaves_a_line_that_is_being_written(run):
    file, content = run.path / "events.jsonl", content_of(1)
    followed = FollowedRun(run)
    assert not followed.update()
    for end in range(0, len(content), len(content) // 7):
        file.write_bytes(content[:end])
        followed.update()
        assert_is_up_to_date(followed)

    assert not followed.update()
    assert followed.num_bytes == content[:end].rfind(b"\n") + 1


@pytest.mark.parametrize("way", ["shorter", "another file"])
def test_a_file_that_was_put_in_its_place_is_read_from_its_beginning(run, way):
    file = run.path / "events.jsonl"
    file.write_bytes(content_of(1))
    followed = FollowedRun(run)
    if way == "shorter":
        file.write_bytes(content_of(2, 40))
    else:
        (run.path / "new").write_bytes(content_of(2, 900))
        shutil.move(run.path / "new", file)

    assert followed.update()
    assert_is_up_to_date(followed)
