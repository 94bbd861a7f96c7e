"""One conformance test over the whole registry: a new method is tested by being registered."""

import copy
import dataclasses

import pytest
import torch

from clusters.capability import DeviceCapability, NodeCapability
from strategies import METHODS
from strategies.contract import Method, Techniques, TrainSettings, Workload
from strategies.shape import ModelShape

CPU = DeviceCapability("cpu", "test", 8 * 2**30)
NODE = NodeCapability("here", 2, 8 * 2**30, (CPU,))


def techniques(**changes):
    return dataclasses.replace(Techniques("float32", "sdpa", True, False, 1, 64), **changes)


def settings(**changes):
    plain = TrainSettings(1e-2, 0.0, "adamw_torch", 0.9, 0.999, 1e-8, techniques(), seed=1)
    return dataclasses.replace(plain, **changes)


def workload(shape):
    return Workload(shape, 100, 3000, 900, 60, 8, 10, 80)


@pytest.fixture(params=sorted(METHODS))
def method(request):
    return METHODS[request.param]()


def base_model(method, model_folder):
    """The pretrained model as this method's loader makes it."""
    from transformers import AutoModelForCausalLM

    arguments = method.load_arguments(techniques())
    return AutoModelForCausalLM.from_pretrained(
        model_folder, dtype=torch.float32, attn_implementation="sdpa", **arguments
    )


@pytest.fixture
def model(method, model_folder):
    return base_model(method, model_folder)


def test_is_a_frozen_dataclass_with_the_two_promises(method):
    assert dataclasses.is_dataclass(method)
    assert method.__dataclass_params__.frozen
    assert isinstance(method, Method)


def test_estimate_counts_what_setup_trains(method, model):
    shape = ModelShape.from_config(model.config.to_dict())

    plan = method.estimate(workload(shape), CPU, NODE, techniques())
    setup = method.setup(model, settings())

    assert plan.num_trainable_parameters == sum(p.numel() for p in setup.parameters.values())


def test_memory_falls_with_checkpointing_and_grows_with_length(method, model):
    shape = ModelShape.from_config(model.config.to_dict())

    def total(**changes):
        return method.estimate(workload(shape), CPU, NODE, techniques(**changes)).memory.total_bytes

    assert total(gradient_checkpointing=True) < total()
    assert total(max_length=128) > total()


def test_step_zero_equals_the_base_model(method, model):
    ids = torch.arange(20)[None]
    with torch.no_grad():
        before = copy.deepcopy(model)(ids).logits

    setup = method.setup(model, settings())

    setup.model.eval()
    with torch.no_grad():
        assert torch.equal(setup.model(ids).logits, before)


def test_training_changes_exactly_the_declared_parameters(method, model):
    setup = method.setup(model, settings())
    setup.model.train()  # in evaluation bitsandbytes lays its weights out anew
    everything = {name: p.detach().clone() for name, p in setup.model.named_parameters()}

    for _ in range(2):  # the second step reaches what starts behind a zero
        setup.model(torch.arange(20)[None]).logits.square().mean().backward()
        setup.optimizer.step()
        setup.optimizer.zero_grad()

    changed = {n for n, p in setup.model.named_parameters() if not torch.equal(p, everything[n])}
    assert changed == set(setup.parameters)


def test_two_setups_with_one_seed_are_equal(method, model):
    twin = copy.deepcopy(model)

    first, second = method.setup(model, settings()), method.setup(twin, settings())

    for name, parameter in first.parameters.items():
        assert torch.equal(parameter, second.parameters[name])


def test_export_is_loadable_by_plain_libraries(method, model, model_folder, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    setup = method.setup(model, settings())
    with torch.no_grad():
        for parameter in setup.parameters.values():
            parameter.add_(0.01)

    setup.export(tmp_path / "out")

    if (tmp_path / "out" / "adapter_config.json").exists():
        loaded = PeftModel.from_pretrained(base_model(method, model_folder), str(tmp_path / "out"))
    else:
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.arange(20)[None]
    setup.model.eval(), loaded.eval()
    with torch.no_grad():
        assert torch.allclose(loaded(ids).logits, setup.model(ids).logits, atol=1e-5)
    assert not list((tmp_path / "out").rglob("*.bin"))
