import pytest

from clusters.units import format_bytes, format_count, format_s


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 B"), (1023, "1023 B"), (2**20, "1.0 MiB"), (17.9 * 2**30, "17.9 GiB"), (2**10, "1.0 KiB")],
)
def test_bytes_are_written_in_binary_units(value, text):
    assert format_bytes(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.421, "0.42 s"),
        (42, "42 s"),
        (185, "3 min 05 s"),
        (7620, "2 h 07 min"),
        (3599.6, "1 h 00 min"),
        (252 * 86400, "252 days"),
    ],
)
def test_seconds_grow_into_minutes_hours_and_days(value, text):
    assert format_s(value) == text


def test_counts_carry_metric_suffixes():
    assert [format_count(n) for n in (312, 7200, 134_515_008)] == ["312", "7.2k", "134.5M"]
