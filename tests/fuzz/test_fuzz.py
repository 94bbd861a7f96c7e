"""A slice of the damaged inputs of every kind; `python -m tests.fuzz` tries more, and any one alone."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.errors import JobError
from orchestrator.job.job_file import parse_job
from tests.fuzz.session import Session
from tests.fuzz.values import as_yaml

SEED = 0
COUNTS = {"jobs": 300, "settings": 300, "hardware": 200, "rows": 100, "names": 100, "bank": 200, "runs": 60}
ALL = 20  # times as many, in the slow test


def _nested(values):
    return st.lists(values, max_size=3) | st.dictionaries(st.text(max_size=8), values, max_size=3)


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    import os

    kept = dict(os.environ)
    yield Session(tmp_path_factory.mktemp("fuzz"))
    os.environ.clear()
    os.environ.update(kept)


def test_an_input_is_made_from_its_seed_kind_and_number_alone(session):
    for kind in session.kinds:
        made = [session.case(kind, SEED, number) for number in range(20)]

        assert made == [session.case(kind, SEED, number) for number in range(20)], kind
        assert made != [session.case(kind, SEED + 1, number) for number in range(20)], kind


def tried(session, kind, numbers):
    """The inputs that end badly, each with the command that brings it back."""
    bad = []
    for number in numbers:
        _, fault = session.judge(kind, SEED, number)
        if fault:
            bad.append(f"python -m tests.fuzz --kind {kind} --seed {SEED} --only {number} --show  # {fault}")
    return bad


@pytest.mark.parametrize("kind", COUNTS)
def test_damaged_input_ends_with_a_message(session, kind):
    """No traceback, no hang, no more than 1 GiB, an exit code of the right kind, nothing written elsewhere."""
    assert tried(session, kind, range(COUNTS[kind])) == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", COUNTS)
def test_twenty_times_as_much_damaged_input_ends_with_a_message(session, kind):
    assert tried(session, kind, range(COUNTS[kind], ALL * COUNTS[kind])) == []


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), _nested, max_leaves=12))
@settings(max_examples=100, derandomize=True)
def test_any_value_at_any_key_is_a_job_or_a_mistake(value):
    for key in ("train", "data", "search", "name", "method"):
        text = as_yaml({"model": {"model_name_or_path": "m"}, "data": {"train": "a.jsonl"}, key: value})
        try:
            parse_job(text, Path("/nowhere"))
        except JobError as error:
            assert str(error)
