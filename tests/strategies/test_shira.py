"""SHiRA: which entries train, that nothing else moves, and that experts merge better than those of LoRA."""

import copy

import pytest
import torch

from strategies.adapter_bank import sparse
from strategies.adapter_bank.adapter import Adapter
from strategies.adapter_bank.generation import Recipe, generate
from strategies.measure import trace
from strategies.methods.lora import Lora
from strategies.methods.shira import Shira
from strategies.methods.sparse_entries import scattered
from strategies.shape import ModelShape
from strategies.step.state import gather, restore
from tests.strategies.test_contract import CPU, NODE, base_model, settings, techniques
from tests.strategies.test_memory import LLAMA, workload


def a_task(seed, rows=16):
    """Rows of one of a few sequences: what a small model learns in some steps."""
    draw = torch.Generator().manual_seed(seed)
    patterns = torch.randint(3, 400, (2, 12), generator=draw)
    return patterns[torch.randint(2, (rows,), generator=draw)]


def loss(model, ids):
    return model(ids, labels=ids).loss


def learn(setup, ids):
    setup.learner.begin_learning(2)
    for part in ids.chunk(2):
        loss(setup.model, part).backward()
        setup.learner.next_learning()
    return setup.learner.end_learning()


def train(setup, ids, steps):
    setup.model.train()
    for _ in range(steps):
        loss(setup.model, ids).backward()
        setup.optimizer.step()
        setup.optimizer.zero_grad()


@pytest.fixture
def model(model_folder):
    return base_model(Shira(), model_folder)


def test_random_entries_are_distinct_and_everywhere():
    draw = torch.Generator().manual_seed(0)

    places = scattered(1500, 2048, draw)

    assert places.dtype == torch.int32 and (places.diff() > 0).all()
    assert 0 <= places[0] < 2 and 2046 <= places[-1] < 2048
    assert not torch.equal(places, scattered(1500, 2048, draw))


def test_the_entries_are_those_with_the_largest_weight_times_gradient(model):
    ids = a_task(0)
    plain = copy.deepcopy(model)
    loss(plain, ids).backward()
    setup = Shira(shira_r=4).setup(model, settings())

    told = learn(setup, ids)

    carried = total = 0.0
    for name, places in setup.buffers.items():
        weight = plain.get_submodule(name.removeprefix("base_model.model.").removesuffix(".places")).weight
        scores = (weight.detach() * weight.grad).abs().flatten()
        places = places.long()
        assert len(places.unique()) == 4 * sum(weight.shape)
        rest = torch.ones(len(scores), dtype=torch.bool).index_fill(0, places, False)
        assert scores[places].min() > 0.999 * scores[rest].max()
        carried, total = carried + scores[places].sum(), total + scores.sum()
    assert told["sensitivity"] == pytest.approx(float(carried / total), abs=0.01)
    assert told["sensitivity"] > 2 * told["density"]
    assert all(p.grad is None for p in setup.model.parameters())
    assert {n for n, p in setup.model.named_parameters() if p.requires_grad} == set(setup.parameters)


