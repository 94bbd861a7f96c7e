"""A dissected step is the real step: nothing is lost between its parts, backward work goes where its forward was."""

import pytest
import torch

from strategies import METHODS
from strategies.measure import dissect, trace
from strategies.train_setup import TrainSettings
from strategies.workload import Techniques
from tests.strategies.test_trace import CONFIG

CPU = torch.device("cpu")


def prepared(method="lora", checkpointing=False):
    techniques = Techniques("float32", "document", True, checkpointing, 1, 256)
    settings = TrainSettings(1e-3, 0.0, "adamw_torch_fused", 0.9, 0.999, 1e-8, techniques, 1)
    torch.manual_seed(0)
    setup = trace.build(CONFIG, 2, METHODS[method](), settings, "cpu")
    batch = trace.even(4, 48, 0.5).batch(True)
    setup.model.train()
    return setup, batch, techniques


def test_the_phases_are_the_step():
    setup, batch, techniques = prepared()

    timed = dissect.timed_step(setup, [lambda: batch, lambda: batch], batch.targets_S.numel() * 2, techniques, CPU)

    assert set(timed.phases) == set(dissect.PHASES)
    assert timed.phases["forward"] > 0 and timed.phases["backward"] > 0 and timed.phases["optimizer"] > 0
    assert timed.step_s == pytest.approx(sum(timed.phases.values()))


def test_no_weight_moves():
    setup, batch, techniques = prepared()
    before = {name: parameter.clone() for name, parameter in setup.parameters.items()}

    dissect.timed_step(setup, [lambda: batch], 10, techniques, CPU)
    dissect.profiled_step(setup, [batch], 10, techniques)

    assert all(torch.equal(before[name], parameter) for name, parameter in setup.parameters.items())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_part_of_a_lora_step_is_found_and_little_is_left_over(checkpointing):
    setup, batch, techniques = prepared(checkpointing=checkpointing)
    dissect.profiled_step(setup, [batch], 10, techniques)  # warms up

    parts = dissect.profiled_step(setup, [batch], 10, techniques).parts

    assert {"attention", "matrix products", "norm", "loss", "lora", "optimizer"} <= set(parts)
    assert parts.get("rest", 0.0) < 0.25 * sum(parts.values())


def test_full_training_has_no_lora():
    full = dissect.profiled_step(*_arguments("full")).parts

    assert "lora" not in full
    assert full["matrix products"] > 0


def _arguments(method):
    setup, batch, techniques = prepared(method)
    dissect.profiled_step(setup, [batch], 10, techniques)
    return setup, [batch], 10, techniques


def test_backward_operators_belong_to_the_module_that_made_them():
    """A matrix product alone: forward one product, backward two, all of one part."""
    setup, batch, techniques = prepared("full")
    dissect.profiled_step(setup, [batch], 10, techniques)

    found = dissect.profiled_step(setup, [batch], 10, techniques, most=50)

    calls = {name: count for name, _, count in found.operators}
    products = sum(calls.get(name, 0) for name in ("aten::mm", "aten::addmm"))
    assert products >= 2 * 7 * 3  # seven maps in two layers, three products each
    assert found.parts["matrix products"] > found.parts.get("rest", 0.0)


def test_memory_by_part_adds_up():
    setup, batch, techniques = prepared()
    dissect.timed_step(setup, [lambda: batch], 10, techniques, CPU)  # the optimizer's state

    memory = dissect.memory_by_part(setup, batch, 10, techniques)

    trained = sum(parameter.numel() for parameter in setup.parameters.values())
    assert memory["gradients"] == 4 * trained
    assert memory["optimizer"] == pytest.approx(8 * trained, rel=0.05)
    assert memory["weights"] >= sum(p.numel() * 4 for p in setup.model.parameters())
    assert memory["weights"] + memory["optimizer"] < memory["peak"]
