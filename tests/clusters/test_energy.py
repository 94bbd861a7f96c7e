"""Energy counters of Linux' powercap, as files: they count up, wrap around, and may be unreadable."""

import pytest

from clusters.energy import Meter


def zone(folder, name, label, joules, limit=1000):
    path = folder / name
    path.mkdir(exist_ok=True)
    (path / "name").write_text(label + "\n")
    (path / "max_energy_range_uj").write_text(str(limit * 10**6))
    (path / "energy_uj").write_text(str(joules * 10**6))


def test_packages_and_dram_are_counted_and_their_parts_are_not(tmp_path):
    zone(tmp_path, "intel-rapl:0", "package-0", 100)
    zone(tmp_path, "intel-rapl:0:0", "core", 100)
    zone(tmp_path, "intel-rapl:0:1", "dram", 50)
    meter = Meter(powercap=tmp_path)

    zone(tmp_path, "intel-rapl:0", "package-0", 460)
    zone(tmp_path, "intel-rapl:0:0", "core", 999)
    zone(tmp_path, "intel-rapl:0:1", "dram", 86)

    read = meter.read()
    assert read.wh == pytest.approx((360 + 36) / 3600)
    assert read.source == "RAPL"


def test_a_counter_that_wraps_goes_on(tmp_path):
    zone(tmp_path, "intel-rapl:0", "package-0", 990)
    meter = Meter(powercap=tmp_path)

    zone(tmp_path, "intel-rapl:0", "package-0", 10)

    assert meter.read().wh == pytest.approx(20 / 3600)
    assert meter.read().wh == pytest.approx(20 / 3600)  # nothing since


def test_a_counter_that_fails_makes_the_figure_unknown_and_nothing_worse(tmp_path):
    zone(tmp_path, "intel-rapl:0", "package-0", 100)
    meter = Meter(powercap=tmp_path)

    (tmp_path / "intel-rapl:0" / "energy_uj").unlink()

    assert meter.read() is None
    zone(tmp_path, "intel-rapl:0", "package-0", 200)
    assert meter.read() is None  # what was missed in between is not known


def test_where_nothing_counts_the_energy_is_unknown(tmp_path):
    (tmp_path / "intel-rapl:0").mkdir()

    assert Meter(powercap=tmp_path).read() is None
    assert Meter(powercap=None).read() is None
