"""What nvidia-smi and rocm-smi print for machines that people have -> probe -> plan and messages, beside a golden file.

The tools answer from cards.py.  What only a GPU can measure stands in the file where a probe remembers it: a torch that
judged each card, and for those it can use seven tenths of the datasheet.  Between the two everything is the product's.
"""

from __future__ import annotations

import json
import os
import platform
import time
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path

import pytest

from clusters.capability import ClusterCapability, DeviceCapability, Library, NodeCapability
from clusters.hardware import datasheet
from clusters.hardware.torch_build import TorchBuild
from clusters.hardware.torch_gpus import Seen, SeenGpu, index_of, judge
from clusters.probe import node as node_probe
from clusters.probe.machine import look_at_this_node
from clusters.units import GIB, format_bytes
from orchestrator.errors import OrchestratorError
from orchestrator.job.job_file import parse_job
from orchestrator.lifecycle import machines
from orchestrator.lifecycle.technique_report import REFERENCES
from orchestrator.planning import planner, workload
from orchestrator.planning.plan import Plan
from strategies.shape import ModelShape
from tests.cli import called
from tests.gpu_rehearsal.cards import MACHINES, Machine

GOLDEN = Path(__file__).with_name("cards.golden")
LLAMA_3B = ModelShape.from_config(REFERENCES["Llama-3.2-3B"])
JOB = "model: {model_name_or_path: m}\ndata: {train: a.jsonl, max_length: 1024}\n"
CPU = DeviceCapability("cpu", "a CPU", 60 * GIB, flops_per_s={"float32": 8e11}, memory_bytes_per_s=5e10)
CUDA = TorchBuild("2.13.0+cu130", "13.0", None, ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"))
ROCM = TorchBuild("2.13.0+rocm7.1", None, "7.1")
FOR_CPUS = TorchBuild("2.13.0+cpu")
STATES = ("measured", "unusable to torch", "extras absent")
FOUND = {"bitsandbytes": Library("runs"), "deepspeed": Library("runs"), "flash_attn": Library("absent")}


def seen_by(build: TorchBuild, machine: Machine, node: NodeCapability) -> Seen:
    """The GPUs that a torch of this build sees: CUDA lists the fastest first."""
    kind = "cuda" if build.cuda else "rocm" if build.hip else "none"
    there = [device for device in node.devices if device.kind == kind and device.name not in machine.unseen]
    there.reverse()
    return Seen(build, tuple(SeenGpu(place, device.name, device.uuid) for place, device in enumerate(there)))


def as_measured(device: DeviceCapability, node: NodeCapability, seen: Seen, state: str) -> DeviceCapability:
    """What measuring on a GPU would have found."""
    if device.kind == "cpu":
        return replace(device, libraries=FOUND if state != "extras absent" else {})
    alike = [other for other in node.devices if other.kind == device.kind]
    device = judge(device, index_of(device, alike, seen.gpus), seen)
    if device.problem:
        return device
    card = datasheet.find(device.name, device.memory_total_bytes) or datasheet.find("RTX 3090")
    assert card is not None
    published = datasheet.device(card)
    flops = {name: peak and 0.7 * peak for name, peak in published.flops_per_s.items()}
    libraries = {name: Library("absent") for name in FOUND} if state == "extras absent" else FOUND
    return replace(
        device,
        flops_per_s=flops,
        memory_bytes_per_s=0.8 * (published.memory_bytes_per_s or 1e12),
        host_to_device_bytes_per_s=12e9,
        device_to_host_bytes_per_s=12e9,
        libraries=libraries,
        sources=device.sources | {f"flops_per_s.{name}": "measured" for name, rate in flops.items() if rate},
    )


@pytest.fixture
def standing_in(tmp_path, monkeypatch):
    """A machine of cards.py in place of this one, as a probe in one of the states has left it."""
    import torch

    tools = tmp_path / "bin"
    tools.mkdir()
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)

    def put(name: str, state: str) -> NodeCapability:
        machine = MACHINES[name]
        machine.install(tools)
        unified = int((machine.unified_gib or 0) * GIB)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (unified or None, unified or None))
        node = look_at_this_node()
        build = FOR_CPUS if state == "unusable to torch" else ROCM if machine.amd else CUDA
        seen = seen_by(build, machine, node)
        devices = tuple(as_measured(device, node, seen, state) for device in node.devices)
        file = node_probe.figures_file(node.hardware_hash)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(asdict(replace(node, devices=devices))))
        os.utime(file, (time.time() + 600,) * 2)  # measured just now: what is in doubt is not measured again
        monkeypatch.setattr(node_probe, "installed_build", lambda: build)
        return node

    return put


