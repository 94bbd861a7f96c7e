"""The conformance test of training methods: a method is tested by being registered, as the example is here."""

import copy
import dataclasses
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

from clusters.capability import DeviceCapability, NodeCapability
from strategies import METHODS
from strategies.compatibility import conflict
from strategies.contract import Method, MethodDefaults
from strategies.export import LOADERS
from strategies.measure.trace import Lengths
from strategies.registry import owner_of
from strategies.shape import ModelShape
from strategies.step.quantise import keep_layout
from strategies.step.state import gather, restore
from strategies.step.step import Update, forward_backward, update
from strategies.techniques.precision import gradient_scaler
from strategies.train_setup import TrainSettings
from strategies.workload import Techniques, Workload
from tests.processes import run_ranks
from tests.strategies.example_method import NormTuning

CPU = DeviceCapability("cpu", "test", 8 * 2**30)
NODE = NodeCapability("here", 2, 8 * 2**30, (CPU,))
LENGTHS, NUM_SUPERVISED = Lengths((20, 12), (9, 5)), 14
SAMPLES = [Lengths((20,), (9,)), Lengths((12,), (5,))]  # the same, one at a time


def techniques(**changes):
    return dataclasses.replace(Techniques("float32", "sdpa", True, False, 1, 64), **changes)


def settings(**changes):
    plain = TrainSettings(1e-2, 0.0, "adamw_torch", 0.9, 0.999, 1e-8, techniques(), seed=1)
    return dataclasses.replace(plain, **changes)


def workload(shape):
    return Workload(shape, 100, 3000, 900, 60, 8, 10, 80)


@pytest.fixture(params=[*sorted(METHODS), NormTuning.name, "lora, fused"])
def method(request, monkeypatch):
    monkeypatch.setitem(METHODS, NormTuning.name, NormTuning)
    name, _, option = request.param.partition(", ")
    return METHODS[name](**({option: True} if option else {}))


def add_gradients(setup, *parts):
    """The gradients of a step whose micro-batches are `parts`, by what workers add up."""
    for part in parts:
        forward_backward(setup, part.batch(False), NUM_SUPERVISED, techniques(), gradient_scaler("cpu", "float32"))
    return [parameter.grad.clone() for parameter in setup.summed]


def train(setup, num_steps):
    """The state after some steps."""
    for _ in range(num_steps):
        add_gradients(setup, *SAMPLES)
        update(setup, gradient_scaler("cpu", "float32"), Update(1.0, 1.0))
    return copy.deepcopy(gather(setup))


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
    assert MethodDefaults in type(method).__mro__
    assert METHODS[method.name] is type(method)


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
        before = copy.deepcopy(model).train()(ids).logits  # evaluated, bitsandbytes would use its packed product

    setup = method.setup(model, settings())

    setup.model.eval()
    with torch.no_grad():
        assert torch.equal(setup.model(ids).logits, before)


def test_training_changes_exactly_the_declared_parameters(method, model):
    setup = method.setup(model, settings())
    setup.model.train()
    everything = {name: p.detach().clone() for name, p in setup.model.named_parameters()}

    for _ in range(2):  # the second step reaches what starts behind a zero
        setup.model(torch.arange(20)[None]).logits.square().mean().backward()
        setup.optimizer.step()
        setup.optimizer.zero_grad()

    changed = {n for n, p in setup.model.named_parameters() if not torch.equal(p, everything[n])}
    assert changed == set(setup.parameters)


def test_an_evaluation_changes_neither_the_model_nor_the_gradients_after_it(method, model):
    setup = method.setup(model, settings())
    add_gradients(setup, *SAMPLES)
    update(setup, gradient_scaler("cpu", "float32"), Update(1.0, 1.0))  # what starts at zero has a gradient now
    setup.model.train()
    before = add_gradients(setup, *SAMPLES)
    setup.optimizer.zero_grad()
    weights = {name: value.clone() for name, value in setup.model.state_dict().items() if torch.is_tensor(value)}

    setup.model.eval()
    with torch.no_grad():
        setup.model(torch.arange(20)[None])
    setup.model.train()

    after = add_gradients(setup, *SAMPLES)
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    assert all(torch.equal(value, weights[name]) for name, value in setup.model.state_dict().items() if name in weights)