def test_a_step_is_peft_s_own(model):
    """Loss and gradients as in PEFT's forward pass, which corrects a copy of each weight."""
    setup = Shira(shira_r=4).setup(model, settings())
    ids = a_task(0)
    train(setup, ids, 2)
    ours = loss(setup.model, ids)
    ours.backward()
    gradients = {name: p.grad.clone() for name, p in setup.parameters.items()}
    setup.optimizer.zero_grad()

    for layer in [module for module in setup.model.modules() if hasattr(module, "shira_indices")]:
        inputs, places = layer.base_layer.weight.shape[1], layer.places.long()
        layer.shira_indices["default"] = torch.stack([places // inputs, places % inputs]).int()
        del layer.forward
    theirs = loss(setup.model, ids)
    theirs.backward()

    torch.testing.assert_close(ours, theirs)
    for name, parameter in setup.parameters.items():
        torch.testing.assert_close(gradients[name], parameter.grad)


def test_training_moves_the_chosen_entries_and_no_others(model, tmp_path):
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    setup = Shira(shira_r=2, block_size=2).setup(model, settings())
    learn(setup, a_task(0))
    train(setup, a_task(0), 3)

    setup.export(tmp_path / "out", None)
    merged = dict(setup.model.merge_and_unload().named_parameters())

    assert sparse.is_sparse(tmp_path / "out")
    for name, weight in before.items():
        changed = (merged[name] != weight).flatten()
        chosen = setup.buffers.get(f"base_model.model.{name.removesuffix('.weight')}.places")
        if chosen is None:
            assert not changed.any()
            continue
        outside = torch.ones(len(changed), dtype=torch.bool).index_fill(0, chosen.long(), False)
        assert not changed[outside].any() and changed[chosen.long()].float().mean() > 0.9
        squares = (~outside).view(weight.shape).unfold(0, 2, 2).unfold(1, 2, 2).sum((2, 3))
        assert set(squares.unique().tolist()) == {0, 4}


def test_a_checkpoint_holds_the_places(model, model_folder):
    setup = Shira(shira_r=4).setup(model, settings())
    learn(setup, a_task(0))
    train(setup, a_task(0), 2)
    held = copy.deepcopy(gather(setup))
    resumed = Shira(shira_r=4).setup(base_model(Shira(), model_folder), settings())

    restore(resumed, held)
    for one in (setup, resumed):
        train(one, a_task(1), 1)

    for name, places in setup.buffers.items():
        assert torch.equal(resumed.buffers[name], places)
    for name, parameter in setup.parameters.items():
        assert torch.equal(resumed.parameters[name], parameter)


def state_of(setup):
    """Value and first moment of every entry that trains, by map and place."""
    found = {}
    for name, parameter in setup.parameters.items():
        places = setup.buffers[name.replace(".shira_weight.default", ".places")].tolist()
        moments = setup.optimizer.state.get(parameter, {}).get("exp_avg", torch.zeros_like(parameter))
        found |= {
            (name, place): (value, moment)
            for place, value, moment in zip(places, parameter.tolist(), moments.tolist(), strict=True)
        }
    return found


def parked_of(setup):
    """Values of entries that no longer train."""
    found = {}
    for name in setup.parameters:
        stem = name.removesuffix(".shira_weight.default")
        places, values = (setup.buffers[f"{stem}.parked_{part}"].tolist() for part in ("places", "values"))
        assert places == sorted(places)
        found |= {(name, place): value for place, value in zip(places, values, strict=True) if place >= 0}
    return found


def test_entries_that_are_chosen_anew_keep_value_and_moments_and_parked_ones_come_back(model):
    setup = Shira(shira_r=4, reselect_every=2, reselections=3).setup(model, settings())
    first, other = a_task(0), a_task(1)
    learn(setup, first)
    train(setup, first, 2)
    before = state_of(setup)

    told = learn(setup, other)  # other rows: other entries

    now, parked = state_of(setup), parked_of(setup)
    kept, gone = before.keys() & now.keys(), before.keys() - now.keys()
    assert len(now) == len(before) and gone and kept and told["kept"] == pytest.approx(len(kept) / len(now), abs=1e-3)
    assert all(now[key] == before[key] for key in kept)
    assert all(now[key] == (0.0, 0.0) for key in now.keys() - before.keys())
    assert parked == {key: before[key][0] for key in gone if before[key][0]}

    train(setup, other, 2)
    trained, told = state_of(setup), learn(setup, first)  # back to the first rows

    again = state_of(setup)
    back = again.keys() & parked.keys()
    assert back and told["taken_back"] == pytest.approx(len(back) / len(again), abs=1e-3)
    assert all(again[key] == (parked[key], 0.0) for key in back)
    assert not parked_of(setup).keys() & again.keys()
    left = {key: trained[key][0] for key in trained.keys() - again.keys() if trained[key][0]}
    assert parked_of(setup) == {key: value for key, value in parked.items() if key not in back} | left


def test_when_entries_are_chosen_anew(model):
    learner = Shira(shira_r=2, reselect_every=5, reselections=2).setup(model, settings()).learner

    assert [step for step in range(30) if learner.is_due(step)] == [0, 5, 10]


def test_a_checkpoint_holds_parked_entries(model, model_folder):
    method = Shira(shira_r=4, reselect_every=2)
    setup = method.setup(model, settings())
    for ids in (a_task(0), a_task(1)):
        learn(setup, ids)
        train(setup, ids, 2)
    held = copy.deepcopy(gather(setup))
    resumed = method.setup(base_model(method, model_folder), settings())

    restore(resumed, held)
    for one in (setup, resumed):
        learn(one, a_task(0))
        train(one, a_task(0), 1)

    assert parked_of(resumed) == parked_of(setup) and state_of(resumed) == state_of(setup)


def test_what_cannot_be_is_refused_with_the_number_that_can(model):
    shape = ModelShape.from_config(model.config.to_dict())

    assert Shira().refuses(techniques(), shape) is None
    assert "q_proj has fewer than r (in + out) entries: set method.shira_r to 32 or less" in Shira(shira_r=64).refuses(
        techniques(), shape
    )
    assert "do not divide" in Shira(shira_r=8, block_size=16).refuses(techniques(), shape)
    assert "float16" not in (Shira(mask="random").refuses(techniques(dtype="float16"), shape) or "")
    assert "fp16" in Shira().refuses(techniques(dtype="float16"), shape)
    assert "not chosen anew" in Shira(mask="random", reselect_every=5).refuses(techniques(), shape)
    assert "ZeRO" in Shira().refuses(techniques(zero_stage=2), shape)
    for optim in ("adamw_bnb_8bit", "lion_8bit", "ademamix", "schedule_free_adamw"):  # moments do not follow entries
        refusal = Shira(reselect_every=5).refuses(techniques(optim=optim), shape)
        assert refusal == (
            f"entries chosen anew take their optimizer state along, which {optim} keeps in another form: set"
            " train.optim: auto, or remove method.reselect_every"
        )
        assert Shira().refuses(techniques(optim=optim), shape) is None
    for optim in ("adamw_torch", "paged_adamw_32bit", "sgd", "muon", "rmsprop", "adafactor"):
        assert Shira(reselect_every=5).refuses(techniques(optim=optim), shape) is None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_predicted_memory_is_that_of_a_traced_step(dtype):
    """Beside the sums of the first step's gradients, which the tracer does not see."""
    asked = settings(techniques=techniques(dtype=dtype, packing=False, max_length=200))
    shape, method = ModelShape.from_config(LLAMA), Shira(mask="random")

    traced = trace.trace(LLAMA, method, asked, trace.Lengths((200,), (100,)))
    told = method.estimate(workload(shape, length=200), CPU, NODE, asked.techniques)

    assert told.memory.tensors_bytes == pytest.approx(traced.peak_bytes, rel=0.1)
    looks = Shira().estimate(workload(shape, length=200), CPU, NODE, asked.techniques)
    elements = shape.num_layers * sum(one.inputs * one.outputs for one in shape.linears)
    size = 4 if dtype == "float32" else 2
    assert looks.memory.tensors_bytes - told.memory.tensors_bytes == size * elements


def test_layers_and_maps_can_be_chosen(model):
    shape = ModelShape.from_config(model.config.to_dict())
    method = Shira(shira_r=2, layers_to_transform=[1], shira_target_modules=["q_proj", "down_proj"])

    setup = method.setup(model, settings())

    trained = {name.split("base_model.model.model.")[1].split(".shira")[0] for name in setup.parameters}
    assert trained == {"layers.1.self_attn.q_proj", "layers.1.mlp.down_proj"}
    told = method.estimate(workload(shape), CPU, NODE, techniques())
    assert told.num_trainable_parameters == sum(p.numel() for p in setup.parameters.values())
    assert "is no linear map" in Shira(shira_target_modules=["c_attn"]).refuses(techniques(), shape)


def test_four_sparse_experts_merge_to_a_better_one_than_four_of_lora(model_folder, tmp_path):
    """The merge of arXiv 2507.07140 against LoRA's average in delta space, each task's loss on the one adapter."""
    from peft import PeftModel

    tasks = [a_task(seed) for seed in range(4)]

    def experts(method, name):
        for number, ids in enumerate(tasks):
            setup = method.setup(base_model(method, model_folder), settings())
            if setup.learner:
                learn(setup, ids)
            train(setup, ids, 30)
            setup.export(tmp_path / f"{name}-{number}", None)
        return [tmp_path / f"{name}-{number}" for number in range(4)]

    def mean_loss(folder):
        model = PeftModel.from_pretrained(base_model(Lora(), model_folder), str(folder)).eval()
        with torch.no_grad():
            return sum(float(loss(model, ids)) for ids in tasks) / len(tasks)

    sparse.merge(experts(Shira(shira_r=4), "shira"), tmp_path / "sparse")
    generate(
        [Adapter(folder) for folder in experts(Lora(lora_r=4), "lora")], [0.25] * 4, tmp_path / "low", Recipe("cat")
    )

    base = sum(float(loss(base_model(Lora(), model_folder), ids).detach()) for ids in tasks) / len(tasks)
    assert mean_loss(tmp_path / "sparse") < mean_loss(tmp_path / "low") < base
