"""Combinations of choices, of which some are tried in every run and the rest in `make test-slow`."""

import itertools

import pytest


def half_now(*axes):
    """All combinations of two choices an axis; in every run half of them, in which all but one axis meet in every way.

    Those are the combinations with an even number of second choices (a half-fraction of a factorial design).
    """
    every = list(itertools.product(*([(0, first), (1, second)] for first, second in axes)))
    is_odd = [sum(number for number, _ in chosen) % 2 for chosen in every]
    return [
        pytest.param(*(value for _, value in chosen), marks=pytest.mark.slow if odd else ())
        for chosen, odd in zip(every, is_odd, strict=True)
    ]
