"""What LOG.md says of predicted against published holds for the formulas as they are."""

import statistics
from pathlib import Path

import pytest

from tests.benchmarks import predictions, time_errors
from tests.benchmarks.published import read
from tests.benchmarks.stacks import predict_memory

TABLES = Path(__file__).resolve().parents[3] / "shared/tables"
pytestmark = pytest.mark.skipif(not TABLES.is_dir(), reason="the published tables are not on this machine")


@pytest.fixture(scope="module")
def rows():
    return [row for row in read(TABLES)[0] if row.kind == "measured" and not row.offload]


def test_published_memory_lies_in_the_predicted_range(rows):
    usable = [r for r in rows if r.metric == "memory_bytes" and not predictions._CANNOT & set(r.extras)]
    found = [(predict_memory(row), row.value) for row in usable]
    errors = [abs(expected / value - 1) for (expected, _, _), value in found]

    assert len(found) > 130
    assert statistics.median(errors) < 0.10
    assert sum(low <= value <= high for (_, low, high), value in found) >= 0.945 * len(found)


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
