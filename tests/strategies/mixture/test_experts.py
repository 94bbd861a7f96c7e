"""Experts of MLPs: what they compute against LoRA, means and a loop over all experts, and who has gradients."""

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from strategies.mixture.experts import MAPS, Routes, attach, weighted_mean
from strategies.mixture.method import MixLora
from strategies.step.step import Update, update
from strategies.techniques import checkpointing
from strategies.techniques.precision import autocast, gradient_scaler
from tests.strategies.test_contract import SAMPLES, add_gradients, settings, techniques

IDS = torch.arange(40).view(2, 20)
PLAIN = MixLora(num_experts=4, lora_r=4, adapt_attention=False, router_aux_loss_coef=0.0)


@pytest.fixture
def base(model_folder):
    return AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32, attn_implementation="sdpa")


def shaken(setup, size=0.05, seed=0):
    """Every trained weight away from its start, or nothing of a pair would be seen."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in setup.parameters.values():
            parameter.add_(size * torch.randn(parameter.shape, generator=draw))
    return setup


def apart(one, other):
    """The largest difference over the largest number."""
    return float((one - other).detach().abs().max() / other.detach().abs().max())


def mlps(model):
    return [layer.mlp for layer in model.model.layers]


def naive(mlp, x, setup_scale):
    """sum_e w_e FFN_e(x) with whole weights of every expert, those that were not chosen times 0."""
    mixture = mlp.mixture
    probabilities = F.linear(x.flatten(0, -2), mixture.router).softmax(-1)
    largest, chosen = probabilities.topk(mixture.sizes.top_k)
    weights = torch.zeros_like(probabilities).scatter(1, chosen, largest / largest.sum(-1, keepdim=True))
    total = 0.0
    for expert in range(mixture.sizes.num_experts):
        gate, up, down = (
            getattr(mlp, name).weight + setup_scale * pairs.b_EOR[expert] @ pairs.a_ERI[expert]
            for name, pairs in zip(MAPS, (mixture.gate, mixture.up, mixture.down), strict=True)
        )
        y = F.linear(mlp.act_fn(F.linear(x, gate)) * F.linear(x, up), down)
        total = total + weights[:, expert].view(*x.shape[:-1], 1) * y
    return total


@pytest.mark.parametrize("top_k", [2, 3, 4])
def test_the_efficient_path_is_a_loop_over_all_experts_in_values_and_gradients(base, top_k):
    shaken(dataclasses.replace(PLAIN, top_k=top_k).setup(base, settings()))
    mlp, x = mlps(base)[0], torch.randn(3, 7, base.config.hidden_size)
    toward = torch.randn_like(x)
    weights = [parameter for parameter in mlp.parameters() if parameter.requires_grad]

    fast, slow = mlp(x.requires_grad_()), naive(mlp, x, 4.0)

    assert apart(fast, slow) < 1e-5
    found = torch.autograd.grad((fast * toward).sum(), [x, *weights], retain_graph=True)
    expected = torch.autograd.grad((slow * toward).sum(), [x, *weights])
    assert len(weights) == 7 and all(one.abs().max() > 0 for one in expected)
    assert all(apart(one, other) < 1e-5 for one, other in zip(found, expected, strict=True))


def test_equal_experts_are_one_lora_whatever_the_router(base):
    twin, setup = copy.deepcopy(base), PLAIN.setup(base, settings())
    lora = get_peft_model(
        twin, LoraConfig(r=4, lora_alpha=16, target_modules=[*MAPS], init_lora_weights=False, task_type="CAUSAL_LM")
    )
    layers = zip(mlps(base), mlps(lora.get_base_model()), strict=True)
    with torch.no_grad():
        for mlp, other in layers:
            mlp.mixture.router.normal_(0.0, 3.0)
            for name, pairs in zip(MAPS, (mlp.mixture.gate, mlp.mixture.up, mlp.mixture.down), strict=True):
                map_of_lora = getattr(other, name)
                pairs.a_ERI.copy_(map_of_lora.lora_A["default"].weight.expand_as(pairs.a_ERI))
                pairs.b_EOR.copy_(map_of_lora.lora_B["default"].weight.expand_as(pairs.b_EOR))
        lora.eval(), setup.model.eval()

        assert not torch.allclose(lora(IDS).logits, copy.deepcopy(lora).unload()(IDS).logits, atol=1e-2)
        assert torch.allclose(setup.model(IDS).logits, lora(IDS).logits, rtol=0, atol=1e-5)


def test_all_experts_behind_a_router_that_knows_nothing_are_their_mean(base):
    shaken(dataclasses.replace(PLAIN, top_k=4).setup(base, settings()))
    mlp, x = mlps(base)[1], torch.randn(11, base.config.hidden_size)
    alone = []
    with torch.no_grad():
        mlp.mixture.router.zero_()
        found = mlp(x)
        for expert in range(4):
            one = copy.deepcopy(mlp)
            for pairs in (one.mixture.gate, one.mixture.up, one.mixture.down):
                pairs.a_ERI.copy_(pairs.a_ERI[expert].clone().expand_as(pairs.a_ERI))
                pairs.b_EOR.copy_(pairs.b_EOR[expert].clone().expand_as(pairs.b_EOR))
            alone.append(one(x))

        assert not torch.allclose(alone[0], alone[1], atol=1e-3)
        assert torch.allclose(found, torch.stack(alone).mean(dim=0), rtol=0, atol=1e-5)


def test_only_the_experts_that_a_token_chose_have_gradients(base):
    setup = shaken(PLAIN.setup(base, settings()), size=0.5)
    mlp, x = mlps(base)[0], torch.randn(1, base.config.hidden_size)

    mlp(x).square().sum().backward()

    chosen = set(mlp.mixture.choose(x).chosen_NK.flatten().tolist())
    assert len(chosen) == 2 and mlp.mixture.router.grad.abs().max() > 0
    for pairs in (mlp.mixture.gate, mlp.mixture.up, mlp.mixture.down):
        for weight in (pairs.a_ERI, pairs.b_EOR):
            assert {expert for expert in range(4) if weight.grad[expert].any()} == chosen
    assert all(parameter.grad is None for parameter in base.parameters() if not parameter.requires_grad)
    assert set(setup.parameters) == {name for name, one in base.named_parameters() if one.requires_grad}


def test_a_pair_of_attention_is_lora(base):
    twin = copy.deepcopy(base)
    setup = shaken(MixLora(num_experts=2, lora_r=4).setup(base, settings()))
    names = ["q_proj", "k_proj", "v_proj", "o_proj"]
    lora = get_peft_model(
        twin, LoraConfig(r=4, lora_alpha=16, target_modules=names, init_lora_weights=False, task_type="CAUSAL_LM")
    )
    x = torch.randn(5, base.config.hidden_size)
    with torch.no_grad():
        for name in names:
            own = getattr(base.model.layers[1].self_attn, name)
            other = getattr(lora.get_base_model().model.layers[1].self_attn, name)
            other.lora_A["default"].weight.copy_(own.pair.a_RI)
            other.lora_B["default"].weight.copy_(own.pair.b_OR)
            assert torch.allclose(own(x), other(x), rtol=0, atol=1e-5) and not torch.equal(
                own(x), F.linear(x, own.weight)
            )
    assert sum(".pair." in name for name in setup.parameters) == 2 * 4 * 2


def test_equal_rows_have_themselves_as_their_mean_bit_by_bit():
    rows = torch.randn(50, 1, 9).expand(50, 5, 9)
    weights = torch.rand(50, 5).softmax(-1)

    assert torch.equal(weighted_mean(rows, weights), rows[:, 0])
    uneven = torch.randn(50, 5, 9)
    assert torch.allclose(weighted_mean(uneven, weights), (uneven * weights[..., None]).sum(1), atol=1e-6)


def test_rows_are_sorted_by_expert_and_come_back():
    probabilities, x = torch.rand(30, 5).softmax(-1), torch.randn(30, 3)

    routes = Routes.of(probabilities, 2)

    rows = routes.to_experts(x)
    starts = torch.tensor([0, *routes.sizes]).cumsum(0)
    for expert in range(5):
        expected = x[(routes.chosen_NK == expert).any(dim=1)]
        assert torch.equal(rows[starts[expert] : starts[expert + 1]], expected)
    assert torch.equal(routes.to_tokens(rows), x[:, None].expand(30, 2, 3))
    assert torch.equal(routes.summed(rows), x + x)
    assert torch.allclose(routes.weights_NK.sum(-1), torch.ones(30))


def test_the_router_decides_in_fp32_under_autocast(base):
    shaken(PLAIN.setup(base, settings()))
    mlp, x = mlps(base)[0], torch.randn(40, base.config.hidden_size)

    with autocast("cpu", "bfloat16"), torch.no_grad():
        routes = mlp.mixture.choose(x)

    assert torch.equal(routes.weights_NK, mlp.mixture.choose(x).weights_NK) and routes.weights_NK.dtype == torch.float32
    with autocast("cpu", "bfloat16"), torch.no_grad():
        near = mlp(x)
    assert 1e-4 < apart(near.float(), mlp(x)) < 0.02


def test_weights_in_16_bits_compute_without_autocast(base):
    shaken(PLAIN.setup(base, settings()), size=0.01)
    expected = base(IDS).logits
    for name, parameter in base.named_parameters():
        if ".mixture." not in name:
            parameter.data = parameter.data.bfloat16()

    found = base(IDS).logits

    assert found.dtype == torch.bfloat16
    assert 1e-4 < apart(found.float(), expected) < 0.05


def test_generation_with_a_cache_writes_what_whole_passes_do(base):
    model = shaken(PLAIN.setup(base, settings()), size=0.2).model.eval()
    prompt = torch.arange(3, 11)[None]

    written = model.generate(input_ids=prompt, max_new_tokens=12, do_sample=False, use_cache=True)

    ids = prompt
    with torch.no_grad():
        for _ in range(written.shape[1] - prompt.shape[1]):
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(written, ids) and written.shape[1] > prompt.shape[1]


def test_activations_that_are_computed_again_give_the_same_step(base):
    method = dataclasses.replace(PLAIN, router_aux_loss_coef=0.5)
    plain, again = method.setup(copy.deepcopy(base), settings()), method.setup(base, settings())
    checkpointing.enable(again.model)
    for setup in (shaken(plain), shaken(again)):
        setup.model.train()

    found, expected = add_gradients(again, *SAMPLES), add_gradients(plain, *SAMPLES)

    assert again.extra_loss.take() == plain.extra_loss.take()
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_a_step_leaves_moments_for_every_weight_and_moves_the_router(base):
    setup = shaken(MixLora(num_experts=4).setup(base, settings()))
    setup.model.train()
    before = {name: parameter.detach().clone() for name, parameter in setup.parameters.items()}
    add_gradients(setup, *SAMPLES)

    update(setup, gradient_scaler("cpu", "float32"), Update(1.0, 1.0))

    moved = {name for name, parameter in setup.parameters.items() if not torch.equal(parameter, before[name])}
    assert {name for name in moved if name.endswith("router")} == {name for name in before if name.endswith("router")}
    assert moved == set(before)


def config(**changes):
    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    return LlamaConfig(**sizes, num_attention_heads=2, **changes)


def test_an_mlp_with_biases_is_corrected_as_well():
    model = LlamaForCausalLM(config(mlp_bias=True))
    torch.nn.init.normal_(model.model.layers[0].mlp.down_proj.bias)
    shaken(PLAIN.setup(model, settings()))
    mlp, x = mlps(model)[0], torch.randn(9, 16)

    biases = [getattr(mlp, name).bias for name in MAPS]
    expected = naive_with_biases(mlp, x, biases)

    assert torch.allclose(mlp(x), expected, atol=1e-5)


def naive_with_biases(mlp, x, biases):
    mixture, total = mlp.mixture, 0.0
    routes = mixture.choose(x)
    for k in range(2):
        rows = []
        for token in range(len(x)):
            expert = routes.chosen_NK[token, k]
            gate, up, down = (
                getattr(mlp, name).weight + 4.0 * pairs.b_EOR[expert] @ pairs.a_ERI[expert]
                for name, pairs in zip(MAPS, (mixture.gate, mixture.up, mixture.down), strict=True)
            )
            h = mlp.act_fn(F.linear(x[token], gate, biases[0])) * F.linear(x[token], up, biases[1])
            rows.append(F.linear(h, down, biases[2]))
        total = total + routes.weights_NK[:, k : k + 1] * torch.stack(rows)
    return total


def test_an_mlp_of_another_form_is_refused():
    model = LlamaForCausalLM(config())
    mlp = model.model.layers[0].mlp
    sizes = dataclasses.replace(PLAIN)._config().sizes
    mlp.up_proj = torch.nn.Sequential(mlp.up_proj)
    with pytest.raises(ValueError, match=r"layer 0: up_proj \(Sequential\): experts correct plain linear maps"):
        attach(model, sizes)
    mlp.up_proj = mlp.up_proj[0]
    forward = type(mlp).forward
    mlp.forward = lambda x: 2 * forward(mlp, x)
    with pytest.raises(ValueError, match="LlamaMLP is not down"):
        attach(model, sizes)
    del mlp.gate_proj
    with pytest.raises(ValueError, match="layer 0 has 0 MLPs of gate_proj, up_proj, down_proj"):
        attach(model, sizes)


@pytest.mark.parametrize("changes", [{}, {"dtype": "bfloat16"}])
def test_setup_gives_the_router_its_range_and_every_b_zero(base, changes):
    setup = MixLora(router_init_range=0.5).setup(base, settings(techniques=techniques(**changes)))

    for name, parameter in setup.parameters.items():
        own = name.rpartition(".")[2]
        assert parameter.dtype == torch.float32
        if own == "router":
            assert parameter.detach().std() == pytest.approx(0.5, rel=0.2)
        else:
            assert parameter.any() == own.startswith("a_")
