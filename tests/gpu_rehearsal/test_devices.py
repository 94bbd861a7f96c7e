"""The verbs, trials and the helper on the GPU that was planned, on stand-ins for the driver's tools and for torch's."""

import os
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from orchestrator.errors import JobError
from orchestrator.lifecycle import calibration
from orchestrator.planning.plan import Beside
from orchestrator.training.model.devices import device_like, gpu_in_use, planned_device
from orchestrator.training.workers import baseline, bench, finished, preflight
from orchestrator.training.workers.experiment import measured_on
from strategies.step import device_memory
from tests.gpu_rehearsal.cards import RTX_3060, RTX_3090, Machine
from tests.orchestrator.planning.test_choice import SMALL, machine, plan

UUIDS = ("GPU-00000000", "GPU-00000001")  # as the stand-in numbers its cards
VARIABLES = ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", *device_memory._SETTINGS)


@pytest.fixture
def cards(tmp_path, monkeypatch):
    """A machine with a 3060 and a 3090; torch starts CUDA with the first device that is set, and notes what it saw."""
    Machine((RTX_3060, RTX_3090)).install(tmp_path)
    seen = SimpleNamespace(at_start=None, fractions=[], device=None)

    def started(*_):
        seen.at_start = seen.at_start or {name: os.environ.get(name) for name in VARIABLES}

    def shown():
        started()
        return list(os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(UUIDS)).split(","))

    def properties(device):
        return SimpleNamespace(uuid=shown()[torch.device(device).index].removeprefix("GPU-"), total_memory=24 * 2**30)

    def set_device(device):
        started()
        seen.device = device

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "environ", {key: value for key, value in os.environ.items() if key not in VARIABLES})
        os.environ["PATH"] = f"{tmp_path}:{os.environ['PATH']}"
        patch.setattr(torch.cuda, "is_initialized", lambda: seen.at_start is not None)
        patch.setattr(torch.cuda, "is_available", lambda: bool(shown()))
        patch.setattr(torch.cuda, "device_count", lambda: len(shown()))
        patch.setattr(torch.cuda, "get_device_properties", properties)
        patch.setattr(torch.cuda, "set_device", set_device)
        patch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda *told: seen.fractions.append(told))
        yield seen


@pytest.fixture(scope="module")
def made():
    """A plan for the second card of the machine."""
    node = machine("a", "RTX 3090")
    gpu = replace(node.gpus[0], uuid=UUIDS[1], name=RTX_3090["name"])
    return plan(SMALL, replace(node, devices=(gpu, node.cpu)))


class Reached(Exception):
    """A verb has come to where it uses its device."""


def of_preflight(made, monkeypatch):
    monkeypatch.setattr(preflight, "datasets", _end)
    preflight.preflight(None, SimpleNamespace(plan=made, data_files=None), lambda _: None)


def of_bench(made, monkeypatch):
    monkeypatch.setattr(bench, "datasets", _end)
    bench.bench_training(None, SimpleNamespace(plan=made, data_files=SimpleNamespace(model="m")), 1, print)


def of_generation(made, monkeypatch):
    monkeypatch.setattr(finished, "model_of", lambda _: "m")
    monkeypatch.setattr(finished, "variants", _end)
    bench.bench_generation(SimpleNamespace(plan=lambda: made, path=None), None, [1], [1], 1, print)


def of_evaluate(made, monkeypatch):
    monkeypatch.setattr(finished, "exported_whole", lambda _: "folder")
    monkeypatch.setattr(finished, "model_of", lambda _: "m")
    monkeypatch.setattr(finished, "load_exported", _end)
    finished.evaluate(SimpleNamespace(plan=lambda: made, path=None), None, None)


def of_helper(made, monkeypatch):
    files = SimpleNamespace(model="m")
    planned = replace(made, beside=(Beside(made.nodes[0].node, "measures", made.nodes[0]),))
    run = SimpleNamespace(plan=lambda: planned, job=lambda: None, data=lambda: files, path=None)
    monkeypatch.setattr(baseline, "RunFolder", lambda _: run)
    monkeypatch.setattr(baseline.loading, "load_data", lambda _: (None, [1]))
    monkeypatch.setattr(baseline, "prepare_model", _end)
    baseline.measure("folder")


def _end(*_, **__):
    raise Reached


@pytest.mark.parametrize("verb", [of_preflight, of_bench, of_generation, of_evaluate, of_helper])
def test_every_verb_uses_the_planned_card_with_the_allocator_of_training(verb, cards, made, monkeypatch):
    threads = torch.get_num_threads()
    with pytest.raises(Reached):
        verb(made, monkeypatch)
    torch.set_num_threads(threads)

    assert cards.at_start["CUDA_VISIBLE_DEVICES"] == UUIDS[1] and cards.at_start["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
    assert cards.at_start["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    assert cards.fractions and cards.device == torch.device("cuda", 0)


def test_where_cuda_has_started_the_planned_card_is_found_among_all(cards, made):
    torch.cuda.set_device("cuda:0")

    assert planned_device(made.nodes[0]) == cards.device == torch.device("cuda", 1)


def test_a_planned_card_that_is_not_there_is_refused_or_replaced_without_its_limit(cards, made):
    part = replace(made.nodes[0], uuid="GPU-old")
    with pytest.raises(JobError, match=r"3090 \(GPU-old\), .* not among the GPUs .*GPU-00000001.*Plan again"):
        planned_device(part)

    assert device_like(part) == torch.device("cuda", 0)
    assert not cards.fractions


def test_a_user_who_set_the_allocator_keeps_it(cards, made):
    os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "max_split_size_mb:64"
    planned_device(made.nodes[0])

    assert cards.at_start["PYTORCH_CUDA_ALLOC_CONF"] == "max_split_size_mb:64"
    assert cards.at_start["PYTORCH_ALLOC_CONF"] is None


@pytest.mark.parametrize(("shown", "name"), [(UUIDS[0], RTX_3060["name"]), (UUIDS[1], RTX_3090["name"])])
def test_a_trial_is_credited_to_the_card_that_ran_it(shown, name, cards, made):
    os.environ["CUDA_VISIBLE_DEVICES"] = shown  # by Ray
    part = made.nodes[0]
    found = gpu_in_use(part, device_like(part))
    times = {
        "formula_step_s": 1.0,
        "measured_step_s": 3.0,
        "device": part.device,
        "uuid": part.uuid,
        "dtype": "int8",
    }
    learnt = calibration.ratios([{"time": times | measured_on(part, *found)}])

    assert found == (name, shown)
    assert {key for key, _ in learnt} == (set() if name != part.device else {name, shown})
