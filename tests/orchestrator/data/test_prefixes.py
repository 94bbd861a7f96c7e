"""How much rows have in common is counted on groups of them, as a training's steps draw them."""

import numpy
import pytest

from orchestrator.data.prefixes import tree_ratios


class Rows:
    """Rows of token ids."""

    documents = None  # each row is one

    def __init__(self, rows):
        self._rows = rows

    def __len__(self):
        return len(self._rows)

    def documents_of(self, index):
        return [(numpy.array(self._rows[index]), None)]


def test_rows_with_one_beginning_share_more_the_more_of_them_stand_together():
    ratios = tree_ratios(Rows([[7] * 30 + [100 + row] * 10 for row in range(40)]))

    assert list(ratios) == [1, 2, 4, 8, 16, 32]
    assert ratios[8] == pytest.approx(8 * 40 / (30 + 8 * 10), abs=1e-4)
    assert sorted(ratios.values()) == list(ratios.values())


def test_rows_of_several_beginnings_share_with_some_of_the_others_only():
    ratios = tree_ratios(Rows([[row % 4] * 30 + [100 + row] * 10 for row in range(64)]))

    assert 1.0 < ratios[2] < 1.3
    assert ratios[64] == pytest.approx(64 * 40 / (4 * 30 + 64 * 10), abs=1e-4)


def test_one_row_shares_with_none():
    assert tree_ratios(Rows([[1, 2, 3]])) == {1: 1.0}
