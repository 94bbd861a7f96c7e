"""Energy counters of Linux' powercap, as files: they count up, wrap around, and may be unreadable."""

import sys

import pytest

from clusters.hardware.energy import Meter


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


class Nvml:
    """The driver's library, as its Python module answers for two cards: one that counts and one from before Volta."""

    def __init__(self, millijoules):
        self.millijoules = millijoules

    def nvmlInit(self):
        pass

    def nvmlDeviceGetHandleByUUID(self, uuid):
        if uuid not in ("GPU-new", "GPU-old"):
            raise RuntimeError("Not Found")
        return uuid

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):
        if handle == "GPU-old":
            raise RuntimeError("Not Supported")
        return self.millijoules


def test_a_card_is_counted_beside_the_cpu(tmp_path, monkeypatch):
    nvml = Nvml(5_000)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    zone(tmp_path, "intel-rapl:0", "package-0", 100)
    meter = Meter(("GPU-new",), tmp_path)

    zone(tmp_path, "intel-rapl:0", "package-0", 136)
    nvml.millijoules += 72_000

    assert meter.read().wh == pytest.approx((36 + 72) / 3600)
    assert meter.read().source == "RAPL + NVML"


@pytest.mark.parametrize(
    ("gpus", "library"), [(("GPU-new",), None), (("GPU-new", "GPU-old"), Nvml(0)), (("GPU-elsewhere",), Nvml(0))]
)
def test_the_energy_of_a_card_that_cannot_be_read_is_unknown_and_never_the_cpus(tmp_path, monkeypatch, gpus, library):
    monkeypatch.setitem(sys.modules, "pynvml", library)  # None: as where it is not installed
    zone(tmp_path, "intel-rapl:0", "package-0", 100)

    assert Meter((), tmp_path).read() is not None
    assert Meter(gpus, tmp_path).read() is None