def planned(told: list[str]) -> Plan:
    """The plan of the job on the machine as the probe tells of it, with a CPU that is the same everywhere."""
    (node,) = machines.probe("local", told.append).nodes
    gpus = tuple(device for device in node.devices if device.kind != "cpu")
    node = replace(node, name="box", num_cores=16, memory_bytes=60 * GIB, devices=(*gpus, CPU))
    spec = parse_job(JOB, Path()).spec
    work, _, _ = workload.describe(spec, LLAMA_3B, [512] * 1600, 1600 * 256, 1)
    return planner.make_plan(spec, work, ClusterCapability((node,)), 1024, None, {})


def told_of(name: str, state: str) -> list[str]:
    """Lines of the golden file: the plan, then what a user is told beside it."""
    told: list[str] = []
    try:
        plan = planned(told)
        lines = [worker(part) for part in plan.nodes]
        told += [f"left out: {device}: {why}" for device, why in plan.left_out.items()]
        told += [f"cannot: {what}: {why}" for what, why in plan.rejected.items() if "not installed" in why]
        lines[0] = f"{plan.method['type']}: {lines[0]}{', partly a guess' if plan.is_guess else ''}"
    except OrchestratorError as error:
        lines = [f"exit code {error.exit_code}: {error}".replace("\n", " / ")]
    told = [text.replace(platform.node(), "box") for text in told]
    return [f"{name} | {state}", *(f"    {line}" for line in lines), *(f"      {text}" for text in told)]


def worker(part) -> str:
    t = part.techniques
    switches = [t.dtype, t.attn_implementation, *(["packed"] if t.packing else [])]
    switches += ["checkpointing"] if t.gradient_checkpointing else []
    switches += [t.loss_type, t.optim, f"rows {t.per_device_train_batch_size}"]
    switches += [f"offload {t.offload}"] if t.offload != "none" else []
    return f"{part.share:.0%} on {part.device}: {', '.join(switches)}; has {format_bytes(part.memory_usable_bytes)}"


@cache
def golden() -> dict[str, list[str]]:
    """`machine | state` -> its lines."""
    found: dict[str, list[str]] = {}
    for line in GOLDEN.read_text().splitlines() if GOLDEN.exists() else ():
        if not line.startswith(" "):
            found[line] = current = []
        current.append(line)
    return found


@pytest.mark.parametrize("state", STATES)
def test_plans_and_messages_of_machines_that_people_have(state, standing_in):
    """What was decided, reviewed by eye; a change here is a decision.  Written anew by deleting the file."""
    assert len(MACHINES) >= 20
    found = {}
    for name in MACHINES:
        standing_in(name, state)
        found[f"{name} | {state}"] = told_of(name, state)
    if any(case not in golden() for case in found):
        with GOLDEN.open("a") as file:
            file.writelines(f"{line}\n" for lines in found.values() for line in lines)
        pytest.fail(f"{GOLDEN.name} lacked cases, which were written; look at them and run again")

    assert found == {case: golden()[case] for case in found}


def test_the_golden_file_holds_every_machine_in_every_state_and_no_other():
    assert set(golden()) == {f"{name} | {state}" for name in MACHINES for state in STATES}


def test_no_card_that_torch_cannot_use_takes_part_in_any_plan():
    unusable = [lines for case, lines in golden().items() if case.endswith("unusable to torch")]

    assert len(unusable) == len(MACHINES)
    assert all("on a CPU" in lines[1] for lines in unusable)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("rtx 3060, old driver", "driver 550.144.03 is too old for CUDA 13.0"),
        ("driver updated and not restarted", "Driver/library version mismatch"),
    ],
)
def test_a_user_of_the_command_line_reads_what_is_wrong_with_the_card(name, words, standing_in, tmp_path):
    standing_in(name, "measured")

    shown = called("probe", cwd=tmp_path, check=0)
    assert words in " ".join((shown.stdout + shown.stderr).split())


def test_techniques_are_judged_on_cards_that_can_be_trained_on_and_say_what_to_install(standing_in):
    from orchestrator.lifecycle.technique_report import catalogue

    told: list[str] = []
    standing_in("rtx 3090 and gtx 1080", "extras absent")
    rows = catalogue(machines.probe("local", told.append), None, False, told.append)
    reasons = {row["technique"]: row["reason"] for row in rows if row["device"].endswith("3090")}

    assert "pip install -e '.[quant]'" in reasons["QLoRA nf4"] and "'.[quant]'" in reasons["8-bit optimizer"]
    assert "pip install -e '.[zero]'" in reasons["optimizer offload"] and "'.[zero]'" in reasons["ZeRO-3"]
    assert not [row for row in rows if row["device"].endswith("1080")]
    assert "GTX 1080" in " ".join(told) and "has no kernels for compute capability 6.1" in " ".join(told)
