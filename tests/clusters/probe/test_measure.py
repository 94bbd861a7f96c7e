"""Figures are measured for real, briefly; what is asserted holds on the slowest machine anybody trains on."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from clusters.capability import DeviceCapability, Library
from clusters.probe import measure
from clusters.probe.machine import look_at_this_node
from clusters.probe.measure import measure_node
from clusters.probe.node import _is_due, probe_node
from clusters.safe.cache import cache_folder

ROOT = Path(__file__).resolve().parents[3]
GPU = DeviceCapability("cuda", "NVIDIA GeForce RTX 9999", 2**30)


def test_speeds_are_plausible(measured):
    cpu = measured.node.cpu

    assert 1e6 < cpu.flops_per_s["bfloat16"] < 1e15
    assert 0.5e9 < cpu.memory_bytes_per_s < 1e13
    assert 1e-8 < cpu.op_overhead_s < 1e-3
    assert 1e6 < measured.node.disk_write_bytes_per_s < 1e11
    assert 1e6 < measured.node.disk_read_bytes_per_s < 1e12
    assert measured.node.disk_free_bytes > 0


@pytest.mark.parametrize(("shares", "is_doubtful"), [((1.0, 1.0), False), ((0.75, 0.7), False), ((1.0, 0.3), True)])
def test_a_cpu_that_others_use_is_in_doubt(shares, is_doubtful):
    assert bool(measure.doubt_of(DeviceCapability("cpu", "a", 1), shares)) is is_doubtful


def test_optional_libraries_run_or_say_why_not(measured):
    found = measured.node.cpu.libraries

    assert found == {"bitsandbytes": Library("runs"), "deepspeed": Library("runs"), "schedulefree": Library("runs")}


@pytest.mark.parametrize(
    ("text", "state"),
    [(None, "absent"), ("", "runs"), ("raise OSError('libcudart.so.13: cannot open\\nmore')", "broken")],
)
def test_a_library_is_absent_broken_with_its_words_or_runs(tmp_path, monkeypatch, text, state):
    from clusters.probe.measure_device import _imported, _try_library

    if text is not None:
        (tmp_path / "some_library.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "some_library", raising=False)
    found = _try_library("some_library", lambda: _imported("some_library"))

    assert found == Library(state, "OSError: libcudart.so.13: cannot open" if state == "broken" else "")


def test_refresh_measures_again_what_is_remembered(measured):
    flops_per_s = measured.node.cpu.flops_per_s

    assert 1e9 < flops_per_s["float32"] < 1e15  # remembered were 7
    assert json.loads(measured.file.read_text())["devices"][-1]["flops_per_s"] == flops_per_s
    assert not list(measured.file.parent.glob("*.tmp"))


def test_every_figure_says_that_it_was_measured_and_unknown_ones_say_nothing(measured):
    cpu = measured.node.cpu
    formats = {f"flops_per_s.{dtype}" for dtype, value in cpu.flops_per_s.items() if value is not None}

    assert formats | {"memory_bytes_per_s", "op_overhead_s", "memory_bytes"} <= set(cpu.sources)
    assert set(cpu.sources.values()) == {"measured"}
    assert "host_to_device_bytes_per_s" not in cpu.sources
    assert measured.node.sources["disk_write_bytes_per_s"] == "measured"
    assert measured.node.sources["disk_read_bytes_per_s"] == "measured"


def test_figures_are_remembered_and_free_memory_is_fresh(measured, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    values = json.loads(measured.file.read_text())
    values["devices"][-1]["memory_bytes"] = 1
    cache_folder("probe").mkdir(parents=True)
    (cache_folder("probe") / measured.file.name).write_text(json.dumps(values))
    node = probe_node()

    assert node.cpu == measured.node.cpu
    assert node.disk_write_bytes_per_s == measured.node.disk_write_bytes_per_s


@pytest.mark.parametrize(("age_s", "is_due"), [(60, False), (3600, True), (-60, True)])
def test_a_busy_cpu_is_measured_again_after_a_while(tmp_path, age_s, is_due):
    node = look_at_this_node()
    in_doubt = replace(node, devices=tuple(replace(device, doubt="busy?") for device in node.devices))
    file = tmp_path / "figures.json"
    file.touch()
    now = file.stat().st_mtime + age_s

    assert _is_due(file, replace(node, devices=(in_doubt.cpu,)), now) is is_due
    assert not _is_due(file, node, now)


def test_a_gpu_that_torch_cannot_use_says_why_and_threads_are_as_before(tmp_path):
    threads = torch.get_num_threads()
    node = measure_node(replace(look_at_this_node(), devices=(GPU,), num_cores=threads + 1), 0.1, tmp_path)

    (gpu,) = node.unusable
    assert node.gpus == () and replace(gpu, problem=None) == GPU
    assert f"torch {torch.__version__} is built for CPUs: install torch " in gpu.problem
    assert torch.get_num_threads() == threads


def test_nothing_is_left_on_the_disk(tmp_path):
    rates = measure.disk_bytes_per_s(tmp_path, 0.01)

    assert set(rates) == {"disk_write_bytes_per_s", "disk_read_bytes_per_s"}
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "_FILE_BYTES", 2**60)

    assert measure.disk_bytes_per_s(tmp_path, 0.01) == {}


def test_a_folder_that_cannot_be_written_has_no_speed():
    assert measure.disk_bytes_per_s(Path("/proc/nowhere"), 0.01) == {}


@pytest.mark.parametrize(
    "rubbish", ["[]", "null", '{"devices": 3}', '{"devices": []}', '{"devices": [{"kind": "tpu"}]}']
)
def test_a_damaged_file_counts_as_none(tmp_path, rubbish):
    from clusters.probe.node import _read

    (tmp_path / "rubbish.json").write_text(rubbish)

    assert _read(tmp_path / "rubbish.json", look_at_this_node()) is None


def test_without_torch_the_look_is_all_and_it_is_no_error(tmp_path):
    hidden = "import sys; sys.modules['torch'] = None; "  # as where it is not installed
    code = "from clusters.probe.node import probe_node; n = probe_node(); print(n.num_cores, dict(n.cpu.flops_per_s))"
    bare = [sys.executable, "-c", hidden + code]
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run(bare, capture_output=True, text=True, cwd=ROOT, env=environment, check=True)

    assert done.stdout.split(maxsplit=1) == [str(look_at_this_node().num_cores), "{}\n"]
    assert "torch is not installed" in done.stderr
    assert not list(tmp_path.rglob("*.json"))


def test_a_cache_that_cannot_be_written_costs_only_the_memory_of_it(tmp_path, caplog):
    from clusters.probe.node import _write

    _write(tmp_path / "missing" / "x.json", look_at_this_node())

    assert "not cached" in caplog.text