def test_the_plan_knows_whether_setup_acts_between_steps_and_adds_a_loss(method, model):
    setup = method.setup(model, settings())

    assert (setup.between is not None) == method.acts_between
    assert (setup.extra_loss is not None) == method.adds_loss


def test_two_setups_with_one_seed_are_equal(method, model):
    twin = copy.deepcopy(model)

    first, second = method.setup(model, settings()), method.setup(twin, settings())

    for name, parameter in first.parameters.items():
        assert torch.equal(parameter, second.parameters[name])


def test_a_method_says_what_it_hands_back_and_of_every_engine_whether_it_loads_it(method, model):
    exports = method.exports(ModelShape.from_config(model.config.to_dict()))

    assert exports.loads_with | set(exports.cannot) == set(LOADERS)
    assert bool(exports.loads_with) == (exports.format != "own") == (method.own_format is None)
    assert all(len(why) > 20 for why in exports.cannot.values())
    assert method.setup(model, settings()).export_format == exports.format


def loads_as_trained(loader, exports, base, folder, trained):
    """Whether an installed engine loads what lies in `folder` and computes what was trained, to 1e-5 of the largest
    logit: a merged and a sliced matrix are summed in another order."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    if loader == "transformers" and not exports.is_adapter:
        base = AutoModelForCausalLM.from_pretrained(folder)
    elif loader == "transformers":
        base.load_adapter(str(folder))
    loaded = PeftModel.from_pretrained(base, str(folder)) if loader == "peft" else base
    keep_layout(loaded)  # else a plain engine evaluates 4-bit maps by another product than trains them
    trained.eval(), loaded.eval()
    ids = torch.arange(20)[None]
    with torch.no_grad():
        expected = trained(ids).logits
        return torch.allclose(loaded(ids).logits, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("loader", ["peft", "transformers"])
def test_engines_that_are_named_load_what_was_trained_and_others_do_not(loader, method, model, model_folder, tmp_path):
    setup = method.setup(model, settings())
    with torch.no_grad():
        for parameter in setup.parameters.values():
            parameter.add_(0.01)
    exports, base = method.exports(ModelShape.from_config(model.config.to_dict())), base_model(method, model_folder)

    setup.export(tmp_path / "out")

    assert not list((tmp_path / "out").rglob("*.bin"))
    if exports.format == "own":  # known to nobody else, who says so by its name
        with pytest.raises((KeyError, ValueError), match=method.own_format):
            loads_as_trained(loader, exports, base, tmp_path / "out", setup.model)
    elif loader in exports.loads_with or exports.is_adapter:
        found = loads_as_trained(loader, exports, base, tmp_path / "out", setup.model)
        assert found == (loader in exports.loads_with)
    else:
        with pytest.raises(ValueError, match=r"adapter_config\.json"):
            loads_as_trained(loader, exports, base, tmp_path / "out", setup.model)


def test_what_is_handed_back_in_a_methods_own_format_is_put_on_the_base_by_it(method, model, model_folder, tmp_path):
    setup, ids = method.setup(model, settings()), torch.arange(20)[None]
    with torch.no_grad():
        for parameter in setup.parameters.values():
            parameter.add_(0.01 * torch.randn_like(parameter))
    setup.export(tmp_path / "out")
    owner = owner_of(tmp_path / "out")

    assert owner is (type(method) if method.own_format else None)
    if owner is None:
        with pytest.raises(ValueError, match="no format of its own"):
            method.load(model, tmp_path / "out")
        return
    loaded = owner.load(base_model(method, model_folder), tmp_path / "out")
    setup.model.eval()
    with torch.no_grad():
        assert torch.allclose(loaded(ids).logits, setup.model(ids).logits, rtol=0, atol=1e-5)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_training_goes_the_same_way_from_a_checkpoint(method, model):
    """Weights and moments of the third step are those of a training that was never interrupted, bit by bit."""
    first, second = method.setup(copy.deepcopy(model), settings()), method.setup(model, settings())
    first.model.train(), second.model.train()

    state = train(first, 2)
    restore(second, state)
    resumed, straight = train(second, 1), train(first, 1)

    assert set(state.weights) == {*first.parameters, *first.buffers}
    for name, weight in straight.weights.items():
        assert torch.equal(resumed.weights[name], weight), name
    for name, moments in straight.moments.items():
        assert moments.keys() == resumed.moments[name].keys()
        assert all(torch.equal(resumed.moments[name][key], value) for key, value in moments.items()), name
    assert any(not torch.equal(state.weights[name], weight) for name, weight in straight.weights.items())


def test_gradients_of_micro_batches_add_up_to_those_of_one_batch(method, model):
    setup = method.setup(model, settings())
    setup.model.train()

    together = add_gradients(setup, LENGTHS)
    setup.optimizer.zero_grad()
    apart = add_gradients(setup, *SAMPLES)

    assert any(gradient.abs().max() > 0 for gradient in together)
    for one, other in zip(together, apart, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("changes", [{"dtype": "float16"}, {"zero_stage": 2, "num_shards": 2}, {"optim": "sgd"},
                                     {"offload": "optimizer"}, {"offload": "activations"}])  # fmt: skip
def test_what_a_method_refuses_the_planner_refuses_in_its_words(method, model, changes):
    gpu = DeviceCapability("cuda", "GPU", 24 * 2**30, compute_capability=(8, 6))
    shape = ModelShape.from_config(model.config.to_dict())

    refusal = method.refuses(techniques(**changes), shape)

    assert method.refuses(techniques(), shape) is None and conflict(method, techniques(), gpu, shape) is None
    if refusal is not None:
        assert len(refusal) > 20
        assert conflict(method, techniques(**changes), gpu, shape, num_devices=2) == refusal


def test_options_left_to_the_plan_are_resolved_with_a_reason(method, model):
    shape = ModelShape.from_config(model.config.to_dict())

    plan = method.estimate(workload(shape), CPU, NODE, techniques())
    stated = dataclasses.replace(method, **{name: value for name, (value, _) in plan.resolved.items()})

    automatic = {field.name for field in dataclasses.fields(method) if getattr(method, field.name) == "auto"}
    assert set(plan.resolved) == automatic
    assert all(reason for _, reason in plan.resolved.values())
    assert stated.estimate(workload(shape), CPU, NODE, techniques()) == dataclasses.replace(plan, resolved={})


def train_beside_another(rank, size, port, methods, model_folder, out):
    """One step of every method, a sample a worker."""
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    for method in methods:
        setup = method.setup(base_model(method, model_folder), settings())
        setup.model.train()
        add_gradients(setup, SAMPLES[rank])
        for parameter in setup.summed:
            dist.all_reduce(parameter.grad)
        summed = [parameter.grad.clone() for parameter in setup.summed]
        update(setup, gradient_scaler("cpu", "float32"), Update(1.0, 1.0))
        torch.save((summed, gather(setup).weights), f"{out}/{method.name}-{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def of_two_workers(model_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("workers")
    every = [make() for make in (*METHODS.values(), NormTuning)]
    methods = [method for method in every if not method.why_one_worker()]
    run_ranks(train_beside_another, 2, methods, str(model_folder), str(out))
    return lambda name: [torch.load(out / f"{name}-{rank}.pt", weights_only=False) for rank in range(2)]


def test_two_workers_train_as_one(method, model, of_two_workers):
    """Their gradients add up to those of one worker, and both have the same weights afterwards, bit by bit."""
    setup = method.setup(model, settings())
    setup.model.train()
    if why := method.why_one_worker():
        shape = ModelShape.from_config(model.config.to_dict())
        assert conflict(method, techniques(), CPU, shape, num_devices=2) == why and "num_workers: 1" in why
        return

    alone = add_gradients(setup, *SAMPLES)
    (summed, weights), (_, others) = of_two_workers(method.name)

    for one, other in zip(alone, summed, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
    assert all(torch.equal(weight, others[name]) for name, weight in weights.items())


def test_a_registered_method_is_a_section_of_the_job_file():
    """Nothing but the registry's line: its options, their limits and their defaults are the job file's."""
    program = """
from strategies import METHODS
from tests.strategies.example_method import NormTuning
METHODS[NormTuning.name] = NormTuning
from orchestrator.job.sections.methods import METHOD_SECTIONS
section = METHOD_SECTIONS["example_norms"]
print(section(type="example_norms").lr_factor, section.model_json_schema()["properties"]["lr_factor"])
"""

    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)

    assert said.returncode == 0, said.stderr
    assert said.stdout.startswith("10.0 {") and "learning rate of the norms" in said.stdout
    assert "'exclusiveMinimum': 0" in said.stdout
