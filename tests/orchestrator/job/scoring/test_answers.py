"""The answer inside a text: GSM8K's number, and patterns of one's own, which are checked with the job file."""

import pytest

from orchestrator.errors import JobError
from orchestrator.job.job_file import parse_job
from orchestrator.job.scoring.answers import comparable, extract, pairs_of_answers, pattern_mistake

JOB = "model: {model_name_or_path: m}\ndata: {train: t.jsonl, eval: e.jsonl}\n"


@pytest.mark.parametrize(
    ("pattern", "text", "answer"),
    [
        ("gsm8k", "48 / 2 = <<48/2=24>>24 clips in May.\n#### 72", "72"),
        ("gsm8k", "so it is\n#### $1,234.50.", "$1,234.50"),
        ("gsm8k", "#### 3 is wrong, so #### -5", "-5"),
        ("gsm8k", "it is 72", None),
        ("last_number", "there were 3, and now 1,200 of them.", "1,200"),
        (r"Answer:\s*(yes|no)", "Answer: no. Answer: yes", "yes"),
        (r"Answer:\s*(yes|no)", "yes", None),
    ],
)
def test_the_last_match_is_the_answer(pattern, text, answer):
    assert extract(pattern, text) == answer


@pytest.mark.parametrize(
    ("one", "other"), [("1,000", "1000.00"), ("$72", "72."), ("７２", "72"), ("-0.50", "-.5"), (" yes ", "yes")]
)
def test_equal_numbers_and_texts_are_equal(one, other):
    assert comparable(one) == comparable(other)


@pytest.mark.parametrize(("one", "other"), [("1", "-1"), ("1.5", "15"), ("yes", "no"), ("NaN", "0"), ("1e3", "13")])
def test_unequal_ones_are_not(one, other):
    assert comparable(one) != comparable(other)


def test_what_has_no_answer_equals_nothing():
    pairs = pairs_of_answers("gsm8k", [("#### 5", "five #### 5.0"), ("5", "#### 5"), ("5", "five")])

    assert [a == b for a, b in pairs] == [True, False, False]


@pytest.mark.parametrize(
    ("pattern", "mistake"),
    [("(", "is no regular expression"), ("yes|no", "has 0 groups"), ("(a)(b)", "has 2 groups; put the answer")],
)
def test_a_pattern_that_cannot_be_used_is_a_mistake_of_the_job_file(pattern, mistake):
    assert mistake in pattern_mistake(pattern)
    with pytest.raises(JobError, match=r"eval\.answer_pattern"):
        parse_job(f"{JOB}eval: {{answer_pattern: '{pattern}'}}", folder=None)


def test_named_patterns_are_none():
    assert pattern_mistake("gsm8k") is pattern_mistake(None) is pattern_mistake("#+ (.*)") is None
