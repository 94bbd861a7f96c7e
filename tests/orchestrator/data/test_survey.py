"""A look through all rows finds what preparing them finds, and keeps nothing."""

import json

import pytest

from orchestrator.data.prepare import prepare_data
from orchestrator.data.rendering.template import Renderer
from orchestrator.data.survey import survey
from orchestrator.errors import JobError
from orchestrator.job.job_file import read_job
from tests.conftest import CHAT_TEMPLATE, rows, write_jsonl


@pytest.fixture
def job_of(tmp_path, tokenizer_folder):
    """A job over rows that the test gives; no weights are needed to look at rows."""

    def make(items, **data):
        write_jsonl(tmp_path / "train.jsonl", items)
        data = {"train": "train.jsonl", **data}
        text = {"model": {"model_name_or_path": str(tokenizer_folder)}, "data": data}
        (tmp_path / "job.yaml").write_text(json.dumps(text))
        return read_job(tmp_path / "job.yaml")

    return make


@pytest.fixture
def renderer(tokenizer):
    return Renderer(tokenizer, CHAT_TEMPLATE)


ODD = [
    *rows(30),
    *rows(3),  # again
    {"prompt": "red " * 40, "completion": "cat"},  # dropped
    {"prompt": "red", "completion": "blue " * 40},  # cut
    {"prompt": "red"},  # broken
    {"prompt": "red", "completion": "cat", "note": "x"},  # with a column that is not used
]


@pytest.mark.parametrize("held_out", [None, {"split": 0.3}])
def test_it_counts_what_preparing_counts(job_of, renderer, tokenizer_folder, tmp_path, held_out):
    job = job_of(ODD, strict=False, truncate=True, eval=held_out)

    found = survey(job, renderer, 32).statistics()["data.train"]

    prepared = prepare_data(job, tokenizer_folder, 32, tmp_path / "cache", lambda text: None).train.statistics
    of_rows = (
        "rows",
        "rejected",
        "dropped",
        "truncated",
        "cut_tokens",
        "dropped_tokens",
        "unended",
        "ignored",
        "formats",
    )
    of_samples = ("samples", "tokens", "supervised_tokens", "longest", "repeated", "held_out")
    for name in of_rows if held_out else of_rows + of_samples:
        assert found[name] == getattr(prepared, name), name
    if held_out:
        assert found["held_out"] == prepared.held_out
    assert (found["rejected"], found["dropped"], found["unended"]) == (1, 1, 1)
    assert found["ignored"] == {"note": 1}


def test_the_first_rows_stand_for_all_unless_all_are_asked_for(job_of, renderer):
    job = job_of([*rows(60), {"prompt": "red"}])

    first, whole = survey(job, renderer, 64, most_rows=50), survey(job, renderer, 64)

    assert first.mistakes() == [] and "(of the first 50 rows)" in first.lines()[0]
    assert "train.jsonl:61: field 'completion' is missing" in whole.mistakes()[0]


def test_rows_are_read_where_they_cannot_be_rendered(job_of):
    job = job_of([*rows(3), {"prompt": "red"}, {"prompt": "x", "completion": "y", "note": "z"}])

    found = survey(job, None, None)

    assert "train.jsonl:4" in found.mistakes()[0] and len(found.mistakes()) == 2
    assert found.lines() == ["data.train: not used: note (1 row)"]


REFUSED = {
    "no row": ([], {}),
    "one row to split": (rows(1), {"eval": {"split": 0.5}}),
    "most is cut": ([{"prompt": "red", "completion": "blue " * 400}], {}),
    "none is left": ([{"prompt": "red " * 400, "completion": "blue"}], {"strict": False}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_only_preparing_could_refuse_is_refused_by_a_look(job_of, renderer, tokenizer_folder, tmp_path, name):
    items, data = REFUSED[name]
    job = job_of(items, **data)

    mistakes = survey(job, renderer, 64).mistakes()

    assert mistakes
    with pytest.raises(JobError):
        prepare_data(job, tokenizer_folder, 64, tmp_path / "cache", lambda text: None)


def test_a_file_without_a_row_is_named(job_of, renderer):
    mistakes = survey(job_of([]), renderer, 64).mistakes()

    assert len(mistakes) == 1
    assert "train.jsonl holds no row. Fill it" in mistakes[0]


def test_an_empty_file_among_others_is_said_to_have_no_rows(job_of, renderer, tmp_path):
    write_jsonl(tmp_path / "empty.jsonl", [])
    write_jsonl(tmp_path / "broken.jsonl", [{"prompt": "red"}])
    job = job_of(rows(3), train=["train.jsonl", "empty.jsonl", "broken.jsonl"], strict=False)

    formats = survey(job, renderer, 64).formats()

    assert list(formats.values()) == ["prompt_completion", "no rows", "unknown"]


def test_a_data_set_of_the_hub_is_not_fetched_to_be_looked_at(job_of, renderer):
    job = job_of(rows(3), train=["train.jsonl", "somebody/somewhere"])

    found = survey(job, renderer, 64, most_rows=100)

    assert found.mistakes() == [] and found.train.counts.statistics.rows == 3
    assert found.unchecked() == ["the rows of somebody/somewhere: they are not fetched"]
