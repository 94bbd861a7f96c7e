"""Schedule-free optimizers: the package's training, averages that are looked at without changing it, whole states."""

import pytest
import schedulefree
import torch

from clusters.capability import DeviceCapability, Library
from strategies import METHODS
from strategies.compatibility import conflict
from strategies.model.heads import undecayed
from strategies.optimizers import OPTIMIZERS
from strategies.shape import ModelShape
from strategies.step.optimizers import averages_of, build_optimizer, evaluated_weights
from strategies.step.state import forget, restore
from strategies.step.step import Update, update
from strategies.techniques.precision import gradient_scaler
from strategies.workload import StagePart
from tests.strategies.test_contract import CPU, SAMPLES, add_gradients, base_model, settings, techniques, train

NAMES = sorted(name for name, facts in OPTIMIZERS.items() if facts.averages)
ADAM = {"betas": (0.9, 0.95), "eps": 1e-7, "weight_decay": 0.1}
THEIRS = {
    "schedule_free_adamw": lambda params: schedulefree.AdamWScheduleFree(params, 1e-2, warmup_steps=3, **ADAM),
    "schedule_free_radam": lambda params: schedulefree.RAdamScheduleFree(params, 1e-2, **ADAM),
    "schedule_free_sgd": lambda params: schedulefree.SGDScheduleFree(params, 1e-2, weight_decay=0.1, warmup_steps=3),
}


def chosen(name):
    return settings(optim=name, weight_decay=0.1, adam_beta2=0.95, adam_epsilon=1e-7, warmup_steps=3)


@pytest.fixture
def set_up(model_folder):
    """`set_up(name, method)`: a training of a method; each call makes the same one."""

    def act(name, method="lora"):
        kind = METHODS[method]()
        setup = kind.setup(base_model(kind, model_folder), chosen(name))
        setup.model.train()
        return setup

    return act


def weights_of(setup):
    return {name: parameter.detach().clone() for name, parameter in setup.parameters.items()}


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_training_is_the_package_s_in_a_loop_of_its_own(name, method, set_up):
    ours, theirs = set_up(name, method), set_up(name, method)
    parameters = list(theirs.parameters.values())
    spared = {id(parameter) for parameter in undecayed(theirs.model)}
    groups = [
        {"params": [parameter for parameter in parameters if id(parameter) not in spared]},
        {"params": [parameter for parameter in parameters if id(parameter) in spared], "weight_decay": 0.0},
    ]
    optimizer = THEIRS[name]([group for group in groups if group["params"]])
    optimizer.train()

    train(ours, 8)
    for _ in range(8):
        add_gradients(theirs, *SAMPLES)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    assert equal(weights_of(ours), weights_of(theirs))
    optimizer.eval()
    with evaluated_weights(ours):
        assert equal(weights_of(ours), weights_of(theirs))
    assert not equal(weights_of(ours), weights_of(theirs))


@pytest.mark.parametrize("name", NAMES)
def test_looking_at_the_averages_changes_no_bit_of_the_training(name, set_up):
    looked_at, alone = set_up(name), set_up(name)

    for _ in range(4):
        train(looked_at, 1)
        with evaluated_weights(looked_at), evaluated_weights(looked_at):  # one within another is the same
            pass
    train(alone, 4)

    assert equal(weights_of(looked_at), weights_of(alone))


def test_weights_come_back_where_an_evaluation_fails(set_up):
    setup = set_up("schedule_free_adamw")
    train(setup, 2)
    before = weights_of(setup)

    with pytest.raises(MemoryError), evaluated_weights(setup):
        raise MemoryError

    assert equal(weights_of(setup), before)


@pytest.mark.parametrize("name", NAMES)
def test_from_a_checkpoint_averages_and_steps_are_those_without_a_break(name, set_up):
    first, second = set_up(name), set_up(name)

    restore(second, train(first, 5))
    train(first, 3), train(second, 3)

    assert equal(weights_of(second), weights_of(first))
    with evaluated_weights(first), evaluated_weights(second):
        assert equal(weights_of(second), weights_of(first))


