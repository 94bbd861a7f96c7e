"""The YAML of a job file with the line of each key, and `--set` over it."""

import pytest

from orchestrator.errors import JobError
from orchestrator.job.document import apply_overrides, load_document, shown

LONG_URI = "postgresql://mlflow:pa55word-pa55word-pa55word-pa55word@db.example.org:5432/the-database-of-the-team"


def overridden(text, *overrides):
    document, mistakes = load_document(text, "job.yaml"), []
    apply_overrides(document, overrides, mistakes)
    return document, mistakes


def test_each_key_has_its_line_and_what_is_missing_that_of_its_section():
    document = load_document("model:\n  a: 1\n\ndata:\n  train: [x,\n    y]\n", "job.yaml")

    assert document.where(("model", "a")) == "line 2"
    assert document.where(("data", "train", 1)) == "line 6"
    assert document.where(("data", "eval", "split")) == "line 4"
    assert document.where(("tracking",)) == "line 1"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("# nothing\n", "job.yaml: is empty; a job file is a mapping with `model:` and `data:`"),
        ("12\n", "job.yaml: holds 12;"),
        ("a:\n  b: 1\n  b: 2\n", r"job.yaml: line 3: .*the key 'b' occurs twice"),
        ("? [a]\n: 1\n", "job.yaml: line 1: .*a key that is not a plain text"),
        ("a: 2026-99-99\n", "job.yaml: line 1: '2026-99-99' cannot be read as timestamp"),
        ("a: !!python/object:os.system x\n", "job.yaml: line 1: the tag .* is not known"),
    ],
)
def test_what_is_no_job_file_is_refused_with_its_line(text, says):
    with pytest.raises(JobError, match=says):
        load_document(text, "job.yaml")


def test_an_override_is_read_as_yaml_and_is_the_place_of_its_mistakes():
    document, mistakes = overridden(
        "train:\n", "train.learning_rate=0.001", "data={eval: {split: 0.2}}", "name=a: b: c"
    )

    assert mistakes == []
    assert document.values == {
        "train": {"learning_rate": 0.001}, "data": {"eval": {"split": 0.2}}, "name": "a: b: c"
    }  # fmt: skip
    assert document.where(("train", "learning_rate")) == "--set train.learning_rate=0.001"


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("nonsense", "write it as section.key=value"),
        ("train..seed=1", "write it as section.key=value"),
        (f"{'a.' * 10}b=1", "write it as section.key=value"),
        ("train.seed.x=1", "train.seed is 3, not a section"),
        ("data.train.0=x", "data.train is ['a'], not a section"),
        ("name=\ud800", "is not UTF-8 text"),
    ],
)
def test_an_override_that_cannot_be_laid_over_changes_nothing(override, says):
    text = "train: {seed: 3}\ndata: {train: [a]}\n"

    document, mistakes = overridden(text, override)

    assert len(mistakes) == 1 and mistakes[0].startswith("--set ") and says in mistakes[0]
    assert document.values == load_document(text, "job.yaml").values


def test_a_shown_value_is_one_short_line():
    assert shown("a\nb") == r"'a\nb'"
    assert len(shown(list(range(1000)))) <= 60 and len(shown("x" * 1000)) <= 60


@pytest.mark.parametrize("value", [LONG_URI, [LONG_URI], {"a": LONG_URI}, f"http://host/x?token={'pa55' * 30}"])
def test_a_value_that_is_cut_shows_no_part_of_its_password(value):
    assert "pa5" not in shown(value)

    document, mistakes = overridden("a: 1\n", f"mlflow_uri={value}")

    assert mistakes == [] and "pa5" not in document.where(("mlflow_uri",))
