"""A slice of the damaged inputs of every kind; `python -m tests.fuzz` tries more, and any one alone."""

import pytest

from tests.fuzz.session import Session

SEED = 0


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