@pytest.mark.parametrize("name", NAMES)
def test_an_optimizer_that_is_cleared_begins_anew(name, set_up):
    cleared, fresh = set_up(name), set_up(name)
    train(cleared, 3)
    with torch.no_grad():
        for one, other in zip(cleared.parameters.values(), fresh.parameters.values(), strict=True):
            one.copy_(other)
    forget(cleared)

    train(cleared, 2), train(fresh, 2)

    assert equal(weights_of(cleared), weights_of(fresh))


@pytest.mark.parametrize("name", NAMES)
def test_a_step_at_rate_zero_moves_no_weight_and_is_no_part_of_the_average(name, set_up):
    setup, twin = set_up(name), set_up(name)
    train(setup, 3), train(twin, 3)
    before = weights_of(setup)
    counted = [state["counts"].tolist() for state in setup.optimizer.state.values()]

    add_gradients(setup, *SAMPLES)
    update(setup, gradient_scaler("cpu", "float32"), Update(0.0, 1.0))

    assert equal(weights_of(setup), before)
    assert [state["counts"].tolist() for state in setup.optimizer.state.values()] == counted
    with evaluated_weights(setup), evaluated_weights(twin):
        assert equal(weights_of(setup), weights_of(twin))


def test_what_is_handed_back_is_the_average_and_nothing_is_left_of_the_rest(set_up):
    setup = set_up("schedule_free_adamw")
    train(setup, 4)
    with evaluated_weights(setup):
        expected = weights_of(setup)

    averages_of(setup).become_averages()

    assert equal(weights_of(setup), expected) and not setup.optimizer.state
    with evaluated_weights(setup):
        assert equal(weights_of(setup), expected)


def test_the_average_of_sgd_with_equal_rates_is_the_mean_of_the_points(set_up):
    """arXiv 2405.15682, eq. 2 and 3 with c = 1 / (t + 1), by hand for one number."""
    parameter = torch.nn.Parameter(torch.tensor([1.0]))
    optimizer = build_optimizer([{"params": [parameter]}], settings(optim="schedule_free_sgd", learning_rate=0.5))
    z, points = 1.0, []

    for gradient in (0.4, -0.2, 0.1, 0.3):
        parameter.grad = torch.tensor([gradient])
        optimizer.step()
        z -= 0.5 * gradient
        points.append(z)

    average = sum(points) / len(points)
    assert parameter.item() == pytest.approx(0.9 * average + 0.1 * z)
    with optimizer.averaged():
        assert parameter.item() == pytest.approx(average)


@pytest.mark.parametrize(
    ("method", "changes", "told"),
    [
        ("lora", {"zero_stage": 1, "num_shards": 2, "state_share": 0.5}, "which ZeRO and DeepSpeed divide"),
        ("full", {"offload": "optimizer"}, "which ZeRO and DeepSpeed divide"),
        ("lora", {"stage": StagePart(0, 2, 0, 1)}, "is untested on stages"),
        ("lora", {"local_merge": "product"}, "strategy.local_steps averages others"),
        ("experimental_boosted_lora", {}, "which experimental_boosted_lora changes between steps without it"),
        ("experimental_galore", {}, "is an AdamW of its own"),
        ("experimental_lsp_offload", {}, "is an AdamW of its own"),
    ],
)
def test_where_the_average_is_nobody_s_it_is_refused_in_words(method, changes, told, model_folder):
    shape = ModelShape.from_config(base_model(METHODS["lora"](), model_folder).config.to_dict())

    found = conflict(METHODS[method](), techniques(optim=NAMES[0], **changes), CPU, shape, num_devices=2)

    assert found is not None and told in found


def test_without_the_package_the_line_to_type_is_told(model_folder):
    shape = ModelShape.from_config(base_model(METHODS["lora"](), model_folder).config.to_dict())
    without = DeviceCapability("cpu", "test", 8 * 2**30, libraries={"schedulefree": Library("absent")})

    found = conflict(METHODS["lora"](), techniques(optim=NAMES[0]), without, shape)

    assert found == "schedulefree is not installed: pip install -e '.[optim]'"
