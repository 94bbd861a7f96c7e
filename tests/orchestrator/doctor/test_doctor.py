"""What the doctor says of a machine, and that each line it gives is one that helps."""

import datetime
import importlib.util
import json
import socket

from clusters.capability import DeviceCapability
from clusters.hardware.torch_build import TorchBuild
from orchestrator.doctor import checks, system
from tests.cli import called

CARD = DeviceCapability("cuda", "RTX 3090", memory_bytes=24 * 2**30, driver_version="470.10", compute_capability=(8, 6))


def test_an_old_driver_is_named_beside_the_build_that_it_cannot_run():
    (found,) = system.judge_gpus((CARD,), TorchBuild("2.13.0", cuda="13.0"))

    assert found.state == "attention"
    assert "470.10" in found.found and "CUDA 13.0" in found.found
    assert found.fix and "driver" in found.fix


def test_a_build_for_cpus_beside_a_card_is_named():
    (found,) = system.judge_gpus((CARD,), TorchBuild("2.13.0+cpu"))

    assert found.state == "attention"
    assert "built for CPUs" in found.found


def test_a_card_that_torch_can_use_is_fine_and_none_is_no_fault():
    card = DeviceCapability(
        "cuda", "RTX 3090", memory_bytes=24 * 2**30, driver_version="580.10", compute_capability=(8, 6)
    )

    assert [one.state for one in system.judge_gpus((card,), TorchBuild("2.13.0", cuda="13.0"))] == ["ok"]
    assert [one.state for one in system.judge_gpus((), None)] == ["absent"]


def test_a_port_that_is_taken_is_named():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        (found,) = system.ports({port: "`orchestrator head`"})

    assert found.state == "attention" and "in use" in found.found


def test_a_clock_in_the_past_needs_attention():
    assert system.clock(datetime.date(1970, 1, 1), None).state == "attention"
    assert system.clock(datetime.date(2030, 1, 1), True).state == "ok"
    assert system.clock(datetime.date(2030, 1, 1), False).state == "absent"


def test_a_missing_package_says_what_it_would_bring_and_the_line_to_type(monkeypatch):
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "deepspeed" else there(name))

    found = {one.name: one for one in checks.packages()}

    assert found["zero"].state == "absent" and "deepspeed" in found["zero"].found
    assert found["zero"].fix and "-m pip install" in found["zero"].fix and "[zero]" in found["zero"].fix
    assert found["zero"].brings == "strategy.mode: zero2 and zero3"


def test_every_extra_of_the_package_is_looked_at():
    assert {*checks.BRINGS} == set(checks.EXTRAS.values())


def test_the_verb_prints_one_finding_a_line_or_one_json_document(tmp_path):
    shown = called("doctor", cwd=tmp_path, check=0).stdout
    found = json.loads(called("doctor", "--json", cwd=tmp_path, check=0).stdout)

    assert {"Python", "system", "train", "memory", "port 6379", "disk of runs", "clock"} <= {
        one["name"] for one in found
    }
    assert all(f"{one['name']}:" in shown for one in found)
    assert {one["state"] for one in found} <= {"ok", "absent", "attention"}
