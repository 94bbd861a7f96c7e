"""What LOG.md says of predicted against published holds for the formulas as they are."""

import statistics
from pathlib import Path

import pytest

from strategies.cost import reserved
from tests.benchmarks import memory_errors, time_errors
from tests.benchmarks.published import read

TABLES = Path(__file__).resolve().parents[3] / "shared/tables"
pytestmark = pytest.mark.skipif(not TABLES.is_dir(), reason="the published tables are not on this machine")


@pytest.fixture(scope="module")
def rows():
    return [row for row in read(TABLES)[0] if row.kind == "measured" and not row.offload]


def test_published_memory_lies_in_the_predicted_range(rows):
    usable = memory_errors.usable(rows)
    errors = [memory_errors.error(row) for row in usable]

    assert len(usable) > 150
    assert statistics.median(abs(error) for error in errors) < 0.06
    assert abs(statistics.median(errors)) < 0.03
    assert sum(map(memory_errors.is_inside, usable)) >= 0.945 * len(usable)
    assert reserved.HIGH / reserved.LOW <= 1.6


def test_the_planner_accepts_what_fits_and_refuses_what_does_not(rows):
    found = [decision for row in memory_errors.usable(rows) for decision in memory_errors.decisions(row)]

    assert len(found) > 800
    assert memory_errors.wrong_accepts(found) <= 0.03
    assert memory_errors.wrong_refusals(found) <= 0.10


def test_the_gaps_are_those_that_fit_the_tables(rows):
    gaps, _ = memory_errors.fit(memory_errors.usable(rows))

    assert abs(gaps.changing - reserved.GAPS.changing) <= 0.2
    assert max(abs(gaps.steady - reserved.GAPS.steady), abs(gaps.moving - reserved.GAPS.moving)) <= 0.05


def test_published_step_times_are_met(rows):
    found = [time_errors.compare(row) for row in time_errors.usable(rows)]
    quality = time_errors.Quality.of([one.measured_s for one in found], [one.predicted_s for one in found])

    assert quality.num_rows > 130
    assert quality.median < 0.10
    assert abs(quality.signed) < 0.03
    assert quality.tau > 0.90


def test_the_rule_of_thumb_is_worse_in_every_way(rows):
    found = [time_errors.compare(row) for row in time_errors.usable(rows)]
    measured = [one.measured_s for one in found]
    own = time_errors.Quality.of(measured, [one.predicted_s for one in found])
    naive = time_errors.Quality.of(measured, [one.naive_s for one in found])

    assert own.median < naive.median / 2
    assert own.tau > naive.tau + 0.1
