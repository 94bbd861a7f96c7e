"""What LOG.md says of predicted against published holds for the formulas as they are."""

import statistics
from pathlib import Path

import pytest

from tests.benchmarks import predictions
from tests.benchmarks.published import read
from tests.benchmarks.stacks import predict_memory, predict_time

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
    usable = [row for row in rows if row.metric != "memory_bytes"]
    errors = [abs(predict_time(row) / row.value - 1) for row in usable]

    assert len(usable) > 130
    assert statistics.median(errors) < 0.15
