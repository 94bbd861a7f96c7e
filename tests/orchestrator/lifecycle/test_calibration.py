"""Finished runs correct the predictions of their device and number format, and nothing else."""

import json

import pytest

from clusters.capability import ClusterCapability, DeviceCapability, NodeCapability
from orchestrator.lifecycle.calibration import calibrated, ratios


def result(predicted, measured, device="cpu", dtype="float32"):
    times = {"formula_step_s": predicted, "measured_step_s": measured, "device": device, "dtype": dtype}
    return {"time": times}


def test_one_run_moves_half_of_the_way_and_many_all_of_it():
    assert ratios([result(1.0, 2.0)])["cpu", "float32"] == pytest.approx(2 ** (1 / 1.5))
    assert ratios([result(1.0, 2.0)] * 99)["cpu", "float32"] == pytest.approx(2, rel=0.01)


def test_formats_and_devices_are_learnt_apart():
    found = ratios([result(1, 2), result(1, 0.5, dtype="bfloat16"), result(1, 3, device="RTX 3090")])

    assert set(found) == {("cpu", "float32"), ("cpu", "bfloat16"), ("RTX 3090", "float32")}
    assert found["cpu", "bfloat16"] < 1


def test_runs_without_times_and_unbelievable_ones_teach_nothing():
    assert ratios([{}, {"time": None}, result(None, 1), result(1, 500)]) == {}


def test_a_folder_of_runs_teaches_its_devices(tmp_path):
    cluster = ClusterCapability((NodeCapability("here", 2, None, (DeviceCapability("cpu", "cpu", None),)),))
    for name, text in (("a", json.dumps(result(1, 2))), ("b", "{half"), ("c", json.dumps(result(1, 2)))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "result.json").write_text(text)

    device = calibrated(cluster, tmp_path).nodes[0].devices[0]

    assert device.calibration == {"float32": pytest.approx(2 ** (2 / 2.5))}
    assert calibrated(cluster, tmp_path / "none").nodes[0].devices[0].calibration == {}


def test_what_a_card_taught_itself_goes_before_what_its_like_did(tmp_path):
    own, other = result(1, 2, device="RTX 3090"), result(1, 0.5, device="RTX 3090")
    own["time"]["uuid"], other["time"]["uuid"] = "GPU-1", "GPU-2"
    for name, held in (("a", own), ("b", other)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "result.json").write_text(json.dumps(held))
    cards = tuple(DeviceCapability("cuda", "RTX 3090", None, uuid=f"GPU-{number}") for number in (1, 2, 3))

    slow, fast, new = calibrated(ClusterCapability((NodeCapability("here", 2, None, cards),)), tmp_path).nodes[0].gpus

    assert slow.calibration == {"float32": pytest.approx(2 ** (1 / 1.5))}
    assert fast.calibration == {"float32": pytest.approx(0.5 ** (1 / 1.5))}
    assert new.calibration == {"float32": pytest.approx(1.0)}
